"""The benchmarks: ``python -m bench [PART ...]``. Prints one table; exits with 1 if a bound was missed."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from bench.table import heading

_PARTS = {
    "overhead": "bench.overhead",
    "tools": "bench.tools",
    "drain": "bench.drain",
    "full": "bench.sustain",
    "analysis": "bench.judging",
    "disk": "bench.disk",
    "attach": "bench.attach",
    "protobuf": "bench.protobuf",
}


def main() -> int:
    """Measure the parts that were asked for, all of them by default."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("part", nargs="*", metavar="PART", help=f"of {', '.join(_PARTS)} (default: all)")
    parts = parser.parse_args().part or list(_PARTS)
    unknown = [part for part in parts if part not in _PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(_PARTS)}")
    print(heading(), flush=True)
    missed = 0
    for part in parts:
        for figure in import_module(_PARTS[part]).figures():
            print(figure.line(), flush=True)
            missed += figure.kept is False
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
