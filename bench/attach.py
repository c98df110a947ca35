"""How long `kvmreq record` takes from the start of its process until it is live."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.command import ROOT, recording
from bench.guest import READY
from bench.table import Figure
from probes.requests import TRIPLE_FAULT
from probes.schema import Kind
from tracer.recording import Recording

_TIMES = 5
_BIT = 1 << TRIPLE_FAULT


def first_raise_ns(path: Path) -> int:
    """Return when the first request rose that a recording has seen to rise."""
    for segment in Recording.open(path).segments():
        if segment is None:
            continue
        events = segment.events
        rose = ((events["requests"] & ~events["before"] & _BIT) != 0) & (events["kind"] != Kind.VCPU_NEW)
        if rose.any():
            return int(events["time_ns"][rose].min())
    raise RuntimeError(f"{path} has seen no request rise")


def figures() -> Iterator[Figure]:
    """Yield the time until the command says so, and until the first request of a running guest was caught."""
    said, caught, cpu = [], [], []
    with subprocess.Popen(
        [sys.executable, "-m", "bench.guest", "shutdowns"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as guest:
        try:
            assert guest.stdout is not None
            if guest.stdout.readline().strip() != READY:
                raise RuntimeError("the guest that is shut down every few milliseconds did not start")
            with tempfile.TemporaryDirectory(prefix="kvmreq-bench-") as scratch:
                for number in range(_TIMES):
                    path = Path(scratch) / str(number)
                    with recording(path) as live:
                        pass
                    said.append(live.took_s)
                    cpu.append(live.cpu_s)
                    caught.append((first_raise_ns(path) - live.began_ns) / 1e9)
        finally:
            guest.kill()
    yield Figure("attach", "start of the process to 'recording into'", statistics.median(said), "s", 1.0)
    yield Figure("attach", "start of the process to the first request caught", statistics.median(caught), "s", 1.0)
    yield Figure("attach", "CPU time that it takes, whatever else runs", statistics.median(cpu), "s")
