"""Lifecycles as CSV, one row each: for spreadsheets, R and the shell.

The columns and their order are stable. They have the names of the JSON document, with each interval as two
columns.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from reports.document import UNKNOWN, each

if TYPE_CHECKING:
    import pandas as pd

# What stands in the table where there is nothing to tell.
_UNKNOWN = {"ended_ns": -1, **UNKNOWN}

COLUMNS = (
    "vm", "pid", "vcpu", "request", "raised_by", "raised_after_ns", "raised_ns", "end", "ended_after_ns",
    "ended_ns", "userspace_exits", "saves", "blind_saves", "nested", "stale", "exposed", "why",
    "raised_in", *UNKNOWN,
)  # fmt: skip
#: Behind them: which recording it is of, as the user named it. Numbers of VMs count in each anew.
RECORDING = "recording"


def write_lifecycles(tables: Iterable[tuple[str, pd.DataFrame]], out: TextIO) -> None:
    """Write lifecycles of recordings as one CSV with a heading; what has not happened, or is not known, is empty."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*COLUMNS, RECORDING))
    for recording, row in ((name, row) for name, table in tables for row in each(table, COLUMNS)):
        for name, unknown in _UNKNOWN.items():
            if row[name] == unknown:
                row[name] = None
        values = (str(value).lower() if isinstance(value, bool) else value for value in row.values())
        writer.writerow([*values, recording])
