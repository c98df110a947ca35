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

from probes.requests import bit_name
from probes.schema import PAYLOAD_FLAGS, PAYLOAD_PENDING, End, Flag, Kind, Site
from probes.uapi import exit_reason, ioctl

Array = npt.NDArray[Any]

#: Each column and what it holds.
COLUMNS: Mapping[str, str] = {
    "time_ns": "CLOCK_MONOTONIC at the hook",
    "utc_ns": "the same moment in UTC, in ns since 1970, by the recording's pair of clocks",
    "since_ns": "CLOCK_MONOTONIC when this vCPU's word was last read before; 0 if it never was",
    "vcpu": "number of the vCPU in the recording; 0: the event concerns a whole VM or VMM",
    "seq": "number of this event among those of its vCPU",
    "pid": "process that owns the VM",
    "tid": "thread that ran the hook",
    "cpu": "host CPU that ran the hook",
    "kind": "what was hooked: the name of a schema.Kind in lower case",
    "requests": "the requests that are pending, by name (bit_N: one that the recording does not name)",
    "before": "those that were pending at since_ns",
    "flags": "what holds: created, nested, cap, cap_exists, sync",
    "vm": "number of the VM (vcpu_new, vm_cap)",
    "vcpu_id": "KVM's own number of the vCPU (vcpu_new)",
    "cap": "whether KVM_CAP_X86_TRIPLE_FAULT_EVENT is on (vm_cap): 0 or 1",
    "ioctl": "the ioctl's name without KVM_",
    "errno": "what it failed with, 0 if it did not (ioctl_exit, save, restore, run_exit)",
    "payload_flags": "kvm_vcpu_events.flags (save, restore)",
    "payload_pending": "triple_fault.pending (save, restore): 0 or 1",
    "exit_reason": "why KVM_RUN returned, without KVM_EXIT_ (run_exit)",
    "hardware_exit": "the hardware's own exit reason (guest_exit)",
    "site": "which function of KVM was hooked: the name of a schema.Site in lower case (site)",
    "end": "how it ended: the name of a schema.End in lower case (vcpu_end, vmm_exit)",
}
_LISTS = ("requests", "before", "flags")

# Events that are text at one time.
_CHUNK = 1 << 17


class _Column(NamedTuple):
    """A column of a batch: numbers, or places in a list of words; ``known`` tells which rows have it (None: all)."""

    name: str
    values: Array
    words: list[Any] | None = None
    known: Array | None = None


def csv(batches: Iterable[Array], names: Mapping[int, str], offset_ns: int) -> Iterator[memoryview]:
    """Yield the events as CSV with a heading. ``names``: the requests by bit; ``offset_ns``: from monotonic to UTC."""
    yield memoryview((",".join(COLUMNS) + "\n").encode())

    def cell(column: _Column) -> Any:
        return _strings(column, lambda word: "|".join(word) if column.name in _LISTS else str(word))

    for columns, _ in _decoded(batches, names, offset_ns):
        yield _lines([cell(column) for column in columns], ",")


def jsonl(batches: Iterable[Array], names: Mapping[int, str], offset_ns: int) -> Iterator[memoryview]:
    """Yield the events as one JSON object a line. ``names``, ``offset_ns``: as for :func:`csv`."""

    def member(column: _Column) -> Any:
        key = f"{json.dumps(column.name)}: "
        comma = "{" if column.name == "time_ns" else ", "
        return _joined(pa.scalar(comma + key), _strings(column, json.dumps), pa.scalar(""))

    for columns, count in _decoded(batches, names, offset_ns):
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


def _decoded(batches: Iterable[Array], names: Mapping[int, str], offset_ns: int) -> Iterator[tuple[list[_Column], int]]:
    for batch in batches:
        for start in range(0, len(batch), _CHUNK):
            part = batch[start : start + _CHUNK]
            yield _columns(part, names, offset_ns), len(part)


def _columns(events: Array, names: Mapping[int, str], offset_ns: int) -> list[_Column]:
    kind, arg, detail = events["kind"], events["arg"], events["detail"]
    low = arg & np.uint64(0xFFFFFFFF)
    result = (arg >> np.uint64(32)).astype("u4").view("i4")

    def among(*kinds: Kind) -> Array:
        return np.isin(kind, kinds)

    def named(name: str, values: Array, word: Callable[[int], Any], known: Array | None = None) -> _Column:
        distinct, places = np.unique(values, return_inverse=True)
        return _Column(name, places, [word(int(value)) for value in distinct], known)

    def requests_of(word: int) -> list[str]:
        return [clean(names.get(bit, bit_name(bit))) for bit in range(64) if word >> bit & 1]

    payload = among(Kind.SAVE, Kind.RESTORE)
    returned = payload | among(Kind.IOCTL_EXIT)
    with_ioctl = returned | among(Kind.IOCTL_ENTER, Kind.RUN_ENTER) | (among(Kind.RESET) & (arg != 0))
    columns = [
        _Column("time_ns", events["time_ns"]),
        _Column("utc_ns", events["time_ns"].astype("i8") + offset_ns),
        *(_Column(name, events[name]) for name in ("since_ns", "vcpu", "seq", "pid", "tid", "cpu")),
        named("kind", kind, lambda value: _member(Kind, value)),
        named("requests", events["requests"], requests_of),
        named("before", events["before"], requests_of),
        named("flags", events["flags"], _flags),
        _Column("vm", detail, known=among(Kind.VCPU_NEW, Kind.VM_CAP)),
        _Column("vcpu_id", arg, known=among(Kind.VCPU_NEW)),
        _Column("cap", arg, known=among(Kind.VM_CAP)),
        named("ioctl", low, ioctl, with_ioctl),
        _Column("errno", np.maximum(-result.astype("i8"), 0), known=returned | among(Kind.RUN_EXIT)),
        _Column("payload_flags", detail & np.uint32(PAYLOAD_FLAGS), known=payload),
        _Column("payload_pending", ((detail & np.uint32(PAYLOAD_PENDING)) != 0).astype("u1"), known=payload),
        named("exit_reason", low, exit_reason, among(Kind.RUN_EXIT)),
        _Column("hardware_exit", arg, known=among(Kind.GUEST_EXIT)),
        named("site", low, lambda value: _member(Site, value), among(Kind.SITE)),
        named("end", low, lambda value: _member(End, value), among(Kind.VCPU_END, Kind.VMM_EXIT)),
    ]
    assert [column.name for column in columns] == list(COLUMNS)
    return columns


def clean(name: str) -> str:
    """Return a name from a recording as a word that needs no quotes anywhere."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _member(enum: Any, value: int) -> str:
    try:
        return str(enum(value).name).lower()
    except ValueError:
        return str(value)


def _flags(value: int) -> list[str]:
    return [str(flag.name).lower() for flag in Flag if value & flag]
