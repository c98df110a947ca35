"""The streams of bench.analysis as figures of the table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from bench.analysis import STREAMS
from bench.command import ROOT
from bench.table import Figure

_EVENTS = 10_000_000


def figures() -> Iterator[Figure]:
    """Yield events per second on one core, and the peak of the memory, for each stream."""
    for name in STREAMS:
        told = subprocess.run(
            [sys.executable, "-m", "bench.analysis", str(_EVENTS), name],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        rate, peak = (float(word) for word in told.split()[-2:])
        yield Figure("analysis", f"{name}, {_EVENTS // 1_000_000} M events", rate, "M/s", 2.0, at_least=True)
        yield Figure("analysis", f"{name}, peak of the process's memory", peak, "MiB", 1024.0)
