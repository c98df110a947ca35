"""Guests: which processes are VMMs, what their guests are called, and which vCPUs they have.

Names are found as each VMM gives them (QEMU -name and -uuid, Firecracker --id, Cloud Hypervisor --api-socket, crosvm
--name, libvirt's machine slice), so they are the users' words: whoever prints them escapes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import select
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from probes.schema import NO_IOCTL
from tracer.errors import NoSuchGuest

PROC = Path("/proc")
_VCPU = re.compile(r"anon_inode:\[?kvm-vcpu(?::\d+)?\]?")
_ANY_KVM = re.compile(r"anon_inode:\[?kvm-(?:vm|vcpu)(?::\d+)?\]?|/dev/kvm")
_PIDFD_THREAD = os.O_EXCL  # Linux commit 64bef697d33b ("pidfd: implement PIDFD_THREAD flag for pidfd_open()") (in v6.9)
_PIDFD_GETFD = 438  # Linux commit 8649c322f75c ("pid: Implement pidfd_getfd syscall") (in v5.6)


@dataclass(frozen=True)
class Guest:
    """What a VMM calls its guest."""

    pid: int
    name: str
    vmm: str | None  # qemu, firecracker, cloud-hypervisor, crosvm, or the process's own name
    uuid: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the guest as a recording's meta.json holds it."""
        return asdict(self)


def _read(pid: int, name: str) -> str:
    try:
        return (PROC / str(pid) / name).read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _option(arguments: Sequence[str], *names: str) -> str | None:
    for index, argument in enumerate(arguments):
        for name in names:
            if argument == name and index + 1 < len(arguments):
                return arguments[index + 1]
            if argument.startswith(f"{name}="):
                return argument[len(name) + 1 :]
    return None


def _qemu_name(value: str | None) -> str | None:
    if not value:
        return None
    # -name guest=NAME,debug-threads=on or -name NAME,...; a comma in a name is written twice.
    parts = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
    for part in parts:
        if part.startswith("guest="):
            return part.removeprefix("guest=")
    return parts[0] if "=" not in parts[0] else None


def _socket_path(value: str | None) -> str | None:
    # Cloud Hypervisor's --api-socket PATH, path=PATH or fd=NUMBER, which names nothing.
    return None if value is None or value.startswith("fd=") else value.removeprefix("path=")


def _libvirt_name(cgroup: str) -> str | None:
    # systemd-machined's scope: machine-qemu\x2d1\x2dNAME.scope, with \xHH for each byte that a unit name may not hold.
    found = re.search(r"machine-(\w+)\\x2d\d+\\x2d([^/\n]+)\.scope", cgroup)
    if not found:
        return None
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda code: bytes.fromhex(code[1].decode()), found[2].encode())
    return raw.decode(errors="replace")


def describe(pid: int, arguments: Sequence[str], cgroup: str, comm: str) -> Guest:
    """Return the guest of a VMM, from its command line, its cgroup path and its process name."""
    program = Path(arguments[0]).name if arguments else comm
    rest = arguments[1:]
    name: str | None = None
    vmm: str | None = comm or None
    uuid = None
    if program.startswith("qemu") or program == "kvm":
        vmm = "qemu"
        uuid = _option(rest, "-uuid", "--uuid")
        name = _qemu_name(_option(rest, "-name", "--name")) or _libvirt_name(cgroup) or uuid
    elif program.startswith("firecracker"):
        vmm, name = "firecracker", _option(rest, "--id")
    elif program.startswith("cloud-hyperviso"):
        # libvirt hands it a descriptor for its socket, or a path of libvirt's own.
        vmm, name = "cloud-hypervisor", _libvirt_name(cgroup) or _socket_path(_option(rest, "--api-socket"))
    elif program.startswith("crosvm"):
        vmm, name = "crosvm", _option(rest, "--name") or _option(rest, "--socket", "-s")
    return Guest(pid, name or _libvirt_name(cgroup) or f"pid {pid}", vmm, uuid)


def guest(pid: int) -> Guest:
    """Return the guest of a process; one that has gone is named by its number."""
    arguments = [argument for argument in _read(pid, "cmdline").split("\0") if argument]
    return describe(pid, arguments, _read(pid, "cgroup"), _read(pid, "comm").strip())


def _links(pid: int, tid: int | None = None) -> Iterator[tuple[int, str]]:
    try:
        with os.scandir(PROC / str(pid) / "task" / str(tid or pid) / "fd") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    yield int(entry.name), os.readlink(entry.path)  # noqa: PTH115 - a DirEntry is no Path
    except OSError:
        return  # gone, or not ours to look at


