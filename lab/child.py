"""Child processes of the lab: most run a scenario, with ``python3 -m lab``.

Started afresh and not forked: the caller may have threads. A child says READY or HELD where it stands still.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lab.kvm import LabError

READY = "ready"  # with --wait: has begun, and waits for the end of its standard input
HELD = "held"  # with --hold: stands still in the middle of its scenario


@contextlib.contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``python3 ARGUMENTS``, which finds the lab; on leaving, the child is gone."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # does nothing to one that has ended


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    """Wait until the child says ``line``."""
    assert process.stdout
    if process.stdout.readline().strip() != line:
        fail(process)


def fail(process: subprocess.Popen[str]) -> None:
    """Raise what the child said about its failure."""
    process.kill()
    _, errors = process.communicate()
    why = errors.strip().rpartition("\n")[2] or f"status {process.returncode}"
    raise LabError(f"a process of the lab failed: {why}")
