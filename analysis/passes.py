"""Batches in, what the walk ends out: the side of the pass that makes room and is not compiled."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from analysis import alive, columns, compiled, exit_rules, memory, rules, walk
from analysis.events import Array, Batch, Columns, columns_of
from probes.schema import EVENT
from tracer.loss import Loss

# So many events are judged in less time than it takes to import numba and to load compiled code.
_FEW = 5_000

# Reasons and vCPUs that are counted before more room is made.
_ROWS = 1 << 10

#: Columns by name, as analysis/columns.py describes them; words are small numbers.
Table: TypeAlias = dict[str, Array]


class Rows:
    """Columns that grow: what the walk gives out, and with which batch.

    Each is memory of its own: the kernel maps more of it and moves no byte, room that is not used takes none, and what
    is done with goes back at once.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        fields: Any = dtype.fields or {}
        self._types = {name: of[0] for name, of in fields.items()} | {"batch": np.dtype(np.uint32)}
        self._memory: dict[str, mmap.mmap] = {}
        self._count = self._room = 0

    def add(self, given: Array, batch: int) -> None:
        """Add rows."""
        if self._count + len(given) > self._room:
            self._room = max(self._count + len(given), 2 * self._room)
            self._map()
        for name, dtype in self._types.items():
            # No name for the view: while there is one, no more can be mapped.
            np.frombuffer(self._memory[name], dtype, len(given), self._count * dtype.itemsize)[:] = (
                batch if name == "batch" else given[name]
            )
        self._count += len(given)

    def _map(self) -> None:
        for name, dtype in self._types.items():
            size = self._room * dtype.itemsize
            if name in self._memory:
                self._memory[name].resize(size)
            else:
                self._memory[name] = mmap.mmap(-1, size, mmap.MAP_PRIVATE)

    def table(self) -> Table:
        """Return the rows, and hold them no longer."""
        held, count = self._memory, self._count
        self._memory, self._count, self._room = {}, 0, 0
        return {
            name: np.frombuffer(held.pop(name), dtype, count) if count else np.empty(0, dtype)
            for name, dtype in self._types.items()
        }


class Given(NamedTuple):
    """What has ended: lifecycles, shutdown exits, what has broken a rule of ordering; edges of periods; and copies."""

    finished: Table  # columns.ENDED
    shutdowns: Table  # columns.SHUTDOWN
    breaks: Table  # columns.BREAK
    edges: Table  # columns.EDGE
    copies: Table  # columns.COPY


