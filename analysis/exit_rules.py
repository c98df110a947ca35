"""What is counted: exits by reason and how long they take, and what comes and goes in the word.

A state machine of one event at a time, for the walk (analysis/walk.py). What it carries over is in the vCPU's record:
which exit goes on, and since when. What it counts is in :class:`Counted`, which the walk only adds to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from analysis import columns
from analysis.compiled import compiled
from analysis.events import NOTHING, Array, Event, low, lowest, signed, without_lowest
from analysis.memory import NONE, Memory, Record
from probes.exits import Kind as Exit
from probes.schema import Kind
from probes.stat import BITS, BUCKETS

_WORD = np.uint64(32)
_ERRORS = 1 << 31  # KVM_RUN's return is an int: from here on it is below 0


class Counted(NamedTuple):
    """All that was counted: a row for each vCPU and reason, and one for each vCPU whose word has changed."""

    exits: Array  # columns.EXITS
    buckets: npt.NDArray[Any]  # of each exit, in its row: how many of its times are in each bucket
    changes: Array  # columns.CHANGED


def nothing(rows: int) -> Counted:
    """Return room for so many rows, with nothing counted."""
    return Counted(np.zeros(rows, columns.EXITS), np.zeros((rows, BUCKETS), np.int64), np.zeros(rows, columns.CHANGED))


def larger(counted: Counted) -> Counted:
    """Return what was counted with twice as much room."""
    made = nothing(2 * len(counted.exits))
    for old, new in zip(counted, made, strict=True):
        new[: len(old)] = old
    return made


@compiled
def room(counted: Counted, memory: Memory) -> int:
    """Return how many events there is room for: each begins one exit at most, and changes one word."""
    return int(min(len(counted.exits) - memory.now.exits, len(counted.changes) - memory.now.changes))


# --- one event ----------------------------------------------------------------------------------------------------


@compiled
def count(counted: Counted, memory: Memory, vcpu: Record, event: Event, missing: int) -> None:
    """Handle an own event of a vCPU: kvm_exit until kvm_entry is one time, kvm_userspace_exit until KVM_RUN another."""
    if missing != 0:
        # The end of what goes on, or another beginning, may be among what is missing.
        vcpu.guest_exit = vcpu.user_exit = NONE
        memory.now.missing += missing
    changed(counted, memory, vcpu, event)
    if event.kind == Kind.GUEST_EXIT:
        memory.now.guest_events += 1
        vcpu.guest_exit = began(counted, memory, vcpu, Exit.GUEST, low(event), event.detail)
        vcpu.guest_exit_ns = event.time_ns
    elif event.kind == Kind.GUEST_ENTRY:
        memory.now.guest_events += 1
        ended(counted, vcpu.guest_exit, event.time_ns - vcpu.guest_exit_ns)
        vcpu.guest_exit = NONE
    elif event.kind == Kind.RUN_EXIT:
        memory.now.user_events += 1
        vcpu.user_exit = began(counted, memory, vcpu, Exit.USER, low(event), error(event))
        vcpu.user_exit_ns = event.time_ns
    elif event.kind == Kind.RUN_ENTER:
        memory.now.user_events += 1
        ended(counted, vcpu.user_exit, event.time_ns - vcpu.user_exit_ns)
        vcpu.user_exit = NONE


@compiled
def error(event: Event) -> int:
    """Return what KVM_RUN returned: 0, or a negative errno."""
    value = signed(event.arg >> _WORD)
    return value - 2 * _ERRORS if value >= _ERRORS else value


@compiled
def began(counted: Counted, memory: Memory, vcpu: Record, kind: int, reason: int, variant: int) -> int:
    """An exit begins: count it; return its row."""
    row = row_of(counted, memory, vcpu, kind, reason, variant)
    counted.exits[row].count += 1
    return row


@compiled
def ended(counted: Counted, row: int, lasted_ns: int) -> None:
    """What began, if its beginning was seen, has ended: count its time."""
    if row == NONE:
        return
    exits, lasted_ns = counted.exits[row], max(lasted_ns, 0)
    exits.sum_ns += lasted_ns
    exits.max_ns = max(exits.max_ns, lasted_ns)
    counted.buckets[row, bucket(lasted_ns)] += 1


@compiled
def bucket(lasted_ns: int) -> int:
    """Return the bucket of a time: stat_bucket() of probes/programs/stat.c."""
    above, top = 0, lasted_ns
    while top >= 2 << BITS:
        top >>= 1
        above += 1
    return min((above << BITS) + top, BUCKETS - 1)


@compiled
def row_of(counted: Counted, memory: Memory, vcpu: Record, kind: int, reason: int, variant: int) -> int:
    """Return the row of a vCPU's exits for a reason: a new one where there is none."""
    row: int = vcpu.exits
    while row != NONE:
        exits = counted.exits[row]
        if exits.reason == reason and exits.kind == kind and exits.variant == variant:
            return row
        row = exits.next
    row = memory.now.exits
    memory.now.exits += 1
    exits = counted.exits[row]
    exits.vcpu, exits.kind, exits.reason, exits.variant = vcpu.number, kind, reason, variant
    exits.next, vcpu.exits = vcpu.exits, row
    return row


# --- the word -----------------------------------------------------------------------------------------------------


@compiled
def changed(counted: Counted, memory: Memory, vcpu: Record, event: Event) -> None:
    """Count what came and what went since the reading before; of the first one of a vCPU nobody knows."""
    change = event.requests ^ event.before
    if event.since_ns <= 0 or change == NOTHING:
        return
    if vcpu.changes == NONE:
        vcpu.changes = memory.now.changes
        memory.now.changes += 1
        counted.changes[vcpu.changes].vcpu = vcpu.number
    row = counted.changes[vcpu.changes]
    add(row.raised, change & event.requests)
    add(row.serviced, change & event.before)


@compiled
def add(bits: Array, word: Any) -> None:
    """Count each bit of a word."""
    while word != NOTHING:
        bits[lowest(word)] += 1
        word = without_lowest(word)
