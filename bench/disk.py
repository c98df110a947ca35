"""How many bytes an event has on disk: in a live recording, and in recordings of made-up streams."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.analysis import STREAMS
from bench.busy import busy
from bench.command import ROOT
from bench.table import Figure
from tracer.loss import Loss
from tracer.recorder import Recorder, Wish
from tracer.recording import Writer

_EXITS = 1_000_000
_EVENTS = 2_000_000
_BOUND = 12.0


def _live(path: Path) -> tuple[int, int]:
    recorder = Recorder(path, Wish())
    recorder.start()
    try:
        guest = subprocess.Popen([sys.executable, "-m", "bench.guest", "pending", str(_EXITS)], cwd=ROOT)
        while guest.poll() is None:
            recorder.poll()
        if guest.returncode:
            raise RuntimeError(f"the pending guest ended with status {guest.returncode}")
    finally:
        recorder.stop()
    return recorder.events, recorder.size


def figures() -> Iterator[Figure]:
    """Yield bytes per event."""
    with tempfile.TemporaryDirectory(prefix="kvmreq-bench-") as scratch:
        events, size = _live(Path(scratch) / "live")
        yield Figure("disk", f"a pending guest, live: {events:,} events", size / events, "B/event", _BOUND)
        for name, stream in {**STREAMS, "detail full": busy}.items():
            path = Path(scratch) / name.replace(" ", "-")
            writer = Writer(path, {})
            written = 0
            for batch in stream(_EVENTS):
                writer.segment(batch, Loss(), 0)
                written += len(batch)
            yield Figure("disk", f"made up, {name}: {written:,} events", writer.bytes / written, "B/event", _BOUND)
