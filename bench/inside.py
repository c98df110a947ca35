"""The part ``tools`` in an emulated machine, for the tools that do not work on the kernel at hand.

    python3 -m tests.matrix 6.1 -- python3 -m bench.inside

There an exit is emulated, so that only the ratios beside one another say something. Imports no pandas.
"""

from __future__ import annotations

import sys
import time

from bench import tools
from bench.table import heading

_STARTS = 1
_SCALE = 0.05


def main() -> int:
    """Print the table; on stderr how far it has come."""
    print(heading(), flush=True)

    def say(name: str) -> None:
        print(f"{time.monotonic():7.1f} {name}", file=sys.stderr, flush=True)

    for figure in tools.figures(_STARTS, _SCALE, say):
        print(figure.line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
