"""What is carried over from event to event: places for records, and an index of them by number.

A place holds a vCPU, a VM, a pending request, a kick ... : whatever analysis/columns.py describes. Places that are
freed are used again, so that what is carried over is bounded by the vCPUs alive. What belongs to a vCPU (its pending
requests, kicks, cases) is a list that begins in the vCPU's record: ``next`` leads on, NONE ends it. Nothing here grows
while an event is handled: the pass asks for room first (analysis/walk.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from analysis import columns
from analysis.compiled import compiled

Array = npt.NDArray[Any]
#: A place: ``row.name`` reads and writes a column.
Record: TypeAlias = Any

NONE = -1
# What a number in the index is of.
VCPU, VM, THREAD = range(3)
_KINDS = 4


class Memory(NamedTuple):
    """All that is carried over."""

    rows: Array  # places: columns.PLACE
    slots: Array  # pairs: key, or 0 where it is free; place. Keys that follow each other stand beside each other
    now: Record  # what there is once: columns.ONCE


def empty(places: int = 1 << 14) -> Memory:
    """Return a memory in which nothing is known."""
    once = np.zeros(1, columns.ONCE)
    for name in ("free", "last", *columns.GIVEN):
        once[name] = NONE
    for name in ("vcpu", "vm", "case", "thread"):
        once[f"first_{name}"] = NONE
    once["due_ns"], once["dark_ns"] = np.iinfo(np.int64).max, -1
    return Memory(np.zeros(places, columns.PLACE), np.zeros(2 * places, np.int64), once[0])


def larger(memory: Memory) -> Memory:
    """Return a memory with twice as many places, each record where it was."""
    rows = np.zeros(2 * len(memory.rows), memory.rows.dtype)
    rows[: len(memory.rows)] = memory.rows
    made = Memory(rows, np.zeros(2 * len(rows), np.int64), memory.now)
    memory.now.indexed = 0
    fill(memory.slots, made)
    return made


@compiled
def fill(old: Array, memory: Memory) -> None:
    """Put all of an index into another one."""
    for slot in range(0, len(old), 2):
        if old[slot] != 0:
            _put(memory, old[slot], old[slot + 1])


@compiled
def take(memory: Memory) -> int:
    """Return a free place."""
    now = memory.now
    place: int = now.free
    if place != NONE:
        now.free = memory.rows[place].next
    else:
        place = now.top
        now.top += 1
    now.used += 1
    return place


@compiled
def give(memory: Memory, place: int) -> None:
    """Free a place."""
    memory.rows[place].next = memory.now.free
    memory.now.free = place
    memory.now.used -= 1


@compiled
def without(memory: Memory, head: int, place: int) -> int:
    """Take a place out of a list; return where the list begins then."""
    after: int = memory.rows[place].next
    if head == place:
        return after
    at = head
    while memory.rows[at].next != place:
        at = memory.rows[at].next
    memory.rows[at].next = after
    return head


@compiled
def into(memory: Memory, head: int, place: int) -> int:
    """Put a place into the list of all of its kind; return where the list begins then."""
    memory.rows[place].before, memory.rows[place].after = NONE, head
    if head != NONE:
        memory.rows[head].before = place
    return place


@compiled
def out_of(memory: Memory, head: int, place: int) -> int:
    """Take a place out of the list of all of its kind; return where the list begins then."""
    before: int = memory.rows[place].before
    after: int = memory.rows[place].after
    if after != NONE:
        memory.rows[after].before = before
    if before == NONE:
        return after
    memory.rows[before].after = after
    return head


# --- the index: open addressing, half empty -----------------------------------------------------------------------


@compiled
def _key(kind: int, number: int) -> int:
    return number * _KINDS + kind + 1


@compiled
def look(memory: Memory, kind: int, number: int) -> int:
    """Return the place of a number, or NONE."""
    key, mask = _key(kind, number), len(memory.slots) - 1
    slot = 2 * key & mask
    while memory.slots[slot] != 0:
        if memory.slots[slot] == key:
            return int(memory.slots[slot + 1])
        slot = slot + 2 & mask
    return NONE


@compiled
def put(memory: Memory, kind: int, number: int, place: int) -> None:
    """Add a number that is not there."""
    _put(memory, _key(kind, number), place)


@compiled
def _put(memory: Memory, key: int, place: int) -> None:
    mask = len(memory.slots) - 1
    slot = 2 * key & mask
    while memory.slots[slot] != 0:
        slot = slot + 2 & mask
    memory.slots[slot], memory.slots[slot + 1] = key, place
    memory.now.indexed += 1


@compiled
def drop(memory: Memory, kind: int, number: int) -> None:
    """Take a number out that is there; what a search would pass it by for moves into its place."""
    key, mask = _key(kind, number), len(memory.slots) - 1
    hole = 2 * key & mask
    while memory.slots[hole] != key:
        hole = hole + 2 & mask
    slot = hole + 2 & mask
    while memory.slots[slot] != 0:
        home = 2 * memory.slots[slot] & mask
        if slot - home & mask >= slot - hole & mask:
            memory.slots[hole], memory.slots[hole + 1] = memory.slots[slot], memory.slots[slot + 1]
            hole = slot
        slot = slot + 2 & mask
    memory.slots[hole] = 0
    memory.now.indexed -= 1
