"""Running scenarios: in a row, several at once, and which of them this host can run.

Each function returns the truth that a trace of the same time must show: of a scenario whose outcome depends on the
kernel, what happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from lab.child import READY, child, fail, wait_for
from lab.kvm import Kvm, LabError
from lab.scenarios import SCENARIOS
from lab.stage import Lifecycle, Outcome, Scenario, Several, Shutdown, Stage, request_of


@dataclass(frozen=True)
class Truth:
    """What must be seen of some runs; VMs are numbered as if the runs had been one after the other."""

    lifecycles: list[Lifecycle]
    shutdowns: list[Shutdown]
    several: list[Several] = field(default_factory=list)

    @classmethod
    def of(cls, scenario: Scenario, runs: int | Sequence[Outcome] = 1) -> Truth:
        """Return the truth of runs of a scenario: so many on a new kernel, or with these outcomes."""
        outcomes = [scenario.outcomes[0]] * runs if isinstance(runs, int) else runs
        numbered = [(run * scenario.vms, outcome) for run, outcome in enumerate(outcomes)]
        return cls(
            [{**one, "vm": start + one["vm"]} for start, outcome in numbered for one in outcome.lifecycles],
            [{**one, "vm": start + one["vm"]} for start, outcome in numbered for one in outcome.shutdowns],
            [one.of_vms_from(start) for start, outcome in numbered for one in outcome.several],
        )

    def of_requests(self, requests: Collection[str]) -> Truth:
        """Return what must be seen of these requests alone."""
        return Truth(
            [one for one in self.lifecycles if request_of(one) in requests],
            self.shutdowns,
            [one for one in self.several if request_of(one.like) in requests],
        )


@dataclass(frozen=True)
class Run:
    """Runs of one scenario that are over, as the process that made them tells others."""

    scenario: str
    pid: int
    pids: list[int]  # of the processes that had its VMs
    begin_ns: int  # CLOCK_MONOTONIC
    end_ns: int
    outcomes: list[Outcome]

    @property
    def about(self) -> frozenset[str]:
        """The requests of which the truth says all that there is."""
        return SCENARIOS[self.scenario].about

    @property
    def vms(self) -> int:
        """How many VMs there were."""
        return SCENARIOS[self.scenario].vms * len(self.outcomes)

    def truth(self, tells: Collection[str] | None = None) -> Truth:
        """Return what must be seen; ``tells``: by an engine of which Outcome.seen() explains this."""
        outcomes = self.outcomes if tells is None else [one.seen(tells) for one in self.outcomes]
        return Truth.of(SCENARIOS[self.scenario], outcomes)

    def as_json(self) -> str:
        """Return it as one line."""
        known = SCENARIOS[self.scenario].outcomes
        return json.dumps({**vars(self), "outcomes": [known.index(one) for one in self.outcomes]})

    @classmethod
    def from_json(cls, line: str) -> Run:
        """Return the run that a line tells of."""
        told = json.loads(line)
        known = SCENARIOS[told["scenario"]].outcomes
        return cls(**{**told, "outcomes": [known[place] for place in told["outcomes"]]})


def runnable() -> list[tuple[Scenario, str | None]]:
    """Return every scenario, with the reason why this host cannot run it, or None.

    Asks KVM and the kernel what they can do, and makes no VM: a trace of it is empty.
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
    return run_and_tell(name, repeat, vms, hold).truth()


def run_and_tell(name: str, repeat: int = 1, vms: int = 1, hold: Callable[[], None] = lambda: None) -> Run:
    """The same, and return all that another process needs to find these runs in a trace."""
    scenario = _find(name)
    outcomes: list[Outcome] = []
    pids: set[int] = set()
    begin_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    with Kvm() as kvm:
        reason = scenario.unmet(kvm)
        if reason is not None:
            raise LabError(f"{name} cannot run here: {reason}", hint="python3 -m lab list shows what can")

        def perform(thread: int) -> None:
            for _ in range(repeat):
                stage = Stage(kvm, scenario.code, hold)
                outcomes.append(_perform(scenario, stage))
                pids.update(stage.pids)

        if vms == 1:
            perform(0)
        else:
            with ThreadPoolExecutor(vms) as threads:
                list(threads.map(perform, range(vms)))
    end_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return Run(name, os.getpid(), sorted(pids), begin_ns, end_ns, outcomes)


def parallel(names: Sequence[str], repeat: int = 1) -> dict[int, Truth]:
    """Run several scenarios at once, each in a process of its own; return the truth by process.

    They start when all are ready. The VMM that ``killed`` kills is a process of its own once more.
    """
    for name in names:
        _find(name)
    with contextlib.ExitStack() as stack:
        options = ("--repeat", str(repeat), "--wait", "--json")
        children = [stack.enter_context(child("-m", "lab", "run", name, *options)) for name in names]
        for process in children:
            wait_for(process, READY)
        for process in children:
            assert process.stdin
            process.stdin.close()
        told = []
        for process in children:
            assert process.stdout
            told.append(process.stdout.read())
            if process.wait() != 0:
                fail(process)
    return {run.pid: run.truth() for run in map(Run.from_json, told)}


def _find(name: str) -> Scenario:
    try:
        return SCENARIOS[name]
    except KeyError:
        raise LabError(f"there is no scenario {name}", hint="python3 -m lab list shows them") from None


def _perform(scenario: Scenario, stage: Stage) -> Outcome:
    try:
        outcome = scenario.steps(stage) or scenario.outcomes[0]
    except LabError as error:
        raise LabError(f"{scenario.name}: {error}") from error
    if stage.vms != scenario.vms:
        raise LabError(f"{scenario.name} made {stage.vms} VMs and declares {scenario.vms}", hint="a mistake in the lab")
    if outcome not in scenario.outcomes:
        raise LabError(f"{scenario.name} came to {outcome}, which it does not declare", hint="a mistake in the lab")
    return outcome
