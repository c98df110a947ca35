"""What this host offers a tracer of KVM: asked for, one fact at a time, never derived from a version."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from probes import guest
from probes.btf import Btf, MissingField

if TYPE_CHECKING:
    from tracer.meta import Clock

SYS = Path("/sys")
TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
PROC = Path("/proc")
BUILT = "/boot/config-{}"  # how a release was configured, where distributions put it

# linux/capability.h: numbers of the capabilities that a tracer needs. Two of them came with Linux commit a17b53c4a4b5
# ("bpf, capability: Introduce CAP_BPF") (in v5.8) and the one before it.
_CAPABILITIES = {
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
# To look at the descriptors of guests that are other users' (proc_fd_permission() asks for both), and to borrow them.
_TO_LOOK_UP = {"CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE"}
_TO_RUN_PROGRAMS = {"CAP_BPF", "CAP_PERFMON"}
_FIRST_TIME_NAMESPACE = 0xEFFFFFFA  # PROC_TIME_INIT_INO (include/linux/proc_ns.h)
_FLAVOURS = {"kvm_intel": "Intel VMX", "kvm_amd": "AMD SVM", "kvm_pvm": "PVM"}


def release() -> str:
    """Return the running kernel's release, as uname -r prints it."""
    return platform.release()


def hostname() -> str:
    """Return the host's name."""
    return platform.node()


def boot_id() -> str:
    """Return the identity of this boot: monotonic times of two recordings compare only within one."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


@cache
def _monotonic_offset_ns() -> int:
    """Return what this process's CLOCK_MONOTONIC is ahead of the one that the hooks tell (a time namespace).

    Linux commit af993f58d69e ("time: Posix clocks in a time namespace: monotonic") (in v5.6), time_namespaces(7).
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (PROC / "self/timens_offsets").read_text().splitlines():
            clock, seconds, ns = line.split()
            if clock == "monotonic" and (PROC / "self/ns/time").stat().st_ino != _FIRST_TIME_NAMESPACE:
                return int(seconds) * 1_000_000_000 + int(ns)
    return 0


def monotonic_ns() -> int:
    """Return CLOCK_MONOTONIC as the hooks tell it, whatever time namespace this process is in."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) - _monotonic_offset_ns()


def clock_pair() -> Clock:
    """Return the same moment on CLOCK_MONOTONIC and in UTC, in ns, read as closely together as Python can."""
    best: tuple[int, int, int] | None = None
    for _ in range(5):
        before = monotonic_ns()
        utc = time.clock_gettime_ns(time.CLOCK_REALTIME)
        after = monotonic_ns()
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, utc)
    assert best is not None
    return {"monotonic_ns": best[1], "utc_ns": best[2]}


def capabilities() -> set[str]:
    """Return which of the capabilities that matter to a tracer this process has."""
    status = (PROC / "self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    mask = int(found[1], 16) if found else 0
    return {name for name, number in _CAPABILITIES.items() if mask >> number & 1}


def not_allowed(engine: str) -> str | None:
    """Say which privileges an engine lacks, if it lacks any."""
    needed = _TO_LOOK_UP | (set() if engine == "ftrace" else _TO_RUN_PROGRAMS)
    if engine == "fentry" and (SYS / "kernel/btf/kvm").exists():
        # bpf_obj_get_next_id() and bpf_btf_get_fd_by_id() in kernel/bpf/syscall.c, by which a module's types are found.
        needed |= {"CAP_SYS_ADMIN"}
    missing = sorted(needed - capabilities())
    if missing:
        return f"this process lacks {', '.join(missing)}: run as root"
    return None


def foreign_pids() -> str | None:
    """Say that processes have other numbers here than the hooks tell, if so."""
    if is_root_of_pids():
        return None
    return (
        "this process is in a pid namespace, where processes have other numbers than the hooks tell: run it among"
        " the host's processes (nsenter --target 1 --pid --mount, or a container with --pid=host)"
    )


@dataclass(frozen=True)
class Kvm:
    """KVM on this host."""

    flavours: tuple[str, ...]  # kvm_intel, kvm_amd, kvm_pvm: more than one can be loaded
    parameters: dict[str, str]  # of kvm and of its flavours, as /sys/module shows them

    @property
    def module(self) -> str:
        """Return the flavours in words."""
        return ", ".join(f"{name} ({_FLAVOURS.get(name, '?')})" for name in self.flavours) or "none"


def kvm() -> Kvm:
    """Return the flavours of KVM that are loaded, and their parameters."""
    modules = SYS / "module"
    flavours = tuple(sorted(path.name for path in modules.glob("kvm_*") if path.name in _FLAVOURS))
    parameters = {}
    for name in ("kvm", *flavours):
        for path in sorted((modules / name / "parameters").glob("*")):
            try:
                parameters[f"{name}.{path.name}"] = path.read_text().strip()
            except OSError:
                continue  # write-only parameters exist
    return Kvm(flavours, parameters)


def kvm_modules() -> dict[str, int]:
    """Return KVM's modules that are loaded now; the number is another one when a module was loaded again."""
    found = {}
    for name in ("kvm", *_FLAVOURS):
        with contextlib.suppress(OSError):
            found[name] = (SYS / "module" / name).stat().st_ino
    return found


