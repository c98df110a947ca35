"""SIGINT, SIGTERM and SIGHUP: they ask for the end, and do no harm once it has come."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
# An object of a module is taken down by Python's own end, after that has given signals their default back.
LATE = """
import os, sys
from command.stop import Stop

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=int(sys.argv[1])):
        kill(pid, number)

late = Late()
stop = Stop()
os.kill(os.getpid(), int(sys.argv[1]))
print(stop.wanted, stop.number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_that_comes_when_all_is_done_changes_nothing(number: signal.Signals) -> None:
    """As when the process that was to be traced ends, and the user stops the recorder in the same moment."""
    done = subprocess.run(
        [sys.executable, "-c", LATE, str(int(number))], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"True {int(number)}\n", "")


def test_who_was_told_to_outlive_the_terminal_does() -> None:
    """By nohup, which ignores SIGHUP: it asks for nothing then, and Ctrl-C still does."""
    command = f"trap '' HUP; exec {sys.executable} -c \"$1\" {int(signal.SIGHUP)}"
    done = subprocess.run(["sh", "-c", command, "sh", LATE], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False 0\n", "")
