"""The rules of ordering against an oracle that is slow and obvious, and however a stream is cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.cases import LATE_NS
from analysis.ordering import Ordered, Ordering
from probes.schema import EVENT, IN_GUEST_MODE, REQUEST_FLAGS, Kind
from tests.examples import examples
from tests.property.oracle import Event

Case: TypeAlias = tuple[str, int, int | str, int, int]  # rule, vCPU, bit, time_ns, since_ns

NAMES = {10: "triple_fault", 11: "mmu_sync", 14: "event", 17: "nmi", 23: "scan_ioapic", 27: "ioapic_eoi_exit"}
OWN, KICKED = {10, 11, 27}, {17, 23}
TAKEN = {10: (8, {11}), 27: (26, {10, 11, 17})}
PLAN = [
    {"hook": hook}
    for hook in (
        "raw_tracepoint:kvm_entry", "raw_tracepoint:kvm_exit", "fentry:kvm_vcpu_kick",
        "fentry:kvm_make_all_cpus_request", "fexit:kvm_make_all_cpus_request", "fentry:kvm_make_vcpus_request_mask",
    )
]  # fmt: skip
WAIT, NO_ACTION = REQUEST_FLAGS["WAIT"], REQUEST_FLAGS["NO_ACTION"]
NO_BIT = "outside_guest_mode"  # what is asked for with NO_ACTION shows in no word
EVERYONE = (1 << 64) - 1
REMOTE = (Kind.KICK, Kind.IN_GUEST_STILL)
INSIDE = (Kind.RUN_ENTER, Kind.GUEST_EXIT, Kind.WAKEUP, Kind.SITE)
WORDS = (0, 0, 1 << 10, 1 << 11, 1 << 14, 1 << 17, 1 << 23, 1 << 17 | 1 << 11, 1 << 27 | 1 << 17, 1 << 10 | 1 << 11)

THOROUGH = settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.too_slow])
STEPS = st.lists(st.tuples(st.integers(0, 17), st.integers(0, 2), st.integers(0, 255)), min_size=20, max_size=60)
CUTS = st.lists(st.integers(0, 100), max_size=10)
SWAPS = st.lists(st.integers(0, 80), max_size=8)
DROPPED = st.sets(st.integers(0, 80), max_size=4)


class Host:
    """Three vCPUs of two VMs, two requesters, and no rule that is kept: anything may follow anything."""

    def __init__(self) -> None:
        self.now, self.events = 1000, list[Event]()
        self.seq, self.word, self.read_ns = defaultdict[int, int](int), defaultdict[int, int](int), {1: 0, 2: 0, 3: 0}
        self.begun: dict[int, tuple[int, int, int, int]] = {}
        self.ended: set[int] = set()
        self.inside: set[int] = set()

    def own(self, vcpu: int, kind: Kind, word: int, arg: int = 0, detail: int = 0) -> None:
        self.seq[vcpu] += 1
        pid = 50 + vcpu // 3
        seq, since, before = self.seq[vcpu], self.read_ns[vcpu], self.word[vcpu]
        self.events.append(Event(self.now, since, word, before, arg, vcpu, seq, pid, vcpu, detail, 0, kind))
        self.word[vcpu], self.read_ns[vcpu] = word, self.now

    def step(self, what: int, who: int, choice: int) -> None:
        vcpu, vm, pid = who + 1, 1 + (who + 1) // 3, 50 + (who + 1) // 3
        self.now += 1 + choice % 7
        word = WORDS[choice % len(WORDS)] | (self.word[vcpu] if choice & 128 else 0)
        if what in (0, 1):  # time passes
            self.now += (LATE_NS // 3, 2 * LATE_NS)[what]
        elif what in (2, 3):
            self.kick(vcpu, pid, WORDS[choice % len(WORDS)] | self.word[vcpu])
        elif what in (4, 5, 6):
            request = (17, 23, 17 | NO_ACTION)[(choice >> 1) % 3]
            self.ask(97 + choice % 2, vm, pid, request, EVERYONE if choice & 12 else 3)
        elif vcpu in self.ended:
            return
        elif what == 7:
            self.end(vcpu, pid, exits=bool(choice & 1))
        elif what == 8:
            self.own(vcpu, Kind.VCPU_NEW, word, vcpu, vm)
        elif what == 9:
            self.own(vcpu, Kind.WAKEUP, word, 5, choice & 1)
        elif what == 10:
            bit = (10, 27)[choice & 1]
            self.word[vcpu] |= 1 << bit
            self.own(vcpu, Kind.RUN_EXIT, (self.word[vcpu] | word) & ~(1 << bit), TAKEN[bit][0])
            self.inside.discard(vcpu)
        elif vcpu in self.inside:
            self.own(vcpu, Kind.GUEST_EXIT, word)
            self.inside.discard(vcpu)
        else:
            self.own(vcpu, Kind.GUEST_ENTRY, word)
            self.inside.add(vcpu)

    def kick(self, vcpu: int, pid: int, word: int) -> None:
        self.events.append(Event(self.now, 0, word, word, 0, vcpu, 0, pid, 99, IN_GUEST_MODE, 1, Kind.KICK))

    def ask(self, tid: int, vm: int, pid: int, bit: int, mask: int) -> None:
        if tid not in self.begun:
            self.begun[tid] = (self.now, vm, bit, mask)
            self.events.append(Event(self.now, 0, mask, mask, bit | WAIT, 0, 0, pid, tid, vm, 1, Kind.REQUEST_ALL))
            return
        begin, vm, bit, mask = self.begun.pop(tid)
        for vcpu in (1, 2) if vm == 1 else (3,):
            if vcpu in self.inside and vcpu not in self.ended:
                self.events.append(
                    Event(
                        self.now, begin, 1 << bit % 64, 1 << bit % 64, bit | WAIT, vcpu, 0, pid, tid, IN_GUEST_MODE, 1,
                        Kind.IN_GUEST_STILL,
                    )
                )  # fmt: skip
        self.events.append(
            Event(self.now, begin, mask, mask, bit | WAIT, 0, 0, pid, tid, vm, 1, Kind.REQUEST_ALL_END)
        )  # fmt: skip

    def end(self, vcpu: int, pid: int, *, exits: bool) -> None:
        if exits:
            self.events.append(Event(self.now, arg=2, pid=pid, kind=Kind.VMM_EXIT))
            self.ended |= {1, 2} if pid == 50 else {3}
        else:
            self.own(vcpu, Kind.VCPU_END, self.word[vcpu])
            self.ended.add(vcpu)


def played(steps: Sequence[tuple[int, int, int]], swaps: Sequence[int], dropped: set[int]) -> list[Event]:
    """Return the events of a host as they come out of the ring, some a little late, some never."""
    host = Host()
    for what, who, choice in steps:
        host.step(what, who, choice)
    events = [event for index, event in enumerate(host.events) if index not in dropped]
    for index in swaps:
        pair = events[index : index + 2]
        # A vCPU's own events keep their order, and so do those of one thread, and nothing of a vCPU follows its end.
        kinds = {event.kind for event in pair}
        if Kind.KICK in kinds and not kinds & {Kind.VCPU_END, Kind.VMM_EXIT}:
            events[index : index + 2] = reversed(pair)
    return events


def batch(events: Sequence[Event]) -> Any:
    return np.array([event.record() for event in events], EVENT)


def judged(events: Sequence[Event], cuts: Sequence[int] = ()) -> Ordered:
    rules = Ordering(NAMES, {}, PLAN, "full")
    edges = sorted({0, len(events), *(min(cut, len(events)) for cut in cuts)})
    for begin, end in pairwise(edges):
        rules.feed(batch(events[begin:end]))
        assert rules.carried <= 3 * (1 + 3 * len(NAMES) + 1)
    return rules.finish()


def asks_for(event: Event) -> int | str:
    return NO_BIT if event.arg & NO_ACTION else event.arg & 0xFF


def own(event: Event) -> bool:
    return event.vcpu > 0 and event.kind not in REMOTE


class Oracle:
    """The rules, with the whole stream at hand."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events
        self.checked, self.undecided = defaultdict[str, int](int), defaultdict[str, int](int)
        self.broken: list[Case] = []
        self.cases: dict[tuple[str, int, int], list[int]] = defaultdict(list)
        for place, event in enumerate(events):
            if own(event):
                self.take(place, event)
        for event in events:
            if event.kind == Kind.REQUEST_ALL_END and event.requests == EVERYONE:
                self.checked["wait_returned_early"] += 1
        for (rule, _, bit), places in self.cases.items():
            until = -1
            for place in places:
                if place >= until:
                    until = self.judge(rule, bit, place)
        self.stays()
        shown = {
            bit
            for bit in KICKED
            for event in events
            if (event.kind == Kind.KICK and event.requests >> bit & 1)
            or (event.kind in (Kind.REQUEST_ALL, Kind.REQUEST_ALL_END) and asks_for(event) == bit)
        }
        for case in [*self.broken]:
            if case[0] != "wait_returned_early" and case[2] not in OWN | shown:
                self.broken.remove(case)
                self.undecided[case[0]] += 1

    def last(self, place: int, vcpu: int) -> int | None:
        return next(
            (at for at in range(place - 1, -1, -1) if own(self.events[at]) and self.events[at].vcpu == vcpu), None
        )

    def next(self, place: int, vcpu: int) -> int | None:
        after = range(place + 1, len(self.events))
        return next((at for at in after if own(self.events[at]) and self.events[at].vcpu == vcpu), None)

    def take(self, place: int, event: Event) -> None:
        at = self.last(place, event.vcpu)
        last = self.events[at] if at is not None else None
        follows = last is not None and event.seq == last.seq + 1
        inside = last is not None and last.kind in INSIDE
        if event.kind == Kind.GUEST_ENTRY:
            rule = "entered_with_request"
            self.checked[rule] += 1
            bits = {bit for bit in OWN | KICKED if event.requests & event.before & 1 << bit}
            self.accuse(rule, place, bits, follows, inside)
        elif event.kind == Kind.GUEST_EXIT:
            rule = "raise_without_kick"
            bits = {bit for bit in KICKED if event.requests & ~event.before & 1 << bit}
            in_guest = last is not None and last.kind == Kind.GUEST_ENTRY
            if follows and in_guest:
                self.checked[rule] += len(bits)
            self.accuse(rule, place, bits, follows, in_guest)
        elif event.kind == Kind.RUN_EXIT:
            rule = "service_order"
            for bit, (reason, earlier) in TAKEN.items():
                if event.before & ~event.requests & 1 << bit and event.arg == reason:
                    self.checked[rule] += follows and inside
                    left = {one for one in earlier if event.requests & event.before & 1 << one}
                    self.accuse(rule, place, left, follows, inside)

    def accuse(self, rule: str, place: int, bits: set[int], follows: bool, inside: bool) -> None:
        event = self.events[place]
        if bits and not follows:
            self.undecided[rule] += 1
        elif bits and inside:
            for bit in bits:
                if bit in OWN:
                    self.broken.append((rule, event.vcpu, bit, event.time_ns, event.since_ns))
                else:
                    self.cases[rule, event.vcpu, bit].append(place)

    def judge(self, rule: str, bit: int, place: int) -> int:
        events, event = self.events, self.events[place]
        named = [one for one in events[:place] if one.kind == Kind.VCPU_NEW and one.vcpu == event.vcpu]
        vm = named[0].detail if named else 0
        due = next(
            (
                at
                for at in range(place, len(events))
                if max(one.time_ns for one in events[: at + 1]) > event.time_ns + LATE_NS
            ),
            len(events),
        )
        end = next(
            (
                at
                for at in range(place + 1, len(events))
                if (events[at].kind == Kind.VCPU_END and events[at].vcpu == event.vcpu)
                or (events[at].kind == Kind.VMM_EXIT and events[at].pid == event.pid)
            ),
            len(events),
        )
        over = min(due, end)
        going: dict[int, Event] = {}
        for at in range(over):
            one = events[at]
            kick = one.kind == Kind.KICK and one.vcpu == event.vcpu
            holds = one.requests >> bit & 1 or (at > place and one.time_ns > event.time_ns)
            ask = one.kind in (Kind.REQUEST_ALL, Kind.REQUEST_ALL_END) and (one.detail, asks_for(one)) == (vm, bit)
            if one.time_ns >= event.since_ns and ((kick and holds) or ask):
                return max(at, place + 1)
            if one.kind == Kind.REQUEST_ALL:
                going[one.tid] = one
            elif one.kind == Kind.REQUEST_ALL_END:
                going.pop(one.tid, None)
        if over < len(events) and any((one.detail, asks_for(one)) == (vm, bit) for one in going.values()):
            return max(over, place + 1)
        if over == len(events) or end < due or not named:
            self.undecided[rule] += 1
        else:
            self.broken.append((rule, event.vcpu, bit, event.time_ns, event.since_ns))
        return over

    def stays(self) -> None:
        rule, told = "wait_returned_early", set[int]()
        for place, still in enumerate(self.events):
            if still.kind != Kind.IN_GUEST_STILL:
                continue
            asks = [one for one in self.events[:place] if one.kind == Kind.REQUEST_ALL and one.tid == still.tid]
            if not asks or asks[-1].time_ns != still.since_ns or asks[-1].requests != EVERYONE:
                continue
            at = self.last(place, still.vcpu)
            if at is None or at in told:
                continue
            entry = self.events[at]
            if entry.kind != Kind.GUEST_ENTRY or entry.time_ns >= still.since_ns:
                continue
            told.add(at)
            after = self.next(place, still.vcpu)
            left = self.events[after] if after is not None else None
            if left is None or left.seq != entry.seq + 1:
                self.undecided[rule] += 1
            elif left.kind == Kind.GUEST_EXIT and left.time_ns > still.time_ns:
                self.broken.append((rule, still.vcpu, asks_for(still), still.time_ns, still.since_ns))


