"""From what a boot left in its folder to results: each recording judged and compared with the truth, on the host."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.judge import judge
from reports.document import document
from tests.matrix import transitions, truth
from tests.matrix.witnesses import EXPECT
from tracer.errors import KvmreqError
from tracer.recording import Recording

EXACT = "exact"  # every lifecycle and shutdown as it must be, and no doubt
DECLARED = "declared"  # the same, but for what the plan of the engine says that it cannot see
WRONG = "wrong"
CANNOT_RUN = "cannot run"  # this kernel lacks what the scenario needs
RESULTS = (EXACT, DECLARED, WRONG, CANNOT_RUN)


# Of the scenarios, those that may be undecided since the kernel left out runs of programs or probes.
MOST_DOUBTFUL = 0.5


@dataclass(frozen=True)
class Failure:
    """One thing that is not as it must be."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def of_boot(folder: Path) -> dict[str, Any]:
    """Return the results of one kernel and user space, from the folder that its boot filled."""
    told = json.loads((folder / "inside.json").read_text())
    kept = ("release", "build", "python", "bcc", "headers", "kvm_has_btf", "complete")
    results = {key: told[key] for key in kept}
    results["engines"] = [_of_engine(folder, told, engine) for engine in told["engines"]]
    results["counts"] = [of_counts(one) for one in told.get("counts", ())]
    if "together" in told:
        results["together"] = _of_both(folder, told["together"])
    if "full" in told:
        results["full"] = _of_full(folder, told["full"])
    return results


