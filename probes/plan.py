"""The hook plan: for every fact that an analysis needs, the hook that tells it, and what stays unseen without it.

The plan is data. It is made from what the running kernel has (its symbols, its tracepoints, its BTF), never from its
version; ``doctor`` prints it, the recording carries it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from probes import guest
from probes.schema import Site

#: The types of what raw tracepoints hand over, by tracepoint; None where no BTF tells.
Arguments = Mapping[str, Sequence[str] | None]


class Via(StrEnum):
    """How a program is attached."""

    RAW_TRACEPOINT = "raw_tracepoint"
    TRACEPOINT = "tracepoint"
    KPROBE = "kprobe"
    KRETPROBE = "kretprobe"
    FENTRY = "fentry"
    FEXIT = "fexit"
    KPROBE_EVENT = "kprobe_event"
    KRETPROBE_EVENT = "kretprobe_event"
    TRACE_EVENT = "trace_event"


_TRACEPOINTS = (Via.RAW_TRACEPOINT, Via.TRACEPOINT, Via.TRACE_EVENT)


_VENDORS = {"svm": "kvm_amd", "vmx": "kvm_intel", "tdx": "kvm_intel"}


@dataclass(frozen=True)
class Hook:
    """A program, and where it goes."""

    fact: str  # what it tells
    via: Via
    target: str  # function of KVM, or tracepoint
    program: str  # function in probes/programs
    unseen: str  # what stays unseen without it
    required: bool = False  # without it the engine proves nothing
    site: Site | None = None  # for a program that is made from SITE()
    full: bool = False  # in detail full only
    other: str | None = None  # program to try where the kernel refuses that one

    @property
    def vendor(self) -> str | None:
        """Return the module of the one flavour of KVM that has such a function, by KVM's own habit of naming."""
        return next((module for mark, module in _VENDORS.items() if mark in self.target), None)


