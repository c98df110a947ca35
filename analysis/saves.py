"""Saves and restores of a recording, from what the walk tells of them: which copy got which request.

A save and a restore belong together where the registers that were read and written have the same fingerprint, and the
vCPU the same id. A fingerprint with which another VM had run before is no proof of that: guests that boot are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.events import Array
from analysis.passes import Table, nothing
from analysis.words import Copy
from probes.requests import TRIPLE_FAULT
from probes.schema import STATES

#: Columns of a table of saves, one row for each save of a pending request.
SAVES = {
    "vm": "u4",  # number of the VM in the recording
    "pid": "u4",
    "vcpu": "u4",  # KVM's vcpu_id
    "vcpu_number": "u4",
    "request": "str",
    "after_ns": "i8",  # the last reading of the word before it, CLOCK_MONOTONIC
    "time_ns": "i8",  # it was over
    "carried": "bool",
    "read": "str",  # what user space read of the vCPU, names of probes.schema.STATES with commas between
    "ran_again": "bool",  # the vCPU ran after it
    "ran_as": "i8",  # number of the VM that ran with what was saved; -1: none was seen
    "arrived": "str",  # the request was "carried" there, or "dropped"; "": not known
}
#: Columns of a table of restores that lost a triple fault on their way in.
RESTORES = {
    "vm": "u4",
    "pid": "u4",
    "vcpu": "u4",
    "vcpu_number": "u4",
    "request": "str",
    "after_ns": "i8",  # the registers were written, or the ioctl failed, CLOCK_MONOTONIC
    "time_ns": "i8",  # it ran, or ended without that
    "outcome": "str",  # "refused": KVM_SET_VCPU_EVENTS failed; "dropped": it ran without what its save had carried
    "errno": "i8",
    "ran": "bool",
    "saved_as": "i8",  # number of the VM that was saved; -1: not known
}
_NAMES = [state.name for state in STATES]
_BIT = np.uint64(1 << TRIPLE_FAULT)
_PROOF = ["fingerprint", "vcpu"]


class Saves:
    """Takes what the walk gives out of copies, batch by batch; of restores it keeps those that may match a save."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._request = np.array([names.get(bit, "") for bit in range(64)], object)
        self._saved: list[pd.DataFrame] = []
        self._closed: list[pd.DataFrame] = []
        self._restored: list[pd.DataFrame] = []
        self._refused: list[pd.DataFrame] = []
        self._known = np.empty(0, np.uint64)  # fingerprints of saves
        self._begun: dict[int, int] = {}  # with which a VM has run, and which one: 0 if there were several

    def add(self, copies: Table) -> None:
        """Take what a batch tells (columns.COPY)."""
        if not len(copies["what"]):
            return
        rows = pd.DataFrame(copies).drop(columns="batch")
        restored = rows[(rows["what"] == Copy.RESTORED) & rows["ran"]]
        saved = rows[rows["what"] == Copy.SAVED].copy()
        ambiguous = [self._ambiguous(*pair) for pair in zip(saved["fingerprint"], saved["vm"], strict=True)]
        saved.loc[ambiguous, "fingerprint"] = np.uint64(0)
        self._known = np.union1d(self._known, saved["fingerprint"][saved["fingerprint"] != 0])
        for table, kept in (
            (self._saved, saved),
            (self._closed, rows[rows["what"] == Copy.CLOSED]),
            (self._restored, restored[restored["fingerprint"].isin(self._known)]),
            (self._refused, rows[rows["what"] == Copy.REFUSED]),
        ):
            if len(kept):
                table.append(kept)
        for mark, vm in zip(restored["fingerprint"].tolist(), restored["vm"].tolist(), strict=True):
            self._begun[mark] = vm if self._begun.get(mark, vm) == vm else 0

    def _ambiguous(self, mark: int, vm: int) -> bool:
        return self._begun.get(mark, vm) != vm

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the tables of :data:`SAVES` and of :data:`RESTORES`, in the order of time."""
        if not self._saved and not self._refused:
            return _typed({}, SAVES), _typed({}, RESTORES)
        saved, refused = _joined(self._saved), _joined(self._refused)
        table = _with_pause(saved, _joined(self._closed))
        arrivals = _arrivals(table, _joined(self._restored))
        table["ran_as"] = arrivals["vm"].to_numpy()
        table["arrived"] = np.where(
            (arrivals["vm"] < 0) | (table["request"] != TRIPLE_FAULT),
            "",
            np.where(arrivals["word"].to_numpy() & _BIT != 0, "carried", "dropped"),
        )
        lost = (table["arrived"] == "dropped") & table["carried"]
        dropped = arrivals[lost.to_numpy()].assign(
            request=TRIPLE_FAULT, outcome="dropped", errno=0, ran=True, saved_as=table["vm"][lost].to_numpy()
        )
        saved_as = dropped.drop_duplicates("vcpu_number").set_index("vcpu_number")["saved_as"]
        refused = refused.assign(
            outcome="refused", saved_as=refused["vcpu_number"].map(saved_as).fillna(-1).astype(np.int64)
        )
        dropped = dropped[~dropped["vcpu_number"].isin(refused["vcpu_number"])]
        restores = pd.concat([refused, dropped]) if len(dropped) else refused
        for one in (table, restores):
            one["request"] = self._request[one["request"].to_numpy(np.int64)]
        order = ["time_ns", "vcpu_number", "request"]
        return _typed(table.sort_values(order), SAVES), _typed(restores.sort_values(order), RESTORES)


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(nothing().copies)


def _with_pause(saved: pd.DataFrame, closed: pd.DataFrame) -> pd.DataFrame:
    """Return saves with what came of the vCPU after each, and all that was read by then."""
    key = ["vcpu_number", "pause"]
    later = saved[key].merge(closed[[*key, "ran", "read"]].drop_duplicates(key), on=key, how="left")
    read = later["read"].to_numpy(np.float64, na_value=np.nan)
    every = np.where(np.isnan(read), saved["read"], np.nan_to_num(read)).astype(np.int64)
    return saved.assign(ran_again=later["ran"].eq(True).to_numpy(), read=_read(every))


def _read(sets: Array) -> Array:
    values, of = np.unique(sets, return_inverse=True)
    texts = [",".join(name for bit, name in enumerate(_NAMES) if value >> bit & 1) for value in values.tolist()]
    return np.array(texts, object)[of]


def _arrivals(saves: pd.DataFrame, restored: pd.DataFrame) -> pd.DataFrame:
    """Return, for each save, the first restore of it that ran: of several saves alike it is a copy of the last one."""
    columns = ["vm", "pid", "vcpu", "vcpu_number", "after_ns", "time_ns", "word"]
    found = pd.DataFrame({name: np.full(len(saves), -1 if name == "vm" else 0, "i8") for name in columns})
    found["word"] = found["word"].astype(np.uint64)
    proving = saves.loc[saves["fingerprint"] != 0, [*_PROOF, "pause", "vcpu_number", "time_ns"]].reset_index()
    if restored.empty or proving.empty:
        return found
    # Requests that were saved together are one save.
    last = proving.sort_values("time_ns").drop_duplicates([*_PROOF, "vcpu_number", "pause"], keep="last")
    copies = pd.merge_asof(
        restored.sort_values("after_ns"),
        last.rename(columns={"time_ns": "saved_ns", "vcpu_number": "of", "pause": "of_pause"}),
        left_on="after_ns",
        right_on="saved_ns",
        by=_PROOF,
    ).dropna(subset=["saved_ns"])
    copies = copies.drop_duplicates(["of", "of_pause"])
    seen = proving.merge(
        copies[["of", "of_pause", *columns]],
        left_on=["vcpu_number", "pause"],
        right_on=["of", "of_pause"],
        suffixes=("_saved", ""),
    )
    for name in columns:
        values = found[name].to_numpy(copy=True)
        values[seen["index"].to_numpy()] = seen[name].to_numpy()
        found[name] = values
    return found


def _typed(rows: Any, columns: Mapping[str, str]) -> pd.DataFrame:
    """Return some columns with their types; words are objects."""
    return pd.DataFrame(
        {
            name: pd.Series(rows[name] if len(rows) else [], dtype=object if dtype == "str" else dtype).reset_index(
                drop=True
            )
            for name, dtype in columns.items()
        }
    )
