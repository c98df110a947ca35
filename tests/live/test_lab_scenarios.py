"""Every scenario, on this machine's KVM. Nothing is traced: that KVM does as a scenario says is the test."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lab.child
from lab import userfault
from lab.kvm import CallFailed, Kvm, LabError, Pages, TimedOut
from lab.runner import Run, Truth, parallel, run, run_and_tell, runnable
from lab.scenarios import SCENARIOS
from lab.stage import Stage
from lab.userfault import UserFault

pytestmark = pytest.mark.live

REASONS = {scenario.name: reason for scenario, reason in runnable()}
SPIN = bytes.fromhex("ebfe")  # 1: jmp 1b


def require(name: str) -> None:
    """Skip a test whose scenario this host cannot run."""
    if REASONS[name]:
        pytest.skip(f"{name}: {REASONS[name]}")


def open_files() -> Counter[str]:
    """Count this process's open files and KVM mappings by name."""
    names: list[str] = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(fd.readlink()))
        except FileNotFoundError:
            continue  # the listing itself
    maps = Path("/proc/self/maps").read_text()
    return Counter([*names, *re.findall(r"anon_inode:kvm\S*", maps)])


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    files, threads = open_files(), threading.active_count()
    yield
    assert open_files() == files
    assert threading.active_count() == threads


#: Scenarios whose VMs are of other processes than the one that plays them.
_IN_CHILDREN = {"killed", "killed_exposed", "first_thread_gone", "number_reused"}


@pytest.mark.parametrize("name", SCENARIOS)
def test_kvm_does_as_the_scenario_says(name: str) -> None:
    """Twice in a row: what one run leaves behind would meet the next."""
    require(name)
    done = run_and_tell(name, repeat=2)
    assert len(done.outcomes) == 2
    assert os.getpid() in done.pids or name in _IN_CHILDREN
    if not SCENARIOS[name].otherwise:
        assert done.truth() == Truth.of(SCENARIOS[name], 2)


@pytest.mark.parametrize("name", ["pending", "lost", "five_vcpus"])
def test_a_scenario_runs_in_several_threads(name: str) -> None:
    """Many vCPUs at once, off the main thread."""
    require(name)
    assert len(run(name, repeat=3, vms=5).lifecycles) == 15 * len(SCENARIOS[name].expect)


def test_eight_vms_run_different_scenarios_at_once() -> None:
    """Each in a process of its own; the truth says which."""
    names = [name for name, reason in REASONS.items() if reason is None][:8]
    if not names:
        pytest.skip(f"no scenario can run: {REASONS['quiet']}")
    truths = parallel(names, repeat=3)
    assert os.getpid() not in truths
    assert list(truths.values()) == [Truth.of(SCENARIOS[name], 3) for name in names]


def test_a_held_scenario_stands_still_where_it_is_pending() -> None:
    """In process by a callback, from the command line by a line on standard output."""
    require("open")
    calls: list[None] = []
    run("open", hold=lambda: calls.append(None))
    assert len(calls) == 1
    with lab.child.child("-m", "lab", "run", "open", "--hold", "30") as process:
        lab.child.wait_for(process, lab.child.HELD)
        assert process.poll() is None


def test_a_stuck_vcpu_is_held_inside_kvm_run() -> None:
    """Only where nothing wakes it; it ends all the same."""
    require("halted")
    calls: list[None] = []
    done = run_and_tell("halted", hold=lambda: calls.append(None))
    assert len(calls) == SCENARIOS["halted"].outcomes.index(done.outcomes[0])


