"""From a recording to verdicts: segment by segment, in memory that the recording's length does not decide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from analysis import compiled, verdicts
from analysis.exposure import vm_table
from analysis.lifecycle import lifecycle_table, shutdown_table
from analysis.ordering import Findings, Ordered
from analysis.passes import Pass, in_order
from analysis.saves import Saves
from probes.schema import TELLS_READS, Kind
from tracer.loss import Loss


class _Segment(Protocol):
    @property
    def columns(self) -> Mapping[str, Any]: ...

    @property
    def loss(self) -> Loss: ...

    @property
    def until_ns(self) -> int: ...


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
    saves: pd.DataFrame  # columns: analysis.saves.SAVES
    restores: pd.DataFrame  # columns: analysis.saves.RESTORES
    vms: pd.DataFrame  # columns: analysis.exposure.VMS, name, vmm
    loss: Loss
    events: int
    left_out: list[str]
    clean: bool
    until_ns: int  # where the last segment ends, else where it began: unless it is clean, nobody knows what came then
    meta: Mapping[str, Any]
    ordering: Ordered

    @property
    def summary(self) -> dict[str, int]:
        """Return how many requests ended how: only ends that occur, in the order of verdicts.ENDS."""
        counts = self.lifecycles["end"].value_counts()
        return {end: int(counts[end]) for end in verdicts.ENDS if end in counts.index}

    @property
    def copies_without(self) -> int:
        """Return how many requests were left out by a save, and so are missing from a copy that is made of it."""
        return int(self.lifecycles["copies_without"].sum())

    @property
    def dropped(self) -> int:
        """Return how many guests ran without a triple fault that their save had, or that their restore was refused."""
        return int(self.restores["ran"].sum())

    @property
    def vouched(self) -> bool:
        """Tell whether an empty recording means that nothing happened: it had a canary, or it is not empty."""
        return self.events > 0 or self.meta.get("untried") is None

    @property
    def unaccounted(self) -> int:
        """Return how many events the hooks produced that no segment has, and no loss tells."""
        produced = (self.meta.get("counters") or {}).get("produced", 0)
        loss = self.loss
        return max(0, int(produced) - self.events - loss.ring_full - loss.kicks - loss.not_written)

    @property
    def whole(self) -> bool:
        """Tell whether everything that happened is in it."""
        return self.clean and self.vouched and not (self.loss.total or self.left_out or self.unaccounted)

    @property
    def exit_status(self) -> int:
        """Return the exit status that a report of this gives."""
        if "lost" in self.summary or self.copies_without or self.dropped:
            return verdicts.EXIT_LOST
        if "undecided" in self.summary or not self.whole:
            return verdicts.EXIT_UNDECIDED
        return verdicts.EXIT_NOTHING_LOST


def judge(recording: Source) -> Judgement:
    """Return the verdicts of a recording."""
    compiled.require()
    meta = recording.meta
    names = {int(bit): name for bit, name in meta["requests_by_bit"].items()}
    # Recordings of schema 1 have no flags, and detail boundary only.
    findings = Findings(names, meta.get("requests_flags") or {}, meta.get("plan") or (), str(meta.get("detail")))
    walk = Pass(
        names,
        full=meta.get("detail") == "full",
        reads=meta.get("schema", TELLS_READS) >= TELLS_READS,
        order=findings.wanted,
        exposure=True,
    )
    copies = Saves(names)
    loss, events, until_ns = _walk_over(recording, walk, findings, copies)
    vms = vm_table(walk.vms())
    walk.finish(loss)
    copies.add(walk.copies())
    saves, restores = copies.tables()
    given = walk.given()
    findings.add(given.breaks)
    # Of those at one time the ones that a segment before has ended come first.
    finished = in_order(given.finished, "raised_ns", "batch", "request", "vcpu_number")
    shutdowns = in_order(given.shutdowns, "time_ns", "batch", "vcpu_number")
    return Judgement(
        lifecycles=lifecycle_table(finished, names),
        shutdowns=shutdown_table(shutdowns),
        saves=saves,
        restores=restores,
        vms=_named(vms, meta.get("guests", {})),
        loss=loss,
        events=events,
        left_out=list(recording.left_out),
        clean=recording.clean,
        until_ns=until_ns,
        meta=meta,
        ordering=findings.ordered(walk.now),
    )


def _walk_over(recording: Source, walk: Pass, findings: Findings, copies: Saves) -> tuple[Loss, int, int]:
    """Feed every segment; return the losses, how many events there were, and until when. The last is not kept."""
    loss, events, until_ns = Loss(), 0, int(recording.meta["started_ns"])
    for segment in recording.segments():
        if segment is None:
            walk.interrupt()
            continue
        # Hooks that were missed in this segment concern what was pending in it, and nothing later.
        blind = segment.loss.blind > loss.blind
        loss, until_ns = segment.loss, segment.until_ns
        events += len(segment.columns["kind"])
        findings.dark(walk.now, segment.columns, loss)
        walk.feed(segment.columns, blind=blind, loss=loss)
        copies.add(walk.copies())
    return loss, events, until_ns


def _named(vms: pd.DataFrame, guests: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    known = [guests.get(str(vm), {}) for vm in vms["vm"]]
    names = [guest.get("name", f"pid {pid}") for guest, pid in zip(known, vms["pid"], strict=True)]
    return vms.assign(name=np.array(names, object), vmm=np.array([guest.get("vmm") for guest in known], object))


_WHAT = np.full(256, "", object)
_TOLD = {Kind.RUN_EXIT: "userspace_exit", Kind.RESET: "reset", Kind.WRITTEN: "written", Kind.RESTORE: "restore"}
_WHAT[list(_TOLD)] = list(_TOLD.values())


def _ends_of(table: pd.DataFrame, key: list[str], most: int) -> pd.DataFrame:
    """Return the first and the last rows of each group, ``most`` in all."""
    place = table.groupby(key).cumcount()
    size = table.groupby(key)["time_ns"].transform("size")
    return table[(place < most // 2) | (place >= size - most // 2)]


def story(recording: Source, lifecycles: pd.DataFrame, saves: pd.DataFrame, most: int = 1000) -> pd.DataFrame:
    """Return what happened in each of these lifecycles, in order: a second reading of the recording.

    Columns: ``vcpu_number``, ``request``, ``raised_ns`` (of the lifecycle), ``time_ns``, ``what``: raised,
    userspace_exit, save, blind_save, reset, written, restore, or the word of the end. Of each lifecycle at most
    ``most`` events are told: the first and the last ones. ``saves``: columns of analysis.saves.SAVES.
    """
    chosen = lifecycles.sort_values(["vcpu_number", "raised_ns"])
    parts = []
    numbers = chosen["vcpu_number"].to_numpy()
    for segment in recording.segments():
        if segment is None:
            continue
        events = segment.columns
        telling = np.flatnonzero(np.isin(events["kind"], list(_TOLD)) & np.isin(events["vcpu"], numbers))
        times, what = events["time_ns"][telling].astype(np.int64), _WHAT[events["kind"][telling]]
        part = pd.DataFrame({"vcpu_number": events["vcpu"][telling], "time_ns": times, "what": what})
        parts.append(_ends_of(part, ["vcpu_number"], most))  # so that no segment holds more than is told of it
    happened = (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(
            {"vcpu_number": np.empty(0, "u4"), "time_ns": np.empty(0, np.int64), "what": np.empty(0, object)}
        )
    )
    own = chosen[["vcpu_number", "request", "raised_ns", "ended_ns", "ended_after_ns", "end"]]
    saved = saves[["vcpu_number", "request", "time_ns"]].assign(
        what=np.where(saves["carried"], "save", "blind_save").astype(object)
    )
    joined = pd.concat([happened.merge(own, on="vcpu_number"), saved.merge(own, on=["vcpu_number", "request"])])
    joined = joined.sort_values("time_ns", kind="stable")
    ended = joined["ended_ns"].where(joined["ended_ns"] >= 0, np.iinfo(np.int64).max)
    # A save that has left out what was raised after it is told when the vCPU ends.
    last = joined["what"].isin(("save", "blind_save")) & (joined["time_ns"] == ended)
    joined = joined[(joined["time_ns"] > joined["raised_ns"]) & ((joined["time_ns"] < ended) | last)]
    key = ["vcpu_number", "request", "raised_ns"]
    joined = _ends_of(joined, key, most)
    columns = [*key, "time_ns", "what"]
    raised = own.assign(time_ns=own["raised_ns"], what="raised")[columns]
    ends = own.assign(time_ns=own["ended_ns"].where(own["ended_ns"] >= 0, own["ended_after_ns"]), what=own["end"])[
        columns
    ]
    order = pd.concat([raised, joined[columns], ends], ignore_index=True)
    return order.sort_values([*key, "time_ns"], kind="stable", ignore_index=True)
