"""What ``kvmreq stat`` counts in the kernel: its hooks, and the histograms as C and numpy see them.

A histogram is log-linear: 2^BITS buckets for each power of two, so that a bucket is at most 1/8 as wide as the smallest
time in it, and its middle is at most 1/16 away from any.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.btf import Btf, MissingField
from probes.exits import UNREADABLE, Kind
from probes.plan import KPROBE, TRACEPOINT, Blind, Hook, Plan, Planned, Via

BITS = 3
BUCKETS = 304  # up to 2^40 ns, 18 minutes; the last one also holds what took longer
MAX_VALUES = 8192  # histograms: one for each vCPU and reason

#: How far a quantile can be from the truth.
ERROR = 1 / 2 ** (BITS + 1)


#: struct stat_key, struct stat_value and struct stat_bits of probes/programs/stat.c.
KEY = np.dtype([("vcpu", "u4"), ("kind", "u4"), ("reason", "u4"), ("variant", "i4")])
VALUE = np.dtype([("count", "u8"), ("sum_ns", "u8"), ("max_ns", "u8"), ("buckets", "u8", (BUCKETS,))])
WORDS = np.dtype([("raised", "u8", (64,)), ("serviced", "u8", (64,))])


@dataclass(frozen=True)
class Counts:
    """What was counted until a moment, or between two: by vCPU and reason, and the requests by vCPU."""

    keys: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, KEY))
    values: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, VALUE))
    vcpus: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, "u4"))
    words: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, WORDS))


_VCPU = "kvm_vcpu *"
_EXIT_WITH_REASON, _EXIT = "stat_on_guest_exit_with_reason", "stat_on_guest_exit"

_USER_EXIT = Hook(
    "KVM_RUN returned to user space, and why",
    Via.RAW_TRACEPOINT,
    "kvm_userspace_exit",
    "stat_on_userspace_exit",
    "exits to user space",
    required=True,
)
_GUEST = (
    Hook("the guest is entered", Via.RAW_TRACEPOINT, "kvm_entry", "stat_on_guest_entry", "how long exits take"),
    Hook("the guest was left, and why", Via.RAW_TRACEPOINT, "kvm_exit", _EXIT, "exits from the guest"),
)


def _of(hooks: Sequence[Hook], *programs: str) -> tuple[Hook, ...]:
    return tuple(hook for hook in hooks if hook.program in programs)


# What knows vCPUs is the engines' own; what ends a time is set before what begins one.
HOOKS: Mapping[str, tuple[Hook, ...]] = {
    "kprobe": (
        *_of(KPROBE, "on_kvm_arch_vcpu_create", "on_kvm_arch_vcpu_destroy", "on_kvm_destroy_vm"),
        Hook(
            "a thread ended",
            Via.RAW_TRACEPOINT,
            "sched_process_exit",
            "stat_on_thread_exit",
            "when a thread number is used again",
        ),
        Hook(
            "KVM_RUN begins",
            Via.KPROBE,
            "kvm_arch_vcpu_ioctl_run",
            "stat_on_run",
            "exits to user space: whose they are",
            required=True,
        ),
        _USER_EXIT,
        *_GUEST,
    ),
    "tracepoint": (
        *_of(TRACEPOINT, "on_sys_exit", "on_process_exit", "on_process_exec", "on_sys_enter"),
        _USER_EXIT,
        *_GUEST,
    ),
}

BLIND: Mapping[str, tuple[Blind, ...]] = {
    "kprobe": (),
    "tracepoint": (Blind("ioctls of 32-bit processes", "exits to user space of a 32-bit VMM"),),
}


def exit_programs(arguments: Sequence[str] | None) -> tuple[str, ...]:
    """Return the programs to try on kvm_exit, given the types of its arguments; None: no BTF tells them.

    The kernel refuses a program that reads beyond a raw tracepoint's last argument, so that without BTF the one that
    reads three is tried first. Linux commit c4f6699dfcb8 ("bpf: introduce BPF_RAW_TRACEPOINT") (in v4.17).
    """
    if arguments is None:
        return (_EXIT_WITH_REASON, _EXIT)
    if list(arguments[:1]) == [_VCPU] and len(arguments) > 1:
        return (_EXIT,)
    if list(arguments[1:2]) == [_VCPU] and len(arguments) > 2:
        return (_EXIT_WITH_REASON,)
    return ()


def arguments(btf: Btf, tracepoint: str) -> tuple[str, ...] | None:
    """Return the types of a tracepoint's arguments, or None where the kernel's BTF does not have them."""
    try:
        return btf.arguments(tracepoint)
    except MissingField:
        return None


def reason_offsets(btf: Btf) -> dict[str, int]:
    """Return where a vCPU holds the reason of its last exit, as far as the BTF of KVM's flavour tells.

    Linux commit 0a62a0319abb ("KVM: x86: Get exit_reason as part of kvm_x86_ops.get_exit_info") (in v5.16) took it
    out of the tracepoint's arguments.
    """
    found: dict[str, int] = {}
    # Linux commit 7172c753c26a ("KVM: VMX: Move common fields of struct vcpu_{vmx,tdx} to a struct") (in v6.16).
    for path in ("vcpu_vmx.exit_reason", "vcpu_vmx.vt.exit_reason"):
        if btf.has(path):
            found["OFFSET_VMX_REASON"] = btf.offset(path) - btf.offset("vcpu_vmx.vcpu")
    if btf.has("vcpu_svm.vmcb") and btf.has("vmcb.control.exit_code"):
        found["OFFSET_SVM_VMCB"] = btf.offset("vcpu_svm.vmcb") - btf.offset("vcpu_svm.vcpu")
        found["OFFSET_SVM_REASON"] = btf.offset("vmcb.control.exit_code")
    return found


def constants(engine: str) -> dict[str, str]:
    """Return what the tracer defines in front of the programs."""
    return {
        "STAT": "1",
        "STAT_KPROBES": str(int(engine == "kprobe")),
        "STAT_GUEST": str(Kind.GUEST.value),
        "STAT_USER": str(Kind.USER.value),
        "STAT_BITS": str(BITS),
        "STAT_BUCKETS": str(BUCKETS),
        "STAT_MAX_VALUES": str(MAX_VALUES),
        "STAT_UNREADABLE": f"{UNREADABLE:#x}",
    }


def make(
    engine: str,
    functions: Collection[str],
    tracepoints: Collection[str],
    exit_arguments: Sequence[str] | None,
    entry_arguments: Sequence[str] | None,
) -> Plan:
    """Return the plan of an engine for a kernel that has these functions and raw tracepoints.

    ``exit_arguments`` and ``entry_arguments`` are what :func:`arguments` says of kvm_exit and kvm_entry.
    """

    def missing(hook: Hook) -> str | None:
        if hook.via is not Via.RAW_TRACEPOINT:
            return None if hook.target in functions else "this kernel has no such function, or it is inlined"
        if hook.target not in tracepoints:
            return "this kernel has no such tracepoint"
        unknown = (hook.target == "kvm_exit" and not exit_programs(exit_arguments)) or (
            hook.target == "kvm_entry" and entry_arguments is not None and list(entry_arguments[:1]) != [_VCPU]
        )
        return "its arguments are not those that kvmreq knows" if unknown else None

    return Plan(engine, tuple(Planned(hook, missing(hook)) for hook in HOOKS[engine]), BLIND[engine])
