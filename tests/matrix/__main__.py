"""Run a command in stock Debian kernels: ``python3 -m tests.matrix KERNEL... -- COMMAND``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.matrix import HOST_PACKAGES, MatrixError, cache, debian13, kernels, missing_packages
from tests.matrix.boot import TIMED_OUT, Machine, Outcome, virtme_ng

EPILOG = """\
The command finds $MATRIX_OUT, a folder whose files are left in OUT/KERNEL on the host, and $MATRIX_KERNEL.
Exit status: 0 the command succeeded in every kernel, 1 it did not, 2 usage.

examples:
  python3 -m tests.matrix 6.1 -- uname -a
  python3 -m tests.matrix 6.12 newest --root debian13 -- python3 -m pytest tests/live
"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; what follows ``--`` is the command."""
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        "python3 -m tests.matrix",
        usage="%(prog)s [options] [KERNEL ...] -- COMMAND ...",
        description="Run a command in stock Debian kernels. "
        f"KERNEL: {', '.join(kernels.SERIES)} or a number such as 7.2",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("kernels", nargs="*", metavar="KERNEL", help=f"by default {' '.join(kernels.DEFAULT)}")
    add("--root", default="/", help="user space: debian13, or a folder (by default this machine's)")
    add("--out", type=Path, help="where results are left (by default OUT is out in the cache)")
    add("--limit", type=int, default=600, metavar="S", help="seconds for the command in each kernel")
    add("--packages", action="store_true", help="print the Debian packages that this needs, and end")
    arguments = parser.parse_args(words[:split])
    arguments.command = list(words[split + 1 :])
    if not arguments.command and not arguments.packages:
        parser.error("no command: it follows --")
    return arguments


@dataclass(frozen=True)
class Row:
    """What is printed of one kernel."""

    name: str
    release: str
    status: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the command ran and succeeded."""
        return self.status == "0"

    def __str__(self) -> str:
        return f"{self.name:<11} {self.release:<22} {self.status:<12} {self.seconds:6.0f} s"


def say(text: str) -> None:
    """Show progress to a person."""
    if sys.stderr.isatty():
        sys.stderr.write(text)
        sys.stderr.flush()


def run(name: str, machine: Machine, command: Sequence[str], out: Path) -> Row:
    """Run the command in one kernel, and print what a person needs of it if it failed."""
    started = time.monotonic()
    release = "-"
    try:
        say(f"== {name}: fetching\n")
        kernel = kernels.fetch(name)
        release = kernel.release
        say(f"== {name}: booting {kernel.release} ({kernel.version})\n")
        outcome = machine.run(kernel, command, out / name, say)
    except MatrixError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return Row(name, release, "not run" if release == "-" else "did not end", time.monotonic() - started)
    if outcome.status and not sys.stderr.isatty():
        print(f"{name}: {outcome.output}", file=sys.stderr)
    return Row(name, release, _status(outcome), outcome.seconds)


def _status(outcome: Outcome) -> str:
    return "timed out" if outcome.status == TIMED_OUT else str(outcome.status)


def _end(*_: object) -> None:
    sys.exit(143)  # through the finally blocks: they end QEMU


def main(words: Sequence[str]) -> int:
    """Run the command in every kernel and print a line for each."""
    signal.signal(signal.SIGTERM, _end)
    arguments = parse(words)
    if arguments.packages:
        print(" ".join(HOST_PACKAGES))
        return 0
    try:
        if missing := missing_packages():
            raise MatrixError(f"Debian packages are missing: apt-get install {' '.join(missing)}")
        virtme_ng()
        names = arguments.kernels or list(kernels.DEFAULT)
        for name in names:
            kernels.series(name)
        root = debian13.root(say) if arguments.root == "debian13" else Path(arguments.root).resolve()
    except MatrixError as error:
        print(error, file=sys.stderr)
        return 1
    machine = Machine(root=root, limit_s=arguments.limit, cwd=Path.cwd())
    out = arguments.out or cache() / "out"
    rows = []
    for name in names:
        rows.append(run(name, machine, arguments.command, out))
        print(rows[-1], flush=True)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
