"""How fast lifecycles are told from events, on one core, and in how much memory.

    .venv/bin/python -m bench.analysis [EVENTS]             every stream, through the core alone
    .venv/bin/python -m bench.analysis write DIR [EVENTS]   a recording of what busy guests do, detail full
    .venv/bin/python -m bench.analysis judge DIR            what a report does with a recording before it prints it

Each stream is judged in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from analysis.judge import judge
from analysis.lifecycle import Lifecycles
from bench import busy
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
        batch["flags"] = Flag.CREATED
        yield batch


STREAMS = {"one pending vCPU": pending, "5,000 vCPUs": many}
EVENTS = 10_000_000


def _told(name: str, events: int, ended: int, spent_s: float) -> None:
    # Not ru_maxrss: what started this process counts in that.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    print(f"{name:<18}{events:>12,}{ended:>12,}{spent_s:>9.2f}{events / spent_s / 1e6:>12.2f}{peak:>10.0f}", flush=True)


def measure(name: str, events: int) -> None:
    """Print how fast one stream was judged, how many lifecycles it ended, and the peak of the process's memory."""
    core = Lifecycles({10: "triple_fault"})
    spent, ended = 0.0, 0
    for batch in STREAMS[name](events):
        begin = time.process_time()
        ended += len(core.feed(batch).lifecycles)
        spent += time.process_time() - begin
    _told(name, events, ended, spent)


def write(path: Path, events: int) -> int:
    """Record what busy guests do, all requests watched; return the bytes of the segments."""
    table = requests.names(busy.RELEASE)
    by_bit = requests.selected(["all"], table)
    meta = {
        "schema": SCHEMA_VERSION,
        "host": "made up",
        "kernel": busy.RELEASE,
        "engine": "kprobe",
        "detail": "full",
        "requests": list(by_bit.values()),
        "requests_by_bit": {str(bit): name for bit, name in by_bit.items()},
        "requests_flags": {name: sorted(flags) for name, flags in table.flags.items()},
        "plan": [{"fact": hook, "hook": hook, "unseen": ""} for hook in busy.HOOKS],
        "clock": {},
        "started_ns": 0,
        "ended_ns": None,
    }
    writer = Writer(path, meta)
    for batch in busy.busy(events):
        until = int(batch["time_ns"].max())
        writer.segment(batch, Loss(), until)
        writer.update(ended_ns=until, segments=writer.segments)
    return writer.bytes


def measure_recording(path: Path) -> None:
    """Print the same of the way from segments on disk to a judgement, by the clock: segments are read ahead."""
    begin = time.perf_counter()
    judgement = judge(Recording.open(path))
    _told("full, from disk", judgement.events, len(judgement.lifecycles), time.perf_counter() - begin)


def main() -> None:
    """Measure every stream, or do one step."""
    match sys.argv[1:]:
        case ["write", path, *rest]:
            write(Path(path), int(rest[0]) if rest else EVENTS)
        case ["judge", path]:
            measure_recording(Path(path))
        case [events, name]:
            measure(name, int(events))
        case words:
            print(
                f"{'stream':<18}{'events':>12}{'lifecycles':>12}{'s':>9}{'M events/s':>12}{'peak MiB':>10}", flush=True
            )
            for name in STREAMS:
                own = [sys.executable, "-m", "bench.analysis", words[0] if words else str(EVENTS), name]
                subprocess.run(own, check=True)


if __name__ == "__main__":
    main()
