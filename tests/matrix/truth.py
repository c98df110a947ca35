"""What must be seen of known work, and in what a report differs from it. The only place that knows how the lab tells.

``run`` belongs into the guest, ``differences`` on the host; between them goes what JSON can hold.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from lab import runner
from lab.scenarios import SCENARIOS

Row = Mapping[str, Any]

# What one engine sees and another does not: an engine that has no hook inside KVM_RUN says kvm_run instead.
_HIDDEN = "raised_by"
_INSIDE = "kvm_run"


def scenarios() -> dict[str, str | None]:
    """Return every scenario, with the reason why this kernel cannot run it, or None."""
    return {scenario.name: reason for scenario, reason in runner.runnable()}


def run(name: str) -> dict[str, Any]:
    """Run a scenario, and return when, and what a trace of it must show."""
    begin_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    truth = runner.run(name)
    return {
        "name": name,
        "pid": os.getpid(),
        "begin_ns": begin_ns,
        "end_ns": time.clock_gettime_ns(time.CLOCK_MONOTONIC),
        "vms": SCENARIOS[name].vms,
        "lifecycles": truth.lifecycles,
        "shutdowns": truth.shutdowns,
    }


def differences(report: Mapping[str, Any], told: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return in what a report differs from what was told of one run: what is wrong, and what the engine cannot see.

    The run's VMs are those that began while it ran: nothing else runs VMs in the matrix.
    """
    mine = [vm for vm in report["vms"] if told["begin_ns"] <= vm["first_ns"] <= told["end_ns"]]
    if len(mine) != told["vms"]:
        return [f"it had {told['vms']} VMs, and the report has {len(mine)} of them"], []
    order = {vm["vm"]: place for place, vm in enumerate(sorted(mine, key=lambda vm: (vm["first_ns"], vm["vm"])))}
    wrong: list[str] = []
    hidden: list[str] = []
    for what in ("lifecycles", "shutdowns"):
        rows: list[Row] = [{**row, "vm": order[row["vm"]]} for row in report[what] if row["vm"] in order]
        _compare(what, rows, told[what], wrong, hidden)
    return wrong, hidden


def _compare(what: str, rows: list[Row], must: Iterable[Row], wrong: list[str], hidden: list[str]) -> None:
    left = list(rows)
    for one in must:
        found = next((row for row in left if _same(row, one)), None)
        if found is None:
            # Once more with less: an engine may not see who raised it.
            found = next((row for row in left if row.get(_HIDDEN) == _INSIDE and _same(row, one, _HIDDEN)), None)
            if found is not None:
                hidden.append(f"{_HIDDEN} is {_INSIDE}, not {one[_HIDDEN]}")
        if found is None:
            wrong.append(f"{what} lack {dict(one)}")
            continue
        left.remove(found)
        if found.get("why"):
            wrong.append(f"{what} have a doubt: {found['why']}")
    wrong += [f"{what} have what they must not: {_short(row)}" for row in left]


def _same(row: Row, one: Row, without: str = "") -> bool:
    return all(row[key] == value for key, value in one.items() if key != without)


def _short(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.endswith("_ns")}
