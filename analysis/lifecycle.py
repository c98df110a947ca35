"""Request lifecycles, from the events that raise, save, service and drop requests.

One incremental core for every use: a batch of events goes in, the lifecycles that it ends come out, and what is carried
over is bounded by the vCPUs alive. Pure: no BCC, no files. How a stream is cut into batches never changes a result.

An event holds the word as it is (``requests``) and as it was last read (``before``). Against the word of the previous
event that was received this gives three readings of each bit: *known*, *before* and *now*. ``before != now`` is a
transition that the event saw; ``known != before`` is one whose event was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.rows import by_key, column, find, heads
from probes.requests import STATE, STATELESS, TRIPLE_FAULT
from probes.schema import (
    KVM_EXIT_SHUTDOWN,
    PAYLOAD_PENDING,
    REQUEST_MASK,
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
    0x4004AE86: "interrupt",
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
#:
#: ``raised_in``: where the vCPU was meanwhile, a word of :data:`PLACES`. ``requester_tid``, ``requester_cpu``: the
#: thread that raised it and its CPU; 0 and -1 if unknown. Detail full: ``kicked_ns``: the first kick for it that was
#: seen; ``left_guest_ns``: when the vCPU left the guest in which it was when the request was raised; ``reentered_ns``:
#: when it entered the guest with the request serviced. CLOCK_MONOTONIC, or -1: not seen, or none.
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
    "raised_in": "str",
    "requester_tid": "u4",
    "requester_cpu": "i4",
    "kicked_ns": "i8",
    "left_guest_ns": "i8",
    "reentered_ns": "i8",
}
#: Where a vCPU can be when a request is raised. In detail boundary nobody sees more than that it was inside KVM_RUN.
PLACES = {
    "unknown": "not seen",
    "user_space": "in user space, between two ioctls",
    "ioctl": "in an ioctl other than KVM_RUN",
    "kvm_run": "in KVM_RUN, in the guest or in the kernel",
    "kernel": "in KVM_RUN, outside the guest",
    "halted": "asleep in KVM_RUN: it was halted",
    "guest": "in the guest",
}
_PLACES = np.array(list(PLACES), object)
_PLACE = {name: place for place, name in enumerate(PLACES)}
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
        ("kind", "u1"),  # of its last event
        ("cut", "?"),  # a part of the recording is missing since its last event
    ]
)
_NO_SAVE, _CARRIED, _BLIND, _UNSURE = 0, 1, 2, 3
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
        ("place", "i1"),  # in _PLACES
        ("tid", "u4"),
        ("cpu", "i4"),
        ("kicked_ns", "i8"),
        ("left_ns", "i8"),
    ]
)
# What events of other threads tell, and where they stand in their batch.
_OTHER = np.dtype(
    [
        ("time_ns", "i8"),
        ("requests", "u8"),
        ("arg", "u8"),
        ("vcpu", "u4"),
        ("detail", "u4"),
        ("tid", "u4"),
        ("cpu", "i4"),
        ("position", "i8"),
    ]
)
# What another thread did to a vCPU since its last own event: kvm_vcpu_kick, or a request made of all vCPUs of its VM.
_KICK = np.dtype(
    [
        ("number", "u4"),
        ("time_ns", "i8"),
        ("word", "u8"),  # the requests that it shows, or makes
        ("tid", "u4"),
        ("cpu", "i4"),
        ("seen", "?"),  # the word was read then: what is in it had been raised
        ("position", "i8"),  # in its batch; -1: it is older
    ]
)

_WHY_VANISHED = "the request disappeared inside KVM_RUN without a shutdown exit"
_WHY_OUTSIDE = "the request disappeared while no ioctl was in progress"
_WHY_OLDER = "it was pending before tracing began: whether it had been saved by then is not known"
_WHY_BLIND = "the tracer missed hooks, and they may be what decides it"
_WHY_MEANWHILE = "it was raised while the vCPU was saved: whether before or after that is not known"
_WHY_UNNAMED = "it was pending when the vCPU was saved, and this kvmreq does not know what it stands for"
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


class _Words(NamedTuple):
    """The rows that have a watched request at all, with the three readings of the word."""

    rows: Array
    known: Array
    before: Array
    now: Array

    @classmethod
    def of(cls, rows: Array, known: Array, before: Array, now: Array) -> _Words:
        """Return these rows out of all of them."""
        if len(rows) == len(now):
            return cls(rows, known, before, now)
        return cls(rows, known[rows], before[rows], now[rows])


class _Known(NamedTuple):
    """What was known before each row: the previous event of its vCPU, and what is missing since then."""

    time_ns: Array
    kind: Array
    gap: Array
    missing: Array
    cut: Array


class _Begun(NamedTuple):
    """The rows of a request, for what other threads did: places among them, or of the request's instances."""

    rows: Array  # which rows of the batch they are
    pending: Array  # it was pending before the row
    pending_in: Array  # in which instance
    starts: Array  # where it was raised since the previous event, with nothing missing between
    started_in: Array  # the instance that is pending after each row


