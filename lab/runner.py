"""Running scenarios: in a row, several at once, and which of them this host can run.

Each function returns the truth that a trace of the same time must show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lab.child import READY, child, fail, wait_for
from lab.kvm import Kvm, LabError
from lab.scenarios import SCENARIOS, Lifecycle, Scenario, Shutdown, Stage


@dataclass(frozen=True)
class Truth:
    """What must be seen of some runs; VMs are numbered as if the runs had been one after the other."""

    lifecycles: list[Lifecycle]
    shutdowns: list[Shutdown]

    @classmethod
    def of(cls, scenario: Scenario, runs: int = 1) -> Truth:
        """Return the truth of ``runs`` runs of a scenario."""
        starts = range(0, runs * scenario.vms, scenario.vms)
        return cls(
            [{**one, "vm": start + one["vm"]} for start in starts for one in scenario.expect],
            [{**one, "vm": start + one["vm"]} for start in starts for one in scenario.shutdowns],
        )


def runnable() -> list[tuple[Scenario, str | None]]:
    """Return every scenario, with the reason why this host cannot run it, or None.

    Asks KVM for its capabilities and does nothing else: a trace of it is empty.
    """
    try:
        with Kvm() as kvm:
            return [(scenario, scenario.unmet(kvm)) for scenario in SCENARIOS.values()]
    except LabError as error:
        return [(scenario, str(error)) for scenario in SCENARIOS.values()]


def run(name: str, repeat: int = 1, vms: int = 1, hold: Callable[[], None] = lambda: None) -> Truth:
    """Run a scenario ``repeat`` times in a row, in ``vms`` threads at once.

    A scenario that can stand still calls ``hold`` when it does, and goes on when that returns.
    """
    scenario = _find(name)
    with Kvm() as kvm:
        reason = scenario.unmet(kvm)
        if reason is not None:
            raise LabError(f"{name} cannot run here: {reason}", hint="python3 -m lab list shows what can")

        def perform(thread: int) -> None:
            for _ in range(repeat):
                _perform(scenario, Stage(kvm, scenario.code, hold))

        if vms == 1:
            perform(0)
        else:
            with ThreadPoolExecutor(vms) as threads:
                list(threads.map(perform, range(vms)))
    return Truth.of(scenario, repeat * vms)


def parallel(names: Sequence[str], repeat: int = 1) -> dict[int, Truth]:
    """Run several scenarios at once, each in a process of its own; return the truth by process.

    They start when all are ready. The VMM that ``killed`` kills is a process of its own once more.
    """
    scenarios = [_find(name) for name in names]
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(child("run", one.name, "--repeat", str(repeat), "--wait")) for one in scenarios]
        for process in children:
            wait_for(process, READY)
        for process in children:
            assert process.stdin
            process.stdin.close()
        for process in children:
            if process.wait() != 0:
                fail(process)
    return {process.pid: Truth.of(scenarios[place], repeat) for place, process in enumerate(children)}


def _find(name: str) -> Scenario:
    try:
        return SCENARIOS[name]
    except KeyError:
        raise LabError(f"there is no scenario {name}", hint="python3 -m lab list shows them") from None


def _perform(scenario: Scenario, stage: Stage) -> None:
    try:
        scenario.steps(stage)
    except LabError as error:
        raise LabError(f"{scenario.name}: {error}") from error
    if stage.vms != scenario.vms:
        raise LabError(f"{scenario.name} made {stage.vms} VMs and declares {scenario.vms}", hint="a mistake in the lab")