def test_a_process_tells_of_its_runs_in_json() -> None:
    """Which outcome it was, and all that is needed to find them in a trace."""
    require("delivered")
    command = [sys.executable, "-m", "lab", "run", "delivered", "quiet", "--repeat", "3", "--json"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    delivered, quiet = map(Run.from_json, lines)
    assert (delivered.scenario, quiet.scenario) == ("delivered", "quiet")
    assert delivered.truth() == Truth.of(SCENARIOS["delivered"], 3)
    assert delivered.pids == [delivered.pid] == [quiet.pid]
    assert delivered.begin_ns < delivered.end_ns <= quiet.begin_ns < time.monotonic_ns()


def test_a_run_can_be_stopped_by_another_thread() -> None:
    """It is a TimedOut there, long before its time is up."""
    require("quiet")
    with Kvm() as kvm, Stage(kvm, SPIN, lambda: None).guest() as vcpu:
        stopper = threading.Timer(0.1, vcpu.stop)
        stopper.start()
        begun = time.monotonic()
        with pytest.raises(TimedOut):
            vcpu.run(timeout_s=60)
        stopper.join()
        assert time.monotonic() - begun < 5
        assert vcpu.kvm_run.immediate_exit == 0


@pytest.mark.skipif(bool(userfault.unmet()), reason=str(userfault.unmet()))
def test_who_touches_a_page_waits_until_it_is_filled_in() -> None:
    """And goes on with what it was filled with; a page that nobody touches is an error."""
    pages = Pages(4096)
    with UserFault(pages) as fault, ThreadPoolExecutor(1) as reader:
        with pytest.raises(LabError, match=r"within 0\.01 s"):
            fault.wait(0.01)
        # By the kernel, not by this process, which the GIL would stop.
        read_end, write_end = os.pipe()
        written = reader.submit(_write_from, write_end, pages.address)
        fault.wait(5)
        assert not written.done()
        fault.fill(b"filled")
        assert written.result(5) == 6
        assert os.read(read_end, 6) == b"filled"
        os.close(read_end)
        os.close(write_end)
    pages.close()


def _write_from(fd: int, address: int) -> int:
    libc = ctypes.CDLL(None)
    libc.write.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    return int(libc.write(fd, address, 6))


@pytest.mark.parametrize("on_main_thread", [True, False])
def test_a_guest_that_never_exits_is_stopped(on_main_thread: bool) -> None:
    """KVM_RUN is bounded on any thread, and the vCPU can be used again."""
    require("quiet")
    begun = time.monotonic()
    stopped: list[int] = []

    def spin() -> None:
        for turn in range(2):
            with pytest.raises(TimedOut, match=r"within 0\.1 s"):
                vcpu.run(timeout_s=0.1)
            assert vcpu.kvm_run.immediate_exit == 0
            stopped.append(turn)

    with Kvm() as kvm, Stage(kvm, SPIN, lambda: None).guest() as vcpu:
        if on_main_thread:
            spin()
        else:
            thread = threading.Thread(target=spin)
            thread.start()
            thread.join()
    assert stopped == [0, 1]
    assert time.monotonic() - begun < 2


def test_a_closed_vcpu_fails_in_words() -> None:
    """Neither a stale mapping nor a stale fd is touched."""
    require("quiet")
    with Kvm() as kvm, Stage(kvm, SPIN, lambda: None).guest() as vcpu:
        vcpu.close_fd()
        with pytest.raises(CallFailed, match="KVM_RUN failed: EBADF") as failure:
            vcpu.run()
        assert failure.value.errno == errno.EBADF
        vcpu.unmap()
        with pytest.raises(LabError, match="unmapped"):
            vcpu.run()


def test_the_command_lists_and_fails_in_one_line() -> None:
    """Results on stdout in 80 columns, errors on stderr with status 1, usage with 2."""
    command = [sys.executable, "-m", "lab"]
    listed = subprocess.run([*command, "list"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[0] for line in listed[::2]] == list(SCENARIOS)
    assert max(map(len, (line for line in listed if "cannot run" not in line))) <= 80
    unknown = subprocess.run([*command, "run", "nope"], check=False, capture_output=True, text=True)
    assert (unknown.returncode, unknown.stdout, unknown.stderr.count("\n")) == (1, "", 1)
    assert subprocess.run([*command, "run"], check=False, capture_output=True).returncode == 2