@dataclass(frozen=True)
class Planned:
    """A hook on the running kernel: it can be set, or why not."""

    hook: Hook
    missing: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the line of the plan that doctor prints and recordings carry."""
        there = self.missing is None
        return {
            "fact": self.hook.fact,
            "hook": f"{self.hook.via}:{self.hook.target}" if there else None,
            "unseen": None if there else f"{self.hook.unseen} ({self.missing})",
        }


@dataclass(frozen=True)
class Blind:
    """What an engine cannot see on any kernel."""

    fact: str
    unseen: str
    full: bool = False  # in detail full only

    def as_json(self) -> dict[str, Any]:
        """Return the line of the plan that doctor prints and recordings carry."""
        return {"fact": self.fact, "hook": None, "unseen": self.unseen}


_RUN_RETURNED = Hook(
    "KVM_RUN returned to user space, why, and with which requests",
    Via.RAW_TRACEPOINT,
    "kvm_userspace_exit",
    "on_userspace_exit",
    "returns of KVM_RUN: nothing can be judged",
    required=True,
)

# Detail full. These are set last: by then every KVM_RUN is seen to begin, so that a vCPU that is first met inside one
# is met so once. What ends something comes before what begins it.
_GUEST = (
    Hook(
        "the guest is entered, with which requests",
        Via.RAW_TRACEPOINT,
        "kvm_entry",
        "on_guest_entry",
        "entries of the guest",
        full=True,
    ),
    Hook(
        "the guest was left, why, and with which requests",
        Via.RAW_TRACEPOINT,
        "kvm_exit",
        "on_guest_exit",
        "exits of the guest",
        full=True,
    ),
    Hook(
        "a vCPU stops blocking, with which requests",
        Via.RAW_TRACEPOINT,
        "kvm_vcpu_wakeup",
        "on_wakeup",
        "wake-ups",
        full=True,
    ),
)
#: Functions that kick a vCPU: each kernel has one of them.
KICKERS = ("kvm_vcpu_kick", "__kvm_vcpu_kick")
_KICKED = "a vCPU is kicked, by whom, with which requests"
_ALL, _SOME = "every vCPU of a VM", "some vCPUs of a VM"
#: Functions that raise a request of several vCPUs, and of which; the first ones may call the later ones.
REQUESTERS = {
    "kvm_make_all_cpus_request": _ALL,
    "kvm_make_all_cpus_request_except": _ALL,  # or of every one but one
    "kvm_make_vcpus_request_mask": _SOME,
}


def _raises(who: str) -> str:
    return f"a request is about to be raised of {who}, by whom"


def _raised(who: str) -> str:
    return f"a request was raised of {who}, and the requester goes on"


_KICKS = (
    *(
        Hook(
            _raised(who),
            Via.KRETPROBE,
            function,
            f"after_{function}",
            f"when a requester of {who} went on, and which vCPUs it left in guest mode ({function})",
            full=True,
        )
        for function, who in REQUESTERS.items()
    ),
    *(
        Hook(
            _raises(who),
            Via.KPROBE,
            function,
            f"on_{function}",
            f"who raised a request of {who} ({function})",
            full=True,
        )
        for function, who in REQUESTERS.items()
    ),
    *(Hook(_KICKED, Via.KPROBE, function, "on_kick", "kicks", full=True) for function in KICKERS),
)

# The order is the order of attaching: what ends an ioctl before what begins one, so that no begin goes without its end.
TRACEPOINT = (
    Hook(
        "a vCPU ioctl returned (KVM_GET_VCPU_EVENTS with its payload), a vCPU was created, a capability enabled",
        Via.RAW_TRACEPOINT,
        "sys_exit",
        "on_sys_exit",
        "saves, creations and capabilities: nothing can be judged",
        required=True,
    ),
    _RUN_RETURNED,
    Hook(
        "nobody has the memory of a VMM any more",
        Via.RAW_TRACEPOINT,
        "exit_mmap",
        "on_exit_mmap",
        "at once, that a VMM ends that shares its memory with another process",
    ),
    Hook(
        "a thread ended, or a VMM with its last one",
        Via.RAW_TRACEPOINT,
        "sched_process_exit",
        "on_process_exit",
        "the end of vCPUs: a lost request stays open",
        required=True,
    ),
    Hook(
        "a VMM executed another program",
        Via.RAW_TRACEPOINT,
        "sched_process_exec",
        "on_process_exec",
        "when a VMM executes another program",
    ),
    Hook(
        "a vCPU ioctl begins (KVM_SET_VCPU_EVENTS with its payload), or a vCPU's descriptor is closed",
        Via.RAW_TRACEPOINT,
        "sys_enter",
        "on_sys_enter",
        "restores and the end of vCPUs: nothing can be judged",
        required=True,
    ),
    *_GUEST,
)
TRACEPOINT_BLIND = (
    Blind(
        "who raised a request inside KVM_RUN",
        "raised_by is kvm_run: no function inside KVM is hooked",
    ),
    Blind(
        "a request that is raised and serviced inside one KVM_RUN",
        "its shutdown is listed as source hardware: the word is only read at the boundaries",
    ),
    Blind(
        "events set through kvm_run (KVM_SYNC_X86_EVENTS)",
        "a request that they raise is raised_by kvm_run, and one that they clear is undecided",
    ),
    Blind("ioctls of 32-bit processes", "such a VMM is not traced"),
    Blind(
        "who kicks a vCPU, and who raises a request of several", "kicks: no function inside KVM is hooked", full=True
    ),
)


def _site(function: str, site: Site, fact: str) -> Hook:
    return Hook(
        fact, Via.KRETPROBE, function, f"after_{function}", f"raised_by is kvm_run when it was {function}", site=site
    )


# What kvm_vcpu_ioctl handles itself and kvm_arch_vcpu_ioctl never sees. KVM_RUN calls none of these functions.
_REGISTERS = {
    "KVM_GET_REGS": "kvm_arch_vcpu_ioctl_get_regs",
    "KVM_SET_REGS": "kvm_arch_vcpu_ioctl_set_regs",
    "KVM_GET_SREGS": "kvm_arch_vcpu_ioctl_get_sregs",
    "KVM_SET_SREGS": "kvm_arch_vcpu_ioctl_set_sregs",
    "KVM_GET_MP_STATE": "kvm_arch_vcpu_ioctl_get_mpstate",
    "KVM_SET_MP_STATE": "kvm_arch_vcpu_ioctl_set_mpstate",
    "KVM_GET_FPU": "kvm_arch_vcpu_ioctl_get_fpu",
    "KVM_SET_FPU": "kvm_arch_vcpu_ioctl_set_fpu",
    "KVM_TRANSLATE": "kvm_arch_vcpu_ioctl_translate",
    "KVM_SET_GUEST_DEBUG": "kvm_arch_vcpu_ioctl_set_guest_debug",
}

KPROBE = (
    Hook(
        "a vCPU was created",
        Via.KPROBE,
        "kvm_arch_vcpu_create",
        "on_kvm_arch_vcpu_create",
        "the reuse of a vCPU's memory",
        required=True,
    ),
    Hook(
        "a vCPU was destroyed, with which requests",
        Via.KPROBE,
        "kvm_arch_vcpu_destroy",
        "on_kvm_arch_vcpu_destroy",
        "the end of vCPUs",
        required=True,
    ),
    Hook("a VM was destroyed", Via.KPROBE, "kvm_destroy_vm", "on_kvm_destroy_vm", "two VMs may count as one"),
    _RUN_RETURNED,
    Hook(
        "a thread ended",
        Via.RAW_TRACEPOINT,
        "sched_process_exit",
        "on_thread_exit",
        "when a thread number is used again",
    ),
    Hook(
        "a vCPU ioctl returned",
        Via.KRETPROBE,
        "kvm_arch_vcpu_ioctl",
        "after_kvm_arch_vcpu_ioctl",
        "the end of an ioctl: it is dated at the next hook",
    ),
    *(
        Hook(
            f"{ioctl} returned",
            Via.KRETPROBE,
            function,
            "after_registers",
            f"that {ioctl} raised a request: raised_by is remote",
        )
        for ioctl, function in _REGISTERS.items()
    ),
    Hook(
        "KVM_GET_VCPU_EVENTS saved the vCPU, with or without the request",
        Via.KRETPROBE,
        "kvm_vcpu_ioctl_x86_get_vcpu_events",
        "after_get_vcpu_events",
        "saves through kvm_run (KVM_SYNC_X86_EVENTS)",
    ),
    Hook(
        "KVM_SET_VCPU_EVENTS restored the vCPU, with or without the request",
        Via.KRETPROBE,
        "kvm_vcpu_ioctl_x86_set_vcpu_events",
        "after_set_vcpu_events",
        "restores through kvm_run (KVM_SYNC_X86_EVENTS)",
    ),
    Hook(
        "KVM_CAP_X86_TRIPLE_FAULT_EVENT was enabled",
        Via.KRETPROBE,
        "kvm_vm_ioctl_enable_cap",
        "after_kvm_vm_ioctl_enable_cap",
        "the moment at which the capability changed",
    ),
    _site("kvm_multiple_exception", Site.EXCEPTION, "a fault while #DF was delivered raised it"),
    _site("emulator_triple_fault", Site.RSM, "RSM to a state that is not allowed raised it"),
    _site("kvm_inject_realmode_interrupt", Site.REALMODE_INTERRUPT, "a real-mode interrupt that failed raised it"),
    _site("svm_can_emulate_instruction", Site.EMULATION, "an instruction that cannot be emulated raised it"),
    _site("svm_check_emulate_instruction", Site.EMULATION, "an instruction that cannot be emulated raised it"),
    _site("nested_svm_vmexit", Site.NESTED_VMEXIT, "a nested VM-exit that failed raised it"),
    _site("nested_vmx_abort", Site.NESTED_ABORT, "a nested abort raised it"),
    _site("svm_set_efer", Site.SET_EFER, "EFER.SVME cleared in L2 raised it"),
    _site("nested_svm_triple_fault", Site.REFLECT, "it was reflected to L1"),
    _site("nested_vmx_triple_fault", Site.REFLECT, "it was reflected to L1"),
    Hook(
        "KVM_GET_VCPU_EVENTS begins",
        Via.KPROBE,
        "kvm_vcpu_ioctl_x86_get_vcpu_events",
        "on_vcpu_events",
        "saves through kvm_run (KVM_SYNC_X86_EVENTS)",
    ),
    Hook(
        "KVM_SET_VCPU_EVENTS begins",
        Via.KPROBE,
        "kvm_vcpu_ioctl_x86_set_vcpu_events",
        "on_vcpu_events",
        "restores through kvm_run (KVM_SYNC_X86_EVENTS)",
    ),
    Hook(
        "KVM_ENABLE_CAP begins",
        Via.KPROBE,
        "kvm_vm_ioctl_enable_cap",
        "on_kvm_vm_ioctl_enable_cap",
        "the moment at which the capability changed",
    ),
    Hook(
        "a vCPU was reset",
        Via.KPROBE,
        "kvm_vcpu_reset",
        "on_kvm_vcpu_reset",
        "resets by INIT: a stale request may not be marked",
    ),
    Hook(
        "a vCPU ioctl begins",
        Via.KPROBE,
        "kvm_vcpu_ioctl",
        "on_kvm_vcpu_ioctl",
        "every ioctl: nothing can be judged",
        required=True,
    ),
)
KPROBE_FULL = (*_GUEST, *_KICKS)
_INLINED = Blind(
    "raises inside inlined functions (mmu_check_root, svm_handle_mce, enter_smm_save_state_64)",
    "raised_by is kvm_run",
)
# probes/programs/full.c looks at so many.
_FAR = Blind(
    "whether a vCPU beyond the first 64 of its VM was in guest mode when the requester that waits for it went on",
    "a requester that went on too early for such a vCPU",
    full=True,
)
KPROBE_BLIND = (
    _INLINED,
    _FAR,
    Blind(
        "kicks by an interrupt that arrives while a probe of its CPU is at work",
        "such a kick: the kernel leaves out that run of the probe, and BPF is not told",
        full=True,
    ),
)

#: Of programs on kprobes, where the kernel is preempted and does not count: trace_call_bpf() of Linux before 6.7.
UNCOUNTED = Blind(
    "runs of programs on kprobes while another task of that CPU is inside a bpf() system call that uses a map",
    "what they would have told: this kernel leaves them out and counts none, so that a loss may be missed in silence",
)

# The same functions through trampolines: cheaper, and no end of a function is missed.
_TRAMPOLINES = {Via.KPROBE: Via.FENTRY, Via.KRETPROBE: Via.FEXIT}
FENTRY = tuple(replace(hook, via=_TRAMPOLINES.get(hook.via, hook.via)) for hook in (*KPROBE, *KPROBE_FULL))
FENTRY_BLIND = (_INLINED, _FAR)


def _event(hook: Hook) -> Hook:
    """Return the probe event that does for the ftrace engine what a program does for the kprobe engine."""
    via, program, required = _FTRACE_EVENTS.get(hook.program, (Via.KRETPROBE_EVENT, f"site_{hook.target}", False))
    target = hook.target if via is not Via.TRACE_EVENT else _SYSTEMS[hook.target]
    return replace(hook, via=via, target=target, program=program, required=hook.required or required)


# By the kprobe engine's program: how tracefs does it, as what, and whether this engine cannot do without it.
_FTRACE_EVENTS = {
    "on_kvm_arch_vcpu_create": (Via.KPROBE_EVENT, "vcpu_create", True),
    "on_kvm_arch_vcpu_destroy": (Via.KPROBE_EVENT, "vcpu_destroy", True),
    "on_kvm_destroy_vm": (Via.KPROBE_EVENT, "vm_destroy", False),
    "on_userspace_exit": (Via.TRACE_EVENT, "kvm_userspace_exit", True),
    "on_thread_exit": (Via.TRACE_EVENT, "sched_process_exit", False),
    "after_kvm_arch_vcpu_ioctl": (Via.KRETPROBE_EVENT, "ioctl_end", True),
    "after_set_vcpu_events": (Via.KRETPROBE_EVENT, "set_events_end", False),
    "after_kvm_vm_ioctl_enable_cap": (Via.KRETPROBE_EVENT, "enable_cap_end", False),
    "on_kvm_vm_ioctl_enable_cap": (Via.KPROBE_EVENT, "enable_cap", False),
    "on_kvm_vcpu_reset": (Via.KPROBE_EVENT, "vcpu_reset", False),
    "on_kvm_vcpu_ioctl": (Via.KPROBE_EVENT, "vcpu_ioctl", True),
}
_SYSTEMS = {
    "kvm_userspace_exit": "kvm:kvm_userspace_exit",
    "sched_process_exit": "sched:sched_process_exit",
}
_GET_EVENTS = "kvm_vcpu_ioctl_x86_get_vcpu_events"
_SET_EVENTS = "kvm_vcpu_ioctl_x86_set_vcpu_events"
_FTRACE_OWN = (
    Hook(
        "KVM_RUN or another vCPU ioctl is about to return, with which requests",
        Via.KPROBE_EVENT,
        "vcpu_put",
        "vcpu_put",
        "the requests with which an ioctl returns: nothing can be judged",
        required=True,
    ),
    Hook(
        "what KVM_GET_VCPU_EVENTS gave, read where it returns",
        Via.KRETPROBE_EVENT,
        _GET_EVENTS,
        "get_events_end",
        "the bytes that a save gave: told by KVM's rule instead, which is to give a pending triple fault exactly if "
        "the capability is enabled",
    ),
    Hook(
        "KVM_GET_VCPU_EVENTS begins, with which requests and capability",
        Via.KPROBE_EVENT,
        _GET_EVENTS,
        "get_events",
        "the requests in the middle of a save: those at its end are taken",
    ),
    Hook(
        "KVM_SET_VCPU_EVENTS begins, with its payload",
        Via.KPROBE_EVENT,
        _SET_EVENTS,
        "set_events",
        "what a restore set",
    ),
)


def _call(role: str, function: str, fact: str, unseen: str, via: Via = Via.KPROBE_EVENT) -> Hook:
    """Return a probe event where a function begins or returns, in detail full; its program is ROLE__FUNCTION."""
    return Hook(fact, via, function, f"{role}__{function}", unseen, full=True)


def _told(tracepoint: str, fact: str, unseen: str) -> Hook:
    return Hook(fact, Via.TRACE_EVENT, f"kvm:{tracepoint}", tracepoint, unseen, full=True)


_NO_WORD = "entries of the guest: their requests are not read"
_LATE = "the requests where the guest was left: they are read at the next hook"
_NO_REQUESTER = "who raised a request of several vCPUs"
_NO_RETURN = "how long a requester of several vCPUs waited"
# A trace event tells that something happened, a probe on a function that is given the vCPU which requests it has then.
# get_exit_info is what KVM's flavours have for the trace event kvm_exit, which calls it while it is written down. A TD
# is entered and left by functions of its own (arch/x86/kvm/vmx/tdx.c), and both kinds of guests may be there.
# Every vCPU that has stopped blocking and can run goes through kvm_apic_accept_events before it services a request.
_FTRACE_FULL = (
    *(
        _call("entering", name, "the requests with which the guest is entered", _NO_WORD)
        for name in ("svm_vcpu_run", "vmx_vcpu_run", "tdx_vcpu_run")
    ),
    *(
        _call("left", name, "the requests with which the guest was left", _LATE)
        for name in ("svm_get_exit_info", "vmx_get_exit_info", "tdx_get_exit_info")
    ),
    _call(
        "awake",
        "kvm_apic_accept_events",
        "the requests with which a vCPU stops blocking",
        "the requests where a vCPU stops blocking: they are read at the next hook",
    ),
    _told("kvm_entry", "the guest is entered", "entries of the guest"),
    _told("kvm_exit", "the guest was left, and why", "exits of the guest"),
    _told("kvm_vcpu_wakeup", "a vCPU stops blocking", "wake-ups"),
    *(_call("kick", name, _KICKED, "kicks") for name in KICKERS),
    *(_call("request_end", name, _raised(who), _NO_RETURN, Via.KRETPROBE_EVENT) for name, who in REQUESTERS.items()),
    *(_call("request", name, _raises(who), _NO_REQUESTER) for name, who in REQUESTERS.items()),
)
# Of the kprobe engine's hooks: what its functions cannot be asked by fetch arguments is replaced by hooks of its own.
FTRACE = (
    *(
        _event(hook)
        for hook in KPROBE[:-1]
        if hook.program in _FTRACE_EVENTS or (hook.via is Via.KRETPROBE and hook.site is not None)
    ),
    *_FTRACE_OWN,
    *_FTRACE_FULL,
    _event(KPROBE[-1]),
)
FTRACE_BLIND = (
    _INLINED,
    Blind(
        "whether an ioctl that writes registers succeeded (KVM_SET_REGS, KVM_SET_SREGS)",
        "it counts as a success: only its requests are read where it ends",
    ),
    Blind(
        "the requests after a function inside KVM whose caller keeps the vCPU in no register",
        "raised_by is kvm_run there",
    ),
    Blind(
        "whether a vCPU was still in guest mode when the requester that waits for it went on",
        "a requester that returned early: nothing can go through a VM's vCPUs where it returns",
        full=True,
    ),
)

HOOKS: Mapping[str, tuple[tuple[Hook, ...], tuple[Blind, ...]]] = {
    "tracepoint": (TRACEPOINT, TRACEPOINT_BLIND),
    "kprobe": ((*KPROBE, *KPROBE_FULL), KPROBE_BLIND),
    "fentry": (FENTRY, FENTRY_BLIND),
    "ftrace": (FTRACE, FTRACE_BLIND),
}


@dataclass(frozen=True)
class Plan:
    """What one engine sees on the running kernel."""

    engine: str
    hooks: tuple[Planned, ...]
    blind: tuple[Blind, ...]

    @property
    def hopeless(self) -> str | None:
        """Return why this engine can prove nothing here, if so."""
        missing = [f"{one.hook.target} ({one.missing})" for one in self.hooks if one.missing and one.hook.required]
        return f"it needs {', '.join(missing)}" if missing else None

    @property
    def attachable(self) -> tuple[Hook, ...]:
        """Return the hooks to set, in the order in which to set them."""
        return tuple(planned.hook for planned in self.hooks if planned.missing is None)

    def refusing(self, hook: Hook, why: str) -> Plan:
        """Return the plan without a hook that the kernel has refused to set."""
        hooks = tuple(Planned(one.hook, f"refused: {why}") if one.hook == hook else one for one in self.hooks)
        return replace(self, hooks=hooks)

    def taking(self, hook: Hook) -> Plan:
        """Return the plan with the other program of a hook, since the kernel has refused the first."""
        taken = Planned(replace(hook, program=hook.other or hook.program, other=None))
        return replace(self, hooks=tuple(taken if one.hook == hook else one for one in self.hooks))

    def as_json(self) -> list[dict[str, Any]]:
        """Return the plan as doctor prints it and recordings carry it."""
        return [*(planned.as_json() for planned in self.hooks), *(blind.as_json() for blind in self.blind)]


# Where raw tracepoint programs can be preempted, the one of another task on that CPU is left out meanwhile, and what it
# would have told is missed. Programs on trace events are not preempted, and cost more. Those of kvm_entry and kvm_exit
# tell no vCPU: there the raw programs stay, and what is left out of them is counted.
_NOT_PREEMPTED = {
    "sys_enter": "raw_syscalls:sys_enter",
    "sys_exit": "raw_syscalls:sys_exit",
    "kvm_userspace_exit": "kvm:kvm_userspace_exit",
    "kvm_vcpu_wakeup": "kvm:kvm_vcpu_wakeup",
}


def planned(hook: Hook, functions: Collection[str], tracepoints: Collection[str], arguments: Arguments) -> Planned:
    """Return a hook with the program that fits a kernel with these functions and raw tracepoints, or what it lacks."""
    if hook.via not in _TRACEPOINTS:
        return Planned(hook, None if hook.target in functions else "this kernel has no such function, or it is inlined")
    if hook.target not in tracepoints:
        return Planned(hook, "this kernel has no such tracepoint")
    if hook.via is Via.RAW_TRACEPOINT and hook.target in guest.TRACEPOINTS:
        fitting = guest.programs(hook.target, arguments.get(hook.target))
        if not fitting:
            return Planned(hook, "its arguments are not those that kvmreq knows")
        return Planned(replace(hook, program=fitting[0], other=fitting[1] if fitting[1:] else None))
    return Planned(hook)


def make(
    engine: str,
    functions: Collection[str],
    tracepoints: Collection[str],
    *,
    vendors: Collection[str] | None = None,
    preempted: bool = False,
    uncounted: bool = False,
    full: bool = False,
    arguments: Arguments = MappingProxyType({}),
) -> Plan:
    """Return the plan of an engine for a kernel with these functions and these raw tracepoints.

    ``vendors``: the flavours of KVM that are loaded, if that is known: what only another one has is left out.
    ``preempted``: this kernel preempts raw tracepoint programs. ``uncounted``: it may leave out runs of kprobe programs
    and not count them. ``full``: for detail full. ``arguments``: what raw
    tracepoints hand over. Of several hooks that tell the same fact those that exist do.
    """
    hooks, blind = HOOKS[engine]
    if uncounted and engine == "kprobe":
        blind = (*blind, UNCOUNTED)

    def best(one: Planned) -> Planned:
        hook = one.hook
        if preempted and hook.via is Via.RAW_TRACEPOINT and hook.target in _NOT_PREEMPTED:
            return replace(one, hook=replace(hook, via=Via.TRACEPOINT, target=_NOT_PREEMPTED[hook.target]))
        return one

    asked = [hook for hook in hooks if full or not hook.full]
    here = [
        planned(hook, functions, tracepoints, arguments)
        for hook in asked
        if vendors is None or hook.vendor is None or hook.vendor in vendors
    ]
    told = {one.hook.fact for one in here if one.missing is None}
    lines = tuple(best(one) for one in here if one.missing is None or one.hook.fact not in told)
    return Plan(engine, lines, tuple(one for one in blind if full or not one.full))


def tells(plan: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Return the words of ``raised_by`` that a plan's hooks inside KVM_RUN tell; the plan as recordings carry it."""
    targets = {line["hook"].partition(":")[2] for line in plan if line["hook"]}
    return frozenset(
        hook.site.name.lower()
        for hooks, _ in HOOKS.values()
        for hook in hooks
        if hook.site is not None and hook.target in targets
    )
