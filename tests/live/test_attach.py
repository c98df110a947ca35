"""Attaching to guests that already run: what happened before is unknown, and said to be; what follows is exact."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.child import HELD, child, wait_for
from lab.runner import runnable

from .session import CHECKOUT, Vmm, by_pid, recording, report, run, wait_until

REASONS = {scenario.name: reason for scenario, reason in runnable()}
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(REASONS["halted"]), reason=f"the lab cannot run: {REASONS['halted']}"),
]


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    """Yield a VMM with one VM."""
    with Vmm() as made:
        yield made


def only(path: Path, pid: int) -> dict[str, Any]:
    """Return the one lifecycle of a VMM."""
    document = report(path)
    assert document["loss"]["total"] == 0, document["loss"]
    (row,) = by_pid(document["lifecycles"], pid)
    assert by_pid(document["vms"], pid)[0]["vcpus"] == 1
    return row


@pytest.mark.parametrize("by_number", [True, False])
def test_what_is_pending_at_attach_is_raised_by_unknown(tmp_path: Path, vmm: Vmm, by_number: bool) -> None:
    """And delivered by the next KVM_RUN, after one more exit to user space."""
    vmm.tell("mce", "bounce", "save")
    with recording(tmp_path / "r", *(["-p", str(vmm.pid)] if by_number else [])):
        vmm.tell("bounce", "run")
    row = only(tmp_path / "r", vmm.pid)
    assert (row["raised_by"], row["end"], row["userspace_exits"]) == ("unknown", "delivered", 1)
    assert row["raised_ns"][0] in (0, None, -1) or row["raised_ns"][0] < row["raised_ns"][1]


def test_an_idle_vmm_is_looked_up_and_then_killed(tmp_path: Path) -> None:
    """It makes no call while it is traced, and yet what was pending is known to be gone."""
    with child("-m", "lab", "run", "open", "--hold", "60") as process:
        wait_for(process, HELD)
        with recording(tmp_path / "r"):
            process.kill()
            process.wait()
    row = only(tmp_path / "r", process.pid)
    assert (row["raised_by"], row["end"]) == ("unknown", "undecided")


def test_an_idle_vmm_that_lives_on_is_open(tmp_path: Path, vmm: Vmm) -> None:
    """Whatever was saved before the recording is not known; a blind save during it exposes."""
    vmm.tell("mce", "save")
    with recording(tmp_path / "plain"):
        pass
    row = only(tmp_path / "plain", vmm.pid)
    assert (row["raised_by"], row["end"], row["exposed"], row["blind_saves"]) == ("unknown", "open", False, 0)
    with recording(tmp_path / "exposed"):
        vmm.tell("save")
    row = only(tmp_path / "exposed", vmm.pid)
    assert (row["raised_by"], row["end"], row["exposed"], row["blind_saves"]) == ("unknown", "open", True, 1)


def test_a_save_after_attach_decides(tmp_path: Path, vmm: Vmm) -> None:
    """A blind save that was seen, then the end: lost, whoever raised it."""
    vmm.tell("mce")
    with recording(tmp_path / "r"):
        vmm.tell("save")
        vmm.end()
    row = only(tmp_path / "r", vmm.pid)
    assert (row["raised_by"], row["end"], row["blind_saves"]) == ("unknown", "lost", 1)


def test_attach_while_a_vcpu_sleeps_inside_kvm_run(tmp_path: Path, vmm: Vmm) -> None:
    """The lookup does not wait for it, and what happens after it is exact."""
    vmm.tell("halt")
    with recording(tmp_path / "r", "-p", str(vmm.pid)):
        vmm.tell("kick", "mce", "bounce", "run")
    row = only(tmp_path / "r", vmm.pid)
    assert (row["raised_by"], row["end"], row["userspace_exits"]) == ("set_mce", "delivered", 1)


def test_only_the_chosen_vmm_is_traced(tmp_path: Path, vmm: Vmm) -> None:
    """-p names it; others leave no trace, not even those that begin meanwhile."""
    with Vmm() as other, recording(tmp_path / "r", "-p", str(vmm.pid)):
        other.tell("mce", "run")
        vmm.tell("mce", "run")
        assert run("lab", "run", "lost").returncode == 0
    document = report(tmp_path / "r")
    assert {vm["pid"] for vm in document["vms"]} == {vmm.pid}
    assert document["summary"] == {"delivered": 1, "copies_without": 0}


HOLD = """
import ctypes, os, sys
from tracer import guests
vmm = int(sys.argv[1])
process = os.pidfd_open(vmm)
held = [ctypes.CDLL(None).syscall(438, process, fd, 0) for fd in guests.vcpu_descriptors(vmm)]
print(min(held), flush=True)
sys.stdin.read()
"""


def test_a_process_that_only_holds_a_descriptor_is_no_vmm(tmp_path: Path, vmm: Vmm) -> None:
    """It is there before the recording begins, and gone before that ends: the vCPU is its VMM's, and goes on."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(vmm.pid)],
        cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdin and holder.stdout
        assert int(holder.stdout.readline()) >= 0
        with recording(tmp_path / "r"):
            vmm.tell("mce", "save")
            holder.stdin.close()
            assert holder.wait() == 0
            vmm.tell("run")
    assert by_pid(report(tmp_path / "r")["vms"], holder.pid) == []
    row = only(tmp_path / "r", vmm.pid)
    assert (row["raised_by"], row["end"], row["blind_saves"]) == ("set_mce", "delivered", 1)