class _Kicked(NamedTuple):
    """Kicks, each with the own row of its vCPU that follows it, and requests made of all vCPUs of a VM."""

    row: Array  # ascending
    kicks: Array
    of_all: Array

    def tell(self, bit: int, one: Array, rows: _Rows, begun: _Begun, who: Callable[[], Array]) -> None:
        """Tell the instances of a request who kicked the vCPU for it; ``who`` each of their rows was, before it."""
        mask = np.uint64(1 << bit)
        mine = (self.kicks["word"] & mask) != 0
        of_bit = self.of_all[(self.of_all["arg"] & np.uint64(REQUEST_MASK)) == bit]
        if not mine.any() and not len(of_bit):
            return
        place, here = find(begun.rows, self.row[mine])
        at, kicks = place[here], self.kicks[mine][here]
        if len(of_bit):
            older = begun.rows[at[(kicks["position"] < 0) & ~kicks["seen"]]]
            more_at, more = self._of_all(of_bit, mask, rows, begun.rows, who(), older)
            at, kicks = np.concatenate((at, more_at)), np.concatenate((kicks, more))
        pending = begun.pending[at]
        _apply_kicks(one, begun.pending_in[at[pending]], kicks[pending])
        raised = np.zeros(len(begun.rows), bool)
        raised[begun.starts] = True
        raised &= ~begun.pending & (rows.kind[begun.rows] != Kind.VCPU_NEW)
        now = raised[at]
        _apply_kicks(one, begun.started_in[at[now]], kicks[now], rows.who_ran(begun.rows[at[now]])[0])

    @staticmethod
    def _of_all(
        of_bit: Array, mask: np.uint64, rows: _Rows, at: Array, who: Array, older: Array
    ) -> tuple[Array, Array]:
        # The first one between each row and the previous one of its vCPU; `older`: rows that have one already.
        order = np.lexsort((of_bit["position"], of_bit["detail"]))
        of_bit = of_bit[order]
        vms, group = np.unique(of_bit["detail"], return_inverse=True)
        slot, known = find(vms, who["vm"])
        at_known = np.flatnonzero(known & ~np.isin(at, older))
        begin = np.full(len(at_known), -1)
        row = at[at_known]
        inner = (row > 0) & (rows.vcpu[row - 1] == rows.vcpu[row])
        begin[inner] = rows.position[row[inner] - 1]
        scale = int(max(of_bit["position"].max(), rows.position.max())) + 3
        keys = group * scale + of_bit["position"] + 1
        parts_at, parts = [at[:0]], [np.empty(0, _KICK)]
        for asking, asked in _asked(of_bit, who["vcpu"][at_known]):
            slots = slot[at_known[asked]]
            place = np.searchsorted(keys[asking], slots * scale + begin[asked] + 1, side="right")
            there = place < len(asking)
            there[there] = keys[asking[place[there]]] <= slots[there] * scale + rows.position[row[asked[there]]]
            made = _kicks_of(of_bit[asking[place[there]]], mask)
            made["number"], made["word"], made["seen"] = rows.vcpu[row[asked[there]]], mask, False
            parts_at.append(at_known[asked[there]])
            parts.append(made)
        return np.concatenate(parts_at), np.concatenate(parts)


class _Batch(NamedTuple):
    """A batch of events as each request is looked for in it."""

    rows: _Rows
    words: _Words
    first: Array  # the first row of each vCPU
    group: Array  # which vCPU each row is of, counted from 0
    initial: Array  # what was carried in of each vCPU
    who: Array  # who rows are, and
    whose: Array  # where that stands for each row
    known: _Known
    kicked: _Kicked
    blind: bool


