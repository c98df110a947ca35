"""What VMMs call their guests, from their command lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tracer import guests
from tracer.errors import NoSuchGuest
from tracer.guests import Guest, describe

UUID = "d1c5dd6e-3f8b-4c2e-9d35-0a7c8a2d9f11"
LIBVIRT = "0::/machine.slice/machine-qemu\\x2d3\\x2dweb\\x2dfront.scope/libvirt/emulator\n"


@pytest.mark.parametrize(
    ("arguments", "name", "uuid"),
    [
        (["-name", "guest=probe"], "probe", None),
        (["-name", "guest=probe,debug-threads=on", "-uuid", UUID], "probe", UUID),
        (["-name", "debug-threads=on,guest=late"], "late", None),
        (["-name", "plain"], "plain", None),
        (["-name", "plain,process=other"], "plain", None),
        (["--name", "guest=two-dashes"], "two-dashes", None),
        (["-name", "guest=a,,b,,,,c,debug-threads=on"], "a,b,,c", None),
        (["-name", "guest=x=y"], "x=y", None),
        (["-name", "guest=</script><b>"], "</script><b>", None),
        (["-uuid", UUID], UUID, UUID),
        (["-name", "debug-threads=on", "-uuid", UUID], UUID, UUID),
        (["-name"], "pid 7", None),
        ([], "pid 7", None),
    ],
)
def test_qemu(arguments: list[str], name: str, uuid: str | None) -> None:
    """By -name in each of its forms; a comma in a name is written twice."""
    for program in ("/usr/bin/qemu-system-x86_64", "qemu-kvm", "/usr/bin/kvm"):
        assert describe(7, [program, "-accel", "kvm", *arguments], "0::/\n", "qemu") == Guest(7, name, "qemu", uuid)


@pytest.mark.parametrize(
    ("arguments", "guest"),
    [
        (["firecracker", "--id", "fc-1", "--api-sock", "/s"], Guest(7, "fc-1", "firecracker")),
        (["/jail/firecracker", "--id=fc-2"], Guest(7, "fc-2", "firecracker")),
        (["firecracker-v1.7.0-x86_64", "--id", "fc-3"], Guest(7, "fc-3", "firecracker")),
        (["firecracker", "--no-api"], Guest(7, "pid 7", "firecracker")),
        (["cloud-hypervisor", "--api-socket", "/run/ch.sock"], Guest(7, "/run/ch.sock", "cloud-hypervisor")),
        (["cloud-hypervisor", "--api-socket=path=/run/ch.sock"], Guest(7, "/run/ch.sock", "cloud-hypervisor")),
        (["cloud-hypervisor", "--api-socket", "fd=26"], Guest(7, "pid 7", "cloud-hypervisor")),
        (["crosvm", "run", "--name", "arc", "vmlinux"], Guest(7, "arc", "crosvm")),
        (["crosvm", "run", "-s", "/run/crosvm.sock", "vmlinux"], Guest(7, "/run/crosvm.sock", "crosvm")),
        (["crosvm", "run", "--socket=/run/c", "vmlinux"], Guest(7, "/run/c", "crosvm")),
        (["python3", "vmm.py"], Guest(7, "pid 7", "python3")),
    ],
)
def test_other_vmms(arguments: list[str], guest: Guest) -> None:
    """Each by the option that it has; a VMM that nobody knows by its number."""
    comm = "python3" if arguments[0] == "python3" else arguments[0][:15]
    assert describe(7, arguments, "0::/user.slice\n", comm) == guest


def test_libvirt_names_what_the_command_line_does_not() -> None:
    r"""In a unit's name - is \x2d, and any other byte that it may not hold likewise."""
    assert describe(7, ["/usr/bin/qemu-system-x86_64"], LIBVIRT, "qemu").name == "web-front"
    assert describe(7, ["/usr/bin/qemu-system-x86_64", "-name", "guest=own"], LIBVIRT, "qemu").name == "own"
    odd = "0::/machine.slice/machine-qemu\\x2d12\\x2da\\x20b\\x40c.scope\n"
    assert describe(7, ["/usr/bin/qemu-system-x86_64"], odd, "qemu").name == "a b@c"
    assert describe(7, ["vmm"], "0::/machine.slice/machine-lxc\\x2d1\\x2dbox.scope\n", "vmm").name == "box"


