"""The Perfetto trace of streams that a host can produce: whole wherever it is cut, and no period that is not proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.judge import judge
from probes.schema import EVENT, SCHEMA_VERSION, End, Flag, Kind
from reports import perfetto
from tests.examples import examples
from tests.property.model import NAMES, played
from tests.property.oracle import Event
from tests.traces import Trace, read
from tracer.loss import Loss
from tracer.recording import Segment

META: dict[str, Any] = {
    "schema": SCHEMA_VERSION,
    "host": "host",
    "kernel": "6.12.0",
    "engine": "tracepoint",
    "detail": "full",
    "requests": list(NAMES.values()),
    "requests_by_bit": {str(bit): name for bit, name in NAMES.items()},
    "clock": {"monotonic_ns": 0, "utc_ns": 10**18},
    "started_ns": 0,
    "plan": [],
    "guests": {},
}
STEPS = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 7), st.integers(0, 255)), max_size=60)


class Made:
    """A recording that is on no disk."""

    path = Path("made")
    meta = META
    clean = True

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.left_out: list[str] = []
        self._segments = segments

    def segments(self) -> Sequence[Segment]:
        return self._segments


# By kind: what it may have been doing before, and what it does after.
ENTRY = ("user space", "user space or ioctl")
EXIT = ("ioctl", "user space or ioctl")
MAY: Mapping[int, tuple[str, ...]] = {
    Kind.IOCTL_ENTER: ENTRY,
    Kind.RUN_ENTER: ENTRY,
    Kind.RUN_EXIT: ("KVM_RUN",),
    Kind.IOCTL_EXIT: EXIT,
    Kind.SAVE: EXIT,
    Kind.RESTORE: EXIT,
}
THEN: Mapping[int, str] = {
    Kind.IOCTL_ENTER: "ioctl",
    Kind.RUN_ENTER: "KVM_RUN",
    Kind.RUN_EXIT: "user space",
    Kind.IOCTL_EXIT: "user space",
    Kind.SAVE: "user space or ioctl",
    Kind.RESTORE: "user space or ioctl",
}


def periods(events: Sequence[Event]) -> set[tuple[int, str, int, int]]:
    """Return what two events that follow each other prove, as (vCPU, what, from, to), one pair at a time."""
    proved: set[tuple[int, str, int, int]] = set()
    last: dict[int, tuple[int, str]] = {}
    for event in events:
        if event.kind == Kind.VMM_EXIT or not event.vcpu:
            continue
        kind = event.kind
        if kind == Kind.RESET and event.arg:
            kind = Kind.IOCTL_ENTER
        if kind == Kind.SAVE and event.flags & Flag.SYNC:
            kind = 0
        before_ns, doing = last.get(event.vcpu, (0, ""))
        if not 0 < event.since_ns <= before_ns or (kind == Kind.VCPU_END and event.arg == End.REUSED):
            doing = ""
        may = MAY.get(kind, (doing,))
        if doing in may and may[0] not in ("", "user space or ioctl"):
            proved.add((event.vcpu, may[0], before_ns, event.time_ns))
        last[event.vcpu] = (event.time_ns, THEN.get(kind, doing))
    return proved


def columns(events: Sequence[Event]) -> dict[str, Any]:
    """Return events as a segment holds them."""
    made = np.array([event.record() for event in events], EVENT)
    return {name: made[name] for name in EVENT.names or ()}


def cut(events: Sequence[Event], cuts: Sequence[int], loss: Loss) -> Made:
    """Return a recording whose segments end at these places."""
    ends = sorted({0, len(events), *(each % (len(events) + 1) for each in cuts)})
    parts = [events[begin:end] for begin, end in pairwise(ends)]
    return Made(
        [Segment(f"{number}", columns(part), loss, max(e.time_ns for e in part)) for number, part in enumerate(parts)]
    )


def traced(made: Any) -> Trace:
    """Return the trace of a recording, as a reader sees it."""
    return read(b"".join(perfetto.trace(made)))


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.sets(st.integers(1, 150), max_size=40), st.lists(st.integers(0, 200), max_size=12), st.booleans())
def test_traces(steps: list[tuple[int, int, int]], full: set[int], cuts: list[int], chatty: bool) -> None:
    """Slices nest and end; requests are those of the report; periods are exactly what pairs of events prove."""
    machine = played(steps, full, chatty=chatty, end_all=True)
    made = cut(machine.events, cuts, machine.loss)
    trace = traced(made)

    lifecycles = judge(made).lifecycles
    drawn = [each for each in trace.slices if each.category == "request"]
    assert sorted((each.name, each.arguments["raised_ns"], each.arguments["end"], each.arguments.get("why", ""))
                  for each in drawn) == sorted(
        (row["request"], row["raised_ns"], row["end"], row["why"]) for row in lifecycles.to_dict("records")
    )  # fmt: skip
    assert all(each.end_ns >= each.begin_ns for each in trace.slices)

    shown = [
        (each.uuid & 0xFFFFFFFF, each.name, each.begin_ns, each.end_ns)  # the vCPU's number is in the track's
        for each in trace.slices
        if each.category == "period"
    ]
    proved = periods(machine.events)
    assert all(
        any(vcpu == one[0] and name == one[1] and one[2] <= begin and end <= one[3] for one in shown)
        for vcpu, name, begin, end in proved
    )
    # Nothing else: each slice is exactly as long as the pairs that it is made of.
    for vcpu, name, begin, end in shown:
        inside = [one for one in proved if one[:2] == (vcpu, name) and begin <= one[2] and one[3] <= end]
        assert sum(one[3] - one[2] for one in inside) == end - begin

    again = traced(cut(machine.events, [], machine.loss))
    key = str
    assert sorted((each for each in again.slices if each.category == "period"), key=key) == sorted(
        (each for each in trace.slices if each.category == "period"), key=key
    )
