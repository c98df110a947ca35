"""The rate that a recording of detail full sustains without loss, and what becomes of it beyond.

The rate rises step by step, a recording for each, until events are lost. Beside the flood (see bench.flood) one guest
is shut down again and again, so that losses have verdicts to spoil.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from analysis.verdicts import EXIT_UNDECIDED
from bench.command import ROOT
from bench.guest import READY
from bench.table import Figure, Missing
from tracer.recording import Recording

_SECONDS = 4
_STEPS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # millions of events a second that are asked for
_MORE = 1.1  # times the rate of the step before: with less, the machine cannot make more
_RING_MIB, _SMALL_RING_MIB = 32, 1  # as kvmreq has it, and its smallest


@dataclass(frozen=True)
class _Step:
    """What one recording holds, and what it should hold."""

    seconds: float
    late_s: float  # from the last event until all was written
    produced: int
    recorded: int
    counted: int  # as lost

    @property
    def rate(self) -> float:
        """Return millions of events a second."""
        return self.produced / self.seconds / 1e6


@contextmanager
def _started(module: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", module, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != READY:
                raise RuntimeError(f"python -m {module} {' '.join(words)} did not start")
            yield process
        finally:
            process.kill()


def _step(path: Path, rate: float, ring_mib: int) -> _Step:
    with _started("bench.guest", "shutdowns"), _started("bench.flood", "record", str(path), str(ring_mib)) as recorder:
        with _started("bench.flood", "produce", str(int(rate * 1e6)), str(_SECONDS)) as producer:
            took = float(producer.communicate("\n")[0])
        end = time.monotonic()
        recorder.communicate()
        late = time.monotonic() - end
        if recorder.returncode:
            raise RuntimeError(f"the recorder ended with status {recorder.returncode}")
    recording = Recording.open(path)
    recorded = counted = 0
    for segment in recording.segments():
        if segment is None:
            raise RuntimeError(f"{path} is not whole: {recording.left_out}")
        recorded, counted = recorded + len(segment.columns["kind"]), segment.loss.total
    return _Step(took, late, recording.meta["counters"]["produced"], recorded, counted)


def _report(path: Path) -> tuple[int, dict[str, int]]:
    """Return the exit status of a recording's report, and how many requests ended how."""
    words = [sys.executable, "-m", "command", "report", str(path), "--format", "json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    if not done.stdout:
        raise RuntimeError(f"the report of a recording with losses failed: {done.stderr}")
    return done.returncode, json.loads(done.stdout)["summary"]


def figures() -> Iterator[Figure | Missing]:
    """Yield the highest rate without loss, the first with losses, and how that recording is reported."""
    kept: _Step | None = None
    with tempfile.TemporaryDirectory(prefix="kvmreq-bench-") as directory:
        scratch = Path(directory)
        for rate in _STEPS:
            path = scratch / str(rate)
            step = _step(path, rate, _RING_MIB)
            if step.produced != step.recorded or step.counted:
                break
            shutil.rmtree(path)
            if kept is not None and step.rate < kept.rate * _MORE:
                break
            kept = step
        if kept is None:
            yield Missing("full", "sustained without loss", f"less than {_STEPS[0]} M/s")
        else:
            yield Figure("full", f"sustained without loss for {kept.seconds:.0f} s", kept.rate, "M/s")
            yield Figure("full", "  written so long after the last event", kept.late_s, "s")
        if path.exists():
            yield Figure("full", "events are lost from", step.rate, "M/s")
        else:
            yield Missing("full", "events are lost from", f"not by the {step.rate:.2f} M/s that can be made here")
            path = scratch / "small"
            step = _step(path, rate, _SMALL_RING_MIB)
            yield Figure("full", f"with a ring of {_SMALL_RING_MIB} MiB instead of {_RING_MIB}", step.rate, "M/s")
        lost = step.produced - step.recorded
        yield Figure("full", f"  of {step.produced:,} events, lost", lost, "events")
        yield Figure("full", "  lost and not counted, or the other way round", abs(lost - step.counted), "events", 0)
        status, ends = _report(path)
        yield Figure("full", f"  exit status of its report (undecided: {EXIT_UNDECIDED})", status, "")
        yield Figure("full", "  requests that it calls undecided", ends.get("undecided", 0), "")
        yield Figure("full", "  requests that it calls lost", ends.get("lost", 0), "", 0)