def test_a_system_call_of_32_bit_code_closes_nothing(tmp_path: Path, vmm: Vmm) -> None:
    """Its number is another one's in 64 bits: here close(), of what happens to be in EDI."""
    config = Path("/proc/config.gz")
    if not config.exists() or "CONFIG_IA32_EMULATION=y" not in gzip.decompress(config.read_bytes()).decode():
        pytest.skip("/proc/config.gz does not say that this kernel runs 32-bit code (CONFIG_IA32_EMULATION)")
    with recording(tmp_path / "r", "-p", str(vmm.pid)):
        vmm.tell("mce", "save", "int80", "run")
    row = only(tmp_path / "r", vmm.pid)
    assert (row["raised_by"], row["end"], row["blind_saves"]) == ("set_mce", "delivered", 1)


def test_the_recording_ends_with_the_vmm(tmp_path: Path, vmm: Vmm) -> None:
    """A pid that vanishes ends the recording, cleanly."""
    with recording(tmp_path / "r", "-p", str(vmm.pid)) as record:
        vmm.process.kill()
        vmm.process.wait()
        assert record.finish(None) == 0
    assert any("every process that was to be traced has ended" in line for line in record.notes)
    assert report(tmp_path / "r")["recording"]["clean"]


# --- QEMU ---------------------------------------------------------------------------------------------------

UUID = "d1c5dd6e-3f8b-4c2e-9d35-0a7c8a2d9f11"
QEMU = [
    *("qemu-system-x86_64", "-accel", "kvm", "-machine", "q35", "-m", "128", "-display", "none", "-nodefaults"),
    *("-uuid", UUID, "-name"),
]
needs_qemu = pytest.mark.skipif(not shutil.which(QEMU[0]), reason="no QEMU: apt install qemu-system-x86")


def check_qemu(document: dict[str, Any], name: str) -> None:
    """It is named, a pending shutdown of it would survive a save, and nothing is reported lost."""
    (vm,) = [vm for vm in document["vms"] if vm["name"] == name]
    assert (vm["vmm"], vm["triple_fault_cap"], vm["vcpus"]) == ("qemu", True, 1)
    assert by_pid(document["lifecycles"], vm["pid"]) == []
    assert by_pid(document["shutdowns"], vm["pid"]) == []
    assert document["loss"]["total"] == 0


@needs_qemu
def test_qemu_is_named_and_loses_nothing(tmp_path: Path) -> None:
    """As the command that is recorded; its own status is told, and is not ours."""
    path = tmp_path / "r"
    done = run("record", "-o", path, "--", "timeout", "5", *QEMU, f"guest=probe-{os.getpid()}")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "timeout ended with status 124" in done.stderr
    check_qemu(report(path), f"probe-{os.getpid()}")
    assert UUID in json.dumps(json.loads((path / "meta.json").read_text())["guests"])


@needs_qemu
def test_a_qemu_that_runs_is_attached_to(tmp_path: Path) -> None:
    """By pid, in mid-life; it does not notice."""
    with subprocess.Popen(
        [*QEMU, f"guest=attached,,{os.getpid()}"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as qemu:
        try:
            wait_until(lambda: "kvm-vcpu" in "".join(_links(qemu.pid)))
            with recording(tmp_path / "r", "-p", str(qemu.pid), "--duration", "2") as record:
                assert record.finish(None) == 0
            assert qemu.poll() is None
        finally:
            qemu.kill()
    check_qemu(report(tmp_path / "r"), f"attached,{os.getpid()}")


def _links(pid: int) -> Iterator[str]:
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            yield str(path.readlink())
