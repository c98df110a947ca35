"""The streams of bench.analysis as figures of the table, and a recording of detail full from disk to verdicts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.analysis import EVENTS, STREAMS
from bench.command import ROOT
from bench.table import Figure


def _run(*words: str) -> list[str]:
    own = [sys.executable, "-m", "bench.analysis", *words]
    return subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout.split()


def figures() -> Iterator[Figure]:
    """Yield events per second on one core, and the peak of the memory, for each stream."""
    size = f"{EVENTS // 1_000_000} M events"
    for name in STREAMS:
        rate, peak = map(float, _run(str(EVENTS), name)[-2:])
        yield Figure("analysis", f"{name}, {size}", rate, "M/s", 2.0, at_least=True)
        yield Figure("analysis", f"{name}, peak of the process's memory", peak, "MiB", 1024.0)
    with tempfile.TemporaryDirectory(prefix="kvmreq-bench-") as scratch:
        path = str(Path(scratch) / "full")
        _run("write", path)
        # By the clock, with a thread that reads ahead: whatever else runs can only slow it.
        *_, ended, _seconds, full_rate, full_peak = max(
            (_run("judge", path) for _ in range(3)), key=lambda run: float(run[-2])
        )
    yield Figure("analysis", f"detail full, from disk, {size}, best of 3", float(full_rate), "M/s", 2.0, at_least=True)
    yield Figure("analysis", f"  {ended} requests; peak of its memory", float(full_peak), "MiB", 1536.0)