def no_dev_kvm() -> str | None:
    """Say why /dev/kvm cannot be used, if it cannot."""
    device = Path("/dev/kvm")
    if not device.exists():
        return "/dev/kvm is missing: load kvm_intel or kvm_amd, or enable virtualization in the firmware"
    if not os.access(device, os.R_OK | os.W_OK):
        return "/dev/kvm cannot be opened: run as root"
    return None


def lockdown() -> str | None:
    """Return the kernel's lockdown mode ('integrity', 'confidentiality'), or None where it has none."""
    try:
        text = (SYS / "kernel/security/lockdown").read_text()
    except OSError:
        return None
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found and found[1] != "none" else None


@cache
def _kallsyms() -> bytes:
    # Megabytes that the kernel formats line by line, some 40 ms each time.
    return (PROC / "kallsyms").read_bytes()


def forget_addresses() -> None:
    """Read the kernel's symbols anew next time: modules come and go."""
    _kallsyms.cache_clear()


def addresses(names: Iterable[str]) -> dict[str, int]:
    """Return the addresses of those kernel functions that exist. They never leave the tracer.

    A compiler's suffix (``enter_smm.constprop.0``) makes another name: such a function has other arguments.
    """
    wanted = set(names)
    text = _kallsyms()
    pattern = rb"^([0-9a-f]+) [tT] (" + b"|".join(re.escape(name.encode()) for name in wanted) + rb")(?=[\t\n])"
    return {match[2].decode(): int(match[1], 16) for match in re.finditer(pattern, text, re.MULTILINE)}


def modules(names: Iterable[str]) -> dict[str, str]:
    """Return the module of each of those kernel functions that exist: ``vmlinux`` for what is built in."""
    wanted = set(names)
    pattern = rb"^[0-9a-f]+ [tT] (" + b"|".join(re.escape(name.encode()) for name in wanted) + rb")(?:\t\[(\w+)\])?$"
    found = re.finditer(pattern, _kallsyms(), re.MULTILINE)
    return {match[1].decode(): (match[2] or b"vmlinux").decode() for match in found}


def tracepoints(names: Iterable[str]) -> set[str]:
    """Return those tracepoints that a raw tracepoint program can be attached to.

    Every tracepoint has a function ``__traceiter_NAME`` that runs what is attached. Linux commit d25e37d89dd2
    ("tracepoint: Optimize using static_call()") (in v5.10).
    """
    found = addresses(f"__traceiter_{name}" for name in names)
    return {name.removeprefix("__traceiter_") for name in found}


@cache
def preempts() -> bool:
    """Tell whether a task can be preempted inside this kernel; where that cannot be known, it can."""
    if "PREEMPT" not in platform.version():
        return False
    # The mode of CONFIG_PREEMPT_DYNAMIC: as it is, in parentheses among the others; else as it was chosen at boot, else
    # as it was built.
    for path, mode in (
        (SYS / "kernel/debug/sched/preempt", r"\((\w+)\)"),
        (PROC / "cmdline", r"\bpreempt=(\w+)"),
        (Path(BUILT.format(release())), r"\bCONFIG_PREEMPT_(NONE|VOLUNTARY)=y"),
    ):
        with contextlib.suppress(OSError):
            if found := re.search(mode, path.read_text()):
                return found[1].lower() not in ("none", "voluntary")
    return True


def counts_kprobe_misses() -> bool:
    """Tell whether the kernel counts runs of kprobe programs that it leaves out.

    trace_call_bpf() runs none while bpf_prog_active is raised on its CPU, which bpf() does around each use of a map. It
    counts since Linux commit dd8657894c11 ("bpf: Count missed stats in trace_call_bpf") (in v6.7), which came together
    with the number in struct bpf_link_info that is asked for here.
    """
    return _kernel().counts_kprobe_misses


def hides_addresses() -> bool:
    """Tell whether the kernel names its functions and not their addresses, which are in the upper half.

    kernel.kptr_restrict = 2 does so for everybody: kallsyms_show_value() in kernel/ksyms_common.c.
    """
    return b"\nf" not in _kallsyms()


class _Kernel(NamedTuple):
    """What the kernel's types tell of the kernel."""

    has_ring: bool  # Linux 5.8
    ring_sleeps: bool
    counts_kprobe_misses: bool
    tracepoints_have_ext: bool