def _who_before(who: Array, whose: Array, initial: Array, first: Array, at: Array, group: Array) -> Array:
    """Return who each of these rows was until it: what a VCPU_NEW says does not hold before it."""
    before: Array = who[whose[np.maximum(at - 1, 0)]]
    begins = at == first[group]
    before[begins] = initial[group[begins]]
    return before


def _kicks_of(others: Array, mask: np.uint64) -> Array:
    """Return kicks, as far as they show requests that are watched."""
    made = np.zeros(len(others), _KICK)
    made["number"], made["time_ns"], made["word"] = others["vcpu"], others["time_ns"], others["requests"] & mask
    made["tid"], made["cpu"], made["position"] = others["tid"], others["cpu"], others["position"]
    made["seen"] = True
    kept: Array = made[(made["word"] != 0) | (others["vcpu"] == 0)]
    return kept


def _asked(of_all: Array, vcpu_id: Array) -> Iterator[tuple[Array, Array]]:
    """Yield which of the requests made of several vCPUs concern which of these: places here and there.

    The mask is by index, which is the id of a vCPU where the VMM counts up, as all do. Beyond 64 it says nothing.
    """
    if (of_all["requests"] == np.uint64(2**64 - 1)).all():
        yield np.arange(len(of_all)), np.arange(len(vcpu_id))
        return
    low = np.minimum(vcpu_id, 64)
    for number in np.unique(low).tolist():
        asking = of_all["requests"] >> np.uint64(number) & np.uint64(1) != 0 if number < 64 else of_all["vcpu"] == 0
        yield np.flatnonzero(asking), np.flatnonzero(low == number)


def _apply_kicks(one: Array, instance: Array, kicks: Array, own_tid: Array | None = None) -> None:
    """Tell instances the first kick since they were raised.

    ``own_tid``: the threads of the vCPUs, where the kicks came before the vCPU itself saw the request.
    """
    since = kicks["time_ns"] > one["raised_after_ns"][instance]
    instance, kicks = instance[since], kicks[since]
    if not len(instance):
        return
    order = np.lexsort((kicks["time_ns"], instance))
    order = order[heads(instance[order])]
    first, kick = instance[order], kicks[order]
    sooner = (one["kicked_ns"][first] < 0) | (kick["time_ns"] < one["kicked_ns"][first])
    one["kicked_ns"][first[sooner]] = kick["time_ns"][sooner]
    seen = kicks["seen"]
    np.minimum.at(one["raised_ns"], instance[seen], kicks["time_ns"][seen])
    if own_tid is not None:
        # Where the vCPU's own thread could not, or where the kicker was told to make this very request.
        remote = np.isin(one["place"][first], (_PLACE["guest"], _PLACE["halted"])) | ~kick["seen"]
        remote &= (one["by"][first] == _RAISER["kvm_run"]) & (kick["tid"] != own_tid[since][order])
        remote &= one["bit"][first] != TRIPLE_FAULT  # only the vCPU's own ioctls raise that
        one["by"][first[remote]] = _RAISER["remote"]
    shown = sooner & (one["by"][first] == _RAISER["remote"])
    one["tid"][first[shown]], one["cpu"][first[shown]] = kick["tid"][shown], kick["cpu"][shown]


# What the rules look at in every row; the rest is asked for where it matters.
_COLUMNS = ("time_ns", "since_ns", "requests", "before", "vcpu", "seq", "kind")