class Pass:
    """The walk over batch after batch.

    ``names`` maps each watched bit of the word to its request's name; ``full``: the events are of detail full;
    ``reads``: they tell what user space reads of a vCPU, as those of schema 3 do.
    ``order``: the columns of columns.WANTED for the rules of ordering, where they are checked. ``exposure``: VMs are
    told; ``periods``: what each vCPU is doing; ``counts``: exits and changes of the word are counted.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        *,
        full: bool = False,
        reads: bool = True,
        order: Mapping[str, Any] | None = None,
        exposure: bool = False,
        periods: bool = False,
        counts: bool = False,
    ) -> None:
        self._wanted = np.zeros(1, columns.WISH)
        self._wanted["mask"] = sum(1 << bit for bit in names)
        self._wanted["carrier"] = [rules.carrier(names.get(bit, "")) for bit in range(64)]
        self._wanted["full"], self._wanted["reads"], self._wanted["exposure"] = full, reads, exposure
        self._wanted["periods"], self._wanted["counts"] = periods, counts
        for name, value in (order or {}).items():
            self._wanted[name] = value
        self.memory = memory.empty()
        self.counted = exit_rules.nothing(_ROWS if counts else 0)
        self._batches = self._events = 0
        self._ended = tuple(Rows(dtype) for dtype in _GIVEN)
        self._buffers = tuple(np.empty(len(self.memory.rows), dtype) for dtype in _GIVEN)

    @property
    def now(self) -> Any:
        """Return what there is once: a record of columns.NOW."""
        return self.memory.now

    @property
    def carried(self) -> int:
        """Return how many vCPUs, pending requests, kicks of them and open cases are carried over."""
        return int(self.now.vcpus + self.now.pending + self.now.kicks + self.now.cases)

    def feed(self, batch: Batch, *, blind: bool = False, loss: Loss | None = None) -> None:
        """Take a batch; ``blind`` and ``loss`` as in analysis.lifecycle.Lifecycles.feed."""
        events = columns_of(batch)
        self._events += len(events.kind)
        if self._events > _FEW:
            compiled.start()
        self._batches += 1
        self.now.blind = blind
        if blind:
            walk.blind(self.memory)
        lost, at = _lost(loss), 0
        while (at := self._walk(events, at, lost)) < len(events.kind):
            self._give()
            self._make_room()
        self._give()

    def _walk(self, events: Columns, at: int, lost: Array) -> int:
        return walk.walk(events, at, self._wanted[0], lost, self.memory, self.counted)

    def interrupt(self) -> None:
        """A part of the recording is missing here."""
        walk.interrupt(self.memory)

    def finish(self, loss: Loss) -> None:
        """End what is still pending at the end of the recording, and forget every vCPU."""
        # Each request that is pending may break a rule, and each vCPU may have two periods and a pause that are open.
        while len(self.memory.rows) - self.now.used < self.now.pending + 3 * self.now.vcpus:
            self.memory = memory.larger(self.memory)
        self._batches += 1
        walk.finish(self._wanted[0], _lost(loss), self.memory, 0 in loss.vcpus, loss.blind > 0)
        self._give()

    def given(self) -> Given:
        """Return what has ended since the last time, each in the order in which it did."""
        return Given(*(rows.table() for rows in self._ended))

    def copies(self) -> Table:
        """Return what concerns copies since the last time, and leave all else."""
        return self._ended[_GIVEN.index(columns.COPIES)].table()

    def edges(self) -> Table:
        """Return where periods have begun and ended since the last time, and leave all else."""
        return self._ended[_GIVEN.index(columns.EDGES)].table()

    def starved(self, rows: Array, order: Mapping[str, Any]) -> None:
        """Find what breaks the rule on waiting, of lifecycles (columns.PLACE) that were told elsewhere."""
        wanted = self._wanted.copy()
        for name, value in order.items():
            wanted[name] = value
        while len(self.memory.rows) - self.now.used < len(rows):
            self.memory = memory.larger(self.memory)
        walk.starved_rows(wanted[0], self.memory, rows)
        self._give()

    def vms(self) -> Array:
        """Return the VMs that an event has told of (columns.VM), in the order in which they were seen."""
        known = self._listed(self.now.first_vm, "next")
        vms: Array = known[known["told"] != 0]
        vms.sort(order="told")
        return vms

    def vcpus(self) -> Array:
        """Return the vCPUs that are known (columns.VCPU): all that is carried over where nothing is watched."""
        return self._listed(self.now.first_vcpu, "after")

    def _listed(self, first: int, link: str) -> Array:
        places, at = [], int(first)
        while at != memory.NONE:
            places.append(at)
            at = int(self.memory.rows[at][link])
        rows: Array = self.memory.rows[places]
        return rows

    def _give(self) -> None:
        """Take what the walk has ended out of the memory."""
        if len(self._buffers[0]) < len(self.memory.rows):
            self._buffers = tuple(np.empty(len(self.memory.rows), dtype) for dtype in _GIVEN)
        gives = (walk.give_lifecycles, walk.give_shutdowns, walk.give_breaks, walk.give_edges, walk.give_copies)
        for name, give, buffer, rows in zip(columns.GIVEN, gives, self._buffers, self._ended, strict=True):
            given = buffer[: int(self.now[f"many_{name}"])]
            give(self.memory, int(self.now[name]), given)
            self.now[name], self.now[f"many_{name}"] = memory.NONE, 0
            if len(given):
                rows.add(given, self._batches)

    def _make_room(self) -> None:
        """Forget what is old; where less than half is free then, double it."""
        alive.sweep(self.memory)
        while 2 * self.now.used > len(self.memory.rows) or 8 * self.now.indexed > len(self.memory.slots):
            self.memory = memory.larger(self.memory)
        while not walk.room_for_many(self.memory):
            self.memory = memory.larger(self.memory)
        while 2 * max(self.now.exits, self.now.changes) > len(self.counted.exits):
            self.counted = exit_rules.larger(self.counted)


def in_order(table: Table, *keys: str) -> Table:
    """Return the rows in the order of some columns, the first one first, and those that are equal as they were.

    A column at a time, each freed once it is in order.
    """
    first = table[keys[0]]
    order = np.argsort(first, kind="stable")
    if len(keys) > 1:
        # Few have another one beside them that is equal.
        times = first[order]
        equal = np.zeros(len(order) + 1, bool)
        equal[1:-1] = times[1:] == times[:-1]
        tied = np.flatnonzero(equal[1:] | equal[:-1])
        of = order[tied]
        order[tied] = of[np.lexsort([table[key][of] for key in reversed(keys)])]
    if (order[1:] >= order[:-1]).all():
        return table
    return {name: _taken(table.pop(name), order) for name in list(table)}


def _taken(column: Array, order: Array) -> Array:
    # Many a column holds one value: that is in any order.
    return column if (column == column[0]).all() else column.take(order)


_GIVEN = (columns.ENDED, columns.SHUT, columns.BROKEN, columns.EDGES, columns.COPIES)


def nothing() -> Given:
    """Return what nothing ends."""
    return Given(*(Rows(dtype).table() for dtype in _GIVEN))


def _lost(loss: Loss | None) -> Array:
    """Return rows of vCPU and for how many of its events the ring had no room, ascending."""
    lost = sorted((number, one.count) for number, one in loss.vcpus.items()) if loss else []
    return np.array(lost, np.int64).reshape(-1, 2)


def warm() -> None:
    """Run the walk over nothing, so that all of it is compiled."""
    one = Pass({}, exposure=True, periods=True, counts=True)
    one.feed(np.zeros(0, EVENT), blind=True)
    one.interrupt()
    one._make_room()
    one.finish(Loss())
    one.starved(np.zeros(0, columns.PLACE), {})
    memory.larger(one.memory)
    one.given()
