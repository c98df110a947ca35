"""Does detail full tell what the kernel's own tracefs tells, event for event?

``python3 -m tests.matrix.full_counts [ENGINE ...]``: runs lab scenarios, each in a process of its own, while the hooks
of detail full are set and an instance of tracefs records kvm_exit, kvm_entry and kvm_vcpu_wakeup, and, where the engine
hooks functions, probes on those that kick a vCPU or raise a request of several. Compares exits by process, vCPU and
name, entries by process and vCPU, wake-ups by thread, length and whether it slept, kicks by thread, and requests of
several vCPUs by thread and request, of nested calls the outermost one. Every event that an engine made has its number,
and none is missing. What an engine has not may not be more than the hook runs that it counted as missed. Exit status 1
says that something differs, that nothing was there to be compared, or that an engine that was asked for does not work.
Imports no pandas.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from probes import exits
from probes.plan import KICKERS, REQUESTERS
from probes.program import ENGINES, Settings
from probes.schema import Kind
from tests.matrix.stat_counts import LINE, Seen, instance, keep, lost, parsed, run_apart, scenarios
from tracer import host, tracefs
from tracer.engines import Choice, choices, open_engine
from tracer.errors import KvmreqError

EVENTS = ("kvm_exit", "kvm_entry", "kvm_vcpu_wakeup")
_RING_BYTES = 64 << 20
_REQUEST = re.compile(r"request=(\d+)")
_WAKEUP = re.compile(r"(wait|poll) time (\d+) ns")

Events = npt.NDArray[np.void]


def probes() -> dict[str, str]:
    """Return what tracefs is to record of the functions that this kernel has."""
    there = host.addresses((*KICKERS, *REQUESTERS))
    found = {f"kick_{name}": f"p {name}" for name in KICKERS if name in there}
    for name in REQUESTERS:
        if name in there:
            found[f"begin_{name}"] = f"p {name} request=%si:u32"
            found[f"end_{name}"] = f"r {name}"
    return found


def wakeups(lines: Iterable[str], pids: Collection[int]) -> Counter[tuple[int, ...]]:
    """Return wake-ups of these processes by thread, nanoseconds, and whether the vCPU slept.

    >>> wakeups([" a-7 ( 6) [000] .... 1.0: kvm_vcpu_wakeup: wait time 23 ns, polling valid"], [6])
    Counter({(7, 23, 1): 1})
    """
    found: Counter[tuple[int, ...]] = Counter()
    for match in filter(None, map(LINE.search, lines)):
        ours = match["event"] == "kvm_vcpu_wakeup" and int(match["pid"]) in pids
        if ours and (told := _WAKEUP.search(match["words"])):
            found[int(match["tid"]), int(told[2]), int(told[1] == "wait")] += 1
    return found


def others(lines: Iterable[str]) -> tuple[Counter[tuple[int, ...]], Counter[tuple[int, ...]]]:
    """Return kicks by thread, and requests of several vCPUs by thread and request, of nested calls the outermost.

    >>> kicks, requests = others([" a-7 ( 6) [000] d... 1.0: begin_f: (f+0x0/0x90) request=777",
    ...                           " a-7 ( 6) [000] d... 1.1: begin_g: (g+0x0/0x90) request=777",
    ...                           " a-7 ( 6) [000] d... 1.2: end_g: (f+0x40/0x90 <- g)",
    ...                           " a-7 ( 6) [000] d... 1.3: end_f: (x+0x40/0x90 <- f)",
    ...                           " a-7 ( 6) [000] d... 1.4: kick_h: (h+0x0/0x90)"])
    >>> dict(kicks), dict(requests)
    ({(7,): 1}, {(7, 777): 1})
    """
    kicks: Counter[tuple[int, ...]] = Counter()
    requests: Counter[tuple[int, ...]] = Counter()
    depth: Counter[int] = Counter()
    for line in lines:
        match = LINE.search(line)
        if not match:
            continue
        what, tid = match["event"].partition("_")[0], int(match["tid"])
        if what == "kick":
            kicks[(tid,)] += 1
        elif what == "begin" and (told := _REQUEST.search(match["words"])):
            requests[tid, int(told[1])] += not depth[tid]
            depth[tid] += 1
        elif what == "end":
            depth[tid] -= 1
    return kicks, +requests


def of_engine(events: Events, names: Mapping[str, exits.Names]) -> Seen:
    """Return exits and entries as an engine told them, in the same terms."""
    seen = Seen()
    new = events[events["kind"] == Kind.VCPU_NEW]
    vcpu_ids = dict(zip(new["vcpu"].tolist(), new["arg"].tolist(), strict=True))
    for event in events[events["kind"] == Kind.GUEST_EXIT]:
        name = exits.reason(names, exits.Kind.GUEST, int(event["arg"]), int(event["detail"]))
        seen.exits[int(event["pid"]), vcpu_ids[int(event["vcpu"])], name] += 1
    for event in events[events["kind"] == Kind.GUEST_ENTRY]:
        seen.entries[int(event["pid"]), vcpu_ids[int(event["vcpu"])], ""] += 1
    return seen


def gaps(events: Events) -> int:
    """Return how many numbers of vCPUs' own events are missing, given all events since their beginning."""
    own = events[events["seq"] > 0]
    return sum(
        int(own["seq"][own["vcpu"] == vcpu].max()) - int((own["vcpu"] == vcpu).sum()) for vcpu in set(own["vcpu"])
    )