class _Rows:
    """The events of a batch that concern vCPUs, by vCPU and in order, beside what was known before each."""

    def __init__(self, events: Any, vcpus: Array) -> None:
        numbers, kind = column(events, "vcpu"), column(events, "kind")
        whole = (numbers == 0) | (column(events, "seq") == 0)  # and what other threads did to a vCPU
        apart = np.flatnonzero(whole)
        own = np.flatnonzero(~whole) if len(apart) else np.arange(len(whole))
        exits = apart[kind[apart] == Kind.VMM_EXIT]
        self.kicks = self._others(events, apart[kind[apart] == Kind.KICK])
        self.of_all = self._others(events, apart[kind[apart] == Kind.REQUEST_ALL])
        mine = numbers[own]
        if not len(exits) and (mine[1:] < mine[:-1]).any():
            own = own[by_key(mine)]
        self.position, self._events = own, events
        if isinstance(events, np.ndarray):
            own_events = events.take(own)  # whole records: faster than column by column
            for name in _COLUMNS:
                setattr(self, name, np.ascontiguousarray(own_events[name]))
        else:
            for name in _COLUMNS:
                setattr(self, name, column(events, name)[own])
        self.real = np.ones(len(own), bool)
        if len(exits):
            self._end_of_vmms(events, exits, vcpus)
            order = np.lexsort((self.position, self.vcpu))
            for name in (*_COLUMNS, "real", "position"):
                setattr(self, name, getattr(self, name)[order])

    @staticmethod
    def _others(events: Any, at: Array) -> Array:
        # What other threads did, at these places of the batch.
        made = np.zeros(len(at), _OTHER)
        for name in _OTHER.names or () if len(at) else ():
            made[name] = at if name == "position" else column(events, name)[at]
        return made

    def told(self, name: str, at: Any) -> Array:
        """Return another column of the events, for some rows."""
        found: Array = column(self._events, name)[self.position[at]]
        return found

    def who_ran(self, at: Array) -> tuple[Array, Array]:
        """Return the thread and the CPU that ran the hook, for some rows."""
        return self.told("tid", at), self.told("cpu", at)

    time_ns: Array
    since_ns: Array
    requests: Array
    before: Array
    vcpu: Array
    seq: Array
    kind: Array

    def _end_of_vmms(self, events: Any, exits: Array, vcpus: Array) -> None:
        # The first exit of its process after a vCPU was first seen ends it.
        numbers, first = np.unique(self.vcpu, return_index=True)
        known = ~np.isin(vcpus["number"], numbers)
        number = np.concatenate((numbers, vcpus["number"][known]))
        pid = np.concatenate((self.told("pid", first), vcpus["pid"][known])).astype(np.int64)
        begin = np.concatenate((self.position[first], np.full(int(known.sum()), -1)))
        carried = np.isin(number, vcpus["number"])
        begin[carried] = -1
        pids = column(events, "pid")[exits]
        scale = len(column(events, "vcpu")) + 2
        keys = pids.astype(np.int64) * scale + exits + 1
        order = np.argsort(keys)
        place = np.searchsorted(keys[order], pid * scale + begin + 1, side="right")
        inside = np.minimum(place, len(exits) - 1)
        ends = (place < len(exits)) & (pids[order[inside]] == pid)
        at = exits[order[inside[ends]]]
        made = {name: column(events, name)[at] for name in _COLUMNS}
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
    """The incremental core. ``names`` maps each watched bit of the word to its request's name.

    ``full``: the events are of detail full, where each reading of the word is one.
    """

    def __init__(self, names: Mapping[int, str], *, full: bool = False) -> None:
        self._names = dict(names)
        self._mask = np.uint64(sum(1 << bit for bit in names))
        self._full = full
        self._vcpus = np.empty(0, _VCPU)
        self._open = np.empty(0, _OPEN)
        self._kicks = np.empty(0, _KICK)
        self._interrupted = False

    @property
    def carried(self) -> int:
        """Return how many vCPUs, pending requests and kicks of them are carried over."""
        return len(self._vcpus) + len(self._open) + len(self._kicks)

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
            return self._without_rows(rows)
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
                return self._without_rows(rows)
            first, group = self._groups(rows.vcpu)
            carried = self._lookup(rows.vcpu[first])
        return self._feed(rows, first, group, carried, blind, loss or Loss())

    def _without_rows(self, rows: _Rows) -> Finished:
        self._carry_kicks(_kicks_of(rows.kicks, self._mask), rows.of_all, np.full(len(self._vcpus), -1))
        return Finished(empty_lifecycles(), empty_shutdowns())

    def _feed(self, rows: _Rows, first: Array, group: Array, carried: Array, blind: bool, loss: Loss) -> Finished:
        n = len(rows.vcpu)
        known = carried >= 0
        state = np.zeros(len(first), _VCPU)
        if known.any():
            state[known] = self._vcpus[carried[known]]
        state["number"] = rows.vcpu[first]
        state["pid"][~known] = rows.told("pid", first[~known])
        initial = state.copy()
        who, whose = self._identify(rows, first, group, state)

        previous = np.arange(n) - 1
        last_seq = rows.seq[previous].astype(np.int64)
        last_word = rows.requests[previous]
        last_ns = rows.time_ns[previous].astype(np.int64)
        last_kind = rows.kind[previous]
        last_seq[first], last_word[first], last_ns[first] = state["seq"], state["word"], state["last_ns"]
        last_kind[first] = state["kind"]
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

        known_rows = _Known(last_ns, last_kind, gap, missing, cut)
        kicked, tail = self._next_rows(_kicks_of(rows.kicks, self._mask), rows, first, group)
        watched = (last_word | rows.before | rows.requests) & self._mask
        used = int(np.bitwise_or.reduce(watched))
        words = _Words.of(np.flatnonzero(watched), last_word, rows.before, rows.requests)
        batch = _Batch(rows, words, first, group, initial, who, whose, known_rows, kicked, blind)
        tables = [self._request(bit, name, batch) for bit, name in self._names.items() if used >> bit & 1]
        shutdowns = self._shutdowns(rows, who, whose)

        last = np.append(first[1:], n) - 1
        state["seq"], state["word"] = rows.seq[last], rows.requests[last]
        state["last_ns"], state["kind"] = rows.time_ns[last], rows.kind[last]
        state["cut"] = False
        alive = rows.kind[last] != Kind.VCPU_END
        others = np.ones(len(self._vcpus), bool)
        others[carried[known]] = False
        merged = np.concatenate((self._vcpus[others], state[alive]))
        order = np.argsort(merged["number"])
        self._vcpus = merged[order]
        kept = self._open[~np.isin(self._open["number"], state["number"])]
        self._open = np.concatenate((kept, *(pending for _, pending in tables)))
        final = np.concatenate((np.full(int(others.sum()), -1), rows.position[last[alive]]))[order]
        self._kicks = self._kicks[~np.isin(self._kicks["number"], state["number"])]
        self._carry_kicks(tail, rows.of_all, final)
        finished = [table for table, _ in tables if len(table)]
        lifecycles = (
            pd.concat(finished, ignore_index=True)
            if len(finished) > 1
            else (finished[0] if finished else empty_lifecycles())
        )
        return Finished(lifecycles, shutdowns)

    def _next_rows(self, kicks: Array, rows: _Rows, first: Array, group: Array) -> tuple[_Kicked, Array]:
        """Return the kicks that an own row of their vCPU follows, those carried in too, and the other new ones."""
        new = np.concatenate((self._kicks[np.isin(self._kicks["number"], rows.vcpu[first])], kicks))
        new = new[by_key(new["number"])]  # by vCPU, older ones first: so the rows that are found ascend
        place, known = find(rows.vcpu[first], new["number"])
        scale = (int(rows.position.max()) if len(rows.position) else 0) + 3
        keys = group * scale + rows.position + 1
        row = np.searchsorted(keys, place * scale + np.minimum(new["position"], scale - 2) + 1, side="right")
        last = np.append(first[1:], len(group)) - 1
        resolved = known.copy()
        resolved[known] = row[known] <= last[place[known]]
        of_all = rows.of_all[np.isin(rows.of_all["arg"] & np.uint64(REQUEST_MASK), list(self._names))]
        return _Kicked(row[resolved], new[resolved], of_all), new[~resolved]

    def _carry_kicks(self, tail: Array, of_all: Array, final: Array) -> None:
        """Keep what was done to each vCPU since its last own event, at place ``final`` of the batch, or -1: before it.

        What is pending gets it at once. Else only the first of each request counts.
        """
        new = [tail]
        if len(of_all) and len(self._vcpus):
            bits = of_all["arg"] & np.uint64(REQUEST_MASK)
            for vm, bit in {(vm, bit) for vm, bit in zip(of_all["detail"].tolist(), bits.tolist(), strict=True)}:
                if bit not in self._names:
                    continue
                of_vm = of_all[(of_all["detail"] == vm) & (bits == bit)]
                members = np.flatnonzero(self._vcpus["vm"] == vm)
                for asking, asked in _asked(of_vm, self._vcpus["vcpu"][members]):
                    place = np.searchsorted(of_vm["position"][asking], final[members[asked]], side="right")
                    there = place < len(asking)
                    made = _kicks_of(of_vm[asking[place[there]]], self._mask)
                    made["number"] = self._vcpus["number"][members[asked[there]]]
                    made["word"], made["seen"] = np.uint64(1 << bit), False
                    new.append(made)
        arrived = np.concatenate(new)
        place, alive = find(self._vcpus["number"], arrived["number"])
        arrived = arrived[alive]
        last_ns = self._vcpus["last_ns"][place[alive]]
        kept = [self._kicks]
        for bit in self._names:
            mine = (arrived["word"] & np.uint64(1 << bit)) != 0
            if not mine.any():
                continue
            chosen = arrived[mine]
            is_open = np.flatnonzero(self._open["bit"] == bit)
            is_open = is_open[np.argsort(self._open["number"][is_open])]
            slot, pending = find(self._open["number"][is_open], chosen["number"])
            _apply_kicks(self._open, is_open[slot[pending]], chosen[pending])
            later = chosen[~pending & (chosen["time_ns"] > last_ns[mine])]
            later["word"], later["position"] = np.uint64(1 << bit), -1
            kept.append(later)
        merged = np.concatenate(kept)
        order = np.lexsort((merged["time_ns"], merged["seen"], merged["word"], merged["number"]))
        merged = merged[order]
        self._kicks = merged[heads(merged["number"], merged["word"], merged["seen"])]

    @staticmethod
    def _identify(rows: _Rows, first: Array, group: Array, state: Array) -> tuple[Array, Array]:
        # Who each row is, and where that stands in the table: what a VCPU_NEW says does not hold for rows before it.
        new = np.flatnonzero(rows.kind == Kind.VCPU_NEW)
        for at in (new[first[group[new]] == new], new[first[group[new]] != new]):
            who = state.copy()
            state["vm"][group[at]] = rows.told("detail", at)
            state["vcpu"][group[at]] = rows.told("arg", at)
            state["pid"][group[at]] = rows.told("pid", at)
        if not len(at):
            return state, group
        # The last VCPU_NEW so far of each row, if it is not the first row of its vCPU.
        latest = np.zeros(len(group), np.int64)
        latest[at] = np.arange(1, len(at) + 1)
        latest = np.maximum.accumulate(latest)
        said = np.append(-1, group[at])[latest] == group
        later = who[group[at]]
        later["vm"], later["vcpu"], later["pid"] = (rows.told(name, at) for name in ("detail", "arg", "pid"))
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

    def _request(self, bit: int, name: str, batch: _Batch) -> tuple[pd.DataFrame, Array]:
        rows, words, first, group, initial, who, whose, known, kicked, blind = batch
        mask = np.uint64(1 << bit)
        was_known = (words.known & mask) != 0
        before = (words.before & mask) != 0
        now = (words.now & mask) != 0
        mine = np.flatnonzero(was_known | before | now)
        if not len(mine):
            return empty_lifecycles(), np.empty(0, _OPEN)
        touched = words.rows[mine]
        # In detail boundary nearly every row has the request: no copies then.
        pick: Any = touched if len(touched) < len(rows.vcpu) else slice(None)
        if len(mine) < len(now):
            was_known, before, now = was_known[mine], before[mine], now[mine]
        group, gap, missing, cut = group[pick], known.gap[pick], known.missing[pick], known.cut[pick]
        last_ns, last_kind = known.time_ns[pick], known.kind[pick]
        kind, flags, detail, arg = rows.kind[pick], *(rows.told(name, pick) for name in ("flags", "detail", "arg"))
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
        one["cpu"] = one["kicked_ns"] = one["left_ns"] = -1
        one["number"][now_in] = who["number"][group]
        place = numbered[carried_in] - start[carried_in] - 1
        one[place] = self._carried_requests(who["number"][group[carried_in]], bit)

        begun = np.flatnonzero(start)
        at = now_in[begun]
        seen = ~unseen_start[begun]
        fresh = (kind[begun] == Kind.VCPU_NEW) & ((flags[begun] & Flag.CREATED) == 0)
        by: Array = np.where(seen & ~fresh, _raised_by(bit, kind[begun], low[begun]), _RAISER["unknown"])
        one["by"][at] = by
        one["raised_after_ns"][at] = np.where(seen, np.where(fresh, 0, since_ns[begun]), last_ns[begun])
        one["raised_ns"][at] = np.where(seen, time_ns[begun], since_ns[begun])
        one["unseen"][at] = ~seen
        whole = seen & ~gap[begun] & ~cut[begun] & (since_ns[begun] == last_ns[begun])  # nothing between was missed
        place = _places(kind[begun], low[begun], flags[begun], detail[begun], last_kind[begun], whole & self._full)
        one["place"][at] = np.where(seen & ~fresh, place, _PLACE["unknown"])
        one["left_ns"][at] = np.where(one["place"][at] == _PLACE["guest"], time_ns[begun], -1)
        # Inside KVM_RUN other threads can raise all but a triple fault.
        own = (by != _RAISER["unknown"]) & (by != _RAISER["remote"])
        if bit != TRIPLE_FAULT:
            own &= by != _RAISER["kvm_run"]
        one["tid"][at[own]], one["cpu"][at[own]] = rows.who_ran(touched[begun[own]])
        told = _Begun(touched, was_known, then_in, begun[whole], now_in)
        kicked.tell(bit, one, rows, told, partial(_who_before, who, whose, initial, first, touched, group))

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
        stands_for = STATE.get(name)
        harmless = stands_for is None and name in STATELESS
        saved = np.flatnonzero(now & (kind == Kind.SAVE) & succeeded)
        if stands_for is None or stands_for.carried_by == "nothing":
            # A VMM with its registers in kvm_run gets a save at every exit: of what no save can hold that says nothing.
            saved = saved[(flags[saved] & Flag.SYNC) == 0]
        if stands_for is None and not harmless:
            one["last_save"][now_in[saved]] = _UNSURE
        elif stands_for is not None:
            if stands_for.carried_by == "vcpu_events_flag":
                full = VALID_TRIPLE_FAULT | PAYLOAD_PENDING
                save = np.where((detail[saved] & full) == full, _CARRIED, _BLIND)
            else:
                save = np.full(len(saved), _CARRIED if stands_for.carried_by == "vcpu_events" else _BLIND)
                save[~before[saved]] = _UNSURE
            add("saves", saved[save == _CARRIED])
            add("blind", saved[save == _BLIND])
            one["last_save"][now_in[saved]] = save
        if bit == TRIPLE_FAULT:
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
        stopped = np.array(["abandoned", "handed_over", "lost", "undecided"], object)[last_save]
        unsure = _WHY_UNNAMED if stands_for is None else _WHY_MEANWHILE
        stop_why = np.where(last_save == _UNSURE, unsure, "").astype(object)
        if stands_for is not None:
            # Pending when tracing began, and not saved since: a save before that is what nobody can exclude.
            older = (last_save == _NO_SAVE) & (one["by"][now_in[over]] == _RAISER["unknown"])
            stopped[older], stop_why[older] = "undecided", _WHY_OLDER
        ends = np.concatenate((np.full(len(vanished), "undecided", object), end, stopped))
        whys = np.concatenate((np.full(len(vanished), "its end was not seen", object), why, stop_why))
        after = np.concatenate((last_ns[vanished], since_ns[gone], since_ns[over]))
        ended = np.concatenate((since_ns[vanished], time_ns[gone], time_ns[over]))
        one["missed"] |= blind
        # What stands for nothing that a save must keep is no loss, whatever else the tracer has missed.
        proof = np.isin(ends, ("lost", "abandoned", "handed_over")) & one["missed"][index] & (not harmless)
        ends[proof], whys[proof] = "undecided", _WHY_BLIND
        order = np.argsort(index)
        index, ends, whys, row = index[order], ends[order], whys[order], row[order]
        entered = np.concatenate(
            (np.zeros(len(vanished), bool), kind[gone] == Kind.GUEST_ENTRY, np.zeros(len(over), bool))
        )
        table = _lifecycles(
            one[index], name, who[whose[touched[row]]], ends, whys, after[order], ended[order], entered[order]
        )
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
        at = np.flatnonzero(rows.kind == Kind.RUN_EXIT)
        at = at[rows.told("arg", at) == KVM_EXIT_SHUTDOWN]
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
                "nested": (rows.told("flags", at) & Flag.NESTED) != 0,
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
        self._vcpus, self._open, self._kicks = self._vcpus[:0], self._open[:0], self._kicks[:0]
        self._interrupted = False
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
                    np.zeros(int(mask.sum()), bool),
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


