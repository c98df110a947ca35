"""The JSON document: a contract (``"schema": "kvmreq.report/1"``) that other programs rely on.

Keys may be added, never renamed or given another meaning. Times are nanoseconds of CLOCK_MONOTONIC, as
integers; ``recording.clock`` pairs that clock with UTC. What the document does not name here it does not
carry, so that nothing which a recording may hold one day leaks by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis import latency
from reports.words import native

if TYPE_CHECKING:
    import pandas as pd

    from analysis.judge import Judgement

SCHEMA = "kvmreq.report/1"

_RECORDING = (
    "host", "boot_id", "kernel", "kvm_module", "kvm_parameters", "engine", "engine_why", "detail", "requests",
    "requests_flags", "requests_table", "requests_table_exact", "started_ns", "ended_ns", "clock", "clocks", "plan",
    "untried", "counters",
)  # fmt: skip
_LIFECYCLE = (
    "userspace_exits", "saves", "blind_saves", "copies_without", "nested", "stale", "exposed", "why", "raised_in",
)  # fmt: skip
_RULE = ("rule", "title", "source", "checked", "broken", "undecided", "unchecked")
_BREAK = ("rule", "vm", "pid", "vcpu", "request", "time_ns", "since_ns", "story")
#: What a lifecycle may not tell, and the number that then stands in the table.
UNKNOWN = {"requester_tid": 0, "requester_cpu": -1, "kicked_ns": -1, "left_guest_ns": -1, "reentered_ns": -1}


# Rows that are Python's objects at one time.
_CHUNK = 10_000


def document(judgement: Judgement) -> dict[str, Any]:
    """Return everything that was judged, as values that ``json.dumps`` takes."""
    return {key: list(value) if isinstance(value, Iterator) else value for key, value in _members(judgement).items()}


def texts(judgements: Sequence[Judgement]) -> Iterator[str]:
    """Yield the document as JSON, part by part; of several judgements an array of documents.

    Each lifecycle and each shutdown has a line of its own. However many there are, few of them are in memory.
    """
    several = len(judgements) != 1
    yield "[" if several else ""
    for place, judgement in enumerate(judgements):
        yield ",\n" if place else ""
        mark = "{"
        for key, value in _members(judgement).items():
            yield f"{mark}\n {json.dumps(key)}: "
            mark = ","
            if not isinstance(value, Iterator):
                yield json.dumps(value, indent=1).replace("\n", "\n ")
                continue
            yield "["
            for number, row in enumerate(value):
                yield f"{',' if number else ''}\n  {json.dumps(row)}"
            yield "\n ]"
        yield "\n}"
    yield "]\n" if several else "\n"


def _members(judgement: Judgement) -> dict[str, Any]:
    # The long ones are iterators.
    return {
        "schema": SCHEMA,
        "recording": {
            **{key: judgement.meta.get(key) for key in _RECORDING},
            "events": int(judgement.events),
            "clean": bool(judgement.clean),
            "until_ns": int(judgement.until_ns),
            "unaccounted": int(judgement.unaccounted),
            "left_out": list(judgement.left_out),
        },
        "loss": {**judgement.loss.as_json(), "total": judgement.loss.total},
        "vms": [
            {
                "vm": row["vm"],
                "pid": row["pid"],
                "name": row["name"],
                "vmm": row["vmm"],
                "triple_fault_cap": row["triple_fault_cap"],
                "vcpus": row["vcpus"],
                "alive": row["alive"],
                "first_ns": row["first_ns"],
            }
            for row in records(judgement.vms)
        ],
        "lifecycles": (one_lifecycle(row) for row in each(judgement.lifecycles)),
        "shutdowns": (
            {key: row[key] for key in ("vm", "pid", "vcpu", "time_ns", "source", "nested")}
            for row in each(judgement.shutdowns)
        ),
        "saves": (one_save(row) for row in each(judgement.saves)),
        # A triple fault that a restore on this host was refused, or has dropped.
        "restores": (
            {
                **{key: row[key] for key in ("vm", "pid", "vcpu", "request", "outcome", "ran")},
                "time_ns": [row["after_ns"], row["time_ns"]],
                "errno": row["errno"] or None,
                "saved_as": row["saved_as"] if row["saved_as"] >= 0 else None,
            }
            for row in each(judgement.restores)
        ),
        # From raise to end, each figure as a lower and an upper bound in ns; null where none is known.
        "latency": records(latency.summary(judgement.lifecycles)),
        "latency_by_vcpu": each(latency.summary(judgement.lifecycles, ("request", "vm", "vcpu"))),
        "ordering": {
            "rules": [{key: row[key] for key in _RULE} for row in records(judgement.ordering.rules)],
            "breaks": [{key: row[key] for key in _BREAK} for row in records(judgement.ordering.breaks)],
        },
        "summary": {
            **{str(end): int(count) for end, count in judgement.summary.items()},
            "copies_without": judgement.copies_without,
        },
        "exit_status": int(judgement.exit_status),
    }


def one_save(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the saves: ``time_ns`` is [last reading before it, over], ``ran_as`` a VM's number or null."""
    return {
        **{key: native(row[key]) for key in ("vm", "pid", "vcpu", "request")},
        "time_ns": [native(row["after_ns"]), native(row["time_ns"])],
        "carried": native(row["carried"]),
        "read": str(row["read"]).split(",") if row["read"] else [],
        "ran_again": native(row["ran_again"]),
        "ran_as": row["ran_as"] if row["ran_as"] >= 0 else None,
        "arrived": row["arrived"] or None,
    }


def one_lifecycle(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the lifecycles as the contract has it: also one line of the live stream.

    ``raised_ns`` is [last seen without, first seen with], ``ended_ns`` [last seen with, first seen without];
    null where it has not ended, and so is what is not known of it.
    """
    keys = ("vm", "pid", "vcpu", "request", "raised_by", "end", *_LIFECYCLE, *UNKNOWN)
    plain = {key: native(row[key]) for key in keys}
    ended_ns = native(row["ended_ns"])
    return {
        "vm": plain["vm"],
        "pid": plain["pid"],
        "vcpu": plain["vcpu"],
        "request": plain["request"],
        "raised_by": plain["raised_by"],
        "raised_ns": [native(row["raised_after_ns"]), native(row["raised_ns"])],
        "end": plain["end"],
        "ended_ns": [
            native(row["ended_after_ns"]),
            ended_ns if ended_ns is not None and ended_ns >= 0 else None,
        ],
        **{key: plain[key] for key in _LIFECYCLE},
        **{key: None if plain[key] == unknown else plain[key] for key, unknown in UNKNOWN.items()},
    }


def each(table: pd.DataFrame, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield what :func:`records` returns, however long the table is; of some columns, if they are named."""
    for start in range(0, len(table), _CHUNK):
        part = table.iloc[start : start + _CHUNK]
        yield from records(part[list(columns)] if columns else part)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as dictionaries of plain Python values."""
    plain = {str(name): _plain(table[name]) for name in table.columns}
    return [dict(zip(plain, values, strict=True)) for values in zip(*plain.values(), strict=True)]


# numpy's own integers and truth values cannot be missing, and become Python's all at once.
def _plain(column: pd.Series[Any]) -> list[Any]:
    values = column.tolist()
    return (
        values
        if getattr(column.dtype, "kind", "O") in "iub" and not hasattr(column.dtype, "na_value")
        else list(map(native, values))
    )
