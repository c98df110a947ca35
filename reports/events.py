"""Events in words: one line of CSV or one JSON object for each, with what ``arg`` and ``detail`` mean for its kind.

The columns, and the keys of an object, are :data:`COLUMNS`; a column that means nothing for the kind is empty in CSV
and absent in JSON. No loop runs over events: every word is looked up once in a batch, and lines are joined by Arrow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from probes.exits import GUEST_EXIT, Names, parse
from probes.requests import bit_name
from probes.schema import (
    MODES,
    PAYLOAD_FLAGS,
    PAYLOAD_PENDING,
    REQUEST_FLAGS,
    REQUEST_MASK,
    STATE_BITS,
    End,
    Flag,
    Kind,
    Site,
    requested,
)
from probes.uapi import exit_reason, ioctl
from reports.words import Clock

Array = npt.NDArray[Any]

#: Each column and what it holds.
COLUMNS: Mapping[str, str] = {
    "time_ns": "CLOCK_MONOTONIC at the hook",
    "utc_ns": "the same moment in UTC, in ns since 1970, by the recording's clock",
    "since_ns": "CLOCK_MONOTONIC when this vCPU's word was last read before, 0 if it never was; when its requester"
    " began (request_all_end, in_guest_still)",
    "vcpu": "number of the vCPU in the recording; 0: the event concerns a whole VM or VMM",
    "seq": "number of this event among those of its vCPU; 0: no reading of the vCPU's own",
    "pid": "process that owns the VM",
    "tid": "thread that ran the hook",
    "cpu": "host CPU that ran the hook",
    "kind": "what was hooked: the name of a schema.Kind in lower case",
    "requests": "the requests that are pending, by name (bit_N: one that the recording does not name)",
    "before": "those that were pending at since_ns (neither in request_all nor in request_all_end)",
    "flags": "what holds: created, nested, cap, cap_exists, sync, read, still, dead (KVM has given the VM up)",
    "vm": "number of the VM (vcpu_new, vm_cap, request_all, request_all_end)",
    "vcpu_id": "KVM's own number of the vCPU (vcpu_new)",
    "cap": "whether KVM_CAP_X86_TRIPLE_FAULT_EVENT is on (vm_cap): 0 or 1",
    "ioctl": "the ioctl's name without KVM_",
    "errno": "what it failed with, 0 if it did not (ioctl_exit, save, restore, run_exit)",
    "payload_flags": "kvm_vcpu_events.flags (save, restore)",
    "payload_pending": "triple_fault.pending (save, restore): 0 or 1",
    "exit_reason": "why KVM_RUN returned, without KVM_EXIT_ (run_exit)",
    "hardware_exit": "the hardware's own exit reason (guest_exit)",
    "hardware_exit_name": "what the kernel that was recorded calls it; empty if it does not",
    "site": "which function of KVM was hooked: the name of a schema.Site in lower case (site)",
    "end": "how it ended: the name of a schema.End in lower case (vcpu_end, vmm_exit)",
    "blocked_ns": "for how long the vCPU had nothing to run (wakeup)",
    "slept": "whether it slept, and did not only poll (wakeup): 0 or 1",
    "mode": "vcpu->mode as that thread saw it, in lower case (kick, in_guest_still)",
    "state": "what user space has read of the vCPU since it last ran (read), or written (written)",
    "fingerprint": "of the registers that it has read or written: equal ones are equal registers (read, written)",
    "request": "the request that several vCPUs get (request_all, request_all_end, in_guest_still)",
    "request_flags": "what KVM was told of it: no_wakeup, wait, no_action (the same kinds)",
    "targets": "the vCPUs that get it, by KVM's index and as far as 63, or all (request_all, request_all_end)",
}
_LISTS = ("requests", "before", "flags", "state", "request_flags", "targets")

# A mask of vCPUs that stands for every one.
_ALL = (1 << 64) - 1
# Events that are text at one time.
_CHUNK = 1 << 17


class _Column(NamedTuple):
    """A column of a batch: numbers, or places in a list of words; ``known`` tells which rows have it (None: all)."""

    name: str
    values: Array
    words: list[Any] | None = None
    known: Array | None = None


def hardware_exits(meta: Mapping[str, Any]) -> Names:
    """Return what the kernel of a recording calls the hardware's exit reasons; nothing if it was not asked."""
    return parse((meta.get("formats") or {}).get(GUEST_EXIT, ""))