def _raised_by(bit: int, kind: Array, low: Array) -> Array:
    # What a function after which the word is read can raise is a triple fault: of others it says nothing.
    sites = _SITES if bit == TRIPLE_FAULT else {}
    by = np.full(len(kind), _RAISER["remote"], "i1")
    by[(kind == Kind.RUN_EXIT) | (kind == Kind.GUEST_ENTRY) | (kind == Kind.GUEST_EXIT)] = _RAISER["kvm_run"]
    by[kind == Kind.RESTORE] = _RAISER["set_vcpu_events"]
    by[kind == Kind.VCPU_NEW] = _RAISER["ioctl"]  # KVM_CREATE_VCPU: of one that is not created nobody knows
    for what, default, names in ((Kind.IOCTL_EXIT, "ioctl", _IOCTLS), (Kind.SITE, "kvm_run", sites)):
        at = np.flatnonzero(kind == what)
        by[at] = _RAISER[default]
        for number, name in names.items() if len(at) else ():
            by[at[low[at] == number]] = _RAISER[name]
    return by


def _places(kind: Array, low: Array, flags: Array, detail: Array, last_kind: Array, full: Array) -> Array:
    """Return where each vCPU was until these rows, given the kind of its last event where ``full`` is true."""
    sync = (flags & Flag.SYNC) != 0
    inside = np.isin(kind, (Kind.RUN_EXIT, Kind.SITE, Kind.GUEST_ENTRY, Kind.GUEST_EXIT)) | sync
    ioctl = np.isin(kind, (Kind.IOCTL_EXIT, Kind.SAVE, Kind.RESTORE, Kind.VCPU_NEW)) & ~sync
    ioctl |= (kind == Kind.SITE) & full & (last_kind == Kind.IOCTL_ENTER)
    begins = np.isin(kind, (Kind.RUN_ENTER, Kind.IOCTL_ENTER)) | ((kind == Kind.RESET) & (low != 0))
    slept = (kind == Kind.WAKEUP) & (detail != 0)
    entered = last_kind == Kind.GUEST_ENTRY
    choices = (
        (begins, "user_space"),
        (ioctl, "ioctl"),
        (slept, "halted"),
        (inside & full & entered & (kind == Kind.GUEST_EXIT), "guest"),
        ((inside & full & ~entered) | (kind == Kind.WAKEUP), "kernel"),
        (inside, "kvm_run"),
    )
    found: Array = np.select([where for where, _ in choices], [_PLACE[name] for _, name in choices], _PLACE["unknown"])
    return found