def of_rules(found: Ordered, name: str) -> dict[str, int]:
    return {str(rule): int(count) for rule, count in zip(found.rules["rule"], found.rules[name], strict=True) if count}


@THOROUGH
@given(STEPS, SWAPS, DROPPED, CUTS)
def test_the_rules_say_what_the_oracle_says(
    steps: list[tuple[int, int, int]], swaps: list[int], dropped: set[int], cuts: list[int]
) -> None:
    events = played(steps, swaps, dropped)
    found, oracle = judged(events, cuts), Oracle(events)
    bits: dict[str, int | str] = {name: bit for bit, name in NAMES.items()} | {NO_BIT: NO_BIT}
    told = [
        (row["rule"], row["vcpu_number"], bits[row["request"]], row["time_ns"], row["since_ns"])
        for row in found.breaks.to_dict("records")
    ]
    assert sorted(told, key=repr) == sorted(oracle.broken, key=repr)
    assert of_rules(found, "checked") == {rule: count for rule, count in oracle.checked.items() if count}
    assert of_rules(found, "undecided") == {rule: count for rule, count in oracle.undecided.items() if count}


@THOROUGH
@given(STEPS, SWAPS, DROPPED, CUTS)
def test_how_a_stream_is_cut_changes_nothing(
    steps: list[tuple[int, int, int]], swaps: list[int], dropped: set[int], cuts: list[int]
) -> None:
    events = played(steps, swaps, dropped)
    whole = judged(events)
    for other in (judged(events, cuts), judged(events, range(len(events)))):
        pd.testing.assert_frame_equal(whole.rules, other.rules)
        pd.testing.assert_frame_equal(whole.breaks, other.breaks)