def csv(
    batches: Iterable[Array], names: Mapping[int, str], clock: Clock, exits: Names | None = None
) -> Iterator[memoryview]:
    """Yield the events as CSV with a heading.

    ``names``: the requests by bit; ``clock``: that of the recording; ``exits``: names of the hardware's reasons.
    """
    yield memoryview((",".join(COLUMNS) + "\n").encode())

    def cell(column: _Column) -> Any:
        return _strings(column, lambda word: "|".join(map(str, word)) if column.name in _LISTS else str(word))

    for columns, _ in _decoded(batches, names, clock, exits):
        yield _lines([cell(column) for column in columns], ",")


def jsonl(
    batches: Iterable[Array], names: Mapping[int, str], clock: Clock, exits: Names | None = None
) -> Iterator[memoryview]:
    """Yield the events as one JSON object a line. ``names``, ``clock``, ``exits``: as for :func:`csv`."""

    def member(column: _Column) -> Any:
        key = f"{json.dumps(column.name)}: "
        comma = "{" if column.name == "time_ns" else ", "
        return _joined(pa.scalar(comma + key), _strings(column, json.dumps), pa.scalar(""))

    for columns, count in _decoded(batches, names, clock, exits):
        yield _lines([*map(member, columns), pa.repeat("}", count)], "")


def _strings(column: _Column, word: Callable[[Any], str]) -> Any:
    mask = None if column.known is None else ~column.known
    if column.words is None:
        return pc.cast(pa.array(column.values, mask=mask), pa.string())
    places: Any = pa.array(column.values, mask=mask)
    return pa.array([word(each) for each in column.words], pa.string()).take(places)


def _joined(*parts: Any, **options: Any) -> Any:
    # The last part separates the others. The stubs know no mixture of scalars and arrays.
    join: Any = pc.binary_join_element_wise
    return join(*parts, **options)


def _lines(cells: list[Any], separator: str) -> memoryview:
    # Arrow keeps strings one after the other: with a line break at the end of each, that is the text itself.
    lines = _joined(*cells, pa.scalar(separator), null_handling="replace", null_replacement="")
    lines = _joined(lines, pa.scalar(""), pa.scalar("\n"))
    _, offsets, data = lines.buffers()
    if data is None:
        return memoryview(b"")
    ends = np.frombuffer(offsets, "i4")
    return memoryview(data)[int(ends[0]) : int(ends[len(lines)])]


def _decoded(
    batches: Iterable[Array], names: Mapping[int, str], clock: Clock, exits: Names | None
) -> Iterator[tuple[list[_Column], int]]:
    for batch in batches:
        for start in range(0, len(batch), _CHUNK):
            part = batch[start : start + _CHUNK]
            yield _columns(part, names, clock, exits or Names()), len(part)