def _ends(bit: int, kind: Array, low: Array, succeeded: Array, nested: Array, gone: Array) -> tuple[Array, Array]:
    """Return how the requests that are gone at these rows ended, and why nobody can tell if so."""
    kind, low, succeeded, nested = kind[gone], low[gone], succeeded[gone], nested[gone]
    why = np.full(len(gone), "", object)
    inside = np.isin(kind, (Kind.RUN_EXIT, Kind.SITE, Kind.GUEST_ENTRY, Kind.GUEST_EXIT, Kind.WAKEUP))
    restore = kind == Kind.RESTORE
    ioctl = np.isin(kind, (Kind.IOCTL_EXIT, Kind.SAVE)) | restore
    if bit != TRIPLE_FAULT:
        # A save takes what it can into the state that it gives.
        return np.where(ioctl & (kind != Kind.SAVE), "cleared", "serviced").astype(object), why
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
    one: Array, name: str, who: Array, ends: Array, whys: Array, after_ns: Array, ended_ns: Array, entered: Array
) -> pd.DataFrame:
    """Return the table of these instances; a gap makes each verdict undecided.

    ``entered``: their end was seen where the guest was entered.
    """
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
            "raised_in": _PLACES[one["place"]],
            "requester_tid": one["tid"],
            "requester_cpu": one["cpu"],
            # Clocks of two CPUs: a kick that came before the end did not come after it.
            "kicked_ns": np.where(ended_ns < 0, one["kicked_ns"], np.minimum(one["kicked_ns"], ended_ns)),
            "left_guest_ns": one["left_ns"],
            "reentered_ns": np.where(entered, ended_ns, -1),
        },
        len(one),
    )
