"""What a report says of runs of scenarios, against what they must show.

A report is the JSON document of ``kvmreq report --format json``, as Python reads it. Which VMs are those of a run is
told by their process and by when they began.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lab.runner import Run
from lab.stage import Several, request_of

Row = Mapping[str, Any]


def differences(report: Mapping[str, Any], run: Run, tells: Collection[str], *, excused: str = "") -> list[str]:
    """Return in what a report of one traced run differs from the truth.

    Compared are the requests that the scenario is about and the recording watched. ``tells``: of the words in
    RAISED_INSIDE_KVM_RUN those that the engine tells. ``excused``: words of a reason for which a request may be
    undecided, however it ended. VMs that ran at once, in threads, cannot be told apart here.
    """
    mine = [vm for vm in report["vms"] if vm["pid"] in run.pids and run.begin_ns <= vm["first_ns"] <= run.end_ns]
    if len(mine) != run.vms:
        return [f"{run.scenario}: it had {run.vms} VMs, and the report has {len(mine)} of them"]
    order = {vm["vm"]: place for place, vm in enumerate(sorted(mine, key=lambda vm: (vm["first_ns"], vm["vm"])))}
    compared = run.about & set(report["recording"]["requests"])
    truth = run.truth(tells).of_requests(compared)
    lifecycles = [row for row in report["lifecycles"] if request_of(row) in compared]
    full = report["recording"]["detail"] == "full"
    wrong = [
        *_compare("lifecycles", _numbered(lifecycles, order), truth.lifecycles, excused, truth.several, full),
        *_compare("shutdowns", _numbered(report["shutdowns"], order), truth.shutdowns, excused),
    ]
    return [f"{run.scenario}: {what}" for what in wrong]


def _numbered(rows: Iterable[Row], order: Mapping[int, int]) -> list[Row]:
    return [{**row, "vm": order[row["vm"]]} for row in rows if row["vm"] in order]


def undecided_for(row: Row, excused: str) -> bool:
    """Tell whether a lifecycle is undecided for a reason with these words."""
    return bool(excused) and row.get("end") == "undecided" and excused in row["why"]


def _compare(
    what: str,
    rows: list[Row],
    must: Iterable[Row],
    excused: str,
    several: Sequence[Several] = (),
    full: bool = False,
) -> list[str]:
    left = list(rows)
    wrong = []
    for one in must:
        found = next((row for row in left if _is(row, one, excused)), None)
        if found is None:
            wrong.append(f"{what} lack {dict(one)}")
        else:
            left.remove(found)
    counts = [0] * len(several)
    for row in tuple(left):
        place = next((place for place, one in enumerate(several) if _counts(row, one, excused)), None)
        if place is not None:
            counts[place] += _counts(row, several[place], excused)
            left.remove(row)
    for alike, count in zip(several, counts, strict=True):
        if not alike.allows(count, full):
            most = " or more" if alike.most is None else f" to {alike.most}"
            wrong.append(f"{what} have {count} like {dict(alike.like)}, not {alike.few(full)}{most}")
    doubts = (row["why"] for row in rows if row.get("why") and not undecided_for(row, excused) and row not in left)
    wrong += [f"{what} have a doubt that they must not have: {why}" for why in doubts]
    return [*wrong, *(f"{what} have what they must not: {dict(row)}" for row in left)]


def _counts(row: Row, one: Several, excused: str) -> int:
    """Return for how many of these a lifecycle counts; for none if it is not like them."""
    if not _is(row, one.like, excused):
        return 0
    return row["userspace_exits"] + (row["raised_in"] == "user_space") if one.stays else 1


def _is(row: Row, one: Row, excused: str) -> bool:
    doubtful = undecided_for(row, excused)
    return all(row[key] == value for key, value in one.items() if not (doubtful and key == "end"))
