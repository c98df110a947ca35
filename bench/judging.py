"""What judging costs: beside reading alone, beside pandas, in memory, and in a report, each in processes of their own.

Machines differ, and one machine differs from minute to minute: so every bound on time is one on the ratio of two things
that were measured in turns. Memory is bounded in MiB.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.analysis import EVENTS, FULL, STREAMS
from bench.command import ROOT
from bench.table import Figure

_TURNS = 5
_STARTS = 9
_IN_MEMORY = 2_000_000  # events that the core and pandas are given in turns
_LONG = 100_000_000
_REPORTED = 12_000_000  # events of the busy guests: a little more than 2 M lifecycles
_MIB = 1024.0
_START = 2.0  # who has little to judge must not wait for a compiler: as long as with a core in numpy alone


def _run(*words: str) -> list[str]:
    """Return the words of the last line of a step of bench.analysis."""
    own = [sys.executable, "-m", "bench.analysis", *words]
    said = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    return said.splitlines()[-1].split() if said else []


def figures() -> Iterator[Figure]:
    """Yield each ratio, with rates beside it for whom they tell something, then the peaks of memory."""
    with tempfile.TemporaryDirectory(prefix="kvmreq-bench-") as scratch:
        yield from _from_disk(Path(scratch) / "full")
        yield from _beside_pandas()
        yield from _long()
        yield from _reports(Path(scratch) / "many")
        yield from _start(Path(scratch) / "small")


def _from_disk(path: Path) -> Iterator[Figure]:
    _run("write", str(path))
    _run("judge", str(path))  # what is compiled once is compiled now, and the files are in memory
    ratios, judged, peaks = [], [], []
    ended = 0
    for _ in range(_TURNS):
        read = float(_run("read", str(path))[0])
        took, count, peak = _run("judge", str(path))
        ratios.append(float(took) / read)
        judged.append(float(took))
        peaks.append(float(peak))
        ended = int(count)
    size = f"{EVENTS // 1_000_000} M events of detail full"
    yield Figure("analysis", "from disk: judging / pyarrow's reading alone", statistics.median(ratios), "x", 4.0)
    yield Figure("analysis", f"  {size}", EVENTS / statistics.median(judged) / 1e6, "M/s")
    yield Figure("analysis", f"  {ended:,} requests; peak of its memory", max(peaks), "MiB", _MIB)


def _beside_pandas() -> Iterator[Figure]:
    for name in (*STREAMS, FULL):
        alone, tabled = map(float, _run("turns", str(_IN_MEMORY), name))
        yield Figure("analysis", f"{name}: pandas / the core", alone, "x", 10.0, at_least=True)
        yield Figure("analysis", "  pandas / the core with its tables", tabled, "x")


def _long() -> Iterator[Figure]:
    name = next(iter(STREAMS))
    early, late = map(float, _run("feed", str(_LONG), name))
    size = f"{_LONG // 1_000_000} M events"
    yield Figure("analysis", f"{name}, {size}: peak of memory", late, "MiB", _MIB)
    yield Figure("analysis", f"  above that after {_LONG // 10_000_000} M", late - early, "MiB", 4.0)


def _reports(path: Path) -> Iterator[Figure]:
    _run("write", str(path), str(_REPORTED))
    lifecycles = int(_run("judge", str(path))[1])
    yield Figure("analysis", "lifecycles of the reports below", lifecycles / 1e6, "M", 2.0, at_least=True)
    page = path.with_suffix(".html")
    ways = {
        **{name: ["--format", name] for name in ("text", "json", "csv")},
        "html": ["--html", str(page)],
    }
    for name, words in ways.items():
        command = [sys.executable, "-m", "command", "report", str(path), *words]
        own = [sys.executable, "-m", "bench.peak", *command]
        peak, status = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout.split()
        if status != "0" or (name == "html" and not page.stat().st_size):
            raise RuntimeError(f"{' '.join(command)} ended with status {status}")
        yield Figure("analysis", f"  report, {name}: peak of its memory", float(peak), "MiB", _MIB)


def _took_s(words: Sequence[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
    return time.perf_counter() - begin


def _start(path: Path) -> Iterator[Figure]:
    _run("write-small", str(path))
    report = ["-m", "command", "report", str(path)]
    imports = ["-c", "import pandas, pyarrow.parquet"]
    _took_s(report), _took_s(imports)  # compiled, cached, in memory
    pairs = [(_took_s(report), _took_s(imports)) for _ in range(_STARTS)]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    yield Figure("analysis", "report of a small recording / what it imports", ratio, "x", _START)
    yield Figure("analysis", "  start of the process included", statistics.median(ours for ours, _ in pairs), "s")