def _columns(events: Array, names: Mapping[int, str], clock: Clock, exits: Names) -> list[_Column]:
    kind, arg, detail = events["kind"], events["arg"], events["detail"]
    low = arg & np.uint64(0xFFFFFFFF)
    result = (arg >> np.uint64(32)).astype("u4").view("i4")

    def among(*kinds: Kind) -> Array:
        return np.isin(kind, kinds)

    def named(name: str, values: Array, word: Callable[[int], Any], known: Array | None = None) -> _Column:
        distinct, places = np.unique(values, return_inverse=True)
        return _Column(name, places, [word(int(value)) for value in distinct], known)

    def request(bit: int) -> str:
        return clean(names.get(bit, bit_name(bit)))

    def requests_of(word: int) -> list[str]:
        return [request(bit) for bit in range(64) if word >> bit & 1]

    def exit_name(value: int) -> str | None:
        name = exits.name(value & 0xFFFFFFFF, value >> 32)
        return None if name.startswith("0x") else clean(name)

    to_all = among(Kind.REQUEST_ALL, Kind.REQUEST_ALL_END)
    of_one = to_all | among(Kind.IN_GUEST_STILL)
    told = np.where(of_one, arg, np.uint64(0))
    # What the hardware said, and in which instruction set, as one number.
    left = np.where(among(Kind.GUEST_EXIT), low | detail.astype("u8") << np.uint64(32), np.uint64(0))
    distinct, places = np.unique(left, return_inverse=True)
    exit_names = [exit_name(int(value)) for value in distinct]
    unnamed = np.array([name is None for name in exit_names], bool)[places]
    payload = among(Kind.SAVE, Kind.RESTORE)
    returned = payload | among(Kind.IOCTL_EXIT)
    times = events["time_ns"].astype("i8")
    with_ioctl = returned | among(Kind.IOCTL_ENTER, Kind.RUN_ENTER) | (among(Kind.RESET) & (arg != 0))
    columns = [
        _Column("time_ns", events["time_ns"]),
        _Column("utc_ns", times + clock.offset_ns(times)),
        *(_Column(name, events[name]) for name in ("since_ns", "vcpu", "seq", "pid", "tid", "cpu")),
        named("kind", kind, lambda value: _member(Kind, value)),
        named("requests", events["requests"], requests_of, ~to_all),
        named("before", events["before"], requests_of, ~to_all),
        named("flags", events["flags"], _flags),
        _Column("vm", detail, known=to_all | among(Kind.VCPU_NEW, Kind.VM_CAP)),
        _Column("vcpu_id", arg, known=among(Kind.VCPU_NEW)),
        _Column("cap", arg, known=among(Kind.VM_CAP)),
        named("ioctl", low, ioctl, with_ioctl),
        _Column("errno", np.maximum(-result.astype("i8"), 0), known=returned | among(Kind.RUN_EXIT)),
        _Column("payload_flags", detail & np.uint32(PAYLOAD_FLAGS), known=payload),
        _Column("payload_pending", ((detail & np.uint32(PAYLOAD_PENDING)) != 0).astype("u1"), known=payload),
        named("exit_reason", low, exit_reason, among(Kind.RUN_EXIT)),
        _Column("hardware_exit", arg, known=among(Kind.GUEST_EXIT)),
        _Column("hardware_exit_name", places, exit_names, among(Kind.GUEST_EXIT) & ~unnamed),
        named("site", low, lambda value: _member(Site, value), among(Kind.SITE)),
        named("end", low, lambda value: _member(End, value), among(Kind.VCPU_END, Kind.VMM_EXIT)),
        _Column("blocked_ns", arg, known=among(Kind.WAKEUP)),
        _Column("slept", (detail != 0).astype("u1"), known=among(Kind.WAKEUP)),
        named("mode", detail, mode, among(Kind.KICK, Kind.IN_GUEST_STILL)),
        named("state", detail, states, among(Kind.READ, Kind.WRITTEN)),
        _Column("fingerprint", arg, known=among(Kind.READ, Kind.WRITTEN) & (arg != 0)),
        named("request", requested(told), request, of_one),
        named("request_flags", told & ~np.uint64(REQUEST_MASK), request_flags, of_one),
        named("targets", np.where(to_all, events["requests"], np.uint64(0)), targets, to_all),
    ]
    assert [column.name for column in columns] == list(COLUMNS)
    return columns


def clean(name: str) -> str:
    """Return a name from a recording as a word that needs no quotes anywhere."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def mode(value: int) -> str:
    """Return KVM's name of a vcpu->mode, in lower case."""
    return MODES[value].lower() if value < len(MODES) else str(value)


def request_flags(arg: int) -> list[str]:
    """Return the flags of a request as KVM was told it, in lower case."""
    return [name.lower() for name, bit in REQUEST_FLAGS.items() if arg & bit]


def targets(mask: int) -> list[int | str]:
    """Return the vCPUs of a mask by their index, or that it is all of them."""
    return ["all"] if mask == _ALL else [index for index in range(64) if mask >> index & 1]


def states(of: int) -> list[str]:
    """Return the parts of a vCPU's state in a set of probes.schema.STATES."""
    return [name for name, bit in STATE_BITS.items() if of & bit]


def _member(enum: Any, value: int) -> str:
    try:
        return str(enum(value).name).lower()
    except ValueError:
        return str(value)


def _flags(value: int) -> list[str]:
    return [str(flag.name).lower() for flag in Flag if value & flag]
