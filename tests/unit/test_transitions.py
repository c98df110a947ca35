"""The comparison of two engines finds every difference that is put into a recording, and excuses only a race."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from probes.schema import EVENT, Kind
from tests.matrix import busy
from tests.matrix.transitions import Events, Story, compare

PID, TID, OTHER = 40, 41, 42
NMI, EVENT_BIT, TLB, SMI = 16, 14, 0, 6
NAMES = {NMI: "nmi", EVENT_BIT: "event", TLB: "tlb_flush", SMI: "smi"}
VCPU = (PID, 0, 0)
RUN = 0xAE80
STEP_NS = 1_000_000_000  # between two hooks: far more than the window in which a kick belongs to a raise
EXITS = 5


def steps() -> list[tuple[Kind, int, int, int]]:
    """Return what a vCPU does: kind, arg, detail, requests."""
    made = [(Kind.VCPU_NEW, 0, 7, 0)]
    for ioctl, name, times in busy.known(smm=True):
        bit = next(bit for bit, known in NAMES.items() if known == name)
        for _ in range(times):
            made += [(Kind.IOCTL_ENTER, ioctl, 0, 0), (Kind.IOCTL_EXIT, ioctl, 0, 1 << bit)]
            made += [(Kind.RUN_ENTER, RUN, 0, 1 << bit), (Kind.GUEST_ENTRY, 0, 0, 0), (Kind.GUEST_EXIT, 0x7B, 2, 0)]
            made += [(Kind.RUN_EXIT, 2, 0, 0)]
    made += [(Kind.RUN_ENTER, RUN, 0, 0), (Kind.WAKEUP, 900, 1, 1 << NMI)]
    for _ in range(EXITS):
        made += [(Kind.GUEST_ENTRY, 0, 0, 0), (Kind.GUEST_EXIT, 0x60, 2, 1 << NMI)]
    return [*made, (Kind.RUN_EXIT, 2, 0, 0), (Kind.VCPU_END, 4, 0, 0)]


def recorded(engine: str, offset_ns: int, change: Callable[[Events], Events] = lambda events: events) -> Story:
    """Return the story of an engine that reads so much later, with a change in it."""
    rows = np.zeros(len(steps()), EVENT)
    for at, (kind, arg, detail, requests) in enumerate(steps()):
        rows[at] = ((at + 1) * STEP_NS + offset_ns, 0, requests, 0, arg, 1, 0, PID, TID, detail, 0, kind, 0)
    rows = change(rows)
    own = ~np.isin(rows["kind"], (Kind.KICK,))
    rows["seq"][own] = np.arange(1, own.sum() + 1)
    rows["before"][np.flatnonzero(own)[1:]] = rows["requests"][own][:-1]
    rows["since_ns"][np.flatnonzero(own)[1:]] = rows["time_ns"][own][:-1]
    kicks = np.zeros(EXITS, EVENT)
    kicks["kind"], kicks["tid"], kicks["requests"], kicks["vcpu"] = Kind.KICK, OTHER, 1 << NMI, 1
    kicks["time_ns"] = rows["time_ns"][rows["arg"] == 0x60][:EXITS] - STEP_NS // 2
    return Story(engine, NAMES, 0, {VCPU: np.concatenate([rows, kicks])}, np.zeros(0, EVENT))


def told(**counts: int) -> dict[str, Any]:
    """Return what tracefs counted, and what the guest did."""
    entries = sum(kind == Kind.GUEST_ENTRY for kind, *_ in steps())
    return {
        "tracefs": {
            "kvm_entry": {"0": entries},
            "kvm_exit": {"0": entries},
            **{k: {"0": n} for k, n in counts.items()},
        },
        "work": {"smm": True},
    }


def test_the_same_story_is_the_same() -> None:
    """However much later one of them reads."""
    result = compare(recorded("kprobe", 0), recorded("ftrace", 5000), told())
    assert result.differences == []
    assert (result.exits, result.excused) == (busy.NMIS + busy.SMIS + busy.INTERRUPTS + EXITS, 0)
    assert result.transitions > 2 * result.exits - 2


def at(kind: Kind, number: int) -> int:
    """Return where the so-manyth event of a kind is."""
    return [place for place, step in enumerate(steps()) if step[0] == kind][number]


def without(place: int) -> Callable[[Events], Events]:
    """Return what takes an event away."""
    return lambda events: np.delete(events, place)


def with_(place: int, **fields: int) -> Callable[[Events], Events]:
    """Return what gives an event other fields."""

    def change(events: Events) -> Events:
        for name, value in fields.items():
            events[name][place] = value
        return events

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(at(Kind.GUEST_EXIT, 3)), "is not the same"),
        (without(at(Kind.WAKEUP, 0)), "woken"),
        (with_(at(Kind.GUEST_EXIT, 3), arg=0x7C), "arg: GUEST_EXIT"),
        (with_(at(Kind.GUEST_EXIT, 3), detail=1), "detail: GUEST_EXIT"),
        (with_(at(Kind.RUN_EXIT, 3), tid=9), "tid: RUN_EXIT"),
        (with_(at(Kind.IOCTL_EXIT, 3), requests=0), "nmi is pending after 22 of 23 ioctls"),
        (with_(at(Kind.GUEST_ENTRY, 3), requests=1 << TLB), "tlb_flush at GUEST_ENTRY"),
        (with_(at(Kind.GUEST_EXIT, -1), requests=0), "nmi at GUEST_EXIT"),
    ],
)
@pytest.mark.parametrize("offset_ns", [-5000, 5000])
def test_every_difference_is_told(change: Callable[[Events], Events], words: str, offset_ns: int) -> None:
    """Whichever of them reads first; nobody is seen to raise what one of them has alone."""
    result = compare(recorded("kprobe", 0), recorded("ftrace", offset_ns, change), told())
    assert any(words in one for one in result.differences), result.differences


def kicked(place: int, before_ns: int) -> Callable[[Story], Story]:
    """Return what adds a kick with a TLB flush so long before an event."""

    def change(story: Story) -> Story:
        events = story.vcpus[VCPU]
        kick = events[-1:].copy()
        kick["requests"] = 1 << TLB
        kick["time_ns"] = events["time_ns"][place] - before_ns
        return Story(story.engine, story.requests, 0, {VCPU: np.concatenate([events, kick])}, story.vms)

    return change


def many(story: Story) -> Story:
    """Have other threads raise so much that one race among it is rare."""
    for place in range(40):
        story = kicked(place, STEP_NS // 2)(story)
    return story


def test_a_race_is_excused_where_it_can_be_one() -> None:
    """The later reading has what another thread raised between the two; the other way round it cannot be."""
    place = at(Kind.GUEST_EXIT, 30)
    raised = with_(place, requests=1 << TLB)
    race = kicked(place, 2500)
    result = compare(many(race(recorded("kprobe", 0))), many(race(recorded("ftrace", 5000, raised))), told())
    assert (result.differences, result.excused) == ([], 1)
    result = compare(many(race(recorded("kprobe", 0, raised))), many(race(recorded("ftrace", 5000))), told())
    assert any("kprobe has it, whose reading is 5000 ns earlier" in one for one in result.differences)
    result = compare(race(recorded("kprobe", 0)), race(recorded("ftrace", 5000, raised)), told())
    assert any("seen by one engine only" in one for one in result.differences)  # rare it is not


def test_kicks_are_counted_by_who_makes_them() -> None:
    """One more in one of them is a difference."""
    one, other = recorded("kprobe", 0), kicked(3, 1)(recorded("ftrace", 0))
    assert any("kicks of" in each for each in compare(one, other, told()).differences)


def test_tracefs_has_the_last_word_on_entries_and_exits() -> None:
    """And what was lost is no equality."""
    result = compare(recorded("kprobe", 0), recorded("ftrace", 0), told(kvm_exit=1))
    assert sum("and tracefs" in one for one in result.differences) == 2
    story = recorded("kprobe", 0)
    lossy = Story(story.engine, story.requests, 3, story.vcpus, story.vms)
    assert "3 events" in compare(lossy, recorded("ftrace", 0), told()).differences[0]


def test_a_story_with_a_gap_does_not_hold_together() -> None:
    """Neither in its numbers nor in what it says that it read before."""
    for name in ("seq", "before"):
        story = recorded("ftrace", 0)
        story.vcpus[VCPU][name][4] ^= 1 << 20
        assert any("hold together" in one for one in compare(recorded("kprobe", 0), story, told()).differences)
