"""What a report is made of: a judged recording, and the tables that its sections and figures show.

Each table is made when it is first asked for and then kept, so that whoever shows it shows the same, and a report of
verdicts alone costs no more than that. Tables are cut to what can be shown before they become Python's objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import latency
from reports import judged
from reports.document import records
from reports.words import Clock, shown

if TYPE_CHECKING:
    from analysis.judge import Judgement
    from analysis.ordering import Ordered

#: Rows of a table of verdicts on a page; those that need an operator come first.
MOST_ROWS = 200
#: Lanes of the swimlane figure.
MOST_LANES = 24
#: Requests that have a heat map, the most frequent ones; and how many of one make a map worth drawing.
MOST_MAPS, LEAST_OF_A_MAP = 3, 30
#: Parts that the time of a recording is cut into.
PARTS = 60
# Of the timeline: the part of its length that is shown before and after what it is about, and at least, in ns.
_MARGIN, _LEAST_MARGIN_NS = 0.3, 2_000


class Timeline(NamedTuple):
    """A stretch of one vCPU's life: rows of analysis.ordering.timeline, breaks of rules, and where it is cut."""

    title: str  # which vCPU
    since: str  # when it begins, in words
    rows: pd.DataFrame  # track, name, begin_ns, end_ns
    breaks: pd.DataFrame  # rule, request, since_ns, time_ns
    begin_ns: int
    end_ns: int