def _differ(ours: Mapping[Any, int], theirs: Mapping[Any, int]) -> list[dict[str, Any]]:
    return [
        {"of": list(key), "kvmreq": ours.get(key, 0), "tracefs": theirs.get(key, 0)}
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, 0) != theirs.get(key, 0)
    ]


def compare(choice: Choice, names: Sequence[str]) -> dict[str, Any]:
    """Run the scenarios under one engine and under tracefs; return the counts and every difference."""
    assert choice.plan is not None
    settings = Settings(watched=(1 << 64) - 1, cpus=host.possible_cpus(), full=True, ring_bytes=_RING_BYTES)
    also = probes() if choice.engine != "tracepoint" else {}
    formats = {name: exits.parse(text) for name, text in tracefs.formats(exits.EVENTS).items()}
    with instance(EVENTS, also) as path, open_engine(choice.plan, settings) as engine:
        engine.attach()
        runs: dict[int, str] = {}
        batches = []
        for name in names:
            runs[run_apart(name)] = name
            batches.append(engine.drain())
        engine.detach()
        batches.append(engine.drain())
        lines = (path / "trace").read_text().splitlines()
        overrun, loss, counters = lost(path), engine.loss(), engine.counters()
        plan = engine.plan.as_json()
    every = np.concatenate(batches)
    events = every[np.isin(every["pid"], list(runs))]
    ours, theirs = of_engine(events, formats), parsed(lines)
    kicks, requests = others(lines)
    woken = events[events["kind"] == Kind.WAKEUP]
    pairs: dict[str, tuple[Mapping[Any, int], Mapping[Any, int]]] = {
        what: (getattr(ours, what), {key: n for key, n in getattr(theirs, what).items() if key[0] in runs})
        for what in ("exits", "entries")
    }
    pairs["wakeups"] = (
        Counter(zip(*(woken[column].tolist() for column in ("tid", "arg", "detail")), strict=True)),
        wakeups(lines, runs),
    )
    if also:
        begun = events[events["kind"] == Kind.REQUEST_ALL]
        pairs["kicks"] = Counter((int(tid),) for tid in events["tid"][events["kind"] == Kind.KICK]), kicks
        pairs["requests"] = (
            Counter((int(tid), int(arg)) for tid, arg in zip(begun["tid"], begun["arg"], strict=True)),
            requests,
        )
    found: dict[str, Any] = {"engine": choice.engine, "overrun": overrun, "counters": counters, "gaps": gaps(events)}
    found["loss"] = {key: value for key, value in loss.as_json().items() if key != "vcpus"}
    found["unseen"] = [line["unseen"] for line in plan if line["unseen"]]
    found["kinds"] = {Kind(kind).name: int((events["kind"] == kind).sum()) for kind in np.unique(events["kind"])}
    for what, (mine, kernels) in pairs.items():
        found[what] = sum(kernels.values())
        found[f"{what}_differ"] = _differ(mine, kernels)
    begun_not_ended = int((events["kind"] == Kind.REQUEST_ALL).sum() - (events["kind"] == Kind.REQUEST_ALL_END).sum())
    # A run that the kernel left out, where programs can be preempted, is counted: it may be missing, and nothing else.
    differ = [one["tracefs"] - one["kvmreq"] for what in pairs for one in found[f"{what}_differ"]]
    found["missing"] = sum(differ) + begun_not_ended
    found["same"] = not (
        loss.ring_full
        or loss.map_full
        or loss.kicks
        or overrun
        or found["gaps"]
        or min([begun_not_ended, *differ]) < 0
        or found["missing"] > loss.missed
        or len(every) != counters["produced"]
        or not any(found[what] for what in pairs)
    )
    return found


def _results(asked: Sequence[str]) -> Iterator[dict[str, Any]]:
    for choice in choices(full=True):
        if choice.engine not in (asked or ENGINES):
            continue
        if choice.why_not is not None:
            yield {"engine": choice.engine, "refused": choice.why_not, "same": not asked}
            continue
        try:
            yield compare(choice, scenarios())
        except KvmreqError as error:
            yield {"engine": choice.engine, "refused": str(error), "same": False}


def main(words: Sequence[str]) -> int:
    """Compare under each engine; print and keep the results."""
    parser = argparse.ArgumentParser("python3 -m tests.matrix.full_counts", description=__doc__)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="(default: each that works here)")
    return keep("full", _results(parser.parse_args(words).engines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
