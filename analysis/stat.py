"""Exits by reason, requests by name: from histograms that the kernel kept, or from the events of a recording.

Pure, and numpy alone. A histogram is log-linear (probes/stat.py), so a quantile is the middle of the bucket that holds
it: at most 1/16 away from the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from analysis import compiled
from analysis.events import Batch
from analysis.passes import Pass
from probes.exits import Kind
from probes.requests import bit_name
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


class Recorded:
    """What the events of a recording of detail full tell until now, fed batch by batch (analysis/exit_rules.py)."""

    def __init__(self) -> None:
        self._pass = Pass({}, counts=True)
        self._isa = 0

    def feed(self, events: Batch, isa: int = 0) -> None:
        """Take a batch; ``isa``: the instruction set that names the reasons of exits where the event does not tell."""
        self._isa = isa
        self._pass.feed(events)

    @property
    def counts(self) -> Counts:
        """Return all that was counted."""
        counted, now = self._pass.counted, self._pass.now
        exits, changes = counted.exits[: now.exits], counted.changes[: now.changes]
        keys, values, words = np.zeros(len(exits), KEY), np.zeros(len(exits), VALUE), np.zeros(len(changes), WORDS)
        for name in KEY.names or ():
            keys[name] = exits[name]
        keys["variant"][(keys["kind"] == Kind.GUEST) & (keys["variant"] == 0)] = self._isa
        for name in ("count", "sum_ns", "max_ns"):
            values[name] = exits[name]
        values["buckets"] = counted.buckets[: now.exits]
        for name in ("raised", "serviced"):
            words[name] = changes[name]
        return together(Counts(keys, values, changes["vcpu"].astype("u4"), words))

    @property
    def events(self) -> dict[Kind, int]:
        """Return how many events were there that begin or end a time."""
        return {Kind.GUEST: int(self._pass.now.guest_events), Kind.USER: int(self._pass.now.user_events)}

    @property
    def gaps(self) -> int:
        """Return how many events were lost between those that are there: times across them are not counted."""
        return int(self._pass.now.missing)

    @property
    def carried(self) -> Array:
        """Return what is carried over besides what was counted: the vCPUs that are alive (columns.VCPU)."""
        return self._pass.vcpus()


def recorded(batch: Batch, before: Recorded | None = None, isa: int = 0) -> Recorded:
    """Count all exits and requests in a batch of events of detail full, on top of what ``before`` holds."""
    told = before or Recorded()
    told.feed(batch, isa)
    return told


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
    compiled.require()
    told, last = Recorded(), None
    known: dict[tuple[int, int], set[int]] = {}
    wanted: list[int] = []
    for segment in recording.segments():
        if segment is None:
            continue  # the sequence numbers of what follows tell the gap
        last, events = segment, segment.columns
        rows = np.flatnonzero(events["kind"] == EventKind.VCPU_NEW)
        new = {name: events[name][rows] for name in ("vcpu", "detail", "pid", "arg")}
        take = np.ones(len(rows), bool)
        for name, values in (("pid", pids), ("detail", vms), ("arg", vcpus)):
            if values:
                take &= np.isin(new[name], np.asarray(values))
        wanted += new["vcpu"][take].tolist()
        for vm, pid, vcpu in zip(*(new[name][take].tolist() for name in ("detail", "pid", "arg")), strict=True):
            known.setdefault((vm, pid), set()).add(vcpu)
        told.feed(_of(events, wanted), isa)
    return told, [Vm(vm, pid, sorted(ids)) for (vm, pid), ids in sorted(known.items())], last


def _of(events: Mapping[str, Array], vcpus: Sequence[int]) -> Mapping[str, Array]:
    """Return the events of some vCPUs, and the exits of processes: with those vCPUs end, too."""
    of = np.isin(events["vcpu"], np.asarray(vcpus, "u4")) | (events["kind"] == EventKind.VMM_EXIT)
    return events if of.all() else {name: column[of] for name, column in events.items()}