class Source:
    """A judged recording and its tables.

    ``tell`` gives the story of some of its lifecycles, ``timeline`` what a vCPU did between two moments: each reads
    the recording once more.
    """

    def __init__(
        self,
        judgement: Judgement,
        tell: Callable[[pd.DataFrame], pd.DataFrame],
        timeline: Callable[[int, int, int], pd.DataFrame],
        name: str = "",
    ) -> None:
        self.judgement = judgement
        self.name = name
        self._tell = tell
        self._timeline = timeline

    @cached_property
    def guests(self) -> Mapping[int, judged.Guest]:
        """Return the guests by their number."""
        return judged.guests(self.judgement.vms)

    @cached_property
    def clock(self) -> Clock:
        """Return what turns the recording's times into UTC."""
        return Clock.of(self.judgement.meta)

    @cached_property
    def _one_by_one(self) -> pd.Series[bool]:
        return judged.one_by_one(self.judgement.lifecycles)

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """Return the lifecycles that are told one by one and that a page has room for, the worst first."""
        lifecycles = self.judgement.lifecycles
        return lifecycles.iloc[judged.ranked(lifecycles, self._one_by_one)[:MOST_ROWS]]

    @property
    def more_verdicts(self) -> int:
        """Return how many lifecycles :attr:`verdicts` has no room for."""
        return int(self._one_by_one.sum()) - len(self.verdicts)

    @cached_property
    def others(self) -> pd.DataFrame:
        """Return the other lifecycles by request and end, see :func:`judged.grouped`."""
        # Columns first, then rows: a copy of what is counted alone.
        return judged.grouped(self.judgement.lifecycles[["request", "end", "raised_by"]][~self._one_by_one])

    @cached_property
    def lanes(self) -> pd.DataFrame:
        """Return the lifecycles of the swimlane figure."""
        return self.verdicts.head(MOST_LANES)

    @cached_property
    def story(self) -> pd.DataFrame:
        """Return what happened in each of the lanes."""
        return self._tell(self.lanes)

    @cached_property
    def latency(self) -> pd.DataFrame:
        """Return the distribution of latencies by request and end, the slowest first."""
        table = self._latency[self._latency["count"] > 0]
        return table.sort_values("p99_upper_ns", ascending=False, kind="stable", na_position="last", ignore_index=True)

    @cached_property
    def _latency(self) -> pd.DataFrame:
        return latency.by_request(self.judgement.lifecycles)

    @property
    def unknown_latencies(self) -> int:
        """Return how many requests no latency is known of."""
        return int(self._latency["excluded"].sum())

    @cached_property
    def waits(self) -> pd.DataFrame:
        """Return the bounds of each latency, by request and end; the index is the place of the lifecycle."""
        return latency.bounds(self.judgement.lifecycles.reset_index(drop=True), ("request", "end"))

    @cached_property
    def states(self) -> pd.DataFrame:
        """Return latencies by request and by where the vCPU was; empty if that divides nothing."""
        lifecycles = self.judgement.lifecycles
        table = latency.by_state(lifecycles if self._many else lifecycles.iloc[:0])
        table = table[table["count"] > 0]
        return table if table["raised_in"].nunique() > 1 else table.iloc[:0]

    @property
    def _many(self) -> bool:
        """Tell whether requests are many enough to be looked at as a whole: a pending shutdown is a rare thing."""
        meta = self.judgement.meta
        return meta.get("detail") == "full" or len(meta["requests"]) > 1

    @cached_property
    def _mapped(self) -> list[str]:
        if not self._many:
            return []
        counts = self.waits["request"].value_counts()
        return [str(name) for name in counts.index[counts >= LEAST_OF_A_MAP][:MOST_MAPS]]

    @cached_property
    def heat(self) -> dict[str, pd.DataFrame]:
        """Return the heat map of each request that has one."""
        return self._by_request(latency.heat)

    @cached_property
    def series(self) -> dict[str, pd.DataFrame]:
        """Return the same over time, with quantiles, leaving out parts in which nothing was raised."""
        return {name: table[table["count"] > 0] for name, table in self._by_request(latency.series).items()}

    def _by_request(self, make: Callable[[pd.DataFrame, int], pd.DataFrame]) -> dict[str, pd.DataFrame]:
        if not self._mapped:
            return {}
        lifecycles = self.judgement.lifecycles[list(latency.TIMES)]
        table = make(lifecycles[lifecycles["request"].isin(self._mapped)], PARTS)
        return {name: table[table["request"] == name] for name in self._mapped}

    @cached_property
    def ordering(self) -> Ordered | None:
        """Return how the rules of ordering were kept; None where none of them could be checked."""
        ordered = self.judgement.ordering
        counts = ordered.rules[["checked", "broken", "undecided"]]
        return ordered if int(counts.to_numpy(dtype=np.int64).sum()) else None

    @cached_property
    def timeline(self) -> Timeline | None:
        """Return the stretch that deserves it most: where a rule was broken first, else the longest latency.

        None in detail boundary, which does not tell what a vCPU did.
        """
        if self.judgement.meta.get("detail") != "full":
            return None
        found = self._broken() or self._longest()
        if found is None:
            return None
        number, begin_ns, end_ns, title, breaks = found
        margin = max(int((end_ns - begin_ns) * _MARGIN), _LEAST_MARGIN_NS)
        begin_ns, end_ns = max(begin_ns - margin, 0), end_ns + margin
        rows = self._timeline(number, begin_ns, end_ns)
        if rows.empty:
            return None
        # A margin in which nothing is known is not shown.
        begin_ns, end_ns = max(begin_ns, int(rows["begin_ns"].min())), min(end_ns, int(rows["end_ns"].max()))
        inside = (breaks["vcpu_number"] == number) & breaks["time_ns"].between(begin_ns, end_ns)
        return Timeline(title, f"{self.clock.when(begin_ns)} UTC", rows, breaks[inside], begin_ns, end_ns)

    def _broken(self) -> tuple[int, int, int, str, pd.DataFrame] | None:
        breaks = self.judgement.ordering.breaks
        known = breaks[breaks["vcpu_number"] > 0]
        if known.empty:
            return None
        row = records(known.sort_values("time_ns", kind="stable").head(1))[0]
        begin_ns = row["since_ns"] or row["time_ns"]
        return row["vcpu_number"], min(begin_ns, row["time_ns"]), row["time_ns"], self._vcpu(row), breaks

    def _longest(self) -> tuple[int, int, int, str, pd.DataFrame] | None:
        waits = self.waits
        if waits.empty:
            return None
        place = int(waits.index.to_numpy(dtype=np.int64)[waits["upper_ns"].to_numpy().argmax()])
        row = records(self.judgement.lifecycles.iloc[[place]])[0]
        title = f"{self._vcpu(row)}: {shown(row['request'])}"
        return row["vcpu_number"], row["raised_after_ns"], row["ended_ns"], title, self.judgement.ordering.breaks

    def _vcpu(self, row: Mapping[str, Any]) -> str:
        return f"{judged.guest_of(row, self.guests).name}, vCPU {row['vcpu']}"
