"""Exits by reason, requests by name: from histograms that the kernel kept, or from the events of a recording.

Pure, and numpy alone. A histogram is log-linear (probes/stat.py), so a quantile is the middle of the bucket that holds
it: at most 1/16 away from the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from analysis.rows import by_key
from probes.exits import Kind
from probes.requests import bit_name
from probes.schema import EVENT
from probes.schema import Kind as EventKind
from probes.stat import BITS, BUCKETS, KEY, VALUE, WORDS, Counts

if TYPE_CHECKING:
    from tracer.recording import Recording, Segment

Array = npt.NDArray[Any]

#: Gives the name of a reason: what it is of, its number, and the instruction set or the error.
Namer = Callable[[Kind, int, int], str]


def edges() -> Array:
    """Return the smallest time of each bucket, and the end of the last one."""
    bucket = np.arange(BUCKETS + 1, dtype="i8")
    above = np.maximum((bucket >> BITS) - 1, 0)
    small: Array = bucket < 1 << BITS
    return np.where(small, bucket, ((bucket & ((1 << BITS) - 1)) + (1 << BITS)) << above)


_EDGES = edges()


def buckets_of(ns: Array) -> Array:
    """Return the bucket that each time belongs to, as the programs in the kernel choose it."""
    found: Array = np.searchsorted(_EDGES, ns, side="right") - 1
    return np.minimum(found, BUCKETS - 1)


def quantile(buckets: Array, q: float, max_ns: int) -> int | None:
    """Return the time that a share ``q`` of a histogram's times does not exceed; None for an empty one.

    At most 1/16 away from what the times themselves would tell, as long as they are below 2^40 ns.
    """
    total = int(buckets.sum())
    if not total:
        return None
    rank = min(max(int(np.ceil(q * total)), 1), total)
    bucket = int(np.searchsorted(np.cumsum(buckets), rank))
    low, end = int(_EDGES[bucket]), int(_EDGES[bucket + 1])
    return min((low + end - 1) // 2, max_ns)


def _before(new: Array, old: Array) -> tuple[Array, Array]:
    # Where each new key stands among the old ones, and whether it does.
    place = {key: index for index, key in enumerate(old.tolist())}
    found = np.fromiter((place.get(key, -1) for key in new.tolist()), "i8", len(new))
    return np.maximum(found, 0), found >= 0


def since(new: Counts, old: Counts) -> Counts:
    """Return what was counted between two moments.

    ``max_ns`` is exact where it is the longest time until now; else it is the end of the highest bucket in use.
    """
    values, words = new.values.copy(), new.words.copy()
    place, known = _before(new.keys, old.keys)
    if known.any():
        was = old.values[place[known]]
        for name in ("count", "sum_ns", "buckets"):
            values[name][known] -= was[name]
        repeated = np.zeros(len(values), bool)
        repeated[known] = new.values["max_ns"][known] == was["max_ns"]
        used = values["buckets"] > 0
        top = BUCKETS - 1 - np.argmax(used[:, ::-1], axis=1)
        upper = np.where(used.any(axis=1), _EDGES[top + 1] - 1, 0).astype("u8")
        # The last bucket has no end.
        upper = np.where(used[:, BUCKETS - 1], values["max_ns"], upper)
        values["max_ns"] = np.where(repeated, np.minimum(upper, values["max_ns"]), values["max_ns"])
    place, known = _before(new.vcpus, old.vcpus)
    if known.any():
        for name in ("raised", "serviced"):
            words[name][known] -= old.words[name][place[known]]
    rows = (values["count"] > 0) | (values["buckets"].any(axis=1))
    bits = words["raised"].any(axis=1) | words["serviced"].any(axis=1)
    return Counts(new.keys[rows], values[rows], new.vcpus[bits], words[bits])


def together(*parts: Counts) -> Counts:
    """Return several counts as one, each key once."""
    keys, key_of = np.unique(np.concatenate([part.keys for part in parts]), return_inverse=True)
    values = np.zeros(len(keys), VALUE)
    given = np.concatenate([part.values for part in parts])
    for name in ("count", "sum_ns", "buckets"):
        np.add.at(values[name], key_of, given[name])
    np.maximum.at(values["max_ns"], key_of, given["max_ns"])
    vcpus, vcpu_of = np.unique(np.concatenate([part.vcpus for part in parts]), return_inverse=True)
    words = np.zeros(len(vcpus), WORDS)
    bits = np.concatenate([part.words for part in parts])
    for name in ("raised", "serviced"):
        np.add.at(words[name], vcpu_of, bits[name])
    return Counts(keys, values, vcpus, words)


def of(counts: Counts, vcpus: Iterable[int]) -> Counts:
    """Return what concerns some vCPUs, by their numbers."""
    numbers = np.fromiter(vcpus, "u4")
    rows, words = np.isin(counts.keys["vcpu"], numbers), np.isin(counts.vcpus, numbers)
    return Counts(counts.keys[rows], counts.values[rows], counts.vcpus[words], counts.words[words])


def over_vcpus(counts: Counts) -> Counts:
    """Return counts over all vCPUs, as those of number 0."""
    keys = counts.keys.copy()
    keys["vcpu"] = 0
    return together(Counts(keys, counts.values, np.zeros_like(counts.vcpus), counts.words))


class Tally:
    """What was counted between two readings of the kernel's counts, and in all.

    Bounded by the vCPUs alive: of those that have ended nothing is kept but the total.
    """

    def __init__(self) -> None:
        self._old = Counts()
        self.total = Counts()

    def feed(self, counts: Counts, ended: Iterable[int], only: Iterable[int] | None) -> Counts:
        """Return what is new in a reading; the kernel forgets vCPUs that have ``ended`` after it.

        ``only`` are the vCPUs that are wanted, None for all.
        """
        new = since(counts, self._old)
        gone = np.fromiter(ended, "u4")
        rows, words = ~np.isin(counts.keys["vcpu"], gone), ~np.isin(counts.vcpus, gone)
        self._old = Counts(counts.keys[rows], counts.values[rows], counts.vcpus[words], counts.words[words])
        wanted = new if only is None else of(new, only)
        self.total = together(self.total, over_vcpus(wanted))
        return wanted


@dataclass(frozen=True)
class Exit:
    """A line of the table of exits."""

    kind: Kind
    reason: str
    number: int  # the kernel's number of the reason
    variant: int  # of exits from the guest the instruction set, of those to user space KVM_RUN's errno or 0
    count: int  # exits that began
    timed: int  # of those, or of earlier ones, that ended: the times below are theirs
    time_ns: int
    share: float  # of the time of all exits of this kind; 0 where there is none
    p50_ns: int | None
    p99_ns: int | None
    max_ns: int | None


@dataclass(frozen=True)
class Request:
    """A line of the table of requests."""

    request: str
    bit: int
    raised: int  # readings that found the bit newly set
    serviced: int  # readings that found it gone


def exits(counts: Counts, name: Namer) -> list[Exit]:
    """Return the table of exits over all vCPUs of ``counts``, each kind's most costly reason first.

    Where KVM_RUN returned an error that is the reason, and its ``number`` is 0: what kvm_run says beside it is older.
    """
    keys = counts.keys.copy()
    keys["reason"][(keys["kind"] == Kind.USER) & (keys["variant"] < 0)] = 0
    merged = over_vcpus(Counts(keys, counts.values, counts.vcpus, counts.words))
    totals = {kind: int(merged.values["sum_ns"][merged.keys["kind"] == kind].sum()) for kind in Kind}
    rows = []
    for key, value in zip(merged.keys.tolist(), merged.values, strict=True):
        _, number, reason, variant = key
        kind, longest, spent = Kind(number), int(value["max_ns"]), int(value["sum_ns"])
        timed = int(value["buckets"].sum())
        rows.append(
            Exit(
                kind,
                name(kind, reason, variant),
                reason,
                abs(variant),
                int(value["count"]),
                timed,
                spent,
                spent / totals[kind] if totals[kind] else 0.0,
                quantile(value["buckets"], 0.5, longest),
                quantile(value["buckets"], 0.99, longest),
                longest if timed else None,
            )
        )
    return sorted(rows, key=lambda row: (row.kind, -row.time_ns, -row.count, row.reason))


def requests(counts: Counts, names: Mapping[int, str]) -> list[Request]:
    """Return the table of requests over all vCPUs of ``counts``, the most frequent first."""
    raised, serviced = (counts.words[name].sum(axis=0, dtype="u8") for name in ("raised", "serviced"))
    rows = [
        Request(names.get(bit, bit_name(bit)), bit, int(raised[bit]), int(serviced[bit]))
        for bit in np.flatnonzero(raised | serviced).tolist()
    ]
    return sorted(rows, key=lambda row: (-row.raised, -row.serviced, row.bit))


# --- from a recording ---------------------------------------------------------------------------------------

#: Events that begin and end a time, by kind.
_BEGIN = {Kind.GUEST: EventKind.GUEST_EXIT, Kind.USER: EventKind.RUN_EXIT}
_END = {Kind.GUEST: EventKind.GUEST_ENTRY, Kind.USER: EventKind.RUN_ENTER}


@dataclass(frozen=True)
class Recorded:
    """What the events of a recording tell until some segment; ``carried`` are those that the next one needs."""

    counts: Counts = field(default_factory=Counts)
    events: Mapping[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))  # that begin or end a time
    gaps: int = 0  # events that were lost between those that are there: times across them are not counted
    carried: Array = field(default_factory=lambda: np.zeros(0, EVENT))


def recorded(batch: Array, before: Recorded | None = None, isa: int = 0) -> Recorded:
    """Count all exits and requests in a batch of events of detail full, on top of what ``before`` holds.

    ``isa`` is the instruction set that names the reasons of exits from the guest, where the event does not tell it.
    """
    before = before or Recorded()
    # Without those about a whole VM or VMM, and those of other threads.
    events = np.concatenate([before.carried, batch[(batch["vcpu"] > 0) & (batch["seq"] > 0)]])
    order = by_key(events["vcpu"])
    events, carried = events[order], order < len(before.carried)
    vcpu, kind, times = events["vcpu"], events["kind"], events["time_ns"].astype("i8")
    same = np.zeros(len(events), bool)
    same[1:] = vcpu[1:] == vcpu[:-1]
    # The first event of a vCPU is number 1. What is missing between carried ones was counted with them.
    seq = events["seq"].astype("i8")
    missing = np.where(carried, 0, np.where(same, np.diff(seq, prepend=0), seq) - 1)
    lost_until = np.cumsum(missing)

    last = np.zeros(len(events), bool)
    last[:-1] = ~same[1:]
    last[-1:] = True
    # How much had been lost when the last event of the same vCPU came.
    lost_at_end = lost_until[last][np.cumsum(last) - last]
    keep = last.copy()
    parts, seen = [before.counts], {}
    for which in Kind:
        begins = kind == _BEGIN[which]
        rows = np.flatnonzero(begins | (kind == _END[which]))
        # A begin has an end if the next row of either is one, of the same vCPU, with nothing lost between.
        begin, end = rows[:-1], rows[1:]
        paired = begins[begin] & ~begins[end] & (vcpu[begin] == vcpu[end]) & (lost_until[begin] == lost_until[end])
        ended = np.zeros(len(events), bool)
        ended[begin[paired]] = True
        lasted = np.zeros(len(events), "i8")
        lasted[begin[paired]] = np.maximum(times[end[paired]] - times[begin[paired]], 0)
        final = np.ones(rows.size, bool)
        final[:-1] = vcpu[begin] != vcpu[end]
        waiting = rows[final]
        keep[waiting[begins[waiting] & (lost_until[waiting] == lost_at_end[waiting])]] = True
        seen[which] = before.events[which] + int((~carried[rows]).sum())
        parts.append(_times(events[begins], which, isa, ~carried[begins], ended[begins], lasted[begins]))
    fresh = events[~carried]
    parts.append(_words(fresh))
    return Recorded(together(*parts), seen, before.gaps + int(missing.sum()), events[keep])


# Count the events that begin a time, and the times of those that ended.
def _times(begins: Array, kind: Kind, isa: int, counted: Array, ended: Array, lasted: Array) -> Counts:
    keys = np.zeros(len(begins), KEY)
    keys["vcpu"], keys["kind"] = begins["vcpu"], kind
    keys["reason"] = begins["arg"] & np.uint64(0xFFFFFFFF)
    if kind is Kind.GUEST:
        keys["variant"] = np.where(begins["detail"] == 0, isa, begins["detail"])
    else:
        keys["variant"] = (begins["arg"] >> np.uint64(32)).astype("u4").view("i4")
    unique, group = np.unique(keys, return_inverse=True)
    values = np.zeros(len(unique), VALUE)
    np.add.at(values["count"], group[counted], 1)
    group, lasted = group[ended], lasted[ended]
    np.add.at(values["sum_ns"], group, lasted.astype("u8"))
    np.maximum.at(values["max_ns"], group, lasted.astype("u8"))
    np.add.at(values["buckets"], (group, buckets_of(lasted)), 1)
    return Counts(unique, values)


# What came and went at each reading; of the first one of a vCPU nobody knows what came.
def _words(events: Array) -> Counts:
    changed = np.where(events["since_ns"] > 0, events["requests"] ^ events["before"], 0).astype("u8")
    rows = np.flatnonzero(changed)
    numbers, group = np.unique(events["vcpu"][rows], return_inverse=True)
    words = np.zeros(len(numbers), WORDS)
    shifts = np.arange(64, dtype="u8")
    for name, bits in (("raised", changed & events["requests"]), ("serviced", changed & events["before"])):
        np.add.at(words[name], group, (bits[rows][:, None] >> shifts) & np.uint64(1))
    return Counts(vcpus=numbers, words=words)


@dataclass(frozen=True)
class Vm:
    """A VM of a recording: its VMM, and the KVM ids of its vCPUs."""

    vm: int
    pid: int
    vcpus: Sequence[int]


def of_recording(
    recording: Recording,
    isa: int,
    *,
    pids: Sequence[int] = (),
    vms: Sequence[int] = (),
    vcpus: Sequence[int] = (),
) -> tuple[Recorded, list[Vm], Segment | None]:
    """Return what a recording tells of the vCPUs that are wanted, its VMs, and its last segment.

    Read segment by segment; a segment that is missing is a gap in every vCPU's events.
    """
    told, last = Recorded(), None
    known: dict[tuple[int, int], set[int]] = {}
    wanted: list[int] = []
    for segment in recording.segments():
        if segment is None:
            continue  # the sequence numbers of what follows tell the gap
        last, events = segment, segment.events
        new = events[events["kind"] == EventKind.VCPU_NEW]
        take = np.ones(len(new), bool)
        for name, values in (("pid", pids), ("detail", vms), ("arg", vcpus)):
            if values:
                take &= np.isin(new[name], np.asarray(values))
        wanted += new["vcpu"][take].tolist()
        for vm, pid, vcpu in new[take][["detail", "pid", "arg"]].tolist():
            known.setdefault((vm, pid), set()).add(vcpu)
        told = recorded(events[np.isin(events["vcpu"], np.asarray(wanted, "u4"))], told, isa)
    return told, [Vm(vm, pid, sorted(ids)) for (vm, pid), ids in sorted(known.items())], last
