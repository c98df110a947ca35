"""What the command says of every scenario: exactly its truth, alone, at once, and in a row."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lab.check import differences
from lab.runner import Run, Truth, parallel, runnable
from lab.scenarios import SCENARIOS
from probes.plan import tells

from .session import by_pid, lab, lab_tells, recording, report

pytestmark = pytest.mark.live

REASONS = {scenario.name: reason for scenario, reason in runnable()}
RUNNABLE = [name for name, reason in REASONS.items() if reason is None]
Rows = list[dict[str, Any]]


def require(name: str) -> None:
    """Skip a test whose scenario this host cannot run."""
    if REASONS[name]:
        pytest.skip(f"{name}: {REASONS[name]}")


def seen(document: Mapping[str, Any], vms: Iterable[Mapping[str, Any]]) -> tuple[Rows, Rows]:
    """Return the lifecycles and shutdowns of some VMs, these numbered in the order of their creation."""
    order = {vm["vm"]: place for place, vm in enumerate(sorted(vms, key=lambda vm: (vm["first_ns"], vm["vm"])))}
    lifecycles = [{**row, "vm": order[row["vm"]]} for row in document["lifecycles"] if row["vm"] in order]
    shutdowns = [{**row, "vm": order[row["vm"]]} for row in document["shutdowns"] if row["vm"] in order]
    return lifecycles, shutdowns


def same(rows: Rows, truth: Iterable[Mapping[str, Any]], without: tuple[str, ...] = ()) -> bool:
    """Tell whether rows and truth agree, in any order, on the keys that the truth has."""
    left = list(rows)
    for one in truth:
        keys = one.keys() - set(without)
        found = next((row for row in left if all(row[key] == one[key] for key in keys)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def check(document: Mapping[str, Any], vms: Iterable[Mapping[str, Any]], truth: Truth) -> None:
    """Compare a report with the truth; a failure shows both."""
    lifecycles, shutdowns = seen(document, vms)
    assert same(lifecycles, truth.lifecycles), (lifecycles, truth.lifecycles)
    assert same(shutdowns, truth.shutdowns), (shutdowns, truth.shutdowns)
    assert all(row["why"] in (None, "") for row in lifecycles), lifecycles


def nothing_lost(document: Mapping[str, Any]) -> None:
    """The recording is whole."""
    assert document["loss"]["total"] == 0
    assert document["recording"]["left_out"] == []
    assert document["recording"]["clean"]


Traced = tuple[dict[str, Any], dict[str, Run]]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Run every scenario, one after the other, under one `record`; return its report, and what each run told."""
    path = tmp_path_factory.mktemp("traced") / "recording"
    runs = {}
    with recording(path):
        for name in RUNNABLE:
            runs[name] = Run.from_json(lab_tells(name))
    return report(path), runs


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_gets_its_verdict(traced: Traced, name: str) -> None:
    """End, who raised it, exits, saves, blind saves, stale, nested; and every shutdown with its source."""
    require(name)
    document, runs = traced
    assert differences(document, runs[name], tells(document["recording"]["plan"])) == []


def test_nothing_is_lost_meanwhile(traced: Traced) -> None:
    """And the summary is that of the lifecycles."""
    document, runs = traced
    nothing_lost(document)
    ends = [row["end"] for row in document["lifecycles"]]
    copies_without = sum(row["copies_without"] for row in document["lifecycles"])
    counts: dict[str, int] = {end: ends.count(end) for end in dict.fromkeys(ends)}
    assert document["summary"] == {**counts, "copies_without": copies_without}
    told = tells(document["recording"]["plan"])
    watched = document["recording"]["requests"]
    assert sum(len(run.truth(told).of_requests(watched).lifecycles) for run in runs.values()) <= len(ends)
    assert document["exit_status"] == 3


def test_intervals_are_honest(traced: Traced) -> None:
    """Each is [last seen without, first seen with], and lies within its run."""
    document, runs = traced
    begin, end = min(run.begin_ns for run in runs.values()), time.monotonic_ns()
    pids = {pid for run in runs.values() for pid in run.pids}
    for row in (row for row in document["lifecycles"] if row["pid"] in pids):
        times = [*row["raised_ns"], *row["ended_ns"]]
        assert times == sorted(times), row
        assert begin <= times[0], row
        assert times[-1] <= end, row


def test_eight_vms_at_once(tmp_path: Path) -> None:
    """Eight processes, each another scenario, five times: told apart by pid."""
    names = [name for name in ("lost", "pending", "delivered_twice", "handed_over", "five_vcpus", "cleared",
                               "abandoned", "stale", "exposed", "quiet", "delivered", "blind_then_run")
             if REASONS[name] is None][:8]  # fmt: skip
    if len(names) < 8:
        pytest.skip(f"this host can only run {', '.join(names)}")
    with recording(tmp_path / "r"):
        truths = parallel(names, repeat=5)
    document = report(tmp_path / "r")
    nothing_lost(document)
    assert len({vm["pid"] for vm in document["vms"]} & truths.keys()) == 8
    for pid, truth in truths.items():
        check(document, by_pid(document["vms"], pid), truth)


@pytest.mark.parametrize("name", ["lost", "pending", "five_vcpus"])
def test_eight_threads_of_one_vmm(tmp_path: Path, name: str) -> None:
    """Eight VMs in one process at once; which is which nobody knows, but together they are right."""
    require(name)
    with recording(tmp_path / "r"):
        process = lab(name, "--vms", "8", "--repeat", "3")
        assert process.wait(60) == 0
    document = report(tmp_path / "r")
    nothing_lost(document)
    truth = Truth.of(SCENARIOS[name], 24)
    lifecycles, shutdowns = seen(document, by_pid(document["vms"], process.pid))
    assert same(lifecycles, truth.lifecycles, without=("vm",))
    assert same(shutdowns, truth.shutdowns, without=("vm",))


def test_303_vms_in_a_row(tmp_path: Path) -> None:
    """KVM gives a new vCPU the address of the one before it: each is its own all the same."""
    require("reused")
    with recording(tmp_path / "r"):
        process = lab("reused", "--repeat", "3")
        assert process.wait(60) == 0
    document = report(tmp_path / "r")
    nothing_lost(document)
    vms = by_pid(document["vms"], process.pid)
    assert len(vms) == 303
    check(document, vms, Truth.of(SCENARIOS["reused"], 3))


@pytest.mark.parametrize("options", [["--detail", "full"], ["--requests", "all"]])
def test_more_detail_changes_no_verdict(tmp_path: Path, options: list[str]) -> None:
    """Every boundary, or every request: what becomes of a triple fault is the same."""
    names = [name for name in ("lost", "pending", "handed_over", "delivered_twice", "stale") if REASONS[name] is None]
    with recording(tmp_path / "r", *options):
        truths = parallel(names)
    document = report(tmp_path / "r")
    nothing_lost(document)
    document["lifecycles"] = [row for row in document["lifecycles"] if row["request"] == "triple_fault"]
    for pid, truth in truths.items():
        check(document, by_pid(document["vms"], pid), truth)
