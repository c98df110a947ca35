"""Rules of the order in which requests are handled: what breaks each, and what looks like it and is innocent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.cases import LATE_NS
from analysis.judge import judge
from analysis.lifecycle import LIFECYCLE
from analysis.ordering import BREAK, RULE, Ordered, Ordering
from analysis.promises import RULES
from analysis.timeline import timeline
from probes.schema import EVENT, IN_GUEST_MODE, REQUEST_FLAGS, Kind
from tests.property.oracle import Event
from tracer.loss import Loss, VcpuLoss

NAMES = {0: "tlb_flush", 9: "report_tpr_access", 10: "triple_fault", 14: "event", 17: "nmi", 23: "scan_ioapic"}
NAMES |= {11: "mmu_sync", 27: "ioapic_eoi_exit"}
FLAGS = {"tlb_flush": frozenset({"NO_WAKEUP", "WAIT"}), "nmi": frozenset[str]()}
TLB_FLUSH, TPR, TRIPLE_FAULT, MMU_SYNC, EVENT_BIT, NMI, SCAN = (1 << bit for bit in (0, 9, 10, 11, 14, 17, 23))
WAIT, NO_ACTION = REQUEST_FLAGS["WAIT"] | REQUEST_FLAGS["NO_WAKEUP"], REQUEST_FLAGS["NO_ACTION"]
EVERYONE = (1 << 64) - 1
PLAN: list[Mapping[str, Any]] = [
    {"fact": "", "hook": f"{via}:{target}", "unseen": None}
    for via, target in (
        ("raw_tracepoint", "kvm_entry"),
        ("raw_tracepoint", "kvm_exit"),
        ("raw_tracepoint", "kvm_vcpu_wakeup"),
        ("fentry", "kvm_vcpu_kick"),
        ("fentry", "kvm_make_all_cpus_request"),
        ("fexit", "kvm_make_all_cpus_request"),
        ("fentry", "kvm_make_vcpus_request_mask"),
    )
]
BLIND_PLAN = PLAN[:3]
# As the engines kprobe and ftrace have it.
KPROBE_PLAN: list[Mapping[str, Any]] = [
    {**line, "hook": line["hook"].replace("fentry:", via).replace("fexit:", "kretprobe:")}
    for via in ("kprobe:", "kprobe_event:")
    for line in PLAN
]


class Story:
    """Events as they come out of the ring, of one VM with two vCPUs that are in KVM_RUN from the beginning."""

    def __init__(self, *, new: bool = True) -> None:
        self.now = 1000
        self.events: list[Event] = []
        self.seq = {1: 0, 2: 0}
        self.word = {1: 0, 2: 0}
        self.read_ns = {1: 0, 2: 0}
        for vcpu in (1, 2):
            if new:
                self.own(vcpu, Kind.VCPU_NEW, arg=vcpu - 1, detail=1)
            self.own(vcpu, Kind.RUN_ENTER)

    def own(self, vcpu: int, kind: Kind, word: int = 0, *, arg: int = 0, detail: int = 0, lost: bool = False) -> Story:
        """Let the vCPU read its word."""
        self.now += 100
        self.seq[vcpu] += 1
        event = Event(
            self.now, self.read_ns[vcpu], word, self.word[vcpu], arg, vcpu, self.seq[vcpu], 50, vcpu, detail, 0, kind
        )  # fmt: skip
        self.word[vcpu], self.read_ns[vcpu] = word, self.now
        if not lost:
            self.events.append(event)
        return self

    def entry(self, word: int = 0, **more: Any) -> Story:
        return self.own(1, Kind.GUEST_ENTRY, word, **more)

    def exit(self, word: int = 0, **more: Any) -> Story:
        return self.own(1, Kind.GUEST_EXIT, word, **more)

    def kick(self, word: int, vcpu: int = 1) -> Story:
        self.now += 100
        self.events.append(
            Event(self.now, 0, word, word, 0, vcpu, 0, 50, 99, IN_GUEST_MODE, 3, Kind.KICK)
        )  # fmt: skip
        return self

    def ask(self, bit: int, *, end: int = 0, mask: int = EVERYONE, vm: int = 1, tid: int = 99) -> int:
        """Let a thread begin to make a request of vCPUs, or with ``end``, the moment of its begin, return from it."""
        self.now += 100
        kind = Kind.REQUEST_ALL_END if end else Kind.REQUEST_ALL
        self.events.append(Event(self.now, end, mask, mask, bit | WAIT, 0, 0, 50, tid, vm, 3, kind))
        return self.now

    def still(self, bit: int, begin_ns: int, *, tid: int = 99) -> Story:
        """Let a requester see at its return that vCPU 1 is in the guest with the request."""
        self.now += 100
        word = 1 << bit % 64
        self.events.append(
            Event(self.now, begin_ns, word, word, bit | WAIT, 1, 0, 50, tid, IN_GUEST_MODE, 3, Kind.IN_GUEST_STILL)
        )  # fmt: skip
        return self

    def later(self, ns: int = 2 * LATE_NS) -> Story:
        """Let time pass, with an event of another vCPU that tells of it."""
        self.now += ns
        return self.own(2, Kind.GUEST_ENTRY).own(2, Kind.GUEST_EXIT)

    def shows_kicks(self, bits: int = NMI | SCAN) -> Story:
        """Show that the hooks do tell of kicks for these requests."""
        return self.kick(bits, vcpu=2)


def batch(events: Sequence[Event]) -> Any:
    return np.array([event.record() for event in events], EVENT)


def judged(story: Story, *, plan: Sequence[Mapping[str, Any]] = PLAN, loss: Loss | None = None,
           lifecycles: pd.DataFrame | None = None, detail: str = "full") -> Ordered:  # fmt: skip
    """Return what the rules say, whole and event by event alike."""
    whole = Ordering(NAMES, FLAGS, plan, detail)
    whole.feed(batch(story.events), loss, lifecycles)
    one = whole.finish(loss)
    if loss is None:
        pieces = Ordering(NAMES, FLAGS, plan, detail)
        for event in story.events:
            pieces.feed(batch([event]))
        if lifecycles is None:
            again = pieces.finish()
            pd.testing.assert_frame_equal(one.rules, again.rules)
            pd.testing.assert_frame_equal(one.breaks, again.breaks)
    return one


def counts(found: Ordered, rule: str) -> tuple[int, int, int]:
    row = found.rules[found.rules["rule"] == rule].to_dict("records")[0]
    return int(row["checked"]), int(row["broken"]), int(row["undecided"])


# --- entered_with_request -------------------------------------------------------------------------------------------


def test_an_own_request_that_was_passed_over_breaks_the_rule() -> None:
    found = judged(Story().entry().exit(MMU_SYNC).entry(MMU_SYNC).exit())
    assert counts(found, "entered_with_request") == (2, 1, 0)
    (row,) = found.breaks.to_dict("records")
    assert (row["rule"], row["request"], row["vm"], row["pid"], row["vcpu"], row["vcpu_number"]) == (
        "entered_with_request", "mmu_sync", 1, 50, 0, 1,
    )  # fmt: skip
    assert row["time_ns"] - row["since_ns"] == 100 and "GUEST_EXIT" in row["story"]


def test_a_request_first_seen_at_the_entry_raced_with_it() -> None:
    assert counts(judged(Story().entry().exit().entry(NMI).exit(NMI).later()), "entered_with_request")[1:] == (0, 0)


def test_kvm_makes_event_itself_just_before_it_enters() -> None:
    found = judged(Story().entry().exit(EVENT_BIT).entry(EVENT_BIT).exit().later())
    assert counts(found, "entered_with_request") == (3, 0, 0)


def test_a_request_that_anyone_can_make_unseen_is_not_accused() -> None:
    found = judged(Story().entry().exit(TLB_FLUSH).entry(TLB_FLUSH).exit().later())
    assert counts(found, "entered_with_request")[1:] == (0, 0)


def test_a_kicked_request_that_was_passed_over_breaks_the_rule_when_no_kick_came() -> None:
    found = judged(Story().shows_kicks().entry().kick(NMI).exit(NMI).entry(NMI).exit().later())
    assert counts(found, "entered_with_request")[1:] == (1, 0)
    assert list(found.breaks["request"]) == ["nmi"]


@pytest.mark.parametrize("where", ["before the entry", "after the exit", "in the ring before its cause"])
def test_a_kicked_request_may_have_been_made_anew(where: str) -> None:
    story = Story().shows_kicks().entry().kick(NMI).exit(NMI)
    if where == "before the entry":
        story.kick(NMI).entry(NMI).exit()
    elif where == "after the exit":
        story.entry(NMI).exit(NMI).kick(0)
    else:
        story.entry(NMI).kick(NMI).exit()
        story.events[-3:-1] = story.events[-2], story.events[-3]
    assert counts(judged(story.later()), "entered_with_request")[1:] == (0, 0)


def test_between_two_entries_something_is_missing() -> None:
    found = judged(Story().entry(MMU_SYNC).entry(MMU_SYNC).exit())
    assert counts(found, "entered_with_request")[1:] == (0, 0)
    found = judged(Story().entry().exit(MMU_SYNC, lost=True).entry(MMU_SYNC).exit())
    assert counts(found, "entered_with_request")[1:] == (0, 1)


def test_without_kick_hooks_only_own_requests_are_judged() -> None:
    story = Story().entry().exit(MMU_SYNC | NMI).entry(MMU_SYNC | NMI).exit().later()
    found = judged(story, plan=BLIND_PLAN)
    assert list(found.breaks["request"]) == ["mmu_sync"]
    unchecked = found.rules.set_index("rule")["unchecked"]
    assert not unchecked["entered_with_request"] and not unchecked["starved"]
    assert all(unchecked[name] for name in ("wait_returned_early", "raise_without_kick", "service_order"))


# --- wait_returned_early --------------------------------------------------------------------------------------------


def early(story: Story, bit: int = 0, **ask: Any) -> Story:
    """Let a requester go by a vCPU that is in the guest."""
    begin = story.ask(bit, **ask)
    story.still(bit, begin)
    story.ask(bit, end=begin, **ask)
    return story


def test_a_requester_that_did_not_wait_breaks_the_rule() -> None:
    found = judged(early(Story().entry()).exit(TLB_FLUSH).later())
    assert counts(found, "wait_returned_early") == (1, 1, 0)
    (row,) = found.breaks.to_dict("records")
    assert (row["request"], row["vcpu_number"], row["vm"]) == ("tlb_flush", 1, 1)
    assert row["since_ns"] < row["time_ns"] and "left it at" in row["story"]


def test_a_request_without_a_bit_is_waited_for_under_its_own_name() -> None:
    """KVM_REQ_OUTSIDE_GUEST_MODE has the number of KVM_REQ_TLB_FLUSH, and no word shows it."""
    found = judged(early(Story().entry(), NO_ACTION).exit().later())
    assert counts(found, "wait_returned_early") == (1, 1, 0)
    assert found.breaks["request"].tolist() == ["outside_guest_mode"]


def test_a_request_without_a_bit_explains_none() -> None:
    """Whatever its number is."""
    story = Story().shows_kicks().entry()
    story.ask(17 | NO_ACTION, end=story.ask(17 | NO_ACTION))
    assert counts(judged(story.exit(NMI).later()), "raise_without_kick") == (1, 1, 0)


def test_of_one_stay_in_the_guest_one_break_is_told() -> None:
    assert counts(judged(early(early(Story().entry())).exit(TLB_FLUSH).later()), "wait_returned_early") == (2, 1, 0)


def test_a_vcpu_that_entered_after_the_request_was_begun_may_have_been_asked_by_another() -> None:
    story = Story()
    begin = story.ask(0)
    story.entry().still(0, begin).ask(0, end=begin)
    assert counts(judged(story.exit(TLB_FLUSH).later()), "wait_returned_early") == (1, 0, 0)


def test_a_vcpu_that_left_and_came_back_was_waited_for() -> None:
    story = Story().entry()
    begin = story.ask(0)
    story.exit(TLB_FLUSH).entry().still(0, begin).ask(0, end=begin)
    assert counts(judged(story.exit(TLB_FLUSH).later()), "wait_returned_early") == (1, 0, 0)


def test_a_vcpu_outside_the_mask_was_not_asked() -> None:
    assert counts(judged(early(Story().entry(), mask=2).exit(TLB_FLUSH).later()), "wait_returned_early") == (0, 0, 0)


def test_a_lost_exit_leaves_it_undecided() -> None:
    story = early(Story().entry()).exit(TLB_FLUSH, lost=True).entry().exit().later()
    assert counts(judged(story), "wait_returned_early") == (1, 0, 1)


def test_an_exit_that_the_ring_holds_late_but_came_before_the_return_is_innocent() -> None:
    story = Story().entry()
    begin = story.ask(0)
    story.exit(TLB_FLUSH)
    story.still(0, begin)
    story.events[-2:] = story.events[-1], story.events[-2]
    assert counts(judged(story.later()), "wait_returned_early")[1:] == (0, 0)


# --- raise_without_kick ---------------------------------------------------------------------------------------------


def test_a_raise_in_the_guest_that_nobody_kicked_for_breaks_the_rule() -> None:
    found = judged(Story().shows_kicks().entry().exit(NMI).later())
    assert counts(found, "raise_without_kick") == (1, 1, 0)
    assert list(found.breaks["request"]) == ["nmi"]


@pytest.mark.parametrize("bits", [NMI, NMI | SCAN])
def test_a_kick_explains_the_raise(bits: int) -> None:
    assert counts(judged(Story().shows_kicks().entry().kick(bits).exit(NMI).later()), "raise_without_kick") == (1, 0, 0)


def test_a_kick_for_another_request_does_not() -> None:
    found = judged(Story().shows_kicks().entry().kick(EVENT_BIT).exit(NMI | EVENT_BIT).later())
    assert counts(found, "raise_without_kick") == (1, 1, 0)


def test_a_kick_can_follow_the_exit() -> None:
    assert counts(judged(Story().shows_kicks().entry().exit(NMI).kick(0).later()), "raise_without_kick") == (1, 0, 0)
    story = Story().shows_kicks().entry().exit(NMI)
    story.now += LATE_NS // 2
    assert counts(judged(story.kick(0).later()), "raise_without_kick") == (1, 0, 0)
    story = Story().shows_kicks().entry().exit(NMI).later().kick(0)
    assert counts(judged(story), "raise_without_kick") == (1, 1, 0)


def test_a_kick_may_stand_in_the_ring_after_the_exit_that_it_caused() -> None:
    story = Story().shows_kicks().entry().kick(NMI).exit(NMI)
    story.events[-2:] = story.events[-1], story.events[-2]
    assert counts(judged(story.later()), "raise_without_kick") == (1, 0, 0)


def test_a_request_to_the_whole_vm_explains_the_raise() -> None:
    story = Story().shows_kicks().entry()
    begin = story.ask(23)
    story.exit(SCAN).ask(23, end=begin)
    assert counts(judged(story.later()), "raise_without_kick") == (1, 0, 0)
    story = Story().shows_kicks().entry()
    begin = story.ask(23, vm=2)
    story.exit(SCAN).ask(23, end=begin, vm=2)
    assert counts(judged(story.later()), "raise_without_kick") == (1, 1, 0)


def test_a_requester_can_have_begun_before_the_entry() -> None:
    story = Story().shows_kicks()
    begin = story.ask(23)
    story.entry().exit(SCAN)
    assert counts(judged(story), "raise_without_kick") == (1, 0, 1)  # not decided yet
    held_up = story.later()
    assert counts(judged(held_up), "raise_without_kick") == (1, 0, 0)
    held_up.ask(23, end=begin)
    assert counts(judged(held_up), "raise_without_kick") == (1, 0, 0)


def test_without_a_kick_ever_seen_for_it_the_hooks_may_be_blind() -> None:
    assert counts(judged(Story().entry().exit(NMI).later()), "raise_without_kick") == (1, 0, 1)


@pytest.mark.parametrize(
    "loss", [Loss(kicks=1), Loss(missed=1), Loss(ring_full=1, vcpus={2: VcpuLoss(1, 1, 2)}, not_written=1)]
)
def test_a_lost_kick_leaves_it_undecided(loss: Loss) -> None:
    assert counts(judged(Story().shows_kicks().entry().exit(NMI).later(), loss=loss), "raise_without_kick")[1:] == (
        0,
        1,
    )


def test_a_loss_before_it_does_not_matter() -> None:
    story = Story().shows_kicks().later()
    rules = Ordering(NAMES, FLAGS, PLAN, "full")
    rules.feed(batch(story.events), Loss(kicks=5))
    told = len(story.events)
    story.entry().exit(NMI).later()
    rules.feed(batch(story.events[told:]), Loss(kicks=5))
    assert counts(rules.finish(Loss(kicks=5)), "raise_without_kick") == (1, 1, 0)


def test_a_missing_part_leaves_it_undecided() -> None:
    story = Story().shows_kicks().entry().exit(NMI)
    rules = Ordering(NAMES, FLAGS, PLAN, "full")
    rules.feed(batch(story.events))
    rules.interrupt()
    told = len(story.events)
    story.later()
    rules.feed(batch(story.events[told:]))
    assert counts(rules.finish(), "raise_without_kick") == (1, 0, 1)


def test_a_raise_outside_the_guest_needs_no_kick() -> None:
    assert counts(judged(Story().own(1, Kind.WAKEUP, NMI, detail=1).entry().exit().later()), "raise_without_kick") == (
        0, 0, 0,
    )  # fmt: skip


def test_a_vcpu_that_ended_meanwhile_leaves_it_undecided() -> None:
    story = Story().shows_kicks().entry().exit(NMI).own(1, Kind.VCPU_END).later()
    assert counts(judged(story), "raise_without_kick") == (1, 0, 1)


def test_a_vm_that_is_not_known_leaves_it_undecided() -> None:
    found = judged(Story(new=False).shows_kicks().entry().exit(NMI).later())
    assert counts(found, "raise_without_kick") == (1, 0, 1)


@pytest.mark.parametrize("half", [0, 1])
def test_a_kprobe_can_be_left_out_of_an_interrupt(half: int) -> None:
    plan = KPROBE_PLAN[half * len(PLAN) :][: len(PLAN)]
    assert counts(judged(Story().shows_kicks().entry().exit(NMI).later(), plan=plan), "raise_without_kick") == (1, 0, 1)
    story = Story().shows_kicks().entry().exit(SCAN).later()
    assert counts(judged(story, plan=plan), "raise_without_kick") == (1, 1, 0)


# --- starved --------------------------------------------------------------------------------------------------------


def lifecycle(**changes: Any) -> pd.DataFrame:
    row = {
        "vm": 1, "pid": 50, "vcpu": 0, "vcpu_number": 1, "request": "nmi", "raised_by": "remote",
        "raised_after_ns": 1000, "raised_ns": 2000, "end": "serviced", "ended_after_ns": 2000 + 2 * LATE_NS,
        "ended_ns": 3000 + 2 * LATE_NS, "userspace_exits": 0, "saves": 0, "blind_saves": 0, "copies_without": False,
        "nested": False, "stale": False, "exposed": False, "why": "", "raised_in": "kernel", "requester_tid": 0,
        "requester_cpu": -1, "kicked_ns": -1, "left_guest_ns": -1, "reentered_ns": -1, **changes,
    }  # fmt: skip
    return pd.DataFrame(
        {name: pd.Series([row[name]], dtype="object" if dtype == "str" else dtype) for name, dtype in LIFECYCLE.items()}
    )


def test_a_request_that_waits_longer_than_the_bound_starves() -> None:
    found = judged(Story().later(), lifecycles=lifecycle())
    assert counts(found, "starved") == (1, 1, 0)
    (row,) = found.breaks.to_dict("records")
    assert row["time_ns"] - row["since_ns"] == 2 * LATE_NS and "2.000 s" in row["story"]


@pytest.mark.parametrize(
    "changes",
    [
        {"ended_after_ns": 2000 + LATE_NS},
        {"userspace_exits": 1},
        {"raised_in": "halted"},
        {"raised_in": "user_space"},
        {"request": "event"},
    ],
)
def test_a_request_that_waits_for_its_guest_does_not(changes: dict[str, Any]) -> None:
    assert counts(judged(Story().later(), lifecycles=lifecycle(**changes)), "starved")[1:] == (0, 0)


def test_a_vcpu_that_slept_meanwhile_did_not_starve_it() -> None:
    slept = Story().own(1, Kind.WAKEUP, NMI, detail=1).later()
    assert counts(judged(slept, lifecycles=lifecycle(raised_ns=1100)), "starved") == (1, 0, 0)
    polled = Story().own(1, Kind.WAKEUP, NMI, detail=0).later()
    assert counts(judged(polled, lifecycles=lifecycle(raised_ns=1100)), "starved") == (1, 1, 0)


def test_an_undecided_wait_is_undecided() -> None:
    assert counts(judged(Story().later(), lifecycles=lifecycle(end="undecided")), "starved") == (1, 0, 1)


def test_a_request_that_is_still_waiting_starves() -> None:
    rules = Ordering(NAMES, FLAGS, PLAN, "full")
    rules.feed(batch(Story().later().events))
    assert counts(rules.finish(Loss(), lifecycle(end="open", ended_ns=-1)), "starved") == (1, 1, 0)


# --- service_order --------------------------------------------------------------------------------------------------


def test_a_request_that_comes_first_was_passed_over() -> None:
    story = Story().entry().exit(MMU_SYNC | TRIPLE_FAULT).own(1, Kind.RUN_EXIT, MMU_SYNC, arg=8)
    found = judged(story.later())
    assert counts(found, "service_order") == (1, 1, 0)
    (row,) = found.breaks.to_dict("records")
    assert row["request"] == "mmu_sync" and row["story"].startswith("triple_fault was served")


def test_what_comes_later_may_wait() -> None:
    story = Story().entry().exit(NMI | TRIPLE_FAULT).own(1, Kind.RUN_EXIT, NMI, arg=8)
    assert counts(judged(story.later()), "service_order") == (1, 0, 0)


@pytest.mark.parametrize("kicked", [False, True])
def test_a_request_made_anew_by_another_thread_is_innocent(kicked: bool) -> None:
    story = Story().shows_kicks().entry().exit(NMI | 1 << 27)
    if kicked:
        story.kick(NMI)
    story.own(1, Kind.RUN_EXIT, NMI, arg=26)
    assert counts(judged(story.later()), "service_order") == (1, 0 if kicked else 1, 0)


def test_a_request_first_seen_at_the_exit_is_new() -> None:
    story = Story().entry().exit(TRIPLE_FAULT).own(1, Kind.RUN_EXIT, MMU_SYNC, arg=8)
    assert counts(judged(story.later()), "service_order") == (1, 0, 0)


def test_a_lost_event_before_the_exit_leaves_it_undecided() -> None:
    word = MMU_SYNC | TRIPLE_FAULT
    story = Story().entry().exit(word, lost=True).own(1, Kind.RUN_EXIT, MMU_SYNC, arg=8)
    assert counts(judged(story.later()), "service_order")[1:] == (0, 1)


# --- all of them ----------------------------------------------------------------------------------------------------


def test_nothing_is_checked_in_detail_boundary() -> None:
    found = judged(Story().entry().exit(MMU_SYNC).entry(MMU_SYNC), detail="boundary")
    assert set(found.rules["unchecked"]) == {"recorded with detail boundary"}
    assert not found.rules["checked"].any() and not len(found.breaks)


def test_each_rule_says_which_hook_it_lacks() -> None:
    def why(*lacking: str) -> dict[str, str]:
        plan = [line for line in PLAN if not line["hook"].endswith(lacking)]
        return {row["rule"]: row["unchecked"] for row in judged(Story(), plan=plan).rules.to_dict("records")}

    assert not any(why("nothing").values())
    assert {rule for rule, text in why("kvm_vcpu_wakeup").items() if text} == {"starved"}
    kicks = {"wait_returned_early", "raise_without_kick", "service_order"}
    assert {rule for rule, text in why("kvm_vcpu_kick").items() if text} == kicks
    assert {rule for rule, text in why("kvm_entry").items() if text} == {
        "entered_with_request", "wait_returned_early", "raise_without_kick",
    }  # fmt: skip
    traced = [{**line, "hook": line["hook"].replace("raw_tracepoint:", "trace_event:kvm:")} for line in PLAN]
    assert not judged(Story(), plan=traced).rules["unchecked"].any()


def test_an_empty_recording_has_every_rule_and_no_break() -> None:
    found = Ordering(NAMES, FLAGS, PLAN, "full").finish()
    assert list(found.rules["rule"]) == list(RULES)
    assert {name: str(dtype) for name, dtype in found.rules.dtypes.items()} == {
        name: {"i8": "int64"}.get(dtype, dtype) for name, dtype in RULE.items()
    }
    assert {name: str(dtype) for name, dtype in found.breaks.dtypes.items()} == {
        name: {"i8": "int64", "u4": "uint32"}.get(dtype, dtype) for name, dtype in BREAK.items()
    }


def test_the_first_breaks_are_kept_and_all_are_counted() -> None:
    story = Story()
    for _ in range(50):
        story.entry().exit(MMU_SYNC).entry(MMU_SYNC).exit()
    rules = Ordering(NAMES, FLAGS, PLAN, "full", most=7)
    rules.feed(batch(story.events))
    found = rules.finish()
    assert counts(found, "entered_with_request") == (100, 50, 0)
    assert (
        list(found.breaks["time_ns"]) == [event.time_ns for event in story.events if event.before & event.requests][:7]
    )


def test_nothing_is_carried_of_vcpus_that_ended() -> None:
    story = Story().shows_kicks().entry().exit(NMI)
    rules = Ordering(NAMES, FLAGS, PLAN, "full")
    rules.feed(batch(story.events))
    assert rules.carried == 3
    rules.feed(batch([Event(story.now + 10, kind=Kind.VMM_EXIT, pid=50, arg=2)]))
    assert rules.carried == 0


# --- a recording ----------------------------------------------------------------------------------------------------


class Recorded:
    """A recording that is never written: None stands for a segment that is missing."""

    clean = True

    def __init__(self, parts: Sequence[Sequence[Event] | None], detail: str = "full") -> None:
        self.meta = {
            "requests_by_bit": {str(bit): name for bit, name in NAMES.items()},
            "requests_flags": {name: sorted(of) for name, of in FLAGS.items()},
            "plan": PLAN,
            "detail": detail,
            "started_ns": 0,
        }
        self.parts = parts
        self.left_out: list[str] = []

    def segments(self) -> Iterator[Any]:
        for part in self.parts:
            yield None if part is None else SimpleNamespace(columns=batch(part), loss=Loss(), until_ns=1)


def test_a_judged_recording_says_how_the_rules_were_kept() -> None:
    story = Story().shows_kicks().entry().exit(MMU_SYNC).entry(MMU_SYNC).exit(NMI)
    told = len(story.events)
    story.later()
    parts = [story.events[:5], story.events[5:told], story.events[told:]]
    found = judge(Recorded(parts)).ordering
    assert counts(found, "entered_with_request") == (3, 1, 0)
    assert counts(found, "raise_without_kick") == (1, 1, 0)
    holed = judge(Recorded([*parts[:2], None, parts[2]])).ordering
    assert counts(holed, "raise_without_kick") == (1, 0, 1)


def test_a_recording_in_detail_boundary_says_why_nothing_was_checked() -> None:
    found = judge(Recorded([Story().events], detail="boundary")).ordering
    assert set(found.rules["unchecked"]) == {"recorded with detail boundary"}


def test_a_starved_request_is_found_in_the_lifecycles_of_its_batch() -> None:
    story = Story().entry().kick(NMI).exit(NMI)
    story.now += 2 * LATE_NS
    story.own(1, Kind.WAKEUP, NMI, detail=0).entry().exit().later()
    found = judge(Recorded([story.events[:6], story.events[6:]])).ordering
    assert counts(found, "starved") == (1, 1, 0)
    assert found.breaks["story"].str.contains("raised in guest").all()


# --- the timeline of a vCPU -----------------------------------------------------------------------------------------


def drawn(
    parts: Sequence[Sequence[Event] | None], begin_ns: int, end_ns: int, most: int = 100
) -> list[tuple[Any, ...]]:
    table = timeline(Recorded(parts), 1, begin_ns, end_ns, NAMES, most)
    assert {str(name): str(dtype) for name, dtype in table.dtypes.items()} == {
        "track": "object", "name": "object", "begin_ns": "int64", "end_ns": "int64",
    }  # fmt: skip
    return sorted(table.itertuples(index=False, name=None))


def test_a_timeline_tells_what_a_vcpu_did_and_who_kicked_it() -> None:
    story = Story().entry()
    entered = story.now
    story.kick(NMI).exit(NMI)
    left = story.now
    story.entry().exit()
    again = story.now
    story.own(1, Kind.RUN_EXIT, arg=5).own(1, Kind.RUN_ENTER)
    begun = story.ask(23)
    story.later()
    wanted = sorted(
        [
            ("guest", "guest", entered, left),
            ("guest", "guest", left + 100, again),
            ("kernel", "kernel", left, left + 100),
            ("kernel", "kernel", again, again + 100),
            ("kernel", "kernel", entered - 300, entered),
            ("user space", "user space", again + 100, again + 200),
            ("nmi", "nmi", left, left),
            ("kick", "thread 99 on CPU 3", entered + 100, entered + 100),
            ("kick", "scan_ioapic for all, thread 99 on CPU 3", begun, begun),
        ]
    )
    assert drawn([story.events], entered - 100, begun) == wanted
    assert drawn([story.events[:6], story.events[6:]], entered - 100, begun) == wanted
    assert drawn([story.events], left + 1, left + 2) == [("kernel", "kernel", left, left + 100)]
    assert drawn([], 0, 1 << 60) == []


def test_a_request_is_drawn_while_it_is_certainly_pending() -> None:
    story = Story().entry(NMI)
    begin = story.now
    story.exit(NMI).entry(NMI).exit().entry(NMI).later()
    own = [row for row in drawn([story.events], 0, story.now) if row[0] == "nmi"]
    assert own == [("nmi", "nmi", begin, begin + 200), ("nmi", "nmi", begin + 400, begin + 400)]


def test_a_timeline_ends_where_too_much_happened() -> None:
    story = Story()
    for _ in range(20):
        story.entry().kick(0).exit()
    rows = drawn([story.events], 0, story.now, most=10)
    assert len([row for row in rows if row[0] == "kick"]) == 10
    assert 3 <= len([row for row in rows if row[0] == "guest"]) <= 6


def test_nothing_is_drawn_across_a_hole() -> None:
    story = Story().entry()
    entered, told = story.now, len(story.events)
    story.exit().entry().exit()
    guest = [("guest", "guest", begin, begin + 100) for begin in (entered, entered + 200)]
    whole, holed = (
        drawn([story.events[:told], *hole, story.events[told:]], 0, story.now) for hole in ((), (None,))
    )  # fmt: skip
    assert [row for row in whole if row[0] == "guest"] == guest
    assert [row for row in holed if row[0] == "guest"] == guest[1:]
