"""Latencies against an oracle that is slow and obvious: loops over lifecycles, and integers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, sqrt
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import latency
from analysis.lifecycle import LIFECYCLE

Row: TypeAlias = dict[str, Any]

QUANTILES = {"p50": (1, 2), "p90": (9, 10), "p99": (99, 100), "p999": (999, 1000), "max": (1, 1)}
LENGTHS = st.one_of(st.integers(0, 5), st.integers(0, 1 << 40))
LIFECYCLES = st.lists(
    st.fixed_dictionaries(
        {
            "request": st.sampled_from(["triple_fault", "nmi", "event"]),
            "end": st.sampled_from(["serviced", "delivered", "undecided"]),
            "raised_by": st.sampled_from(["remote", "kvm_run", "unknown"]),
            "raised_in": st.sampled_from(["guest", "halted", "kernel", "unknown"]),
            "vm": st.integers(1, 2),
            "vcpu": st.integers(0, 2),
            "vcpu_number": st.integers(1, 3),
            "userspace_exits": st.integers(0, 2),
            "ended": st.booleans(),
            "times": st.tuples(LENGTHS, LENGTHS, LENGTHS, LENGTHS),
        }
    ),
    max_size=40,
)


def lifecycle(drawn: Row) -> Row:
    """Return what was drawn with times that follow each other."""
    after, raised, ended_after, ended = np.cumsum(drawn["times"]).tolist()
    times = {"raised_after_ns": after, "raised_ns": raised, "ended_after_ns": ended_after, "ended_ns": ended}
    return {**drawn, **times, "ended_ns": ended if drawn["ended"] else -1}


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Return rows as lifecycles: of the columns that a latency needs, each in its type."""
    columns = {name: dtype for name, dtype in LIFECYCLE.items() if not rows or name in rows[0]}
    return pd.DataFrame(
        {
            name: pd.Series([row[name] for row in rows], dtype="object" if dtype == "str" else dtype)
            for name, dtype in columns.items()
        }
    )


def known(rows: Sequence[Row]) -> list[Row]:
    return [
        {
            **row,
            "crossed": row["userspace_exits"] > 0,
            "lower_ns": max(row["ended_after_ns"] - row["raised_ns"], 0),
            "upper_ns": row["ended_ns"] - row["raised_after_ns"],
        }
        for row in rows
        if row["ended_ns"] >= 0 and row["raised_by"] != "unknown" and row["raised_after_ns"] > 0
    ]


def distribution(rows: Sequence[Row]) -> Row:
    """Return the quantiles: the value that this share of the n - 1 others, rounded up, do not exceed."""
    found: Row = {}
    for name, (above, below) in QUANTILES.items():
        for bound in ("lower_ns", "upper_ns"):
            values = sorted(row[bound] for row in rows)
            place = (above * (len(values) - 1) + below - 1) // below
            found[f"{name}_{bound}"] = values[place] if values else None
    return found