def of_counts(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many exits, entries, kicks and so on an engine counted, and in what that differs from tracefs."""
    differ = {what: lines for what, lines in told.items() if what.endswith("_differ") and lines and not told["same"]}
    differences = [f"{what}: {lines}" for what, lines in differ.items()]
    if not told["same"] and not differences:
        known = ("refused", "loss", "overrun", "gaps", "counters", "unseen")
        differences = [f"{what}: {told[what]}" for what in known if told.get(what)] or ["nothing was counted"]
    counted = {
        key: sum(told[key].values()) if isinstance(told[key], dict) else told[key] for key in _COUNTED & told.keys()
    }
    return {"what": told["what"], "engine": told["engine"], "counted": counted, "differences": differences}


# What tests.matrix.stat_counts and full_counts compare.
_COUNTED = {"exits", "ended", "user", "entries", "wakeups", "kicks", "requests"}


def _of_both(folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two engines that ran at the same time say differently."""
    result: dict[str, Any] = {"engines": told["engines"], "scenarios": len(told["runs"])}
    if "refused" in told or any(told["status"].values()):
        return {**result, "differences": [f"{told.get('refused') or told['status']}"]}
    try:
        reports = [document(judge(Recording.open(folder / f"together-{engine}"))) for engine in told["engines"]]
    except KvmreqError as error:
        return {**result, "differences": [str(error)]}
    return {
        **result,
        "lifecycles": len(reports[0]["lifecycles"]),
        "differences": truth.between(reports[0], reports[1]),
    }


def _of_full(folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two engines say differently of every request of a busy guest, and how much they had to say."""
    result: dict[str, Any] = {"engines": told["engines"]}
    failed = told.get("refused") or told["work"].get("error")
    if failed or any(told["status"].values()):
        return {**result, "differences": [str(failed or told["status"])]}
    if told["overrun"]:
        return {**result, "differences": [f"tracefs itself has lost {told['overrun']} events"]}
    pid = told["work"]["pid"]
    try:
        stories = [transitions.story(folder / f"full-{engine}", pid) for engine in told["engines"]]
        compared = transitions.compare(stories[0], stories[1], told)
    except KvmreqError as error:
        return {**result, "differences": [str(error)]}
    return {**result, **dataclasses.asdict(compared)}


def _of_engine(folder: Path, told: Mapping[str, Any], engine: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("engine", "refused", "status", "left_behind", "left_behind_by_kill", "attached", "live_s", "seconds")
    result: dict[str, Any] = {key: engine.get(key) for key in kept}
    if engine["refused"] is not None:
        return result
    try:
        report = document(judge(Recording.open(folder / engine["engine"])))
    except KvmreqError as error:
        return {**result, "unreadable": str(error)}
    (folder / f"{engine['engine']}.report.json").write_text(json.dumps(report, indent=1))
    plan = report["recording"]["plan"]
    result["loss"], result["missed"] = report["loss"]["total"], report["loss"]["missed"]
    result["clean"] = report["recording"]["clean"]
    result["unseen"] = [line for line in plan if line["unseen"] is not None]
    result["hooks"] = sum(line["hook"] is not None for line in plan)
    cannot = {name: {"result": CANNOT_RUN, "reasons": [reason]} for name, reason in told["cannot_run"].items()}
    result["scenarios"] = {run["name"]: _compared(report, run) for run in engine["runs"]}
    result["scenarios"] |= {name: one for name, one in cannot.items() if name not in EXPECT}
    result["witnesses"] = {run["name"]: _witnessed(report, run) for run in engine["witnesses"]}
    result["witnesses"] |= {name: one for name, one in cannot.items() if name in EXPECT}
    return result


def _compared(report: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    if "error" in run:
        return {"result": WRONG, "reasons": [f"the scenario failed: {run['error']}"]}
    wrong, hidden = truth.differences(report, run["told"])
    return {"result": WRONG if wrong else DECLARED if hidden else EXACT, "reasons": wrong or sorted(set(hidden))}


def _witnessed(report: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    if run["status"]:
        return {"result": WRONG, "reasons": [f"the test ended with status {run['status']}: {run['said']}"]}
    wrong = truth.compared(report, {**EXPECT[run["name"]], **run})
    return {"result": WRONG if wrong else EXACT, "reasons": wrong}


def may_be_refused(boot: Mapping[str, Any]) -> dict[str, str]:
    """Return which engines may be refused there, and why; every other one must work."""
    if not boot["kvm_has_btf"]:
        # Linux commit 36e68442d1af ("bpf: Load and verify kernel module BTFs") (in v5.11).
        return {"fentry": "this kernel gives no BTF of the kvm module"}
    numbers = [int(number) for number in re.findall(r"\d+", boot["bcc"])[:2]]
    if numbers < [0, 28]:
        return {"fentry": "BCC before 0.28 attaches fentry to the kernel image only"}
    return {}


def failures(where: str, boot: Mapping[str, Any], allowed: Mapping[str, str]) -> list[Failure]:
    """Return everything that is not as it must be; ``allowed``: engines that may be refused here, and why."""
    found = [
        Failure(where, f"there are kernel headers, which kvmreq must not need: {path}") for path in boot["headers"]
    ]
    if not boot["complete"]:
        found.append(Failure(where, "it did not come to its end"))
    for one in boot.get("counts", ()):
        name = f"{where} {one['engine']} {one['what']}, beside tracefs"
        found += [Failure(name, what) for what in one["differences"]]
    both = boot.get("together")
    if both is not None:
        found += [Failure(f"{where} {' and '.join(both['engines'])}", what) for what in both["differences"]]
        if not both["differences"] and not both["lifecycles"]:
            found.append(Failure(where, "two engines at the same time saw nothing"))
    if (full := boot.get("full")) is not None:
        found += [Failure(f"{where} {' and '.join(full['engines'])} full", what) for what in full["differences"]]
    for engine in boot["engines"]:
        found += [Failure(f"{where} {engine['engine']}", what) for what in _wrong_of(engine, allowed)]
    return found


def _wrong_of(engine: Mapping[str, Any], allowed: Mapping[str, str]) -> Iterator[str]:
    if engine["refused"] is not None:
        if engine["engine"] not in allowed:
            yield f"refused: {engine['refused']}"
        if engine["left_behind"]:
            yield f"a refused recording left behind: {', '.join(engine['left_behind'])}"
        return
    if "unreadable" in engine:
        yield f"the recording cannot be read: {engine['unreadable']}"
        return
    if engine["status"] != 0 or not engine["clean"]:
        yield f"record ended with status {engine['status']}, {'cleanly' if engine['clean'] else 'not cleanly'}"
    if engine["loss"] - engine["missed"]:
        yield f"{engine['loss'] - engine['missed']} events were lost"
    doubtful = [name for name, one in engine["scenarios"].items() if any(truth.MISSED in why for why in one["reasons"])]
    if len(doubtful) > MOST_DOUBTFUL * len(engine["scenarios"]):
        yield f"{len(doubtful)} scenarios are undecided: {engine['missed']} hooks were missed"
    if not engine["attached"]:
        yield "a live recording was not seen in the kernel: what it leaves behind would not be either"
    for key, when in (("left_behind", "Ctrl-C"), ("left_behind_by_kill", "kill -9")):
        if engine[key]:
            yield f"left behind after {when}: {', '.join(engine[key])}"
    for kind in ("scenarios", "witnesses"):
        for name, one in engine[kind].items():
            if one["result"] == WRONG:
                yield f"{name}: {'; '.join(one['reasons'])}"


def counts(boot: Mapping[str, Any]) -> Counter[str]:
    """Return how many scenarios and tests of the kernel came to which result."""
    return Counter(
        one["result"]
        for engine in boot["engines"]
        for kind in ("scenarios", "witnesses")
        for one in (engine.get(kind) or {}).values()
    )
