"""Periods of streams that a host can produce, against an oracle that looks at one pair of events after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.periods import PERIODS, Edges, Periods
from probes.schema import EVENT, REMOTE, End, Flag, Kind
from tests.examples import examples
from tests.property.model import played

Events = npt.NDArray[Any]
STEPS = st.lists(st.tuples(st.integers(0, 31), st.integers(0, 7), st.integers(0, 255)), max_size=60)
LOST = st.sets(st.integers(1, 200), max_size=30)
CUTS = st.lists(st.integers(0, 300), max_size=5)
#: Places: the event there and the next one of its vCPU change places (even), or only their numbers (odd).
SWAPS = st.lists(st.integers(0, 300), max_size=8)

USER, IOCTL, KERNEL, GUEST, HALTED = "user space", "ioctl", "kernel", "guest", "halted"
RUN = {KERNEL, GUEST}
# By kind: where a vCPU may be until then, and where after it.
TELLS: Mapping[int, tuple[set[str], set[str]]] = {
    Kind.IOCTL_ENTER: ({USER}, {IOCTL}),
    Kind.IOCTL_EXIT: ({IOCTL}, {USER}),
    Kind.SAVE: ({IOCTL}, {USER, IOCTL}),
    Kind.RESTORE: ({IOCTL}, {USER, IOCTL}),
    Kind.RUN_ENTER: ({USER}, RUN),
    Kind.RUN_EXIT: (RUN, {USER}),
    Kind.GUEST_ENTRY: ({KERNEL}, {GUEST}),
    Kind.GUEST_EXIT: ({GUEST}, {KERNEL}),
    Kind.WAKEUP: ({*RUN, HALTED}, RUN),
}


class Period(NamedTuple):
    """What a vCPU was doing, from when to when; ``why``: it began where the guest was left, for this reason."""

    vcpu: int
    name: str
    begin_ns: int
    end_ns: int
    why: tuple[int, int] | None = None


class Stretch(NamedTuple):
    """What a vCPU can have been doing between two events of its."""

    begin_ns: int
    end_ns: int
    doing: frozenset[str]
    why: tuple[int, int] | None


def lives(events: Events) -> Iterable[tuple[int, list[Any]]]:
    """Return the own events of each vCPU, apart for each time that its number is used."""
    own: dict[int, list[Any]] = defaultdict(list)
    for event in events:
        if event["kind"] == Kind.VMM_EXIT:
            for vcpu in [vcpu for vcpu, life in own.items() if life[0]["pid"] == event["pid"]]:
                yield vcpu, own.pop(vcpu)
        elif event["vcpu"] and event["kind"] not in REMOTE:
            vcpu = int(event["vcpu"])
            own[vcpu].append(event)
            if event["kind"] == Kind.VCPU_END:
                yield vcpu, own.pop(vcpu)
    yield from own.items()


def stretches(life: Sequence[Any]) -> Iterable[Stretch]:
    """Return what the events of a vCPU prove, from one to the next."""
    newest_ns, seq, after, why = 0, 0, set[str](), None
    for event in life:
        kind, time_ns, since_ns = int(event["kind"]), int(event["time_ns"]), int(event["since_ns"])
        if kind == Kind.RESET and event["arg"]:
            kind = Kind.IOCTL_ENTER
        follows = 0 < since_ns <= newest_ns and not (kind == Kind.VCPU_END and event["arg"] == End.REUSED)
        ordered = event["seq"] > seq and time_ns >= newest_ns
        if not (follows and ordered):
            after = set()
        silent = kind not in TELLS or (kind == Kind.SAVE and event["flags"] & Flag.SYNC)
        if silent and after == {GUEST}:
            after = RUN
        if kind == Kind.WAKEUP and event["detail"] and event["arg"] and ordered:
            asleep_ns = max(time_ns - int(event["arg"]), newest_ns)
            yield Stretch(newest_ns, asleep_ns, frozenset(after & RUN), why)
            yield Stretch(asleep_ns, time_ns, frozenset({HALTED}), None)
        else:
            before = after if silent else after & TELLS[kind][0]
            yield Stretch(newest_ns, max(newest_ns, time_ns), frozenset(before), why)
        if not silent:
            after = TELLS[kind][1] if ordered else set()
        newest_ns, seq = max(newest_ns, time_ns), int(event["seq"])
        why = (int(event["detail"]), int(event["arg"])) if kind == Kind.GUEST_EXIT else None


def proved(vcpu: int, life: Sequence[Any]) -> Iterable[Period]:
    """Return the periods of a vCPU: stretches of which one thing is proved, as long as it goes on."""
    for inside in (False, True):
        open_: Period | None = None
        for begin_ns, end_ns, doing, why in stretches(life):
            (name,) = doing if len(doing) == 1 else [""]
            if inside:
                name = name if name in (KERNEL, GUEST, HALTED) else ""
            elif doing == RUN or name in (KERNEL, GUEST, HALTED):
                name = "KVM_RUN"
            if open_ and open_.name == name:
                open_ = open_._replace(end_ns=end_ns)
                continue
            if open_:
                yield open_
            open_ = Period(vcpu, name, begin_ns, end_ns, why) if name else None
        if open_:
            yield open_


def oracle(events: Events) -> list[Period]:
    """Return all periods that events prove."""
    return sorted((period for vcpu, life in lives(events) for period in proved(vcpu, life)), key=str)


def drawn(parts: Iterable[Edges]) -> list[Period]:
    """Return the periods between edges; each begins and ends once, inside the one around it."""
    found = []
    open_: dict[int, list[Period]] = defaultdict(list)
    for edges in parts:
        for vcpu, time_ns, begins, number, left in zip(*(column.tolist() for column in edges), strict=True):
            if begins:
                why = (left >> 32, left & 0xFFFFFFFF) if left >= 0 else None
                open_[vcpu].append(Period(vcpu, PERIODS[number], time_ns, -1, why))
                continue
            begun = open_[vcpu].pop()
            assert begun.name == PERIODS[number] and time_ns >= begun.begin_ns
            found.append(begun._replace(end_ns=time_ns))
    assert not any(open_.values())
    return sorted(found, key=str)


def fed(events: Events, cuts: Sequence[int] = ()) -> list[Period]:
    """Return the periods of a stream that is cut at these places."""
    core = Periods()
    parts = [core.feed(part) for part in np.split(events, sorted(min(cut, len(events)) for cut in cuts))]
    return drawn([*parts, core.finish()])


def stream(steps: Sequence[tuple[int, int, int]], lost: set[int], *, deep: bool, end_all: bool) -> Events:
    """Return what the model's tracer records; as short a sleep as fits between two of its events."""
    machine = played(steps, lost, deep=deep, chatty=True, end_all=end_all)
    events = np.array([event.record() for event in machine.events], EVENT)
    events["arg"][events["kind"] == Kind.WAKEUP] = 1
    return events


