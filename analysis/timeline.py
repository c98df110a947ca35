"""What one vCPU did in a stretch of a recording, period by period: a second reading, for a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.cases import LATE_NS
from analysis.passes import Pass
from analysis.periods import PERIODS, edges_of
from probes.requests import bit_name
from probes.schema import EVENT, REMOTE, Kind, requested
from tracer.loss import Loss

Array = npt.NDArray[Any]

#: Columns of :func:`timeline`.
TIMELINE = {"track": "object", "name": "object", "begin_ns": "i8", "end_ns": "i8"}
# The track of each period; KVM_RUN as a whole has none.
_TRACKS = {"guest": "guest", "kernel": "kernel", "ioctl": "kernel", "user space": "user space", "halted": "halted"}


_IS_OWN = np.ones(256, bool)
_IS_OWN[[*REMOTE, Kind.REQUEST_ALL, Kind.REQUEST_ALL_END, Kind.VMM_EXIT, Kind.VM_CAP]] = False


class _Segment(Protocol):
    @property
    def columns(self) -> Mapping[str, Array]: ...


class Segments(Protocol):
    """A recording, or anything that yields its segments."""

    def segments(self) -> Iterable[_Segment | None]:
        """Yield the segments in order, and None where one is missing."""


def timeline(
    recording: Segments,
    vcpu_number: int,
    begin_ns: int,
    end_ns: int,
    names: Mapping[int, str],
    most: int = 2_000,
) -> pd.DataFrame:
    """Return what one vCPU did between two moments, what was pending, and who kicked it: a second reading.

    Rows: ``track``, ``name``, ``begin_ns``, ``end_ns``. Tracks: ``guest``, ``kernel`` (also other ioctls, by name),
    ``user space``, ``halted``; one for each request in ``names``, for as long as it was certainly pending; ``kick``,
    named after the requester. What only reaches into the stretch is whole. Of the vCPU's own events the first ``most``
    are looked at, and as many kicks: behind them the timeline ends.
    """
    own, kicks = _stretch(recording, vcpu_number, begin_ns, end_ns, most)
    rows: list[tuple[str, str, int, int]] = []
    if len(own):
        walk = Pass({}, periods=True)
        walk.feed(own)
        walk.finish(Loss())
        edges = edges_of(walk.edges())
        for number, name in enumerate(PERIODS):
            if name in _TRACKS:
                of = edges.period == number
                begins, ends = edges.time_ns[of & edges.begins], edges.time_ns[of & ~edges.begins]
                rows += [
                    (_TRACKS[name], name, begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
                ]
        for bit, name in names.items():
            rows += [(name, name, begin, end) for begin, end in _pending(own, bit)]
    for kick in kicks:
        who = f"thread {kick['tid']} on CPU {kick['cpu']}"
        if kick["kind"] != Kind.KICK:
            bit = int(requested(kick["arg"]))
            who = f"{names.get(bit, bit_name(bit))} for all, {who}"
        rows.append(("kick", who, int(kick["time_ns"]), int(kick["time_ns"])))
    rows = [row for row in rows if row[2] <= end_ns and row[3] >= begin_ns]
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(TIMELINE)
    return pd.DataFrame(
        {name: pd.Series(list(of), dtype=dtype) for (name, dtype), of in zip(TIMELINE.items(), columns, strict=True)}
    )


def _stretch(recording: Segments, number: int, begin_ns: int, end_ns: int, most: int) -> tuple[Array, Array]:
    """Return a vCPU's own events in a stretch, with one before and one after it, and the kicks of it there."""
    before, inside, kicks = np.empty(0, EVENT), np.empty(0, EVENT), np.empty(0, EVENT)
    vm = -1
    for segment in recording.segments():
        if segment is None:
            before, inside = before[:0], inside[:0]  # what was before a hole proves nothing of what came after it
            continue
        columns = segment.columns
        kind, times = columns["kind"], columns["time_ns"]
        mine = columns["vcpu"] == number
        own = np.flatnonzero(mine & _IS_OWN[kind])
        new = own[kind[own] == Kind.VCPU_NEW]
        vm = int(columns["detail"][new[-1]]) if len(new) else vm
        last = own[times[own] < begin_ns][-1:]
        before = _records(columns, last) if len(last) else before
        later = own[times[own] >= begin_ns]
        later = later[: int((times[later] <= end_ns).sum()) + 1]
        if not len(inside) or int(inside["time_ns"][-1]) <= end_ns:
            inside = np.concatenate((inside, _records(columns, later[: most + 1 - len(inside)])))
        asked = (kind == Kind.REQUEST_ALL) & (columns["detail"] == vm)
        of = np.flatnonzero(((kind == Kind.KICK) & mine | asked) & (times >= begin_ns) & (times <= end_ns))
        kicks = np.concatenate((kicks, _records(columns, of[: most - len(kicks)])))
        if len(times) and int(times.min()) > end_ns + LATE_NS:
            break
    return np.concatenate((before, inside)), kicks


def _records(columns: Mapping[str, Array], rows: Array) -> Array:
    records = np.empty(len(rows), EVENT)
    for name in EVENT.names or ():
        records[name] = columns[name][rows]
    return records


def _pending(own: Array, bit: int) -> Iterable[tuple[int, int]]:
    """Return from which event to which a request was certainly pending, each time."""
    mask = np.uint64(1 << bit)
    now, before = (own["requests"] & mask) != 0, (own["before"] & mask) != 0
    begins = np.flatnonzero(now & ~(before & np.append(False, now[:-1])))
    goes_on = np.append(before[1:] & now[1:] & now[:-1], False)
    ends = np.flatnonzero(now & ~goes_on)
    # Where the next event had it before, it was pending until then at least: until its last reading.
    after = np.minimum(ends + 1, len(own) - 1)
    until = np.where((after > ends) & before[after], own["since_ns"][after], own["time_ns"][ends])
    return zip(
        own["time_ns"][begins].tolist(), np.maximum(until, own["time_ns"][begins]).tolist(), strict=True
    )  # fmt: skip