@cache  # BTF takes its time
def _kernel() -> _Kernel:
    fields = (
        "bpf_ringbuf.spinlock",
        # With CONFIG_PREEMPT_RT a spinlock is an rt_mutex, which has an owner.
        "bpf_ringbuf.spinlock.lock.owner",
        "bpf_link_info.perf_event.kprobe.missed",
        "tracepoint.ext",
    )
    try:
        with Btf() as btf:
            return _Kernel(*map(btf.has, fields))
    except MissingField:
        return _Kernel(*(False for _ in fields))


@cache  # every engine asks, and the symbols are many
def preempts_raw_tracepoints() -> bool:
    """Tell whether programs on raw tracepoints can be preempted, and with tracefs there is another way.

    Since tracepoints are protected by SRCU again, they disable preemption no more, and BPF leaves a program out that
    another task of the CPU is in the middle of. Before Linux 6.13, which took SRCU away and gave struct tracepoint its
    ``ext``, SRCU was for tracepoints outside RCU only. Read in the source of 7.3.4, and seen there as recursion_misses.
    """
    if not re.search(rb"^[0-9a-f]+ \w tracepoint_srcu$", _kallsyms(), re.MULTILINE):
        return False
    return _kernel().tracepoints_have_ext and any((place / "events/raw_syscalls").is_dir() for place in TRACEFS)


@cache
def tracepoint_arguments() -> Mapping[str, tuple[str, ...] | None]:
    """Return the types of what KVM's raw tracepoints hand over, None where the kernel's BTF does not tell."""
    try:
        with Btf("kvm") as btf:
            return {name: guest.arguments(btf, name) for name in guest.TRACEPOINTS}
    except MissingField:
        return dict.fromkeys(guest.TRACEPOINTS)


@cache
def reason_offsets() -> Mapping[str, int]:
    """Return where a vCPU holds the reason of its last exit, as far as BTF tells."""
    found: dict[str, int] = {}
    for module in ("kvm", *kvm().flavours):
        with contextlib.suppress(MissingField), Btf(module) as btf:
            if module == "kvm" or btf.has_module:
                found |= guest.reason_offsets(btf)
    return found


def no_kprobes() -> str | None:
    """Say why kprobes cannot be used, if they cannot."""
    if not (SYS / "bus/event_source/devices/kprobe").exists():
        return "this kernel was built without kprobes (CONFIG_KPROBE_EVENTS)"
    mode = lockdown()
    if mode == "confidentiality":
        return "the kernel is locked down (confidentiality): kprobes are refused"
    return None


def no_ring() -> str | None:
    """Say why programs have no ring to put events into, if so."""
    if not _kernel().has_ring:
        return "this kernel has no BPF ring buffers, which came with Linux 5.8"
    if _kernel().ring_sleeps:
        # Linux commit 8b62645b09f8 ("bpf: Use raw_spinlock_t in ringbuf") (in v6.12).
        return "the ring buffers of this real-time kernel may sleep where programs may not; those of Linux 6.12 do not"
    return None


def no_btf() -> str | None:
    """Say why the offsets of kernel fields cannot be known, if they cannot."""
    if not (SYS / "kernel/btf/vmlinux").exists():
        return "/sys/kernel/btf/vmlinux is missing: the kernel was built without BTF (CONFIG_DEBUG_INFO_BTF)"
    return None


@cache
def possible_cpus() -> int:
    """Return one more than the highest number that a CPU of this host can have."""
    text = (SYS / "devices/system/cpu/possible").read_text()
    return int(re.split(r"[-,]", text.strip())[-1]) + 1


def is_root_of_pids() -> bool:
    """Tell whether this process sees the host's own process numbers, which BPF reports."""
    try:
        # PROC_PID_INIT_INO (include/linux/proc_ns.h): the inode of the first pid namespace.
        return Path("/proc/self/ns/pid").stat().st_ino == 0xEFFFFFFC
    except OSError:
        return False


def bpf_syscall(command: int, attributes: ctypes.Structure) -> int:
    """Make the bpf system call; return its result, or the negative errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(321, command, ctypes.byref(attributes), ctypes.sizeof(attributes)))
    return result if result >= 0 else -ctypes.get_errno()


_BPF_OBJ_GET_INFO_BY_FD = 15  # enum bpf_cmd, uapi linux/bpf.h


class _GetInfo(ctypes.Structure):
    # The `info` member of union bpf_attr (uapi linux/bpf.h).
    _fields_ = (("bpf_fd", ctypes.c_uint32), ("info_len", ctypes.c_uint32), ("info", ctypes.c_uint64))


def bpf_info(descriptor: int, info: ctypes.Structure) -> bool:
    """Have the kernel fill in what it knows of a program or of BTF, and tell whether it did.

    ``info`` is a struct bpf_prog_info or bpf_btf_info (uapi linux/bpf.h), or the first part of one.
    """
    request = _GetInfo(descriptor, ctypes.sizeof(info), ctypes.addressof(info))
    return bpf_syscall(_BPF_OBJ_GET_INFO_BY_FD, request) >= 0
