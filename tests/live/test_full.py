"""`record --detail full` on this KVM: the same as tracefs, without a gap, and honest where the ring is full."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lab.runner import runnable
from probes.program import Settings
from probes.schema import Kind
from tests.matrix.full_counts import EVENTS, gaps, wakeups
from tests.matrix.stat_counts import instance
from tracer import host, tracefs
from tracer.engines import choices, first, open_engine
from tracer.recording import Recording

from .session import CHECKOUT, PATIENCE_S, Vmm, recording, report

REASONS = {scenario.name: reason for scenario, reason in runnable()}
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(REASONS["quiet"]), reason=f"the lab cannot run: {REASONS['quiet']}"),
]
HALTS = 23
FULL = ("--detail", "full", "--requests", "all")


@pytest.fixture(scope="module", autouse=True)
def _tracefs() -> None:
    with tracefs.root() as root:
        if root is None:
            pytest.skip("tracefs cannot be mounted: run as root, on a kernel with CONFIG_TRACING")


def test_23_wake_ups_are_those_of_tracefs(tmp_path: Path) -> None:
    """To the nanosecond, each inside one KVM_RUN, and no event is missing."""
    with Vmm() as vmm, recording(tmp_path / "r", *FULL, "-p", str(vmm.pid)), instance(EVENTS) as path:
        for _ in range(HALTS):
            vmm.tell("halt", "kick")
        vmm.end()
        theirs = wakeups((path / "trace").read_text().splitlines(), [vmm.pid])
    events = np.concatenate([segment.events for segment in Recording.open(tmp_path / "r").segments() if segment])
    own = events[(events["pid"] == vmm.pid) & (events["seq"] > 0)]
    own = own[np.argsort(own["seq"], kind="stable")]
    assert set(own["vcpu"].tolist()) == {own["vcpu"][0]}
    assert gaps(own) == 0
    woken = np.flatnonzero(own["kind"] == Kind.WAKEUP)
    assert len(woken) >= HALTS
    ours = sorted(zip(*(own[woken][name].tolist() for name in ("tid", "arg", "detail")), strict=True))
    assert ours == sorted(theirs.elements())
    # What was read last before it is the reading before: the story has one thread of time.
    assert (own["since_ns"][1:] == own["time_ns"][:-1]).all()
    assert (own["before"][1:] == own["requests"][:-1]).all()
    kinds = own["kind"]
    inside = (kinds == Kind.RUN_ENTER).cumsum() - (kinds == Kind.RUN_EXIT).cumsum()
    assert (inside[woken] == 1).all()
    assert json.loads((tmp_path / "r/meta.json").read_text())["counters"]["guest"] == len(woken)


@pytest.fixture
def _tracefs_in_its_place() -> Iterator[None]:
    """BCC looks for trace events there, and nowhere else."""
    place = Path("/sys/kernel/tracing")
    if (place / "events").is_dir():
        yield
        return
    subprocess.run(["mount", "-t", "tracefs", "tracefs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.usefixtures("_tracefs_in_its_place")
def test_where_raw_tracepoints_are_preempted_trace_events_tell_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that such a kernel gets are taken by this one, too: none is refused, and wake-ups are tracefs's."""
    monkeypatch.setattr(host, "preempts_raw_tracepoints", lambda: True)
    plan = first("tracepoint", choices(full=True), lambda plan: plan).opened
    assert "tracepoint:kvm:kvm_vcpu_wakeup" in {line["hook"] for line in plan.as_json()}
    settings = Settings(watched=(1 << 64) - 1, cpus=host.possible_cpus(), full=True)
    with open_engine(plan, settings, ()) as engine:
        engine.attach()
        assert not [line for line in engine.plan.as_json() if "refused" in str(line["unseen"])]
        with Vmm() as vmm, instance(EVENTS) as path:
            for _ in range(HALTS):
                vmm.tell("halt", "kick")
            vmm.end()
            theirs = wakeups((path / "trace").read_text().splitlines(), [vmm.pid])
        events = engine.drain()
    woken = events[(events["pid"] == vmm.pid) & (events["kind"] == Kind.WAKEUP)]
    assert len(woken) >= HALTS
    ours = sorted(zip(*(woken[name].tolist() for name in ("tid", "arg", "detail")), strict=True))
    assert ours == sorted(theirs.elements())


def test_the_plan_of_a_recording_says_what_that_detail_sees(tmp_path: Path) -> None:
    """Guest entries are in the plan of detail full, and in that of detail boundary they are not."""
    for detail in ("full", "boundary"):
        with recording(tmp_path / detail, "--detail", detail):
            pass
        plan = json.loads((tmp_path / detail / "meta.json").read_text())["plan"]
        hooks = {line["hook"] for line in plan}
        assert ("raw_tracepoint:kvm_exit" in hooks) is (detail == "full")
        kicks = [line for line in plan if "kick" in line["fact"]]
        assert bool(kicks) is (detail == "full")


def test_the_kernels_own_trace_tells_the_same() -> None:
    """Event for event, over every scenario of one VM."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.matrix.full_counts"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    results = [one for one in json.loads(done.stdout) if "refused" not in one]
    if not any(one[what] for one in results for what in ("exits", "entries", "wakeups")):
        pytest.skip(
            "no scenario of the lab has this KVM enter a guest, or a vCPU sleep: make matrix has kernels that do"
        )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_small_ring_under_load_is_undecided_and_nothing_is_lost(tmp_path: Path) -> None:
    """What the ring had no room for is counted exactly, and the request that it may be about is judged by nobody."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc: apt install gcc")
    loop = tmp_path / "exit_loop"
    subprocess.run(["gcc", "-O2", "-o", loop, CHECKOUT / "bench/exit_loop.c"], check=True)
    path = tmp_path / "r"
    with (
        Vmm() as vmm,
        subprocess.Popen([loop, "1", "20011"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guest,
    ):
        assert guest.stdin and guest.stdout
        guest.stdout.readline()
        only = ("-p", str(vmm.pid), "-p", str(guest.pid))
        with recording(path, *FULL, "--ring", "1", *only) as record:
            vmm.tell("mce")
            os.kill(record.process.pid, signal.SIGSTOP)  # a reader that is not scheduled: the load fills the ring
            guest.communicate("\n", PATIENCE_S)
            vmm.tell("run")
            os.kill(record.process.pid, signal.SIGCONT)
            vmm.end()
    document = report(path)
    counters = json.loads((path / "meta.json").read_text())["counters"]
    received = sum(len(segment.events) for segment in Recording.open(path).segments() if segment)
    assert document["loss"]["ring_full"] > 20_011
    assert counters["produced"] == received + document["loss"]["ring_full"] + document["loss"]["kicks"]
    faults = [row for row in document["lifecycles"] if row["request"] == "triple_fault"]
    assert [(row["pid"], row["end"]) for row in faults] == [(vmm.pid, "undecided")]
    assert faults[0]["why"]
    assert "lost" not in document["summary"]
    assert document["exit_status"] == 4
