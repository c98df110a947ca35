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

from probes.exits import Kind
from probes.plan import KPROBE, TRACEPOINT, UNCOUNTED, Arguments, Blind, Hook, Plan, Via, planned

#: In probes/programs, in this order.
FILES = ("stat.c", "guest.c")
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


_USER_EXIT = Hook(
    "KVM_RUN returned to user space, and why",
    Via.RAW_TRACEPOINT,
    "kvm_userspace_exit",
    "stat_on_userspace_exit",
    "exits to user space",
    required=True,
)
_GUEST = (
    Hook("the guest is entered", Via.RAW_TRACEPOINT, "kvm_entry", "on_guest_entry", "how long exits take"),
    Hook("the guest was left, and why", Via.RAW_TRACEPOINT, "kvm_exit", "on_guest_exit", "exits from the guest"),
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
        *_of(TRACEPOINT, "on_sys_exit", "on_exit_mmap", "on_process_exit", "on_process_exec", "on_sys_enter"),
        _USER_EXIT,
        *_GUEST,
    ),
}

BLIND: Mapping[str, tuple[Blind, ...]] = {
    "kprobe": (),
    "tracepoint": (Blind("ioctls of 32-bit processes", "exits to user space of a 32-bit VMM"),),
}


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
    }


def make(
    engine: str,
    functions: Collection[str],
    tracepoints: Collection[str],
    arguments: Arguments,
    *,
    uncounted: bool = False,
) -> Plan:
    """Return the plan of an engine for a kernel that has these functions and raw tracepoints.

    ``arguments``: the types of what :data:`probes.guest.TRACEPOINTS` hand over, None where no BTF tells. ``uncounted``:
    see :func:`probes.plan.make`.
    """
    hooks = (planned(hook, functions, tracepoints, arguments) for hook in HOOKS[engine])
    blind = (*BLIND[engine], UNCOUNTED) if uncounted and engine == "kprobe" else BLIND[engine]
    return Plan(engine, tuple(hooks), blind)