def group(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def plain(frame: pd.DataFrame) -> list[Row]:
    """Return the rows as Python's values, None where one is missing."""
    return [
        {str(name): None if value is pd.NA else value for name, value in row.items()}
        for row in frame.astype(object).to_dict("records")
    ]


@settings(deadline=None)
@given(LIFECYCLES)
def test_bounds(drawn: list[Row]) -> None:
    rows = [lifecycle(each) for each in drawn]
    assert plain(latency.bounds(table(rows))) == [{name: row[name] for name in latency.BOUNDS} for row in known(rows)]
    few = ("end", "raised_ns", "lower_ns", "upper_ns")
    assert plain(latency.bounds(table(rows), ("end",))) == [{name: row[name] for name in few} for row in known(rows)]


@settings(deadline=None)
@given(LIFECYCLES, st.lists(st.sampled_from(latency.KEYS), min_size=1, unique=True))
def test_summary(drawn: list[Row], by: list[str]) -> None:
    rows = [lifecycle(each) for each in drawn]
    whole = [{**row, "crossed": row["userspace_exits"] > 0} for row in rows]
    wanted = []
    for key, members in group(whole, lambda row: tuple(row[name] for name in by)).items():
        of_group = known(members)
        numbers = {"count": len(of_group), "excluded": len(members) - len(of_group)}
        wanted.append({**dict(zip(by, key, strict=True)), **numbers, **distribution(of_group)})
    assert plain(latency.summary(table(rows), by)) == wanted


@settings(deadline=None)
@given(LIFECYCLES)
def test_by_state(drawn: list[Row]) -> None:
    rows = [lifecycle(each) for each in drawn]
    wanted = []
    for (request, state), members in group(rows, lambda row: (row["request"], row["raised_in"])).items():
        figures = {**distribution(known(members)), "request": request, "raised_in": state, "count": len(known(members))}
        wanted.append({name: figures[name] for name in latency.STATES})
    assert plain(latency.by_state(table(rows))) == wanted


def part_of(time_ns: int, rows: Sequence[Row], parts: int) -> tuple[int, int]:
    """Return the part of the span of all raises that a time is in."""
    times = [row["raised_ns"] for row in rows]
    span = max(times) - min(times) + 1
    edges = [min(times) + span * part // min(parts, span) for part in range(min(parts, span) + 1)]
    return next((low, high) for low, high in pairwise(edges) if low <= time_ns < high)


@settings(deadline=None)
@given(LIFECYCLES, st.integers(1, 9))
def test_series(drawn: list[Row], parts: int) -> None:
    rows = known([lifecycle(each) for each in drawn])
    found = plain(latency.series(table([lifecycle(each) for each in drawn]), parts))
    cells = group(rows, lambda row: (row["request"], part_of(row["raised_ns"], rows, parts)))
    told = {(row["request"], (row["begin_ns"], row["end_ns"])): row for row in found}
    assert set(cells) <= set(told)
    for (request, (begin, end)), row in told.items():
        members = cells.get((request, (begin, end)), [])
        assert row == {
            "request": request, "begin_ns": begin, "end_ns": end, "count": len(members), **distribution(members)
        }  # fmt: skip
    # The parts of a request follow each other without a gap.
    for own in group(found, lambda row: row["request"]).values():
        assert [row["end_ns"] for row in own[:-1]] == [row["begin_ns"] for row in own[1:]]
        assert own[0]["begin_ns"] == min(row["raised_ns"] for row in rows)
        assert own[-1]["end_ns"] == max(row["raised_ns"] for row in rows) + 1


@settings(deadline=None)
@given(LIFECYCLES, st.integers(1, 9))
def test_heat(drawn: list[Row], parts: int) -> None:
    rows = known([lifecycle(each) for each in drawn])
    found = plain(latency.heat(table([lifecycle(each) for each in drawn]), parts))
    cells = {(row["request"], row["begin_ns"], row["end_ns"], row["low_ns"], row["high_ns"]) for row in found}
    assert len(cells) == len(found)
    for row in rows:
        begin, end = part_of(row["raised_ns"], rows, parts)
        own = [
            each
            for each in found
            if (each["request"], each["begin_ns"], each["end_ns"]) == (row["request"], begin, end)
            and each["low_ns"] <= row["upper_ns"] < each["high_ns"]
        ]
        assert len(own) == 1
        own[0]["count"] -= 1
    assert all(row["count"] == 0 for row in found)


def test_buckets_are_two_for_each_factor_of_two() -> None:
    ends = np.array([0, 1, 100, 1000, 1_000_000])
    rows = [
        lifecycle(
            {"request": "nmi", "raised_by": "remote", "ended": True, "times": (1, 0, int(end), 0)}
        )
        for end in ends
    ]  # fmt: skip
    found = plain(latency.heat(table(rows), 1))
    assert [(row["low_ns"], row["high_ns"]) for row in found] == [
        (0, 1), (1, 2), (ceil(64 * sqrt(2)), 128), (ceil(512 * sqrt(2)), 1024), (ceil(524288 * sqrt(2)), 1 << 20),
    ]  # fmt: skip
    edges = latency._EDGES
    assert edges[-1] < np.iinfo(np.int64).max <= 2 * int(edges[-1])
    assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize("make", [latency.bounds, latency.summary, latency.by_state, latency.series, latency.heat])
def test_an_empty_table_keeps_columns_and_types(make: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    row = lifecycle(
        {
            "request": "nmi", "end": "serviced", "raised_by": "remote", "raised_in": "guest", "vm": 1, "vcpu": 0,
            "vcpu_number": 1, "userspace_exits": 0, "ended": True, "times": (1, 2, 3, 4),
        }
    )  # fmt: skip
    full, empty = make(table([row])), make(table([row]).iloc[:0])
    assert len(full) and not len(empty)
    assert list(full.dtypes.items()) == list(empty.dtypes.items())
