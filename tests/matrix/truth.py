"""What must be seen of known work, and in what a report differs from it. The only place that knows how the lab tells.

``run`` belongs into the guest, ``differences`` on the host; between them goes what JSON can hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lab import check, runner, scratch
from lab.stage import RAISED_INSIDE_KVM_RUN, TRIPLE_FAULT, request_of
from probes.plan import tells

Row = Mapping[str, Any]

MISSED = "the tracer missed hooks"  # what a report says where the kernel left out runs of programs or probes


def scenarios() -> dict[str, str | None]:
    """Return every scenario, with the reason why this kernel cannot run it, or None."""
    return {scenario.name: reason for scenario, reason in runner.runnable()}


def run(name: str) -> dict[str, Any]:
    """Run a scenario, and return what the lab tells of it."""
    return {"told": runner.run_and_tell(name).as_json()}


def differences(report: Mapping[str, Any], told: str) -> tuple[list[str], list[str]]:
    """Return in what a report differs from what was told of one run: what is wrong, and what the engine cannot see."""
    one = runner.Run.from_json(told)
    if not check.differences(report, one, RAISED_INSIDE_KVM_RUN):
        return [], []
    told_by = tells(report["recording"]["plan"])
    wrong = check.differences(report, one, told_by)
    hidden = _hidden(one.truth().lifecycles, one.truth(told_by).lifecycles)
    missed = report["loss"]["missed"]
    if wrong and missed and not check.differences(report, one, told_by, excused=MISSED):
        return [], [*hidden, f"undecided: {MISSED} ({missed} in the recording)"]
    return wrong, hidden


def _hidden(all_there_is: Iterable[Row], seen: Iterable[Row]) -> list[str]:
    left = list(seen)
    hidden = []
    for one in all_there_is:
        anonymous = {**one, "raised_by": "kvm_run"}
        if one in left:
            left.remove(one)
        elif anonymous in left:
            left.remove(anonymous)
            hidden.append(f"raised_by is kvm_run, not {one['raised_by']}")
        else:
            hidden.append(f"raised by {one['raised_by']} and {one['end']} inside one KVM_RUN: not seen")
    return hidden


def between(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return in what the reports of two recordings of the same time differ, but for what their plans declare unseen.

    Who raised a request is unseen to an engine that says kvm_run and has no hook for what the other one says.
    """
    told, told_by_other = (tells(report["recording"]["plan"]) for report in (one, other))
    wrong = []
    for kind, words in (("lifecycles", _LIFECYCLE), ("shutdowns", ("pid", "vcpu", "source", "nested"))):
        mine, others = _in_order(one, kind), _in_order(other, kind)
        if len(mine) != len(others):
            wrong.append(f"{len(mine)} {kind} and {len(others)}")
            continue
        for row, twin in zip(mine, others, strict=True):
            doubtful = any(check.undecided_for(each, MISSED) for each in (row, twin))
            differ = [word for word in words if row[word] != twin[word] and not (doubtful and word == "end")]
            wrong += [f"{kind}: {word} of {row} is {twin[word]}" for word in differ]
            by, by_other = row.get("raised_by"), twin.get("raised_by")
            unseen = (by == "kvm_run" and by_other not in told) or (by_other == "kvm_run" and by not in told_by_other)
            if by != by_other and not unseen:
                wrong.append(f"{row}: raised by {by} and by {by_other}")
    return wrong


_LIFECYCLE = ("pid", "vcpu", "request", "end", "userspace_exits", "saves", "blind_saves", "nested", "stale")


def _in_order(report: Mapping[str, Any], kind: str) -> list[Row]:
    # One kvmreq begins after the other, which sees its canary.
    first = {vm["vm"]: vm["first_ns"] for vm in report["vms"]}
    return sorted(
        (row for row in report[kind] if row["vcpu"] != scratch.UNUSUAL_ID),
        key=lambda row: (row["pid"], first[row["vm"]], row["vcpu"], row.get("raised_ns", [row.get("time_ns")])[-1]),
    )


def compared(report: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    """Return in what a report differs from what is known of one of the kernel's own tests.

    Its VMs are those that began while it ran: nothing else runs VMs in the matrix. Known are its triple faults.
    """
    mine = [vm for vm in report["vms"] if told["begin_ns"] <= vm["first_ns"] <= told["end_ns"]]
    if len(mine) != told["vms"]:
        return [f"it had {told['vms']} VMs, and the report has {len(mine)} of them"]
    order = {vm["vm"]: place for place, vm in enumerate(sorted(mine, key=lambda vm: (vm["first_ns"], vm["vm"])))}
    wrong = []
    for what in ("lifecycles", "shutdowns"):
        rows = (row for row in report[what] if row["vm"] in order and request_of(row) == TRIPLE_FAULT)
        left: list[Row] = [{**row, "vm": order[row["vm"]]} for row in rows]
        for one in told[what]:
            found = next((row for row in left if all(row[key] == value for key, value in one.items())), None)
            if found is None:
                wrong.append(f"{what} lack {dict(one)}")
                continue
            left.remove(found)
            if found.get("why"):
                wrong.append(f"{what} have a doubt: {found['why']}")
        wrong += [f"{what} have what they must not: {_short(row)}" for row in left]
    return wrong


def _short(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.endswith("_ns")}