@pytest.mark.parametrize("socket", ["fd=26", "/run/libvirt/ch/box-socket", "path=/run/libvirt/ch/box-socket"])
def test_a_cloud_hypervisor_of_libvirt_has_libvirt_s_name(socket: str) -> None:
    """Its socket is libvirt's own."""
    cgroup = "0::/machine.slice/machine-ch\\x2d3\\x2dbox\\x2d1.scope/libvirt/emulator\n"
    arguments = ["/usr/bin/cloud-hypervisor", "--api-socket", socket]
    assert describe(7, arguments, cgroup, "cloud-hyperviso") == Guest(7, "box-1", "cloud-hypervisor")


def test_libvirt_names_in_any_language() -> None:
    """A unit's name escapes the bytes of UTF-8."""
    cgroup = "0::/machine.slice/machine-qemu\\x2d1\\x2db\\xc3\\xbcro.scope\n"
    assert describe(7, ["qemu-system-x86_64"], cgroup, "qemu").name == "büro"


@pytest.mark.parametrize("arguments", [[], ["\udcff"], [""], ["qemu-system-x86_64", "-name", ""]])
def test_anything_has_a_name(arguments: list[str]) -> None:
    """Whatever a process says of itself."""
    assert describe(7, arguments, "garbage \\x2d machine-", "").name == "pid 7"


def test_a_running_process_is_read_from_proc() -> None:
    """Its arguments may hold anything but NUL."""
    with subprocess.Popen([sys.executable, "-c", "input()", "-name", "x"], stdin=subprocess.PIPE) as process:
        found = guests.guest(process.pid)
        assert (found.pid, found.name) == (process.pid, f"pid {process.pid}")
        assert found.vmm
        process.kill()
    assert guests.guest(process.pid).name == f"pid {process.pid}"  # gone


def test_a_guest_is_plain_data_for_json() -> None:
    """What meta.json holds."""
    assert Guest(7, "n", "qemu", UUID).as_json() == {"pid": 7, "name": "n", "vmm": "qemu", "uuid": UUID}


def test_what_is_no_vmm_is_refused() -> None:
    """With the pid, and where to find one that is."""
    with pytest.raises(NoSuchGuest, match=rf"process {os.getpid()} is no VMM.*kvmreq doctor"):
        guests.Held([os.getpid()])
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    with pytest.raises(NoSuchGuest, match=f"no process {most + 1}"):
        guests.Held([most + 1])
    assert not guests.Held([]).ended


def test_a_thread_is_no_process() -> None:
    """Its number is what `top -H` and QEMU's monitor show: the error names the one to give."""
    told = threading.Event()
    thread = threading.Thread(target=told.wait)
    thread.start()
    try:
        with pytest.raises(
            NoSuchGuest, match=rf"{thread.native_id} is a thread of process {os.getpid()} \(-p {os.getpid()}"
        ):
            guests.Held([thread.native_id or 0])
    finally:
        told.set()


def test_one_that_nobody_has_waited_for_is_none() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(NoSuchGuest, match=f"process {process.pid} has ended"):
            guests.Held([process.pid])


def test_what_is_held_has_ended_when_it_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it is a zombie, and when its number may be another's."""
    monkeypatch.setattr(guests, "_ANY_KVM", re.compile(".*"))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        held = guests.Held([process.pid])
        assert not held.ended
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert held.ended
        process.wait()
        assert held.ended
    held.close()


LEADERLESS = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).syscall(60, 0)
"""


def test_a_process_whose_first_thread_has_exited_has_descriptors() -> None:
    """Its first thread has none any more; another one tells them."""
    with subprocess.Popen([sys.executable, "-c", LEADERLESS], stdin=subprocess.PIPE) as process:
        while (tid := guests._thread_of(process.pid)) == process.pid:
            assert process.poll() is None
        assert dict(guests._links(process.pid)) == {}
        assert dict(guests._links(process.pid, tid))
        assert process.stdin
        process.stdin.close()
