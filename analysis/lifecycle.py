"""Request lifecycles, from the events that raise, save, service and drop requests.

One incremental core for every use: a batch of events goes in, the lifecycles that it ends come out, and what is carried
over is bounded by the vCPUs alive. Pure: no BCC, no files. How a stream is cut into batches never changes a result.

An event holds the word as it is (``requests``) and as it was last read (``before``). Against the word of the previous
event that was received this gives three readings of each bit: *known*, *before* and *now*. ``before != now`` is a
transition that the event saw; ``known != before`` is one whose event was lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.rows import by_key
from probes.requests import TRIPLE_FAULT
from probes.schema import (
    KVM_EXIT_SHUTDOWN,
    PAYLOAD_PENDING,
    VALID_TRIPLE_FAULT,
    Flag,
    Kind,
    Site,
)
from tracer.loss import Loss

Array = npt.NDArray[Any]

# vCPU ioctls that can change the word, by number (uapi linux/kvm.h), and KVM's name for who they are.
_IOCTLS = {
    0x4040AE9E: "set_mce",
    0x4040AEA0: "set_vcpu_events",
    0x4090AE82: "set_regs",
    0x4138AE84: "set_sregs",
    0x4140AECD: "set_sregs2",
    0x4008AE89: "set_msrs",
    0x4080AEBF: "set_nested_state",
    0x4004AE99: "set_mp_state",
    0xAE9A: "nmi",
    0xAEB7: "smi",
}
_SITES = {
    Site.EXCEPTION: "exception",
    Site.RSM: "rsm",
    Site.REALMODE_INTERRUPT: "realmode_interrupt",
    Site.EMULATION: "emulation",
    Site.NESTED_VMEXIT: "nested_vmexit",
    Site.NESTED_ABORT: "nested_abort",
    Site.SET_EFER: "set_efer",
    Site.MACHINE_CHECK: "machine_check",
    Site.SYNC_EVENTS: "set_vcpu_events",
}

# Who can raise a request; 0: unknown.
_RAISERS = np.array(
    ["unknown", "remote", "ioctl", "kvm_run", *dict.fromkeys((*_IOCTLS.values(), *_SITES.values()))], object
)
_RAISER = {name: place for place, name in enumerate(_RAISERS)}

#: Columns of a table of lifecycles, one row for each request instance.
#:
#: ``vm``, ``vcpu_number``: numbers of the recording; ``pid``: the VMM; ``vcpu``: KVM's vcpu_id. ``raised_after_ns`` and
#: ``raised_ns``, ``ended_after_ns`` and ``ended_ns``: CLOCK_MONOTONIC intervals (last seen without, first seen with);
#: 0: at some time since boot; ``ended_ns`` -1: has not ended. ``why``: what a verdict hangs on, or empty.
LIFECYCLE = {
    "vm": "u4",
    "pid": "u4",
    "vcpu": "u4",
    "vcpu_number": "u4",
    "request": "str",
    "raised_by": "str",
    "raised_after_ns": "i8",
    "raised_ns": "i8",
    "end": "str",
    "ended_after_ns": "i8",
    "ended_ns": "i8",
    "userspace_exits": "i8",
    "saves": "i8",
    "blind_saves": "i8",
    "nested": "bool",
    "stale": "bool",
    "exposed": "bool",
    "why": "str",
}
#: Columns of a table of KVM_EXIT_SHUTDOWN; ``source``: "request", or "hardware" where no request made it.
SHUTDOWN = {
    "vm": "u4",
    "pid": "u4",
    "vcpu": "u4",
    "vcpu_number": "u4",
    "time_ns": "i8",
    "source": "str",
    "nested": "bool",
}

# What is carried over of a vCPU that is alive.
_VCPU = np.dtype(
    [
        ("number", "u4"),
        ("vm", "u4"),
        ("pid", "u4"),
        ("vcpu", "u4"),
        ("seq", "u4"),
        ("gaps", "i8"),  # events that gaps in seq have told to be lost
        ("word", "u8"),
        ("last_ns", "i8"),
        ("cut", "?"),  # a part of the recording is missing since its last event
    ]
)
_NO_SAVE, _CARRIED, _BLIND = 0, 1, 2
# What is carried over of a request that is pending.
_OPEN = np.dtype(
    [
        ("number", "u4"),
        ("bit", "u1"),
        ("by", "i1"),  # place in _RAISERS
        ("raised_after_ns", "i8"),
        ("raised_ns", "i8"),
        ("exits", "i8"),
        ("saves", "i8"),
        ("blind", "i8"),
        ("last_save", "i1"),
        ("nested", "?"),
        ("reset", "?"),
        ("restored_without", "?"),  # KVM_SET_VCPU_EVENTS without the flag since it was raised
        ("restored_since", "?"),  # KVM_SET_VCPU_EVENTS that set it, since the reset
        ("gap", "?"),
        ("gap_lost", "i8"),  # events lost while it was pending; 0: how many is not known
        ("gap_from", "i8"),
        ("gap_to", "i8"),
        ("unseen", "?"),  # its raise was not seen
        ("cut", "?"),
        ("missed", "?"),  # hooks were missed while it was pending
    ]
)

_WHY_VANISHED = "the request disappeared inside KVM_RUN without a shutdown exit"
_WHY_OUTSIDE = "the request disappeared while no ioctl was in progress"
_WHY_OLDER = "it was pending before tracing began: whether it had been saved by then is not known"
_WHY_BLIND = "the tracer missed hooks, and they may be what decides it"
_WHY_CUT = "a part of the recording is missing while it was pending"


class Finished(NamedTuple):
    """What a batch has ended: lifecycles, and shutdown exits."""

    lifecycles: pd.DataFrame
    shutdowns: pd.DataFrame


def _table(columns: Mapping[str, str], values: Mapping[str, Any], rows: int) -> pd.DataFrame:
    """Return a table of exactly these columns and types; columns of strings are Python objects."""
    # A Series of objects, lest pandas look through them for strings.
    return pd.DataFrame(
        {
            name: pd.Series(np.asarray(values[name]) if rows else [], dtype="object" if dtype == "str" else dtype)
            for name, dtype in columns.items()
        }
    )


_EMPTY_LIFECYCLES = _table(LIFECYCLE, {}, 0)
_EMPTY_SHUTDOWNS = _table(SHUTDOWN, {}, 0)


def empty_lifecycles() -> pd.DataFrame:
    """Return a table of lifecycles without rows."""
    return _EMPTY_LIFECYCLES.copy()


def empty_shutdowns() -> pd.DataFrame:
    """Return a table of shutdown exits without rows."""
    return _EMPTY_SHUTDOWNS.copy()


def _seconds(ns: int) -> str:
    return f"{ns // 1_000_000_000}.{ns % 1_000_000_000:09d} s"


def gap_story(lost: int, begin_ns: int, end_ns: int) -> str:
    """Say which events are missing; times are CLOCK_MONOTONIC."""
    if lost <= 0:
        return f"two threads used this vCPU at once around {_seconds(end_ns)}: the order of its events is not certain"
    events = "1 event" if lost == 1 else f"{lost} events"
    were = "was" if lost == 1 else "were"
    return f"{events} of this vCPU {were} lost between {_seconds(begin_ns)} and {_seconds(end_ns)}"


# What the rules look at.
_COLUMNS = (
    "time_ns", "since_ns", "requests", "before", "arg", "vcpu", "seq", "pid", "detail", "kind", "flags",
)  # fmt: skip


class _Rows:
    """The events of a batch that concern vCPUs, by vCPU and in order, beside what was known before each."""

    def __init__(self, events: Any, vcpus: Array) -> None:
        numbers = np.asarray(events["vcpu"])
        if isinstance(events, np.ndarray) and numbers.all() and (numbers[1:] < numbers[:-1]).any():
            events = events.take(by_key(numbers))  # whole records: faster than column by column, below
        column = {name: np.ascontiguousarray(events[name]) for name in _COLUMNS}
        whole = (column["vcpu"] == 0) | (column["seq"] == 0)  # and what other threads saw of a vCPU
        exits = np.flatnonzero(whole & (column["kind"] == Kind.VMM_EXIT)) if whole.any() else np.empty(0, np.int64)
        own = np.flatnonzero(~whole) if whole.any() else np.arange(len(whole))
        self.position = own
        for name in _COLUMNS:
            setattr(self, name, column[name][own] if whole.any() else column[name])
        self.real = np.ones(len(own), bool)
        if len(exits):
            self._end_of_vmms(column, exits, vcpus)
        if (len(self.vcpu) and (self.vcpu[1:] < self.vcpu[:-1]).any()) or len(exits):
            order = np.lexsort((self.position, self.vcpu)) if len(exits) else by_key(self.vcpu)
            for name in (*_COLUMNS, "real", "position"):
                setattr(self, name, getattr(self, name)[order])

    time_ns: Array
    since_ns: Array
    requests: Array
    before: Array
    arg: Array
    vcpu: Array
    seq: Array
    pid: Array
    detail: Array
    kind: Array
    flags: Array

    def _end_of_vmms(self, column: Mapping[str, Array], exits: Array, vcpus: Array) -> None:
        # The first exit of its process after a vCPU was first seen ends it.
        numbers, first = np.unique(self.vcpu, return_index=True)
        known = ~np.isin(vcpus["number"], numbers)
        number = np.concatenate((numbers, vcpus["number"][known]))
        pid = np.concatenate((self.pid[first], vcpus["pid"][known])).astype(np.int64)
        begin = np.concatenate((self.position[first], np.full(int(known.sum()), -1)))
        carried = np.isin(number, vcpus["number"])
        begin[carried] = -1
        scale = len(column["vcpu"]) + 2
        keys = column["pid"][exits].astype(np.int64) * scale + exits + 1
        order = np.argsort(keys)
        place = np.searchsorted(keys[order], pid * scale + begin + 1, side="right")
        inside = np.minimum(place, len(exits) - 1)
        ends = (place < len(exits)) & (column["pid"][exits[order[inside]]] == pid)
        at = exits[order[inside[ends]]]
        made = {name: column[name][at] for name in _COLUMNS}
        made["vcpu"] = number[ends].astype("u4")
        made["kind"] = np.full(len(at), Kind.VCPU_END, "u1")
        for name in _COLUMNS:
            setattr(self, name, np.concatenate((getattr(self, name), made[name])))
        self.real = np.concatenate((self.real, np.zeros(len(at), bool)))
        self.position = np.concatenate((self.position, at))

    def keep(self, mask: Array) -> None:
        """Leave out the other rows."""
        for name in (*_COLUMNS, "real", "position"):
            setattr(self, name, getattr(self, name)[mask])


class Lifecycles:
    """The incremental core. ``names`` maps each watched bit of the word to its request's name."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = dict(names)
        self._vcpus = np.empty(0, _VCPU)
        self._open = np.empty(0, _OPEN)
        self._interrupted = False

    @property
    def carried(self) -> int:
        """Return how many vCPUs and pending requests are carried over."""
        return len(self._vcpus) + len(self._open)

    def feed(self, events: Any, *, blind: bool = False, loss: Loss | None = None) -> Finished:
        """Take a batch: a numpy array of EVENT, or anything with its columns. Return what it ends.

        ``loss``: the totals, counted no earlier than the last event of the batch. The exit of a process has no sequence
        number of its vCPUs: only these totals tell that the last events of a vCPU before it were lost.

        ``blind``: hooks were missed of which no sequence number tells; then a vCPU that ends with a request pending
        proves nothing.
        """
        if blind:
            self._open["missed"] = True
        rows = _Rows(events, self._vcpus)
        # After the end of a vCPU nothing is its own any more; an end without a vCPU is a second one.
        n = len(rows.vcpu)
        if n == 0:
            return Finished(empty_lifecycles(), empty_shutdowns())
        first, group = self._groups(rows.vcpu)
        ended = rows.kind == Kind.VCPU_END
        ends_before = np.cumsum(ended) - ended
        late = ends_before > ends_before[first][group]
        carried = self._lookup(rows.vcpu[first])
        unknown_end = np.zeros(n, bool)
        unknown_end[first] = (carried < 0) & ended[first] & ((rows.seq[first] != 1) | ~rows.real[first])
        # A vCPU whose only news is its end, and which is not alive: it ended with its process.
        drop = late | unknown_end[first][group]
        if drop.any():
            rows.keep(~drop)
            n = len(rows.vcpu)
            if n == 0:
                return Finished(empty_lifecycles(), empty_shutdowns())
            first, group = self._groups(rows.vcpu)
            carried = self._lookup(rows.vcpu[first])
        return self._feed(rows, first, group, carried, blind, loss or Loss())

    def _feed(self, rows: _Rows, first: Array, group: Array, carried: Array, blind: bool, loss: Loss) -> Finished:
        n = len(rows.vcpu)
        known = carried >= 0
        state = np.zeros(len(first), _VCPU)
        if known.any():
            state[known] = self._vcpus[carried[known]]
        state["number"] = rows.vcpu[first]
        state["pid"][~known] = rows.pid[first][~known]
        who, whose = self._identify(rows, first, group, state)

        previous = np.arange(n) - 1
        last_seq = rows.seq[previous].astype(np.int64)
        last_word = rows.requests[previous]
        last_ns = rows.time_ns[previous].astype(np.int64)
        last_seq[first], last_word[first], last_ns[first] = state["seq"], state["word"], state["last_ns"]
        made = np.flatnonzero(~rows.real)  # ends of vCPUs that their process's exit tells: nothing was read there
        if len(made):
            rows.before[made] = rows.requests[made] = last_word[made]
            rows.since_ns[made] = last_ns[made].astype("u8")
            rows.seq[made] = last_seq[made]
        sight = np.zeros(n, bool)
        sight[first] = ~known
        missing = rows.seq.astype(np.int64) - last_seq - 1
        missing[made] = 0
        cut = np.zeros(n, bool)
        cut[first] = state["cut"]
        # Signed: two threads can put their events into the ring in another order. Events of a missing part are no loss.
        counted = np.where(cut | (sight & self._interrupted), 0, missing)
        state["gaps"] += np.bincount(group, counted, len(first)).astype(np.int64)
        tail = _losses(loss, rows.vcpu[made]) - state["gaps"][group[made]]
        missing[made] = np.maximum(tail, 0)
        gap = missing != 0
        # A VCPU_NEW that the ring had no room for is sent again: its word was so before, nobody saw since when.
        again = np.flatnonzero((rows.kind == Kind.VCPU_NEW) & (gap | ~sight))
        if len(again):
            rows.before, rows.since_ns = rows.before.copy(), rows.since_ns.copy()
            rows.before[again], rows.since_ns[again] = rows.requests[again], rows.time_ns[again]

        tables = [
            self._request(bit, name, rows, first, group, who, whose, last_word, last_ns, gap, missing, cut, blind)
            for bit, name in self._names.items()
        ]
        shutdowns = self._shutdowns(rows, who, whose)

        last = np.append(first[1:], n) - 1
        state["seq"], state["word"] = rows.seq[last], rows.requests[last]
        state["last_ns"] = rows.time_ns[last]
        state["cut"] = False
        alive = rows.kind[last] != Kind.VCPU_END
        others = np.ones(len(self._vcpus), bool)
        others[carried[known]] = False
        merged = np.concatenate((self._vcpus[others], state[alive]))
        self._vcpus = merged[np.argsort(merged["number"])]
        kept = self._open[~np.isin(self._open["number"], state["number"])]
        self._open = np.concatenate((kept, *(pending for _, pending in tables)))
        finished = [table for table, _ in tables if len(table)]
        lifecycles = (
            pd.concat(finished, ignore_index=True)
            if len(finished) > 1
            else (finished[0] if finished else empty_lifecycles())
        )
        return Finished(lifecycles, shutdowns)

    @staticmethod
    def _identify(rows: _Rows, first: Array, group: Array, state: Array) -> tuple[Array, Array]:
        # Who each row is, and where that stands in the table: what a VCPU_NEW says does not hold for rows before it.
        new = np.flatnonzero(rows.kind == Kind.VCPU_NEW)
        for at in (new[first[group[new]] == new], new[first[group[new]] != new]):
            who = state.copy()
            state["vm"][group[at]] = rows.detail[at]
            state["vcpu"][group[at]] = rows.arg[at]
            state["pid"][group[at]] = rows.pid[at]
        if not len(at):
            return state, group
        # The last VCPU_NEW so far of each row, if it is not the first row of its vCPU.
        latest = np.zeros(len(group), np.int64)
        latest[at] = np.arange(1, len(at) + 1)
        latest = np.maximum.accumulate(latest)
        said = np.append(-1, group[at])[latest] == group
        later = who[group[at]]
        later["vm"], later["vcpu"], later["pid"] = rows.detail[at], rows.arg[at], rows.pid[at]
        return np.concatenate((who, later)), np.where(said, len(who) + latest - 1, group)

    @staticmethod
    def _groups(vcpu: Array) -> tuple[Array, Array]:
        starts = np.empty(len(vcpu), bool)
        starts[0] = True
        np.not_equal(vcpu[1:], vcpu[:-1], out=starts[1:])
        return np.flatnonzero(starts), np.cumsum(starts) - 1

    def _lookup(self, numbers: Array) -> Array:
        if not len(self._vcpus):
            return np.full(len(numbers), -1)
        place = np.minimum(np.searchsorted(self._vcpus["number"], numbers), len(self._vcpus) - 1)
        found: Array = np.where(self._vcpus["number"][place] == numbers, place, -1)
        return found

    def _request(
        self,
        bit: int,
        name: str,
        rows: _Rows,
        first: Array,
        group: Array,
        who: Array,
        whose: Array,
        last_word: Array,
        last_ns: Array,
        gap: Array,
        missing: Array,
        cut: Array,
        blind: bool,
    ) -> tuple[pd.DataFrame, Array]:
        mask = np.uint64(1 << bit)
        was_known = (last_word & mask) != 0
        before = (rows.before & mask) != 0
        now = (rows.requests & mask) != 0
        touched = np.flatnonzero(was_known | before | now)
        if not len(touched):
            return empty_lifecycles(), np.empty(0, _OPEN)
        # In detail boundary nearly every row has the request: no copies then.
        pick: Any = touched if len(touched) < len(now) else slice(None)
        was_known, before, now = was_known[pick], before[pick], now[pick]
        group, gap, missing, cut = group[pick], gap[pick], missing[pick], cut[pick]
        last_ns = last_ns[pick]
        kind, flags, detail = rows.kind[pick], rows.flags[pick], rows.detail[pick]
        arg = rows.arg[pick]
        time_ns, since_ns = rows.time_ns[pick].view(np.int64), rows.since_ns[pick].view(np.int64)
        low = (arg & np.uint64(0xFFFFFFFF)).view(np.int64)
        succeeded = (arg >> np.uint64(32)) == 0

        # Instances are numbered in order: what is carried in, then one for each raise, seen or not.
        carried_in = np.zeros(len(touched), bool)
        heads = np.flatnonzero(np.diff(group, prepend=-1))
        is_first = touched[heads] == first[group[heads]]
        carried_in[heads] = was_known[heads] & is_first
        unseen_start = ~was_known & before
        start = unseen_start | (~before & now)
        numbered = np.cumsum(carried_in.astype(np.int64) + start)
        instances = int(numbered[-1])
        now_in = numbered - 1  # the instance that is pending after the row, or ends at it
        then_in = now_in - start  # the one that was pending before a raise at the row

        one = np.zeros(instances, _OPEN)
        one["bit"] = bit
        one["number"][now_in] = who["number"][group]
        place = numbered[carried_in] - start[carried_in] - 1
        one[place] = self._carried_requests(who["number"][group[carried_in]], bit)

        begun = np.flatnonzero(start)
        at = now_in[begun]
        seen = ~unseen_start[begun]
        fresh = (kind[begun] == Kind.VCPU_NEW) & ((flags[begun] & Flag.CREATED) == 0)
        one["by"][at] = np.where(seen & ~fresh, _raised_by(kind[begun], low[begun]), _RAISER["unknown"])
        one["raised_after_ns"][at] = np.where(seen, np.where(fresh, 0, since_ns[begun]), last_ns[begun])
        one["raised_ns"][at] = np.where(seen, time_ns[begun], since_ns[begun])
        one["unseen"][at] = ~seen

        def add(column: str, where: Array, weights: Array | None = None) -> None:
            one[column] += np.bincount(now_in[where], weights, instances).astype(one[column].dtype)

        # Events lost while it was pending, or while it was raised.
        broken = np.flatnonzero((gap | cut) & (was_known | before) | unseen_start)
        owner = np.where(was_known[broken], then_in[broken], now_in[broken])
        owner = np.where(was_known[broken] & before[broken], now_in[broken], owner)
        holes = gap[broken]
        early = (one["gap_from"][owner] == 0) & holes
        one["gap"][owner[holes]] = True
        np.add.at(one["gap_lost"], owner[holes], np.maximum(missing[broken[holes]], 0))
        back = np.flatnonzero(early)[::-1]
        one["gap_from"][owner[back]] = np.maximum(last_ns[broken[back]], 1)
        one["gap_to"][owner[holes]] = time_ns[broken[holes]]
        one["cut"][owner[cut[broken]]] = True

        add("exits", np.flatnonzero(now & (kind == Kind.RUN_EXIT)))
        if bit == TRIPLE_FAULT:
            saved = np.flatnonzero(now & (kind == Kind.SAVE) & succeeded)
            full = VALID_TRIPLE_FAULT | PAYLOAD_PENDING
            carries = (detail[saved] & full) == full
            add("saves", saved[carries])
            add("blind", saved[~carries])
            one["last_save"][now_in[saved]] = np.where(carries, _CARRIED, _BLIND)
            self._resets(one, instances, now_in, now & before, kind, detail, succeeded)
        nested = (flags & Flag.NESTED) != 0
        one["nested"][now_in[nested & (before | now)]] = True

        vanished = np.flatnonzero(was_known & ~before)
        gone = np.flatnonzero(before & ~now)
        over = np.flatnonzero(now & (kind == Kind.VCPU_END))
        index = np.concatenate((then_in[vanished], now_in[gone], now_in[over]))
        if not len(index):
            return empty_lifecycles(), one
        row = np.concatenate((vanished, gone, over))
        end, why = _ends(bit, kind, low, succeeded, one["nested"][now_in], gone)
        last_save = one["last_save"][now_in[over]]
        stopped = np.array(["abandoned", "handed_over", "lost"], object)[last_save]
        stop_why = np.full(len(over), "", object)
        if bit == TRIPLE_FAULT:
            # Pending when tracing began, and not saved since: a save before that is what nobody can exclude.
            older = (last_save == _NO_SAVE) & (one["by"][now_in[over]] == _RAISER["unknown"])
            stopped[older], stop_why[older] = "undecided", _WHY_OLDER
        ends = np.concatenate((np.full(len(vanished), "undecided", object), end, stopped))
        whys = np.concatenate((np.full(len(vanished), "its end was not seen", object), why, stop_why))
        after = np.concatenate((last_ns[vanished], since_ns[gone], since_ns[over]))
        ended = np.concatenate((since_ns[vanished], time_ns[gone], time_ns[over]))
        one["missed"] |= blind
        proof = np.isin(ends, ("lost", "abandoned", "handed_over")) & one["missed"][index]
        ends[proof], whys[proof] = "undecided", _WHY_BLIND
        order = np.argsort(index)
        index, ends, whys, row = index[order], ends[order], whys[order], row[order]
        table = _lifecycles(one[index], name, who[whose[touched[row]]], ends, whys, after[order], ended[order])
        still = np.ones(instances, bool)
        still[index] = False
        return table, one[still]

    def _carried_requests(self, numbers: Array, bit: int) -> Array:
        mine = self._open[self._open["bit"] == bit]
        mine = mine[np.argsort(mine["number"])]
        found: Array = mine[np.searchsorted(mine["number"], numbers)]
        return found

    @staticmethod
    def _resets(
        one: Array, instances: int, now_in: Array, pending: Array, kind: Array, detail: Array, succeeded: Array
    ) -> None:
        # The last reset of each instance in this batch against its last restore that set the request again.
        last_reset = np.full(instances, -1)
        last_set = np.full(instances, -1)
        at = np.flatnonzero(pending & (kind == Kind.RESET))
        last_reset[now_in[at]] = at
        restored = np.flatnonzero(pending & (kind == Kind.RESTORE) & succeeded)
        valid = (detail[restored] & VALID_TRIPLE_FAULT) != 0
        one["restored_without"][now_in[restored[~valid]]] = True
        put = restored[valid & ((detail[restored] & PAYLOAD_PENDING) != 0)]
        last_set[now_in[put]] = put
        again = last_reset >= 0
        one["restored_since"] = np.where(
            again, last_set > last_reset, one["restored_since"] | (one["reset"] & (last_set >= 0))
        )
        one["reset"] |= again

    def _shutdowns(self, rows: _Rows, everyone: Array, whose: Array) -> pd.DataFrame:
        at = np.flatnonzero((rows.kind == Kind.RUN_EXIT) & (rows.arg == KVM_EXIT_SHUTDOWN))
        if not len(at):
            return empty_shutdowns()
        mask = np.uint64(1 << TRIPLE_FAULT)
        taken = ((rows.before[at] & mask) != 0) & ((rows.requests[at] & mask) == 0)
        who = everyone[whose[at]]
        return _table(
            SHUTDOWN,
            {
                "vm": who["vm"],
                "pid": who["pid"],
                "vcpu": who["vcpu"],
                "vcpu_number": who["number"],
                "time_ns": rows.time_ns[at],
                "source": np.where(taken, "request", "hardware").astype(object),
                "nested": (rows.flags[at] & Flag.NESTED) != 0,
            },
            len(at),
        )

    def interrupt(self) -> None:
        """A part of the recording is missing here: nothing that is pending can be judged any more."""
        self._interrupted = True
        self._vcpus["cut"] = True
        self._open["cut"] = True

    def finish(self, loss: Loss) -> Finished:
        """Return what is still pending at the end of the recording, and forget everything."""
        pending = self._open[np.argsort(self._open["number"], kind="stable")]
        state = self._vcpus[self._lookup(pending["number"])]
        self._vcpus, self._open, self._interrupted = self._vcpus[:0], self._open[:0], False
        if not len(pending):
            return Finished(empty_lifecycles(), empty_shutdowns())
        whys = np.full(len(pending), "", object)
        ends = np.full(len(pending), "open", object)
        reasons = (
            (_losses(loss, state["number"]) > state["gaps"], "the last events of this vCPU were lost"),
            (np.full(len(pending), 0 in loss.vcpus), "events of whole VMs or VMMs were lost"),
            (np.full(len(pending), loss.blind > 0), _WHY_BLIND),
        )
        for mask, reason in reasons:
            chosen = mask & (ends == "open")
            ends[chosen], whys[chosen] = "undecided", reason
        table = pd.concat(
            [
                _lifecycles(
                    pending[mask],
                    name,
                    state[mask],
                    ends[mask],
                    whys[mask],
                    state["last_ns"][mask],
                    np.full(int(mask.sum()), -1),
                )
                for bit, name in self._names.items()
                if (mask := pending["bit"] == bit).any()
            ],
            ignore_index=True,
        )
        return Finished(table, empty_shutdowns())