def _thread_of(pid: int) -> int:
    """Return a thread of a process that has its descriptors: its first one, or another if that has exited."""
    with contextlib.suppress(OSError):
        if (PROC / str(pid) / "task" / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            others = (int(task.name) for task in (PROC / str(pid) / "task").iterdir())
            return next((tid for tid in others if tid != pid and any(_links(pid, tid))), pid)
    return pid


def vcpu_descriptors(pid: int) -> list[int]:
    """Return the descriptors of a process that lead to vCPUs."""
    return sorted(number for number, link in _links(pid, _thread_of(pid)) if _VCPU.fullmatch(link))


def running() -> dict[int, list[int]]:
    """Return every process that has vCPUs, and the descriptors that lead to them."""
    found = {}
    for process in PROC.iterdir():
        if process.name.isdigit() and (descriptors := vcpu_descriptors(int(process.name))):
            found[int(process.name)] = descriptors
    return found


class Held:
    """Processes that were asked for, held: once one has ended its number may be another's."""

    def __init__(self, pids: Iterable[int]) -> None:
        """Raise :class:`NoSuchGuest` unless each of these processes is a VMM that lives."""
        self._processes: list[int] = []
        try:
            for pid in pids:
                self._processes.append(_held(pid))
        except BaseException:
            self.close()
            raise

    @property
    def ended(self) -> bool:
        """Tell whether there were any, and all have ended; one that nobody has waited for yet, too."""
        return bool(self._processes) and all(map(_ended, self._processes))

    def close(self) -> None:
        """Let them go."""
        while self._processes:
            os.close(self._processes.pop())


def _ended(process: int) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(0))


def _held(pid: int) -> int:
    hint = "kvmreq doctor lists the guests that run here"
    found = re.search(r"^Tgid:\s*(\d+)", _read(pid, "status"), re.MULTILINE)
    if found is None:
        raise NoSuchGuest(f"no process {pid}", hint=hint)
    if int(found[1]) != pid:
        raise NoSuchGuest(
            f"{pid} is a thread of process {found[1]}", hint=f"-p {found[1]} traces it with all its vCPUs"
        )
    try:
        process = os.pidfd_open(pid)
    except OSError as error:
        raise NoSuchGuest(f"no process {pid}: {error.strerror}", hint=hint) from None
    try:
        if _ended(process):
            raise NoSuchGuest(f"process {pid} has ended: its parent has not waited for it yet", hint=hint)
        if not any(_ANY_KVM.fullmatch(link) for _, link in _links(pid, _thread_of(pid))):
            raise NoSuchGuest(f"process {pid} is no VMM: it has no KVM descriptor open", hint=hint)
    except BaseException:
        os.close(process)
        raise
    return process


def not_looked_at() -> list[int]:
    """Return the processes whose descriptors this one may not look at: nobody knows whether they have vCPUs."""
    refused = []
    for process in PROC.iterdir():
        if process.name.isdigit():
            try:
                with os.scandir(process / "fd"):
                    pass
            except PermissionError:
                refused.append(int(process.name))
            except OSError:
                continue  # gone
    return refused


class Asked(NamedTuple):
    """How many descriptors of vCPUs were asked, and how many this process may not borrow."""

    asked: int
    refused: int


def ask(pid: int, descriptors: Iterable[int]) -> Asked:
    """Make the hooks see these vCPUs of another process now, without waiting for the guest.

    Borrows each descriptor (pidfd_getfd) and makes an ioctl that KVM refuses before it touches the vCPU: the guest does
    not notice. One that has gone meanwhile, or leads elsewhere by now, is neither asked nor refused. Those of a process
    whose first thread has exited are lent from Linux 6.9 on (PIDFD_THREAD), and refused before.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    thread = _thread_of(pid)
    flags = 0 if thread == pid else _PIDFD_THREAD
    try:
        process = os.pidfd_open(thread, flags)
    except OSError as error:
        # Gone: nothing to see. Or a thread that the kernel gives no descriptor of.
        return Asked(0, len(list(descriptors)) if error.errno == errno.EINVAL else 0)
    asked = refused = 0
    try:
        for number in descriptors:
            borrowed = libc.syscall(_PIDFD_GETFD, process, number, 0)
            if borrowed < 0:
                refused += ctypes.get_errno() not in (errno.ESRCH, errno.EBADF)
                continue
            try:
                if _VCPU.fullmatch(str(Path(f"/proc/self/fd/{borrowed}").readlink())):
                    asked += 1
                    with contextlib.suppress(OSError):
                        fcntl.ioctl(borrowed, NO_IOCTL)
            finally:
                os.close(borrowed)
    finally:
        os.close(process)
    return Asked(asked, refused)
