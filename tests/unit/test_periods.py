"""Periods of events written out in the test: what is proved, and what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from analysis.periods import PERIODS, Edges, Periods
from probes.schema import EVENT, End, Flag, Kind

Shown = list[tuple[str, int, int]]


def events(*steps: tuple[int, Kind] | tuple[int, Kind, dict[str, int]]) -> Any:
    """Return events of one vCPU, numbered, each read where the one before was; times in ns since 1000."""
    made = np.zeros(len(steps), EVENT)
    for at, (time_ns, kind, *values) in enumerate(steps):
        made["time_ns"][at], made["kind"][at], made["seq"][at] = 1000 + time_ns, kind, at + 1
        made["since_ns"][at] = made["time_ns"][at - 1] if at else 0
        for name, value in (values[0] if values else {}).items():
            made[name][at] = value
    made["vcpu"], made["pid"] = 1, 4711
    return made


def shown(*parts: Edges) -> Shown:
    """Return periods in the order in which they end, times in ns since 1000."""
    found, open_ = [], dict[int, int]()
    for edges in parts:
        for time_ns, begins, number in zip(edges.time_ns.tolist(), edges.begins, edges.period.tolist(), strict=True):
            if begins:
                open_[number] = time_ns - 1000
            else:
                found.append((PERIODS[number], open_.pop(number), time_ns - 1000))
    assert not open_
    return found


def told(stream: Any) -> Shown:
    """Return the periods of a stream."""
    core = Periods()
    return shown(core.feed(stream), core.finish())


def test_kvm_run_is_divided_where_hooks_prove_it() -> None:
    """In the guest, in the kernel, asleep, and in user space between two KVM_RUNs."""
    assert told(events(
        (1, Kind.RUN_EXIT), (2, Kind.RUN_ENTER), (4, Kind.GUEST_ENTRY), (8, Kind.GUEST_EXIT),
        (60, Kind.WAKEUP, {"detail": 1, "arg": 50}), (61, Kind.RUN_EXIT),
    )) == [
        ("user space", 1, 2), ("kernel", 2, 4), ("guest", 4, 8), ("kernel", 8, 10), ("halted", 10, 60),
        ("KVM_RUN", 2, 61),
    ]  # fmt: skip


@pytest.mark.parametrize("silent", [Kind.SITE, Kind.RESET, Kind.VM_CAP])
def test_a_hook_of_kvm_after_the_guest_was_entered_hides_when_it_was_left(silent: Kind) -> None:
    """As long as none tells of that: KVM_RUN it was."""
    stream = events((1, Kind.RUN_EXIT), (2, Kind.RUN_ENTER), (4, Kind.GUEST_ENTRY), (6, silent), (9, Kind.RUN_EXIT))
    assert told(stream) == [("user space", 1, 2), ("kernel", 2, 4), ("KVM_RUN", 2, 9)]


def test_a_reset_by_user_space_begins_an_ioctl_and_a_save_through_kvm_run_is_none() -> None:
    """KVM_SET_REGS; with KVM_SYNC_X86_EVENTS kvm_run holds the save."""
    stream = events(
        (1, Kind.RUN_EXIT), (2, Kind.SAVE, {"flags": Flag.SYNC}), (5, Kind.RESET, {"arg": 7}), (8, Kind.IOCTL_EXIT)
    )  # fmt: skip
    assert told(stream) == [("user space", 1, 5), ("ioctl", 5, 8)]


def test_a_poll_is_no_sleep_and_a_sleep_no_longer_than_since_the_event_before() -> None:
    """WAKEUP: detail 0 if it only polled; the clock of its length may be another."""
    for detail, expected in ((0, []), (1, [("halted", 4, 9)])):
        stream = events(
            (2, Kind.RUN_ENTER), (4, Kind.GUEST_ENTRY), (9, Kind.WAKEUP, {"detail": detail, "arg": 1 << 63})
        )
        inside = [one for one in told(stream) if one[0] == "halted"]
        assert inside == expected


def test_a_sleep_is_proved_whatever_was_lost_before() -> None:
    """Its WAKEUP tells all of it."""
    assert told(events((50, Kind.WAKEUP, {"detail": 1, "arg": 40}))) == [("halted", 10, 50), ("KVM_RUN", 10, 50)]


def test_a_reading_between_two_events_is_a_hole() -> None:
    """In detail boundary most are: what the vCPU did there nobody knows."""
    stream = events((1, Kind.RUN_EXIT), (9, Kind.RUN_ENTER, {"since_ns": 1005}), (12, Kind.RUN_EXIT))
    assert told(stream) == [("KVM_RUN", 9, 12)]


@pytest.mark.parametrize(
    "later",
    [
        {"seq": 2},  # two threads: the number before was another one's
        {"time_ns": 1001},  # two threads: the clock was read before the other one's
    ],
)
def test_two_threads_at_once_prove_nothing(later: dict[str, int]) -> None:
    """Neither up to such an event, nor from it on."""
    stream = events(
        (1, Kind.RUN_EXIT), (2, Kind.RUN_ENTER), (3, Kind.GUEST_ENTRY, {"seq": 3}),
        (4, Kind.GUEST_EXIT, {"since_ns": 1002, **later}), (5, Kind.RUN_EXIT, {"seq": 5, "since_ns": 1001}),
        (7, Kind.RUN_ENTER, {"seq": 6}),
    )  # fmt: skip
    assert told(stream) == [("user space", 1, 2), ("kernel", 2, 3), ("KVM_RUN", 2, 3), ("user space", 5, 7)]


@pytest.mark.parametrize("how", [End.CLOSED, End.REUSED])
def test_a_vcpu_whose_memory_is_used_again_has_long_ended(how: End) -> None:
    """Else it did what it was doing until its end."""
    core = Periods()
    edges = core.feed(
        events((1, Kind.RUN_EXIT), (2, Kind.RUN_ENTER), (4, Kind.RUN_EXIT), (90, Kind.VCPU_END, {"arg": how}))
    )
    assert shown(edges)[2:] == [("user space", 4, 90)] * (how == End.CLOSED)
    assert not len(core.finish().vcpu)


def test_two_events_at_one_moment_are_in_order() -> None:
    """As the clock is read, one after the other: what was between them took no time."""
    stream = events(
        (1, Kind.RUN_EXIT), (2, Kind.RUN_ENTER), (2, Kind.GUEST_ENTRY), (8, Kind.GUEST_EXIT)
    )  # fmt: skip
    assert told(stream) == [("user space", 1, 2), ("kernel", 2, 2), ("guest", 2, 8), ("KVM_RUN", 2, 8)]


def test_why_the_guest_was_left_is_told_where_it_was_and_nowhere_else() -> None:
    """Not where a sleep begins or ends, nor at the end of all."""
    core = Periods()
    stream = events(
        (1, Kind.RUN_EXIT), (2, Kind.RUN_ENTER), (3, Kind.GUEST_ENTRY), (8, Kind.GUEST_EXIT, {"arg": 12, "detail": 2}),
        (20, Kind.WAKEUP, {"detail": 1, "arg": 5}), (21, Kind.GUEST_EXIT, {"arg": 7, "seq": 9}),
    )  # fmt: skip
    edges = core.feed(stream)
    left = {(time_ns - 1000, why) for time_ns, why in zip(edges.time_ns.tolist(), edges.left.tolist(), strict=True)}
    assert {one for one in left if one[1] != -1} == {(8, 2 << 32 | 12)}
    assert set(core.finish().left.tolist()) <= {-1}
    core = Periods()
    core.feed(stream[:4])
    end = core.finish()
    assert end.left.tolist() == [-1] * len(end.left) and len(end.left)


def test_what_others_do_to_a_vcpu_is_none_of_its_periods() -> None:
    """They have no number."""
    stream = events((1, Kind.RUN_EXIT), (2, Kind.KICK, {"seq": 0}), (7, Kind.RUN_ENTER, {"seq": 2, "since_ns": 1001}))
    assert told(stream) == [("user space", 1, 7)]


def test_a_process_ends_the_periods_of_its_vcpus_alone() -> None:
    """At their last event; those of others go on. The ends come last."""
    one = events((1, Kind.RUN_EXIT), (2, Kind.RUN_ENTER), (3, Kind.GUEST_ENTRY), (4, Kind.GUEST_EXIT))
    other = one.copy()
    other["vcpu"], other["pid"] = 2, 4712
    gone = events((9, Kind.VMM_EXIT, {"vcpu": 0, "seq": 0}))
    gone["vcpu"] = gone["seq"] = 0
    core = Periods()
    edges = core.feed(np.concatenate((one, other, gone)))
    assert edges.vcpu.tolist() == [1] * 6 + [2] * 6 + [1] * 2
    assert (edges.time_ns[-1], edges.begins[-1], PERIODS[edges.period[-1]]) == (1004, False, "KVM_RUN")
