"""A batch of events as the pass reads it: contiguous columns, and one event at a time as small integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from analysis.compiled import compiled
from probes.schema import NO_BIT, PAYLOAD_PENDING, REQUEST_FLAGS, REQUEST_MASK, VALID_TRIPLE_FAULT, Flag, Kind

Array: TypeAlias = npt.NDArray[Any]

if TYPE_CHECKING:
    signed = int
else:
    #: What a number is while events are handled: compiled code would go on with another width.
    signed = np.int64

#: Flags of an event as plain numbers: compiled code knows no IntFlag.
CREATED, NESTED, CAP, CAP_EXISTS, SYNC, READ, STILL, DEAD = (
    int(flag)
    for flag in (
        Flag.CREATED,
        Flag.NESTED,
        Flag.CAP,
        Flag.CAP_EXISTS,
        Flag.SYNC,
        Flag.READ,
        Flag.STILL,
        Flag.DEAD,
    )
)
ONE, NOTHING = np.uint64(1), np.uint64(0)
_LOW = np.uint64(0xFFFF_FFFF)
HALF = np.uint64(32)
_MASK, _NO_ACTION = np.uint64(REQUEST_MASK), np.uint64(REQUEST_FLAGS["NO_ACTION"])


class Batch(Protocol):
    """A batch of events: a numpy array of EVENT, a mapping of columns, or a DataFrame."""

    def __getitem__(self, name: str, /) -> Any:
        """Return the column ``name``."""


class Event(NamedTuple):
    """One event, by the names of probes.schema.FIELDS: words are unsigned, all else is signed."""

    time_ns: int
    since_ns: int
    requests: Any
    before: Any
    arg: Any
    vcpu: int
    seq: int
    pid: int
    tid: int
    detail: int
    cpu: int
    kind: int
    flags: int


class Columns(NamedTuple):
    """The same fields of a whole batch."""

    time_ns: Array
    since_ns: Array
    requests: Array
    before: Array
    arg: Array
    vcpu: Array
    seq: Array
    pid: Array
    tid: Array
    detail: Array
    cpu: Array
    kind: Array
    flags: Array


def columns_of(batch: Batch) -> Columns:
    """Return a batch as columns of one layout, so that the pass is compiled once; copied only where it must be."""

    def column(name: str) -> Array:
        values = np.ascontiguousarray(batch[name]).view()
        if name in ("time_ns", "since_ns"):
            values = values.view(np.int64)
        values.flags.writeable = False
        return values

    return Columns(*(column(name) for name in Columns._fields))


@compiled
def event_at(of: Columns, at: int) -> Event:
    """Return one event of a batch."""
    return Event(
        of.time_ns[at],
        of.since_ns[at],
        of.requests[at],
        of.before[at],
        of.arg[at],
        signed(of.vcpu[at]),
        signed(of.seq[at]),
        signed(of.pid[at]),
        signed(of.tid[at]),
        signed(of.detail[at]),
        signed(of.cpu[at]),
        signed(of.kind[at]),
        signed(of.flags[at]),
    )


@compiled
def without_change(event: Event) -> Event:
    """Return a VCPU_NEW that comes late: what it says was so before it, and nobody saw since when."""
    return Event(
        event.time_ns,
        event.time_ns,
        event.requests,
        event.requests,
        event.arg,
        event.vcpu,
        event.seq,
        event.pid,
        event.tid,
        event.detail,
        event.cpu,
        event.kind,
        event.flags,
    )


@compiled
def end_with_process(event: Event, number: int, seq: int, word: Any, last_ns: int, flags: int) -> Event:
    """Return the end of a vCPU that the exit of its process tells: nothing was read there."""
    return Event(
        event.time_ns,
        last_ns,
        word,
        word,
        event.arg,
        number,
        seq,
        event.pid,
        event.tid,
        event.detail,
        event.cpu,
        signed(Kind.VCPU_END),
        flags,
    )


@compiled
def low(event: Event) -> int:
    """Return the ioctl, the exit reason or the site."""
    return signed(event.arg & _LOW)


@compiled
def asked_for(event: Event) -> int:
    """Return the number of the request that is made of several vCPUs; NO_BIT for one that sets no bit."""
    return NO_BIT if event.arg & _NO_ACTION != NOTHING else signed(event.arg & _MASK)


@compiled
def succeeded(event: Event) -> bool:
    """Tell whether the ioctl returned 0."""
    return bool(event.arg >> HALF == NOTHING)


@compiled
def fault_in_payload(event: Event) -> bool:
    """Tell whether the events of a SAVE or RESTORE hold a pending triple fault."""
    return event.detail & VALID_TRIPLE_FAULT != 0 and event.detail & PAYLOAD_PENDING != 0


@compiled
def holds(word: Any, bit: int) -> bool:
    """Tell whether a request is in a word."""
    return bool(word >> np.uint64(bit) & ONE != NOTHING)


@compiled
def lowest(word: Any) -> int:
    """Return the number of the lowest bit of a word that is not 0."""
    bit = 0
    while word & np.uint64(0xFF) == NOTHING:
        word = word >> np.uint64(8)
        bit += 8
    while word & ONE == NOTHING:
        word = word >> ONE
        bit += 1
    return bit


@compiled
def without_lowest(word: Any) -> Any:
    """Return a word without its lowest bit."""
    return word & (word - ONE)
