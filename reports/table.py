"""Lifecycles as CSV, one row each: for spreadsheets, R and the shell.

The columns and their order are stable. They have the names of the JSON document, with each interval as two
columns.
"""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, TextIO

from reports.document import each

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "vm", "pid", "vcpu", "request", "raised_by", "raised_after_ns", "raised_ns", "end", "ended_after_ns",
    "ended_ns", "userspace_exits", "saves", "blind_saves", "nested", "stale", "exposed", "why",
)  # fmt: skip


def write_lifecycles(lifecycles: pd.DataFrame, out: TextIO) -> None:
    """Write the lifecycles as CSV with a heading; ``ended_ns`` is empty where a request has not ended."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in each(lifecycles[list(COLUMNS)]):
        if row["ended_ns"] is not None and row["ended_ns"] < 0:
            row["ended_ns"] = None
        writer.writerow([str(value).lower() if isinstance(value, bool) else value for value in row.values()])
