"""What stat counts in a recording, of events written out in the test."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from analysis import exit_rules
from analysis.events import columns_of, event_at
from analysis.passes import Pass
from analysis.stat import Recorded
from probes.exits import Kind as Exit
from probes.schema import EVENT, Kind
from probes.stat import Counts

_EINTR = 10 | (2**32 - 4) << 32  # KVM_EXIT_INTR, and what KVM_RUN returned


def events(*steps: tuple[int, Kind] | tuple[int, Kind, dict[str, int]]) -> Any:
    """Return events of one vCPU, numbered."""
    made = np.zeros(len(steps), EVENT)
    for at, (time_ns, kind, *values) in enumerate(steps):
        made["time_ns"][at], made["kind"][at], made["seq"][at] = time_ns, kind, at + 1
        for name, value in (values[0] if values else {}).items():
            made[name][at] = value
    made["vcpu"], made["pid"] = 1, 4711
    return made


def counted(counts: Counts) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return count, sum_ns, max_ns and the number of times, by kind, reason and variant."""
    rows = zip(counts.keys.tolist(), counts.values, strict=True)
    return {
        key[1:]: (int(one["count"]), int(one["sum_ns"]), int(one["max_ns"]), int(one["buckets"].sum()))
        for key, one in rows
    }


def told(stream: Any, isa: int = 1) -> Recorded:
    """Return what a stream tells."""
    recorded = Recorded()
    recorded.feed(stream, isa)
    return recorded


def test_an_exit_ends_once_and_begins_anew() -> None:
    """What begins again before its end never ended, as far as is known; a clock that goes back makes no time."""
    recorded = told(events(
        (10, Kind.GUEST_EXIT, {"arg": 48}), (15, Kind.GUEST_ENTRY), (17, Kind.GUEST_ENTRY),
        (20, Kind.GUEST_EXIT, {"arg": 48}), (30, Kind.GUEST_EXIT, {"arg": 48}), (28, Kind.GUEST_ENTRY),
        (40, Kind.RUN_EXIT, {"arg": 2}), (47, Kind.RUN_ENTER), (90, Kind.RUN_ENTER),
    ))  # fmt: skip
    assert counted(recorded.counts) == {(Exit.GUEST, 48, 1): (3, 5, 5, 2), (Exit.USER, 2, 0): (1, 7, 7, 1)}
    assert recorded.events == {Exit.GUEST: 6, Exit.USER: 3}


def test_an_event_names_its_instruction_set_or_the_recording_does() -> None:
    """And an exit to user space what KVM_RUN returned."""
    recorded = told(
        events((1, Kind.GUEST_EXIT, {"detail": 2}), (2, Kind.GUEST_EXIT), (3, Kind.RUN_EXIT, {"arg": _EINTR}))
    )
    assert sorted(counted(recorded.counts)) == [(Exit.GUEST, 0, 1), (Exit.GUEST, 0, 2), (Exit.USER, 10, -4)]


@pytest.mark.parametrize(
    ("high", "value"), [(0, 0), (1, 1), (2**31 - 1, 2**31 - 1), (2**31, -(2**31)), (2**32 - 4, -4)]
)
def test_what_kvm_run_returned_is_an_int(high: int, value: int) -> None:
    columns = columns_of(events((1, Kind.RUN_EXIT, {"arg": 10 | high << 32})))
    assert exit_rules.error(event_at(columns, 0)) == value


def test_equal_exits_are_counted_in_one_row() -> None:
    """So what is carried over grows with reasons, not with exits."""
    stream = events(
        (1, Kind.RUN_EXIT), (4, Kind.RUN_ENTER), (6, Kind.RUN_EXIT), (9, Kind.RUN_ENTER), (10, Kind.RUN_EXIT)
    )  # fmt: skip
    recorded = told(stream)
    assert counted(recorded.counts) == {(Exit.USER, 0, 0): (3, 6, 3, 2)} and recorded.events[Exit.USER] == 5
    walk = Pass({}, counts=True)
    walk.feed(stream)
    assert walk.now.exits == 1


def test_gaps_are_added_up() -> None:
    assert told(events((1, Kind.RUN_EXIT, {"seq": 3}), (2, Kind.RUN_EXIT, {"seq": 7}))).gaps == 2 + 3


def test_words_change_of_more_vcpus_than_there_was_room_for_and_nothing_exits() -> None:
    many = 1_103
    stream = np.zeros(many, EVENT)
    stream["vcpu"], stream["seq"], stream["kind"], stream["since_ns"] = 1 + np.arange(many), 1, Kind.SITE, 1
    stream["requests"] = 1
    counts = told(stream).counts
    assert counts.words["raised"][:, 0].tolist() == [1] * many and not len(counts.keys)


def test_a_time_across_a_gap_is_not_counted() -> None:
    """Nor one across events of two threads, whose order is not certain: of either kind of exit."""
    for later, gaps in ((4, 1), (2, -1)):
        recorded = told(events(
            (1, Kind.GUEST_EXIT), (2, Kind.RUN_EXIT), (5, Kind.RUN_ENTER, {"seq": later}),
            (6, Kind.GUEST_ENTRY, {"seq": later + 1}),
        ))  # fmt: skip
        assert [one[1:] for one in counted(recorded.counts).values()] == [(0, 0, 0)] * 2
        assert recorded.gaps == gaps


def test_what_is_carried_over_is_bounded_by_the_vcpus_that_are_alive() -> None:
    """Their end, and that of their process, is the end of what goes on; what was counted stays."""
    one = events((1, Kind.RUN_EXIT), (9, Kind.VCPU_END))
    other = events((1, Kind.RUN_EXIT), (2, Kind.IOCTL_ENTER))
    other["vcpu"] = 2
    gone = events((20, Kind.VMM_EXIT))
    gone["vcpu"] = gone["seq"] = 0
    recorded = told(np.concatenate((one, other)))
    assert [vcpu["number"] for vcpu in recorded.carried] == [2]
    recorded.feed(gone)
    assert not len(recorded.carried)
    assert counted(recorded.counts) == {(Exit.USER, 0, 0): (1, 0, 0, 0)} and len(recorded.counts.keys) == 2


def test_more_is_counted_than_there_was_room_for() -> None:
    """401 reasons of 3 vCPUs each, and then 1,103 vCPUs whose word changes."""
    many, others = 401, 1_103
    stream = np.zeros(3 * many + others, EVENT)
    exits, changes = stream[: 3 * many], stream[3 * many :]
    exits["vcpu"], exits["arg"] = np.arange(3 * many) % 3 + 1, np.arange(3 * many) // 3
    exits["seq"], exits["kind"] = exits["arg"] + 1, Kind.GUEST_EXIT
    changes["vcpu"], changes["seq"], changes["kind"], changes["since_ns"] = 10 + np.arange(others), 1, Kind.SITE, 1
    changes["requests"], changes["before"] = 1 << 63 | 5, 4 | 2
    recorded = told(stream)
    counts = recorded.counts
    assert len(counts.keys) == 3 * many and (counts.values["count"] == 1).all() and not recorded.gaps
    assert counts.vcpus.tolist() == list(range(10, 10 + others))
    for name, bits in (("raised", [0, 63]), ("serviced", [1])):
        assert np.flatnonzero(counts.words[name].all(axis=0)).tolist() == bits
        assert counts.words[name].sum() == len(bits) * others
