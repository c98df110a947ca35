"""Scenarios about KVM's other requests, traced with all requests watched: exactly the counts that they declare."""

from __future__ import annotations

from typing import Any

import pytest

from lab.check import differences
from lab.requests import BUSY_VCPUS
from lab.runner import Run, runnable
from lab.scenarios import SCENARIOS
from probes.plan import tells

from .session import lab_tells, recording, report

pytestmark = pytest.mark.live

REASONS = {scenario.name: reason for scenario, reason in runnable()}
ABOUT_OTHERS = [name for name, scenario in SCENARIOS.items() if scenario.others]
Traced = tuple[dict[str, Any], dict[str, Run]]


@pytest.fixture(scope="module", params=["boundary", "full"])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Run every scenario that this host can run; return the report, and what each run told."""
    path = tmp_path_factory.mktemp("traced") / "recording"
    with recording(path, "--requests", "all", "--detail", request.param):
        runs = {name: Run.from_json(lab_tells(name)) for name, reason in REASONS.items() if reason is None}
    return report(path), runs


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_request_gets_its_verdict(traced: Traced, name: str) -> None:
    """As many lifecycles as there must be, each with who raised it and how it ended; and triple faults as ever."""
    if REASONS[name]:
        pytest.skip(f"{name}: {REASONS[name]}")
    document, runs = traced
    assert differences(document, runs[name], tells(document["recording"]["plan"])) == []


def test_nothing_is_lost_meanwhile(traced: Traced) -> None:
    """The ring has room for all of it, and scenarios about other requests were among them."""
    document, runs = traced
    assert document["loss"]["total"] == 0
    assert runs.keys() & set(ABOUT_OTHERS)


@pytest.mark.parametrize("names", [("nmi", "exit_storm"), ("clock_update",)])
def test_a_list_of_requests_is_as_right_as_all(traced: Traced, tmp_path: Any, names: tuple[str, ...]) -> None:
    """Only what is watched is compared."""
    names = tuple(name for name in names if REASONS[name] is None)
    watched = {request for name in names for request in SCENARIOS[name].others}
    if not watched:
        pytest.skip("this host cannot run them")
    with recording(tmp_path / "r", "--requests", ",".join(sorted(watched))):
        runs = [Run.from_json(lab_tells(name)) for name in names]
    document = report(tmp_path / "r")
    assert set(document["recording"]["requests"]) == watched
    for run in runs:
        assert differences(document, run, tells(document["recording"]["plan"])) == []


def test_the_busy_guest_has_latencies(traced: Traced) -> None:
    """Its vCPUs service interrupts and hear of the clock while they run, and that is what latencies are made of."""
    if REASONS["busy"]:
        pytest.skip(f"busy: {REASONS['busy']}")
    document, runs = traced
    run = runs["busy"]
    (vm,) = (
        one["vm"] for one in document["vms"] if one["pid"] in run.pids and run.begin_ns <= one["first_ns"] <= run.end_ns
    )
    served = [row for row in document["lifecycles"] if row["vm"] == vm and row["end"] == "serviced"]
    assert {row["vcpu"] for row in served} == set(range(BUSY_VCPUS))
    while_running = {row["request"] for row in served if row["raised_by"] in ("kvm_run", "remote")}
    assert while_running >= {"event", "clock_update"}
