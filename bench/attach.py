"""How long `kvmreq record` takes from the start of its process until it is live, beside the least that it can take.

The least: a process that imports what `record` imports of others, and has BCC compile and load the very program that
kvmreq compiles, and attaches nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from bench.command import ROOT, recording
from bench.guest import READY
from bench.table import Figure
from probes import program
from probes.requests import TRIPLE_FAULT
from probes.schema import Kind
from tracer.bpf import _CFLAGS
from tracer.recorder import Recorder, Wish
from tracer.recording import Recording

_TIMES = 5
_BIT = 1 << TRIPLE_FAULT
_MOST = 2.0

# The flags are kvmreq's too: without them the compiler takes longer.
_LEAST = """
import os, pathlib, sys
import numpy
from bcc import BPF
os.environ["BCC_KERNEL_SOURCE"] = sys.argv[2]
class Unattached(BPF):
    def _trace_autoload(self):
        pass
bpf = Unattached(text=pathlib.Path(sys.argv[1]).read_bytes(), cflags=sys.argv[3:])
"""


def program_of_record(scratch: Path) -> Path:
    """Return a file with the program that `kvmreq record` compiles on this host."""
    source, texts = program.source, []

    def kept(*arguments: Any) -> str:
        texts.append(source(*arguments))
        return texts[-1]

    recorder = Recorder(scratch / "program", Wish())
    with mock.patch.object(program, "source", kept):
        recorder.start()
    recorder.stop()
    path = scratch / "program.c"
    path.write_text(texts[-1])
    return path


def least_s(text: Path) -> float:
    """Return how long a process takes that imports the libraries, and has BCC compile and load the program."""
    begin = time.perf_counter()
    words = [sys.executable, "-c", _LEAST, str(text), str(program.headers()), *_CFLAGS]
    subprocess.run(words, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


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
    said, caught, least = [], [], []
    with subprocess.Popen(
        [sys.executable, "-m", "bench.guest", "shutdowns"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as guest:
        try:
            assert guest.stdout is not None
            if guest.stdout.readline().strip() != READY:
                raise RuntimeError("the guest that is shut down every few milliseconds did not start")
            with tempfile.TemporaryDirectory(prefix="kvmreq-bench-") as scratch:
                text = program_of_record(Path(scratch))
                least_s(text)
                for number in range(_TIMES):
                    least.append(least_s(text))
                    path = Path(scratch) / str(number)
                    with recording(path) as live:
                        pass
                    said.append(live.took_s)
                    caught.append((first_raise_ns(path) - live.began_ns) / 1e9)
        finally:
            guest.kill()
    for what, taken in (("'recording into'", said), ("the first request caught", caught)):
        ratio = statistics.median(ours / floor for ours, floor in zip(taken, least, strict=True))
        yield Figure("attach", f"start to {what} / the least", ratio, "x", _MOST)
        yield Figure("attach", "  by the clock", statistics.median(taken), "s")
    yield Figure("attach", "the least: imports, and BCC compiles and loads", statistics.median(least), "s")
