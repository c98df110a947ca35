"""Latency from raise to end, as an honest interval: the word is read at hooks, so both moments have bounds.

Every figure is a pair. As each latency lies within its own bounds, a quantile of the latencies lies between the
quantile of the lower bounds and that of the upper ones: nothing is assumed of where in its interval a moment was. The
bounds of a latency that is not known are not guessed: such a lifecycle is ``excluded``, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Array = npt.NDArray[Any]

# In thousandths, so that which of n values is meant is exact: the smallest that so many of the others do not exceed.
_QUANTILES = {"p50": 500, "p90": 900, "p99": 990, "p999": 999, "max": 1000}


def _names(quantiles: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}_{bound}_ns" for name in quantiles for bound in ("lower", "upper"))


#: Columns of quantiles, in the order in which they stand: ``p50_lower_ns``, ``p50_upper_ns`` and so on.
QUANTILES = _names(_QUANTILES)

#: Columns of :func:`bounds`; ``crossed``: the vCPU returned to user space while the request was pending.
BOUNDS = {
    "request": "object",
    "end": "object",
    "vm": "u4",
    "vcpu": "u4",
    "vcpu_number": "u4",
    "raised_in": "object",
    "crossed": "bool",
    "raised_ns": "i8",
    "lower_ns": "i8",
    "upper_ns": "i8",
}
#: What :func:`summary` can split by.
KEYS = ("request", "end", "vm", "vcpu_number", "vcpu", "raised_in", "crossed")
#: Columns of :func:`by_request`.
LATENCY = ("request", "end", "count", "excluded", *QUANTILES)
#: What :func:`series` and :func:`heat` take of a lifecycle.
TIMES = ("request", "raised_by", "raised_after_ns", "raised_ns", "ended_after_ns", "ended_ns")
#: Columns of :func:`series`.
SERIES = ("request", "begin_ns", "end_ns", "count", *QUANTILES)
#: Columns of :func:`heat`.
HEAT = ("request", "begin_ns", "end_ns", "low_ns", "high_ns", "count")
#: Columns of :func:`by_state`.
STATES = ("request", "raised_in", "count", *_names(("p50", "p99", "max")))

# Where logarithmic buckets begin: at 0, and at each power of the square root of two, rounded up.
_EDGES = np.array(sorted({0, *(isqrt((1 << power) - 1) + 1 for power in range(126))}), np.int64)


def bounds(lifecycles: pd.DataFrame, by: Sequence[str] = KEYS) -> pd.DataFrame:
    """Return ``lower_ns`` and ``upper_ns`` of each lifecycle's latency, with what they can be split by: :data:`BOUNDS`.

    ``by``: the keys that are wanted, as each takes memory. Left out are requests that have not ended, and those whose
    raise was not seen: their latency has no upper bound.
    """
    known = _known(lifecycles)
    lower, upper = _interval(lifecycles, known)
    columns = {name: _key(lifecycles, name)[known] for name in by}
    columns |= {"raised_ns": lifecycles["raised_ns"].to_numpy()[known], "lower_ns": lower, "upper_ns": upper}
    index = lifecycles.index[known]
    # Columns of their own already: there can be millions of rows.
    made = {name: pd.Series(columns.pop(name), index, BOUNDS[name], copy=False) for name in BOUNDS if name in columns}
    return pd.DataFrame(made, copy=False)


def summary(lifecycles: pd.DataFrame, by: Sequence[str] = ("request", "end")) -> pd.DataFrame:
    """Return the distribution of latencies of each group, in the order in which the groups are first met.

    Columns: the keys (some of :data:`KEYS`), ``count``, ``excluded`` (lifecycles whose latency is not known), and
    :data:`QUANTILES`, in ns and missing where ``count`` is 0.
    """
    codes, groups = _groups(lifecycles, by)
    known = _known(lifecycles)
    lower, upper = _interval(lifecycles, known)
    of = codes[known]
    count = np.bincount(of, minlength=len(groups))
    numbers = {"count": count, "excluded": np.bincount(codes, minlength=len(groups)) - count}
    return pd.concat(
        [groups, pd.DataFrame(numbers).astype("Int64"), _distributions(of, count, lower, upper)], axis="columns"
    )


def by_request(lifecycles: pd.DataFrame) -> pd.DataFrame:
    """Return the distribution of latencies of each request and end, see :data:`LATENCY`; times are ns."""
    return summary(lifecycles, ("request", "end"))


def by_state(lifecycles: pd.DataFrame) -> pd.DataFrame:
    """Return how long each request waits by where the vCPU was when it was raised, see :data:`STATES`."""
    return summary(lifecycles, ("request", "raised_in"))[list(STATES)]


def series(lifecycles: pd.DataFrame, parts: int = 60) -> pd.DataFrame:
    """Return how the latencies of each request change over time, see :data:`SERIES`.

    The time from the first raise to the last is cut into ``parts`` of equal length, the same for every request;
    ``end_ns`` is not within. Each request has a row for each part; in one without a raise ``count`` is 0.
    """
    known = _known(lifecycles)
    codes, requests = _groups(lifecycles, ("request",), known)
    lower, upper = _interval(lifecycles, known)
    part, edges = _parts(lifecycles["raised_ns"].to_numpy()[known], parts)
    many = len(edges) - 1
    cell = codes * many + part
    count = np.bincount(cell, minlength=len(requests) * many)
    cells = np.arange(len(count))
    numbers = {"begin_ns": edges[cells % max(many, 1)], "end_ns": edges[cells % max(many, 1) + 1], "count": count}
    return pd.concat(
        [
            requests.iloc[cells // max(many, 1)].reset_index(drop=True),
            pd.DataFrame(numbers).astype("Int64"),
            _distributions(cell, count, lower, upper),
        ],
        axis="columns",
    )


def heat(lifecycles: pd.DataFrame, parts: int = 60) -> pd.DataFrame:
    """Return how many requests waited how long, and when: a row for each cell that is not empty, see :data:`HEAT`.

    Time is cut as by :func:`series`. Upper bounds are binned into [``low_ns``, ``high_ns``), two buckets for each
    factor of two. Rows are in the order of the requests' first raises, then of time, then of latency.
    """
    known = _known(lifecycles)
    codes, requests = _groups(lifecycles, ("request",), known)
    _, upper = _interval(lifecycles, known)
    part, edges = _parts(lifecycles["raised_ns"].to_numpy()[known], parts)
    bucket = np.searchsorted(_EDGES, upper, side="right") - 1
    many = max(len(edges) - 1, 1)
    cells, count = np.unique((codes * many + part) * len(_EDGES) + bucket, return_counts=True)
    request, part, bucket = cells // len(_EDGES) // many, cells // len(_EDGES) % many, cells % len(_EDGES)
    highs = np.append(_EDGES[1:], np.iinfo(np.int64).max)
    numbers = {
        "begin_ns": edges[part],
        "end_ns": edges[part + 1],
        "low_ns": _EDGES[bucket],
        "high_ns": highs[bucket],
        "count": count,
    }
    names = requests.iloc[request].reset_index(drop=True)
    return pd.concat([names, pd.DataFrame(numbers).astype("Int64")], axis="columns")


def _known(lifecycles: pd.DataFrame) -> Array:
    ended = lifecycles["ended_ns"].to_numpy() >= 0
    # Requests that a vCPU is created with have a raiser, but no earliest moment.
    seen = (lifecycles["raised_by"] != "unknown").to_numpy(bool) & (lifecycles["raised_after_ns"].to_numpy() > 0)
    raised_after, raised, ended_after, end = (
        lifecycles[name].to_numpy() for name in ("raised_after_ns", "raised_ns", "ended_after_ns", "ended_ns")
    )
    # A clock that ran backwards bounds nothing.
    known: Array = ended & seen & (raised_after <= raised) & (ended_after <= end)
    return known


def _interval(lifecycles: pd.DataFrame, known: Array) -> tuple[Array, Array]:
    raised_after, raised, ended_after, ended = (
        lifecycles[name].to_numpy(np.int64)[known]
        for name in ("raised_after_ns", "raised_ns", "ended_after_ns", "ended_ns")
    )
    return np.maximum(ended_after - raised, 0), ended - raised_after


def _key(lifecycles: pd.DataFrame, name: str) -> Array:
    values = lifecycles["userspace_exits"] > 0 if name == "crossed" else lifecycles[name]
    if isinstance(values.dtype, pd.CategoricalDtype):
        # Each word once: to_numpy can make a string anew for every row.
        words: Array = values.cat.categories.to_numpy(object)[values.cat.codes.to_numpy()]
        return words
    return values.to_numpy(BOUNDS[name])


def _groups(lifecycles: pd.DataFrame, by: Sequence[str], only: Array | None = None) -> tuple[Array, pd.DataFrame]:
    """Return the number of each row's group, and the table of the groups, in the order of their first rows."""
    columns = {name: _key(lifecycles, name) for name in by}
    if only is not None:
        columns = {name: values[only] for name, values in columns.items()}
    rows = len(next(iter(columns.values())))
    codes = np.zeros(rows, np.int64)
    for values in columns.values():
        found, distinct = pd.factorize(values)
        # After each key anew: products of the sizes of many keys would not fit.
        codes, _ = pd.factorize(codes * max(len(distinct), 1) + found)
    first = np.zeros(int(codes.max()) + 1 if rows else 0, np.int64)
    first[codes[::-1]] = np.arange(rows - 1, -1, -1)
    return codes, pd.DataFrame({name: pd.Series(values[first], dtype=BOUNDS[name]) for name, values in columns.items()})


