"""The real command, started as a user starts it: `kvmreq record` in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_STOP_S = 60


@dataclass(frozen=True)
class Live:
    """A recording that has begun: what it took from the start of the process to its line on stderr."""

    began_ns: int
    took_s: float


@contextmanager
def recording(path: Path, *words: str) -> Iterator[Live]:
    """Record into ``path`` meanwhile; the body runs once the command says that it records."""
    began = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    process = subprocess.Popen(
        [sys.executable, "-m", "command", "record", "-o", str(path), *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if "recording into" in line:
                break
        else:
            raise RuntimeError(f"kvmreq record failed: {''.join(said)}")
        took = (time.clock_gettime_ns(time.CLOCK_MONOTONIC) - began) / 1e9
        yield Live(began, took)
    finally:
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=_STOP_S)
        if process.returncode:
            raise RuntimeError(f"kvmreq record ended with status {process.returncode}: {rest}")
