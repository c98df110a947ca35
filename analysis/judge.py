"""From a recording to verdicts: segment by segment, in memory that the recording's length does not decide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from analysis import verdicts
from analysis.exposure import Exposure
from analysis.lifecycle import Lifecycles, empty_lifecycles, empty_shutdowns
from analysis.ordering import Ordered, Ordering
from probes.schema import PAYLOAD_PENDING, VALID_TRIPLE_FAULT, Kind
from tracer.loss import Loss


class _Segment(Protocol):
    @property
    def columns(self) -> Mapping[str, Any]: ...

    @property
    def events(self) -> Any: ...

    @property
    def loss(self) -> Loss: ...


class Source(Protocol):
    """What is judged: a recording, or anything that yields its segments."""

    left_out: list[str]

    @property
    def meta(self) -> Mapping[str, Any]: ...

    @property
    def clean(self) -> bool: ...

    def segments(self) -> Iterable[_Segment | None]:
        """Yield the segments in order, and None where one is missing."""


@dataclass(frozen=True)
class Judgement:
    """What became of each request of a recording."""

    lifecycles: pd.DataFrame  # columns: analysis.lifecycle.LIFECYCLE
    shutdowns: pd.DataFrame  # columns: analysis.lifecycle.SHUTDOWN
    vms: pd.DataFrame  # columns: analysis.exposure.VMS, name, vmm
    loss: Loss
    events: int
    left_out: list[str]
    clean: bool
    meta: Mapping[str, Any]
    ordering: Ordered

    @property
    def summary(self) -> dict[str, int]:
        """Return how many requests ended how: only ends that occur, in the order of verdicts.ENDS."""
        counts = self.lifecycles["end"].value_counts()
        return {end: int(counts[end]) for end in verdicts.ENDS if end in counts.index}

    @property
    def exit_status(self) -> int:
        """Return the exit status that a report of this gives."""
        if "lost" in self.summary:
            return verdicts.EXIT_LOST
        if "undecided" in self.summary or self.loss.total or self.left_out:
            return verdicts.EXIT_UNDECIDED
        return verdicts.EXIT_NOTHING_LOST


def judge(recording: Source) -> Judgement:
    """Return the verdicts of a recording."""
    names = {int(bit): name for bit, name in recording.meta["requests_by_bit"].items()}
    core = Lifecycles(names, full=recording.meta.get("detail") == "full")
    exposure, ordering = Exposure(), _ordering(recording.meta, names)
    lifecycles, shutdowns = [empty_lifecycles()], [empty_shutdowns()]
    loss, events = Loss(), 0
    # Of one segment all else is analysed while the lifecycles of the next one are.
    with ThreadPoolExecutor(1) as beside:
        others: Future[None] | None = None
        for segment in recording.segments():
            if segment is None:
                if others is not None:
                    others.result()
                core.interrupt()
                ordering.interrupt()
                continue
            # Hooks that were missed in this segment concern what was pending in it, and nothing later.
            blind = segment.loss.blind > loss.blind
            loss = segment.loss
            events += len(segment.columns["kind"])
            finished = core.feed(segment.columns, blind=blind, loss=loss)
            if others is not None:
                others.result()
            others = beside.submit(_others, exposure, ordering, segment.columns, loss, finished.lifecycles)
            lifecycles.append(finished.lifecycles)
            shutdowns.append(finished.shutdowns)
        if others is not None:
            others.result()
    pending = core.finish(loss).lifecycles
    ordered = ordering.finish(loss, pending)
    lifecycles.append(pending)
    return Judgement(
        lifecycles=_joined(lifecycles),
        shutdowns=_joined(shutdowns),
        vms=_named(exposure.table(), recording.meta.get("guests", {})),
        loss=loss,
        events=events,
        left_out=list(recording.left_out),
        clean=recording.clean,
        meta=recording.meta,
        ordering=ordered,
    )


def _ordering(meta: Mapping[str, Any], names: Mapping[int, str]) -> Ordering:
    # Recordings of schema 1 have no flags, and detail boundary only.
    return Ordering(names, meta.get("requests_flags") or {}, meta.get("plan") or (), str(meta.get("detail")))


def _others(
    exposure: Exposure, ordering: Ordering, events: Mapping[str, Any], loss: Loss, lifecycles: pd.DataFrame
) -> None:
    exposure.feed(events)
    ordering.feed(events, loss, lifecycles)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all tables by time. A column at a time: half of what concat and sort_values take."""
    full = [table for table in tables if len(table)]
    if not full:
        return tables[0]
    time = "raised_ns" if "raised_ns" in full[0] else "time_ns"
    when = np.concatenate([table[time].to_numpy() for table in full])
    order = None if (when[1:] >= when[:-1]).all() else np.argsort(when, kind="stable")
    joined = {}
    for name, dtype in full[0].dtypes.items():
        column = np.concatenate([table[name].to_numpy() for table in full])
        joined[name] = pd.Series(column if order is None else column.take(order), dtype=dtype, copy=False)
    tables.clear()  # they can be large
    return pd.DataFrame(joined, copy=False)