def out_of_order(events: Events, swaps: Sequence[int]) -> Events:
    """Return events of which some are as those of two threads at once: in the ring, or by number, in another order."""
    events = events.copy()
    for at in swaps:
        of = np.flatnonzero((events["vcpu"] == events["vcpu"][at % len(events)]) & (events["seq"] > 0))
        of = of[of >= at % len(events)][:2]
        if len(of) == 2 and not (events["kind"][of] == Kind.VCPU_END).any():
            if at % 2:
                events["seq"][of] = events["seq"][of[::-1]]
            else:
                events[of] = events[of[::-1]]
    return events


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, LOST, CUTS, SWAPS, st.booleans(), st.booleans())
def test_periods_are_what_pairs_of_events_prove(
    steps: list[tuple[int, int, int]], lost: set[int], cuts: list[int], swaps: list[int], deep: bool, end_all: bool
) -> None:
    """With losses and out of order, however the stream is cut."""
    events = stream(steps, lost, deep=deep, end_all=end_all)
    events = out_of_order(events, swaps) if len(events) else events
    assert fed(events, cuts) == oracle(events)


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, LOST, SWAPS, st.booleans())
def test_what_is_lost_or_out_of_order_makes_no_period_that_was_not(
    steps: list[tuple[int, int, int]], lost: set[int], swaps: list[int], deep: bool
) -> None:
    """Each is inside one that the whole stream proves."""
    whole = defaultdict(list)
    for period in fed(stream(steps, set(), deep=deep, end_all=False)):
        whole[period.vcpu, period.name].append(period)
    events = stream(steps, lost, deep=deep, end_all=False)
    for period in fed(out_of_order(events, swaps) if len(events) else events):
        of = whole[period.vcpu, period.name]
        assert any(one.begin_ns <= period.begin_ns and period.end_ns <= one.end_ns for one in of), period


def test_more_periods_are_open_than_there_is_room_for() -> None:
    """20,011 vCPUs in the guest, half of which end with their process: two periods each."""
    many = 20_011
    events = np.zeros(4 * many + 1, EVENT)
    for at, kind in enumerate((Kind.RUN_EXIT, Kind.RUN_ENTER, Kind.GUEST_ENTRY, Kind.GUEST_EXIT)):
        of = events[at * many : (at + 1) * many]
        of["vcpu"], of["seq"], of["kind"] = np.arange(1, many + 1), at + 1, kind
        of["pid"], of["time_ns"], of["since_ns"] = 50 + np.arange(many) % 2, 1000 + at, (999 + at) * (at > 0)
    events["kind"][-1], events["pid"][-1], events["time_ns"][-1] = Kind.VMM_EXIT, 51, 1100
    core = Periods()
    edges = core.feed(events)
    over = edges.time_ns == 1003
    assert edges.vcpu[over & ~edges.begins].tolist().count(2) == 2
    found = drawn([edges, core.finish()])
    for number in (1, 2, many):
        assert [period[1:4] for period in found if period.vcpu == number] == [
            ("KVM_RUN", 1001, 1003), ("guest", 1002, 1003), ("kernel", 1001, 1002), (USER, 1000, 1001)
        ]  # fmt: skip
    assert len(found) == 4 * many