def _parts(raised_ns: Array, parts: int) -> tuple[Array, Array]:
    """Return the part that each time is in, and the edges of the parts: one more than there are parts."""
    if not len(raised_ns):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    begin, span = int(raised_ns.min()), int(raised_ns.max()) - int(raised_ns.min()) + 1
    parts = min(parts, span)
    edges = np.array([begin + span * part // parts for part in range(parts + 1)], np.int64)
    return np.searchsorted(edges, raised_ns, side="right") - 1, edges


def _distributions(codes: Array, count: Array, lower: Array, upper: Array) -> pd.DataFrame:
    """Return :data:`QUANTILES` of each group of latencies: a row for each, missing where it has none."""
    some = np.flatnonzero(count)
    many = count[some]
    start = (np.cumsum(count) - count)[some]
    columns: dict[str, Any] = {}
    for bound, values in (("lower", lower), ("upper", upper)):
        order = np.argsort(values)
        order = order[np.argsort(codes[order], kind="stable")]
        ordered = values[order]
        for name, thousandths in _QUANTILES.items():
            chosen = pd.array(np.zeros(len(count), np.int64), "Int64")
            chosen[count == 0] = pd.NA
            chosen[some] = ordered[start + -(-(many - 1) * thousandths // 1000)]
            columns[f"{name}_{bound}_ns"] = chosen
    return pd.DataFrame({name: columns[name] for name in QUANTILES})