def _named(vms: pd.DataFrame, guests: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    known = [guests.get(str(vm), {}) for vm in vms["vm"]]
    names = [guest.get("name", f"pid {pid}") for guest, pid in zip(known, vms["pid"], strict=True)]
    return vms.assign(name=np.array(names, object), vmm=np.array([guest.get("vmm") for guest in known], object))


_WHAT = np.full(max(Kind) + 1, "", object)
_WHAT[[Kind.RUN_EXIT, Kind.SAVE, Kind.RESET, Kind.RESTORE]] = ["userspace_exit", "save", "reset", "restore"]


def _ends_of(table: pd.DataFrame, key: list[str], most: int) -> pd.DataFrame:
    """Return the first and the last rows of each group, ``most`` in all."""
    place = table.groupby(key).cumcount()
    size = table.groupby(key)["time_ns"].transform("size")
    return table[(place < most // 2) | (place >= size - most // 2)]


def story(recording: Source, lifecycles: pd.DataFrame, most: int = 1000) -> pd.DataFrame:
    """Return what happened in each of these lifecycles, in order: a second reading of the recording.

    Columns: ``vcpu_number``, ``request``, ``raised_ns`` (of the lifecycle), ``time_ns``, ``what``: raised,
    userspace_exit, save, blind_save, reset, restore, or the word of the end. Of each lifecycle at most ``most`` events
    are told: the first and the last ones.
    """
    chosen = lifecycles.sort_values(["vcpu_number", "raised_ns"])
    parts = []
    numbers = chosen["vcpu_number"].to_numpy()
    for segment in recording.segments():
        if segment is None:
            continue
        events = segment.events
        kind = events["kind"]
        telling = np.isin(kind, (Kind.RUN_EXIT, Kind.SAVE, Kind.RESET, Kind.RESTORE)) & np.isin(events["vcpu"], numbers)
        events = events[telling]
        full = VALID_TRIPLE_FAULT | PAYLOAD_PENDING
        blind = (events["kind"] == Kind.SAVE) & ((events["detail"] & full) != full)
        what = _WHAT[events["kind"]]
        what[blind] = "blind_save"
        part = pd.DataFrame(
            {"vcpu_number": events["vcpu"], "time_ns": events["time_ns"].astype(np.int64), "what": what}
        )
        parts.append(_ends_of(part, ["vcpu_number"], most))  # so that no segment holds more than is told of it
    happened = (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(
            {"vcpu_number": np.empty(0, "u4"), "time_ns": np.empty(0, np.int64), "what": np.empty(0, object)}
        )
    )
    own = chosen[["vcpu_number", "request", "raised_ns", "ended_ns", "ended_after_ns", "end"]]
    joined = happened.merge(own, on="vcpu_number")
    ended = joined["ended_ns"].where(joined["ended_ns"] >= 0, np.iinfo(np.int64).max)
    joined = joined[(joined["time_ns"] > joined["raised_ns"]) & (joined["time_ns"] < ended)]
    key = ["vcpu_number", "request", "raised_ns"]
    joined = _ends_of(joined, key, most)
    columns = [*key, "time_ns", "what"]
    raised = own.assign(time_ns=own["raised_ns"], what="raised")[columns]
    ends = own.assign(time_ns=own["ended_ns"].where(own["ended_ns"] >= 0, own["ended_after_ns"]), what=own["end"])[
        columns
    ]
    order = pd.concat([raised, joined[columns], ends], ignore_index=True)
    return order.sort_values([*key, "time_ns"], kind="stable", ignore_index=True)
