"""Latency from raise to end, as an honest interval: the word is read at hooks, so both moments have bounds."""

from __future__ import annotations

import numpy as np
import pandas as pd

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}

#: Columns of :func:`by_request`.
LATENCY = (
    "request",
    "end",
    "count",
    "excluded",
    *(f"{name}_{bound}_ns" for name in _QUANTILES for bound in ("lower", "upper")),
)


def bounds(lifecycles: pd.DataFrame) -> pd.DataFrame:
    """Return ``lower_ns`` and ``upper_ns`` of each lifecycle's latency, with its ``request`` and ``end``.

    Left out are requests that have not ended, and those whose raise was not seen: their latency has no upper bound.
    """
    known = lifecycles[(lifecycles["ended_ns"] >= 0) & (lifecycles["raised_by"] != "unknown")]
    lower = (known["ended_after_ns"] - known["raised_ns"]).clip(lower=0)
    upper = known["ended_ns"] - known["raised_after_ns"]
    return pd.DataFrame({"request": known["request"], "end": known["end"], "lower_ns": lower, "upper_ns": upper})


def by_request(lifecycles: pd.DataFrame) -> pd.DataFrame:
    """Return the distribution of latencies of each request and end, see :data:`LATENCY`; times are ns."""
    rows = []
    known = bounds(lifecycles)
    for (request, end), group in lifecycles.groupby(["request", "end"], sort=False):
        of_group = known[(known["request"] == request) & (known["end"] == end)]
        row: dict[str, object] = {"request": request, "end": end}
        row["count"], row["excluded"] = len(of_group), len(group) - len(of_group)
        for name, quantile in _QUANTILES.items():
            for bound in ("lower", "upper"):
                values = of_group[f"{bound}_ns"].to_numpy()
                row[f"{name}_{bound}_ns"] = (
                    int(np.quantile(values, quantile, method="higher")) if len(values) else pd.NA
                )
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(LATENCY))
    return table.astype(dict.fromkeys(LATENCY[2:], "Int64"))
