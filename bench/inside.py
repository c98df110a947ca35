"""The part ``tools`` in an emulated machine, for the tools that do not work on the kernel at hand.

    python3 -m tests.matrix 6.1 -- python3 -m bench.inside

There an exit is emulated, so that only the ratios beside one another say something. Imports no pandas.
"""

from __future__ import annotations

import sys

from bench import tools
from bench.table import heading

_SCALE = 0.05


def main() -> int:
    """Print the table line by line, what takes longest last."""
    print(heading(), flush=True)
    ways = sorted(tools.WAYS, key=lambda way: (way.slow, way.program is None))
    for way, known in tools.tries(ways, 1, _SCALE):
        for line in tools.told(way, known):
            print(line.line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
