"""The end of a command that fails: one line and status 1, whatever failed, and in whichever thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
HERE = """
import signal, sys, threading
from command.failure import one_line
from command.stop import Stop
from tracer.errors import BadRecording

def fail():
    {fails}

def wait():
    signal.pause()

with one_line():
    {does}
"""
ELSEWHERE = "threading.Thread(target=fail).start(); wait()"
FINISHES = "stop = Stop(); thread = threading.Thread(target=fail); thread.start(); thread.join(); assert stop.wanted"


@pytest.mark.parametrize("before", ["", "trap '' INT; "], ids=["", "background"])
@pytest.mark.parametrize("does", ["fail()", ELSEWHERE, FINISHES])
@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("raise BadRecording('it is\\n full', hint='make room')", "it is full (make room)"),
        ("raise MemoryError", "there is no memory left"),
        ("[][1]", "IndexError at <string>:8: list index out of range (this was not foreseen"),
        ("open('/nowhere')", "/nowhere: No such file or directory"),
        ("raise SystemError", "SystemError at <string>:8: "),
    ],
)
def test_any_exception_of_any_thread_is_one_line(does: str, fails: str, says: str, before: str) -> None:
    """What waits is woken, also in the background; what finishes its work has failed all the same."""
    code = HERE.format(does=does, fails=fails)
    done = subprocess.run(
        ["sh", "-c", f'{before}exec "$0" -c "$1"', sys.executable, code],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"kvmreq: {says}")
    assert done.stderr.count("\n") == 1