def _losses(loss: Loss, numbers: Array) -> Array:
    """Return how many events of each of these vCPUs the ring had no room for."""
    if not loss.vcpus:
        return np.zeros(len(numbers), np.int64)
    return np.array([loss.vcpus[number].count if number in loss.vcpus else 0 for number in numbers.tolist()], np.int64)


def _raised_by(kind: Array, low: Array) -> Array:
    by = np.full(len(kind), _RAISER["remote"], "i1")
    by[(kind == Kind.RUN_EXIT) | (kind == Kind.GUEST_ENTRY) | (kind == Kind.GUEST_EXIT)] = _RAISER["kvm_run"]
    by[kind == Kind.RESTORE] = _RAISER["set_vcpu_events"]
    for what, default, names in ((Kind.IOCTL_EXIT, "ioctl", _IOCTLS), (Kind.SITE, "kvm_run", _SITES)):
        at = np.flatnonzero(kind == what)
        by[at] = _RAISER[default]
        for number, name in names.items() if len(at) else ():
            by[at[low[at] == number]] = _RAISER[name]
    return by


def _ends(bit: int, kind: Array, low: Array, succeeded: Array, nested: Array, gone: Array) -> tuple[Array, Array]:
    """Return how the requests that are gone at these rows ended, and why nobody can tell if so."""
    kind, low, succeeded, nested = kind[gone], low[gone], succeeded[gone], nested[gone]
    why = np.full(len(gone), "", object)
    inside = np.isin(kind, (Kind.RUN_EXIT, Kind.SITE, Kind.GUEST_ENTRY, Kind.GUEST_EXIT))
    restore = kind == Kind.RESTORE
    ioctl = np.isin(kind, (Kind.IOCTL_EXIT, Kind.SAVE)) | restore
    if bit != TRIPLE_FAULT:
        return np.where(ioctl, "cleared", "serviced").astype(object), why
    end = np.full(len(gone), "undecided", object)
    end[ioctl] = "cleared"
    why[ioctl & ~restore] = "cleared by another ioctl than KVM_SET_VCPU_EVENTS"
    # The vCPU can be in L1 again by the time that the word is read.
    end[inside & nested] = "reflected"
    end[(kind == Kind.SITE) & (low == Site.REFLECT)] = "reflected"
    end[(kind == Kind.RUN_EXIT) & succeeded & (low == KVM_EXIT_SHUTDOWN)] = "delivered"
    end[kind == Kind.VCPU_END] = "undecided"
    unknown = end == "undecided"
    why[unknown] = np.where(inside[unknown], _WHY_VANISHED, _WHY_OUTSIDE)
    return end, why


