"""How fast lifecycles are told from events, and in how much memory: the steps that bench.judging takes, by hand.

    .venv/bin/python -m bench.analysis [EVENTS]              every stream, through the core alone
    .venv/bin/python -m bench.analysis feed EVENTS STREAM    one of them
    .venv/bin/python -m bench.analysis turns EVENTS STREAM   the core and pandas, in turns
    .venv/bin/python -m bench.analysis write DIR [EVENTS]    a recording of what busy guests do, detail full
    .venv/bin/python -m bench.analysis write-small DIR       a recording of one vCPU with a triple fault pending
    .venv/bin/python -m bench.analysis judge DIR             what a report does with a recording before it prints it
    .venv/bin/python -m bench.analysis read DIR              the same columns of the same files, read by pyarrow alone

Each is a process of its own, so that its peak memory is its own; its last line is for bench.judging, in words.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import compiled
from analysis.judge import judge
from analysis.lifecycle import Lifecycles, lifecycle_table
from analysis.passes import Pass, in_order
from bench import busy, pandas_way
from probes import requests
from probes.schema import EVENT, SCHEMA_VERSION, Flag, Kind, Site
from tracer.loss import Loss
from tracer.recording import Recording, Writer

BATCH = 1_000_000
VCPUS = 5_000
TRIPLE_FAULT = 1 << 10
SAVE = 0x8040AE9F


def pending(events: int) -> Iterator[Any]:
    """Yield batches of one vCPU that returns to user space with a triple fault pending, again and again."""
    for begin in range(0, events, BATCH):
        batch = np.zeros(min(BATCH, events - begin), EVENT)
        index = np.arange(begin, begin + len(batch))
        batch["vcpu"], batch["pid"], batch["kind"], batch["arg"] = 1, 100, Kind.RUN_EXIT, 5
        batch["seq"], batch["time_ns"], batch["since_ns"] = index + 1, 1000 + index, 999 + index
        batch["requests"] = batch["before"] = TRIPLE_FAULT
        if begin == 0:
            batch["kind"][0], batch["flags"][0], batch["requests"][0] = Kind.VCPU_NEW, Flag.CREATED, 0
            batch["before"][:2] = batch["since_ns"][0] = batch["arg"][0] = 0
        yield batch


def many(events: int) -> Iterator[Any]:
    """Yield batches of 5,000 vCPUs in turn: raised by RSM, returned, saved, returned, delivered, and again."""
    kinds = np.array([Kind.SITE, Kind.RUN_EXIT, Kind.SAVE, Kind.RUN_EXIT, Kind.RUN_EXIT], "u1")
    args = np.array([Site.RSM, 5, SAVE, 5, 8], "u8")
    words = np.array([1, 1, 1, 1, 0], "u8") * np.uint64(TRIPLE_FAULT)
    for begin in range(0, events, BATCH):
        batch = np.zeros(min(BATCH, events - begin), EVENT)
        index = np.arange(begin, begin + len(batch))
        turn = index // VCPUS
        step = (turn - 1) % len(kinds)
        new = turn == 0
        batch["vcpu"], batch["seq"] = index % VCPUS + 1, turn + 1
        batch["pid"] = 100 + index % VCPUS // 8
        batch["time_ns"], batch["since_ns"] = 1_000_000 + index, np.where(new, 0, 1_000_000 + index - VCPUS)
        batch["kind"], batch["arg"] = np.where(new, Kind.VCPU_NEW, kinds[step]), np.where(new, 0, args[step])
        batch["requests"] = np.where(new, 0, words[step])
        batch["before"] = np.where(turn < 2, 0, words[step - 1])
        batch["flags"] = np.where(batch["kind"] == Kind.SAVE, Flag.CREATED | Flag.READ, Flag.CREATED)
        yield batch


STREAMS = {"one pending vCPU": pending, "5,000 vCPUs": many}
#: These and the one of detail full, which the core takes with every request watched.
FULL = "detail full, all requests"
EVENTS = 10_000_000
_TURNS = 5
_SMALL = 1_000


def _peak_mib() -> float:
    # Not ru_maxrss: what started this process counts in that.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def _told(name: str, events: int, ended: int, spent_s: float) -> None:
    rate = events / spent_s / 1e6
    print(f"{name:<26}{events:>12,}{ended:>12,}{spent_s:>9.2f}{rate:>12.2f}{_peak_mib():>10.0f}", flush=True)


def _core(name: str) -> Lifecycles:
    return Lifecycles(_names(name), full=name == FULL)


def _names(name: str) -> dict[int, str]:
    return dict(requests.names(busy.RELEASE).by_bit) if name == FULL else {10: "triple_fault"}


def _batches(name: str, events: int) -> Iterator[Any]:
    return busy.busy(events) if name == FULL else STREAMS[name](events)


def feed(name: str, events: int) -> None:
    """Print how fast one stream was judged and what it ended; last the peak after a tenth of it, and after all."""
    core = _core(name)
    spent, ended, fed, early = 0.0, 0, 0, 0.0
    for batch in _batches(name, events):
        begin = time.process_time()
        ended += len(core.feed(batch).lifecycles)
        spent += time.process_time() - begin
        fed += len(batch)
        if not early and fed >= events // 10:
            early = _peak_mib()
    _told(name, events, ended, spent)
    print(early, _peak_mib())


def turns(name: str, events: int) -> None:
    """Print the CPU time that the core, its tables and pandas took for events in memory, in turns; last the ratios.

    Each takes columns: the core in batches, as a recording has them, pandas all at once. Both must tell the same.
    Ratios: of pandas to the core alone, and to the core with its tables.
    """
    batches = [
        {column: np.ascontiguousarray(batch[column]) for column in EVENT.names or ()}
        for batch in _batches(name, events)
    ]
    frame = pd.concat([pd.DataFrame(batch) for batch in batches], ignore_index=True)
    names, full, ratios = _names(name), name == FULL, []
    for turn in range(_TURNS + 1):
        begin = time.process_time()
        core = Pass(names, full=full)
        for batch in batches:
            core.feed(batch)
        core.finish(Loss())
        fed = time.process_time()
        told = lifecycle_table(in_order(core.given().finished, "raised_ns", "request", "vcpu_number"), names)
        tabled = time.process_time()
        found = pandas_way.lifecycles(frame, names, full=full)
        end = time.process_time()
        if not _verdicts(told).equals(_verdicts(found)):
            raise RuntimeError(f"{name}: {_verdicts(told)} by the core, {_verdicts(found)} by pandas")
        if turn:  # the first one warms up: code is compiled, memory fetched
            ratios.append(((end - tabled) / (fed - begin), (end - tabled) / (tabled - begin)))
            spent = f"core {fed - begin:.3f} s, tables {tabled - fed:.3f} s, pandas {end - tabled:.3f} s"
            print(f"{name}: {spent}, {len(found):,} lifecycles")
    print(*(statistics.median(of) for of in zip(*ratios, strict=True)))


def _verdicts(lifecycles: pd.DataFrame) -> pd.Series[int]:
    """Return how many requests ended how, and by whom they were raised."""
    return lifecycles.groupby(["request", "end", "raised_by"]).size()


def write(path: Path, batches: Iterator[Any], detail: str) -> int:
    """Record a stream; all requests are watched in detail full, else triple_fault. Return the bytes of the segments."""
    table = requests.names(busy.RELEASE)
    by_bit = requests.selected(["all" if detail == "full" else "triple_fault"], table)
    meta = {
        "schema": SCHEMA_VERSION,
        "host": "made up",
        "kernel": busy.RELEASE,
        "engine": "kprobe",
        "detail": detail,
        "requests": list(by_bit.values()),
        "requests_by_bit": {str(bit): name for bit, name in by_bit.items()},
        "requests_flags": {name: sorted(flags) for name, flags in table.flags.items()},
        "plan": [{"fact": hook, "hook": hook, "unseen": ""} for hook in busy.HOOKS],
        "clock": {"monotonic_ns": 0, "utc_ns": 0},
        "started_ns": 0,
        "ended_ns": None,
    }
    writer = Writer(path, meta)
    for batch in batches:
        until = int(batch["time_ns"].max())
        writer.segment(batch, Loss(), until)
        writer.update(ended_ns=until, segments=writer.segments)
    return writer.bytes


def from_disk(path: Path) -> None:
    """Print how long it took from segments on disk to a judgement, by the clock; last this, how many, and the peak."""
    compiled.warm()  # what a start takes is measured apart
    begin = time.perf_counter()
    judgement = judge(Recording.open(path))
    took = time.perf_counter() - begin
    _told("from disk", judgement.events, len(judgement.lifecycles), took)
    print(took, len(judgement.lifecycles), _peak_mib())


def read(path: Path) -> None:
    """Print how long pyarrow takes for the columns that a recording's reader takes, page checksums looked at too."""
    import pyarrow.parquet as pq

    first = next(iter(Recording.open(path).segments()))
    names = list(first.columns) if first is not None else []
    begin = time.perf_counter()
    for segment in sorted(path.glob("segment-*.parquet")):
        with pq.ParquetFile(segment, page_checksum_verification=True, memory_map=False) as file:
            file.read(columns=names)
    print(time.perf_counter() - begin)


def main() -> None:
    """Do one step, or feed every stream."""
    match sys.argv[1:]:
        case ["write", path, *rest]:
            write(Path(path), busy.busy(int(rest[0]) if rest else EVENTS), "full")
        case ["write-small", path]:
            write(Path(path), pending(_SMALL), "boundary")
        case ["judge", path]:
            from_disk(Path(path))
        case ["read", path]:
            read(Path(path))
        case ["feed", events, name]:
            feed(name, int(events))
        case ["turns", events, name]:
            turns(name, int(events))
        case words:
            heading = f"{'events':>12}{'lifecycles':>12}{'s':>9}{'M events/s':>12}{'peak MiB':>10}"
            print(f"{'stream':<26}{heading}", flush=True)
            for name in (*STREAMS, FULL):
                own = [sys.executable, "-m", "bench.analysis", "feed", words[0] if words else str(EVENTS), name]
                told = subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout
                print(told.splitlines()[0], flush=True)


if __name__ == "__main__":
    main()
