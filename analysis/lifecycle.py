"""Request lifecycles, from the events that raise, save, service and drop requests.

One incremental core for every use: a batch of events goes in, the lifecycles that it ends come out, and what is carried
over is bounded by the vCPUs alive. Pure: no BCC, no files. How a stream is cut into batches never changes a result.
The rules are in analysis/rules.py, in the order and the words of docs/proof.md; here their numbers become tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import columns
from analysis.events import Array, Batch
from analysis.passes import Pass, Table, in_order, nothing
from analysis.words import WHYS, By, Place, Source, Verdict, Why, words
from tracer.loss import Loss

_TYPES = {"word": "str", "text": "str"}
#: Columns of a table of lifecycles, one row for each request instance; what they hold is in analysis/columns.py.
LIFECYCLE = {column.name: _TYPES.get(column.dtype, column.dtype) for column in columns.FINISHED}
#: Columns of a table of KVM_EXIT_SHUTDOWN.
SHUTDOWN = {column.name: _TYPES.get(column.dtype, column.dtype) for column in columns.SHUTDOWN}

_WORDS: Mapping[str, type[IntEnum]] = {"raised_by": By, "end": Verdict, "raised_in": Place, "source": Source}
_WHY_CUT = "a part of the recording is missing while it was pending"
_WHY_UNSEEN = "it was not seen being raised"


class Finished(NamedTuple):
    """What a batch has ended: lifecycles, and shutdown exits."""

    lifecycles: pd.DataFrame
    shutdowns: pd.DataFrame


def lifecycle_table(finished: Table, names: Mapping[int, str]) -> pd.DataFrame:
    """Return finished lifecycles as a table of :data:`LIFECYCLE`; ``names``: of the requests, by bit."""
    return _table(columns.FINISHED, finished, names)


def shutdown_table(shutdowns: Table) -> pd.DataFrame:
    """Return shutdown exits as a table of :data:`SHUTDOWN`."""
    return _table(columns.SHUTDOWN, shutdowns, {})


def _table(of: Sequence[columns.Column], rows: Table, names: Mapping[int, str]) -> pd.DataFrame:
    """Return the table of these rows, which are used up."""
    made: dict[str, Any] = {}
    whys = _whys(rows) if any(column.dtype == "text" for column in of) else None
    for name in set(rows) - {column.name for column in of}:
        del rows[name]  # of millions of rows that is much
    for column in of:
        values = rows.pop(column.name)
        # A Series of objects, lest pandas look through them for strings.
        if column.dtype == "text":
            made[column.name] = pd.Series(whys, dtype=object)
        elif column.dtype == "word":
            made[column.name] = pd.Series(_words_of(column.name, names)[values], dtype=object)
        else:
            made[column.name] = values
    return pd.DataFrame(made, copy=False)


def _words_of(name: str, names: Mapping[int, str]) -> Array:
    if name == "request":
        return np.array([names.get(bit, "") for bit in range(64)], object)
    return np.array(words(_WORDS[name]), object)


def _whys(rows: Table) -> Array:
    """Return what each verdict hangs on: what is missing first."""
    texts = np.array([WHYS[why] for why in Why], object)[rows["why"]]
    for at in np.flatnonzero(rows["gap"] | rows["cut"] | rows["unseen"]).tolist():
        gap = [gap_story(*(int(rows[name][at]) for name in ("gap_lost", "gap_from", "gap_to")))]
        story = gap * bool(rows["gap"][at]) + [_WHY_CUT] * bool(rows["cut"][at])
        story += [_WHY_UNSEEN] * bool(rows["unseen"][at])
        texts[at] = "; ".join([*story, texts[at]] if texts[at] else story)
    return texts


def empty_lifecycles() -> pd.DataFrame:
    """Return a table of lifecycles without rows."""
    return lifecycle_table(nothing().finished, {})


def empty_shutdowns() -> pd.DataFrame:
    """Return a table of shutdown exits without rows."""
    return shutdown_table(nothing().shutdowns)


def _seconds(ns: int) -> str:
    return f"{ns // 1_000_000_000}.{ns % 1_000_000_000:09d} s"


def gap_story(lost: int, begin_ns: int, end_ns: int) -> str:
    """Say which events are missing; times are CLOCK_MONOTONIC."""
    if lost <= 0:
        return f"two threads used this vCPU at once around {_seconds(end_ns)}: the order of its events is not certain"
    events = "1 event" if lost == 1 else f"{lost} events"
    were = "was" if lost == 1 else "were"
    return f"{events} of this vCPU {were} lost between {_seconds(begin_ns)} and {_seconds(end_ns)}"


class Lifecycles:
    """The incremental core. ``names`` maps each watched bit of the word to its request's name.

    ``full``: the events are of detail full, where each reading of the word is one.
    """

    def __init__(self, names: Mapping[int, str], *, full: bool = False) -> None:
        self._names = dict(names)
        self._pass = Pass(names, full=full)

    @property
    def carried(self) -> int:
        """Return how many vCPUs, pending requests and kicks of them are carried over."""
        return self._pass.carried

    def feed(self, events: Batch, *, blind: bool = False, loss: Loss | None = None) -> Finished:
        """Take a batch: a numpy array of EVENT, or anything with its columns. Return what it ends.

        ``loss``: the totals, counted no earlier than the last event of the batch. The exit of a process has no sequence
        number of its vCPUs: only these totals tell that the last events of a vCPU before it were lost.

        ``blind``: hooks were missed of which no sequence number tells; then a vCPU that ends with a request pending
        proves nothing.
        """
        self._pass.feed(events, blind=blind, loss=loss)
        return self._finished()

    def interrupt(self) -> None:
        """A part of the recording is missing here: nothing that is pending can be judged any more."""
        self._pass.interrupt()

    def finish(self, loss: Loss) -> Finished:
        """Return what is still pending at the end of the recording, and forget everything."""
        self._pass.finish(loss)
        return self._finished()

    def _finished(self) -> Finished:
        given = self._pass.given()
        finished = in_order(given.finished, "request", "vcpu_number")
        return Finished(
            lifecycle_table(finished, self._names), shutdown_table(in_order(given.shutdowns, "vcpu_number"))
        )