def _lifecycles(
    one: Array, name: str, who: Array, ends: Array, whys: Array, after_ns: Array, ended_ns: Array
) -> pd.DataFrame:
    """Return the table of these instances; a gap makes each verdict undecided."""
    ends, whys = ends.copy(), whys.copy()
    for index in np.flatnonzero(one["gap"] | one["cut"] | one["unseen"]):
        story = []
        if one["gap"][index]:
            story.append(gap_story(*(int(one[part][index]) for part in ("gap_lost", "gap_from", "gap_to"))))
        if one["cut"][index]:
            story.append(_WHY_CUT)
        if one["unseen"][index]:
            story.append("it was not seen being raised")
        if whys[index]:
            story.append(whys[index])
        ends[index], whys[index] = "undecided", "; ".join(story)
    delivered = ends == "delivered"
    stale = (
        delivered
        & one["reset"]
        & ~one["restored_since"]
        & ((one["by"] != _RAISER["set_vcpu_events"]) | one["restored_without"])
    )
    return _table(
        LIFECYCLE,
        {
            "vm": who["vm"],
            "pid": who["pid"],
            "vcpu": who["vcpu"],
            "vcpu_number": who["number"],
            "request": np.full(len(one), name, object),
            "raised_by": _RAISERS[one["by"]],
            "raised_after_ns": one["raised_after_ns"],
            "raised_ns": one["raised_ns"],
            "end": ends,
            "ended_after_ns": after_ns,
            "ended_ns": ended_ns,
            "userspace_exits": one["exits"],
            "saves": one["saves"],
            "blind_saves": one["blind"],
            "nested": one["nested"],
            "stale": stale,
            "exposed": (ends == "open") & (one["last_save"] == _BLIND),
            "why": whys,
        },
        len(one),
    )
