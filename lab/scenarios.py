"""Scenarios: what a VMM can do with a pending triple fault, and what must become of it.

A scenario checks what user space can see (exit reasons, errno, event flags) and raises LabError where KVM
differs. What it cannot see, the request itself, is in ``expect``: what a trace of the scenario must show.

"The capability" is KVM_CAP_X86_TRIPLE_FAULT_EVENT, off until a VMM enables it; Linux commit ed2351174e38
("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from lab.child import HELD, child, wait_for
from lab.kvm import (
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    CallFailed,
    Cap,
    Exit,
    Kvm,
    KvmRun,
    KvmVcpuEvents,
    KvmX86Mce,
    LabError,
    MpState,
    TimedOut,
    Vcpu,
    Vm,
)

# --- what a scenario is -------------------------------------------------------------------------------------


class Lifecycle(TypedDict, total=False):
    """What became of one request, in the report's words. A key that is left out depends on the kernel."""

    vm: int  # in order of creation, from 0
    vcpu: int
    raised_by: str
    end: str
    userspace_exits: int
    saves: int
    blind_saves: int
    stale: bool
    nested: bool
    exposed: bool


class Shutdown(TypedDict):
    """A KVM_EXIT_SHUTDOWN, and whether a request made it or the guest's own triple fault did."""

    vm: int
    vcpu: int
    source: str


# Says why a host cannot run a scenario, if it cannot.
Need = Callable[[Kvm], "str | None"]


@dataclass(frozen=True)
class Scenario:
    """Work on VMs with a known outcome."""

    name: str
    title: str
    code: bytes
    """Guest machine code, run in real mode at CODE_GPA."""
    needs: tuple[Need, ...]
    steps: Callable[[Stage], None]
    vms: int
    """How many VMs it creates."""
    expect: tuple[Lifecycle, ...]
    held: tuple[Lifecycle, ...]
    """What to expect instead while the scenario is held, if it can be."""
    hardware_shutdowns: tuple[tuple[int, int], ...] = ()
    """(VM, vCPU) of each shutdown exit that no request made."""

    @property
    def outcome(self) -> str:
        """The ends of its lifecycles, in words."""
        return ", ".join(dict.fromkeys(lifecycle["end"] for lifecycle in self.expect)) or "no request"

    @property
    def shutdowns(self) -> list[Shutdown]:
        """Every shutdown exit that it makes."""
        delivered = (one for one in self.expect if one["end"] == "delivered")
        return [
            *(Shutdown(vm=one["vm"], vcpu=one["vcpu"], source="request") for one in delivered),
            *(Shutdown(vm=vm, vcpu=vcpu, source="hardware") for vm, vcpu in self.hardware_shutdowns),
        ]

    def unmet(self, kvm: Kvm) -> str | None:
        """Say why this host cannot run it, if it cannot."""
        reasons = (need(kvm) for need in self.needs)
        return "; ".join(reason for reason in reasons if reason is not None) or None


def no_mce(kvm: Kvm) -> str | None:
    """Say why a triple fault cannot be raised by SET_MCE."""
    return None if kvm.check_extension(Cap.KVM_CAP_MCE) > _BANK else "no machine checks (KVM_CAP_MCE)"


def no_triple_fault_event(kvm: Kvm) -> str | None:
    """Say why a pending triple fault cannot be saved."""
    if kvm.check_extension(Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT):
        return None
    return "no KVM_CAP_X86_TRIPLE_FAULT_EVENT, which came with Linux 6.0"


def no_immediate_exit(kvm: Kvm) -> str | None:
    """Say why KVM_RUN cannot be made to return before it looks at requests."""
    return None if kvm.check_extension(Cap.KVM_CAP_IMMEDIATE_EXIT) else "no KVM_CAP_IMMEDIATE_EXIT"


def no_sync_regs(kvm: Kvm) -> str | None:
    """Say why KVM does not check kvm_run's register masks."""
    return None if kvm.check_extension(Cap.KVM_CAP_SYNC_REGS) else "no KVM_CAP_SYNC_REGS"


def no_halted_vcpus(kvm: Kvm) -> str | None:
    """Say why a vCPU cannot sleep inside KVM."""
    caps = (Cap.KVM_CAP_IRQCHIP, Cap.KVM_CAP_MP_STATE)
    missing = [cap.name for cap in caps if not kvm.check_extension(cap)]
    return f"no {' and no '.join(missing)}" if missing else None


# --- guests -------------------------------------------------------------------------------------------------

CODE_GPA = 0x1000
_MEMORY_SIZE = 0x10000
_TSS_GPA = 0xFFFB_D000  # three pages that no guest here uses
_PORT = 0x80
_ALIVE = 0x2A

# Says that it lives, then halts.
#   b0 2a   mov $0x2a, %al
#   e6 80   out %al, $0x80
#   f4      hlt
SIGN_OF_LIFE = bytes.fromhex("b02a e680 f4")

# Goes to user space for ever.
#   e6 80   1: out %al, $0x80
#   eb fc      jmp 1b
ENDLESS_IO = bytes.fromhex("e680 ebfc")

# Prime, so that a trace that counts anything twice cannot be right by chance.
EXITS = 23
GENERATIONS = 101


class Stage:
    """The VMs of one run of a scenario. ``hold`` is called where the scenario can stand still."""

    def __init__(self, kvm: Kvm, code: bytes, hold: Callable[[], None]) -> None:
        self.hold = hold
        self.vms = 0
        self._kvm = kvm
        self._code = code

    @contextlib.contextmanager
    def vm(self, *, triple_fault_event: bool = False, irqchip: bool = False) -> Iterator[Vm]:
        """Create a VM with the scenario's code in its memory."""
        with self._kvm.create_vm() as vm:
            self.vms += 1
            vm.set_tss_addr(_TSS_GPA)
            if irqchip:
                vm.create_irqchip()
            vm.add_memory(0, _MEMORY_SIZE).write(CODE_GPA, self._code)
            if triple_fault_event:
                set_triple_fault_event(vm, True)
            yield vm

    @contextlib.contextmanager
    def guest(self, *, triple_fault_event: bool = False, irqchip: bool = False) -> Iterator[Vcpu]:
        """Create a VM with one vCPU that is about to run the scenario's code."""
        with self.vm(triple_fault_event=triple_fault_event, irqchip=irqchip) as vm, vm.create_vcpu(0) as vcpu:
            start(vcpu)
            yield vcpu

    def killed(self, name: str) -> None:
        """Hold another scenario in a process of its own, and kill that process."""
        self.vms += SCENARIOS[name].vms
        with child("run", name, "--hold", str(_KILLED_HOLD_S)) as vmm:
            wait_for(vmm, HELD)
            vmm.kill()


_KILLED_HOLD_S = 10  # it is killed long before


# --- what a VMM does ----------------------------------------------------------------------------------------


def start(vcpu: Vcpu) -> None:
    """Point a vCPU at the scenario's code."""
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip = CODE_GPA
    vcpu.set_regs(regs)


def set_triple_fault_event(vm: Vm, on: bool) -> None:
    """Let vCPU events carry a pending triple fault, or no longer: this capability can be turned off."""
    vm.enable_cap(Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT, int(on))


# IA32_MCi_STATUS: VAL, UC, EN, S and AR; IA32_MCG_STATUS: RIPV and MCIP (Intel SDM volume 3, "Machine-Check
# Architecture").
_BANK = 9
_UNCORRECTED = 1 << 63 | 1 << 61 | 1 << 60 | 1 << 56 | 1 << 55
_IN_PROGRESS = 1 << 2 | 1 << 0


def raise_by_mce(vcpu: Vcpu) -> None:
    """Raise a triple fault: an uncorrected machine check shuts down a guest whose CR4.MCE is 0.

    kvm_vcpu_ioctl_x86_set_mce() in arch/x86/kvm/x86.c does so on every kernel since 5.10 at the latest.
    """
    vcpu.setup_mce(_BANK + 1)
    vcpu.set_mce(KvmX86Mce(status=_UNCORRECTED, mcg_status=_IN_PROGRESS, bank=_BANK))


def triple_fault(pending: bool) -> KvmVcpuEvents:
    """Return events that raise or clear a triple fault, and change nothing else."""
    events = KvmVcpuEvents(flags=KVM_VCPUEVENT_VALID_TRIPLE_FAULT)
    events.triple_fault.pending = pending
    return events


def save(vcpu: Vcpu) -> KvmVcpuEvents:
    """Save the events of a vCPU with a pending triple fault, which must be among them."""
    events = vcpu.get_vcpu_events()
    if not (events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT and events.triple_fault.pending):
        raise LabError(f"saved events (flags {events.flags:#x}) lack the pending triple fault")
    return events


def save_blindly(vcpu: Vcpu) -> KvmVcpuEvents:
    """Save the events of a vCPU with a pending triple fault, which cannot be among them."""
    events = vcpu.get_vcpu_events()
    if events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT:
        raise LabError(f"saved events (flags {events.flags:#x}) have a triple fault, with the capability off")
    return events


def shut_down(vcpu: Vcpu) -> None:
    """Run a vCPU, which must shut down."""
    _run_until(vcpu, Exit.KVM_EXIT_SHUTDOWN)


def live_on(vcpu: Vcpu) -> None:
    """Run SIGN_OF_LIFE to its end."""
    _run_until(vcpu, Exit.KVM_EXIT_IO)
    if (vcpu.kvm_run.io.port, vcpu.io_data()) != (_PORT, bytes([_ALIVE])):
        raise LabError(f"the guest wrote {vcpu.io_data().hex()} to port {vcpu.kvm_run.io.port:#x}")
    _run_until(vcpu, Exit.KVM_EXIT_HLT)


def bounce(vcpu: Vcpu) -> None:
    """Enter KVM_RUN and return at once, before requests are looked at."""
    vcpu.kvm_run.immediate_exit = 1
    _refused(errno.EINTR, vcpu.run)
    vcpu.kvm_run.immediate_exit = 0


def _run_until(vcpu: Vcpu, wanted: Exit) -> None:
    reason = vcpu.run()
    if reason != wanted:
        raise LabError(f"KVM_RUN returned {_exit_name(vcpu.kvm_run)}, not {wanted.name}")


def _exit_name(kvm_run: KvmRun) -> str:
    if kvm_run.exit_reason == Exit.KVM_EXIT_INTERNAL_ERROR:
        return f"KVM_EXIT_INTERNAL_ERROR, suberror {kvm_run.internal.suberror}"
    return next((one.name for one in Exit if one == kvm_run.exit_reason), f"exit {kvm_run.exit_reason}")


def _refused(number: int, call: Callable[[], object]) -> None:
    try:
        call()
    except CallFailed as error:
        if error.errno == number:
            return
        raise
    raise LabError(f"KVM accepted what it had to refuse with {errno.errorcode[number]}")


# --- the scenarios ------------------------------------------------------------------------------------------

_scenarios: dict[str, Scenario] = {}


def _lifecycle(
    end: str,
    *,
    vm: int = 0,
    vcpu: int = 0,
    raised_by: str = "set_mce",
    userspace_exits: int = 0,
    saves: int = 0,
    blind_saves: int = 0,
    stale: bool = False,
) -> Lifecycle:
    return Lifecycle(
        vm=vm,
        vcpu=vcpu,
        raised_by=raised_by,
        end=end,
        userspace_exits=userspace_exits,
        saves=saves,
        blind_saves=blind_saves,
        stale=stale,
        nested=False,
    )


# Makes a scenario of its steps: their name is its name, and the first line of their docstring its title.
def _scenario(
    *expect: Lifecycle,
    needs: Sequence[Need] = (no_mce,),
    vms: int = 1,
    code: bytes = SIGN_OF_LIFE,
    held: tuple[Lifecycle, ...] = (),
) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    def add(steps: Callable[[Stage], None]) -> Callable[[Stage], None]:
        name = steps.__name__.rstrip("_")
        title = (steps.__doc__ or "").partition("\n")[0].rstrip(".")
        _scenarios[name] = Scenario(name, title, code, tuple(needs), steps, vms, expect, held)
        return steps

    return add


@_scenario(_lifecycle("delivered"))
def delivered(stage: Stage) -> None:
    """A machine check raises it, KVM_RUN delivers it."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        shut_down(vcpu)


@_scenario(_lifecycle("delivered", raised_by="set_vcpu_events"), needs=[no_triple_fault_event])
def delivered_by_events(stage: Stage) -> None:
    """SET_VCPU_EVENTS raises it, KVM_RUN delivers it."""
    with stage.guest(triple_fault_event=True) as vcpu:
        vcpu.set_vcpu_events(triple_fault(pending=True))
        shut_down(vcpu)


@_scenario(_lifecycle("delivered"), _lifecycle("delivered"))
def delivered_twice(stage: Stage) -> None:
    """Two requests of one vCPU, one after the other."""
    with stage.guest() as vcpu:
        for _ in range(2):
            raise_by_mce(vcpu)
            shut_down(vcpu)


@_scenario(_lifecycle("delivered", userspace_exits=EXITS), needs=[no_mce, no_immediate_exit])
def pending(stage: Stage) -> None:
    """It waits across 23 exits to user space."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        for _ in range(EXITS):
            bounce(vcpu)
        shut_down(vcpu)


@_scenario(_lifecycle("delivered", userspace_exits=1), needs=[no_mce, no_sync_regs])
def pending_bad_registers(stage: Stage) -> None:
    """It waits while KVM_RUN refuses kvm_run's registers.

    kvm_arch_vcpu_ioctl_run() checks kvm_valid_regs before it enters the guest (KVM_CAP_SYNC_REGS).
    """
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        vcpu.kvm_run.kvm_valid_regs = 1 << 63
        _refused(errno.EINVAL, vcpu.run)
        vcpu.kvm_run.kvm_valid_regs = 0
        shut_down(vcpu)


@_scenario(
    _lifecycle("handed_over", saves=1),
    _lifecycle("delivered", vm=1, raised_by="set_vcpu_events"),
    needs=[no_mce, no_triple_fault_event],
    vms=2,
)
def handed_over(stage: Stage) -> None:
    """A save carries it to a new VM, which shuts down."""
    with stage.guest(triple_fault_event=True) as source:
        raise_by_mce(source)
        events = save(source)
    with stage.guest(triple_fault_event=True) as destination:
        destination.set_vcpu_events(events)
        shut_down(destination)


@_scenario(_lifecycle("lost", blind_saves=1), vms=2)
def lost(stage: Stage) -> None:
    """A save drops it: the bug. The new guest lives on."""
    with stage.guest() as source:
        raise_by_mce(source)
        events = save_blindly(source)
    with stage.guest() as destination:
        destination.set_vcpu_events(events)
        live_on(destination)


@_scenario(_lifecycle("abandoned"))
def abandoned(stage: Stage) -> None:
    """The VM ends while it is pending; nothing was saved."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)


@_scenario(_lifecycle("cleared"), needs=[no_mce, no_triple_fault_event])
def cleared(stage: Stage) -> None:
    """SET_VCPU_EVENTS takes it back; the guest goes on."""
    with stage.guest(triple_fault_event=True) as vcpu:
        raise_by_mce(vcpu)
        vcpu.set_vcpu_events(triple_fault(pending=False))
        live_on(vcpu)


@_scenario(needs=[])
def refused(stage: Stage) -> None:
    """With the capability off nothing can be raised by events."""
    with stage.guest() as vcpu:
        _refused(errno.EINVAL, lambda: vcpu.set_vcpu_events(triple_fault(pending=True)))
        live_on(vcpu)


@_scenario(_lifecycle("delivered", stale=True))
def stale(stage: Stage) -> None:
    """It survives a reset and shuts the new guest down.

    What a VMM sets for a reset leaves requests alone, unless its events have the triple fault's flag.
    """
    with stage.vm() as vm, vm.create_vcpu(0) as vcpu:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        start(vcpu)
        raise_by_mce(vcpu)
        vcpu.set_regs(regs)
        vcpu.set_sregs(sregs)
        vcpu.set_vcpu_events(KvmVcpuEvents())
        shut_down(vcpu)


@_scenario(_lifecycle("lost", saves=1, blind_saves=1), needs=[no_mce, no_triple_fault_event])
def saved_then_blind(stage: Stage) -> None:
    """Saved with it, then without it: the last save decides."""
    with stage.guest(triple_fault_event=True) as vcpu:
        raise_by_mce(vcpu)
        save(vcpu)
        set_triple_fault_event(vcpu.vm, False)
        save_blindly(vcpu)


@_scenario(_lifecycle("handed_over", saves=1, blind_saves=1), needs=[no_mce, no_triple_fault_event])
def blind_then_saved(stage: Stage) -> None:
    """Saved without it, then with it: the last save decides."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        save_blindly(vcpu)
        set_triple_fault_event(vcpu.vm, True)
        save(vcpu)


@_scenario(_lifecycle("delivered", blind_saves=1))
def blind_then_run(stage: Stage) -> None:
    """A blind save that did no harm: the guest stays here."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        save_blindly(vcpu)
        shut_down(vcpu)


_OPEN: Lifecycle = {**_lifecycle("open"), "exposed": False}
_EXPOSED: Lifecycle = {**_lifecycle("open", blind_saves=1), "exposed": True}


@_scenario(_lifecycle("abandoned"), held=(_OPEN,))
def open_(stage: Stage) -> None:
    """It stays pending for as long as the scenario is held."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        stage.hold()


@_scenario(_lifecycle("lost", blind_saves=1), held=(_EXPOSED,))
def exposed(stage: Stage) -> None:
    """The same, after a blind save."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        save_blindly(vcpu)
        stage.hold()


@_scenario(_lifecycle("abandoned"))
def killed(stage: Stage) -> None:
    """The VMM is killed while it is pending."""
    stage.killed("open")


@_scenario(_lifecycle("lost", blind_saves=1))
def killed_exposed(stage: Stage) -> None:
    """The VMM is killed after a blind save."""
    stage.killed("exposed")


@_scenario(code=ENDLESS_IO, needs=[])
def quiet(stage: Stage) -> None:
    """23 exits for I/O, and no request at all."""
    with stage.guest() as vcpu:
        for _ in range(EXITS):
            _run_until(vcpu, Exit.KVM_EXIT_IO)


_HALTED = _lifecycle("delivered")
del _HALTED["userspace_exits"]


@_scenario(_HALTED, needs=[no_mce, no_halted_vcpus])
def halted(stage: Stage) -> None:
    """It wakes a halted vCPU; 5.10 must be woken by hand.

    There KVM_RUN sleeps on, and one more exit to user space is part of the story.
    """
    with stage.guest(irqchip=True) as vcpu:
        vcpu.set_mp_state(MpState.KVM_MP_STATE_HALTED)
        raise_by_mce(vcpu)
        try:
            reason = vcpu.run(timeout_s=0.2)
        except TimedOut:
            vcpu.set_mp_state(MpState.KVM_MP_STATE_RUNNABLE)
            reason = vcpu.run()
        if reason != Exit.KVM_EXIT_SHUTDOWN:
            raise LabError(f"a halted vCPU ended with {_exit_name(vcpu.kvm_run)}")


@_scenario(
    _lifecycle("delivered", vcpu=0, userspace_exits=EXITS),
    _lifecycle("cleared", vcpu=1),
    _lifecycle("handed_over", vcpu=2, saves=1),
    _lifecycle("abandoned", vcpu=3),
    _lifecycle("lost", vcpu=4, blind_saves=1),
    needs=[no_mce, no_triple_fault_event, no_immediate_exit],
)
def five_vcpus(stage: Stage) -> None:
    """Five vCPUs of one VM, each with its own end and thread."""
    together = threading.Barrier(5, timeout=_MEETING_TIMEOUT_S)

    def deliver(vcpu: Vcpu) -> None:
        for _ in range(EXITS):
            bounce(vcpu)
        shut_down(vcpu)

    def clear(vcpu: Vcpu) -> None:
        vcpu.set_vcpu_events(triple_fault(pending=False))
        live_on(vcpu)

    ends: list[Callable[[Vcpu], object]] = [deliver, clear, save, lambda vcpu: None, lambda vcpu: None]

    def play(vcpu: Vcpu, end: Callable[[Vcpu], object]) -> None:
        together.wait()
        raise_by_mce(vcpu)
        end(vcpu)

    with stage.vm(triple_fault_event=True) as vm, contextlib.ExitStack() as stack:
        vcpus = [stack.enter_context(vm.create_vcpu(vcpu_id)) for vcpu_id in range(5)]
        for vcpu in vcpus:
            start(vcpu)
        with ThreadPoolExecutor(5) as threads:
            list(threads.map(play, vcpus, ends))
        set_triple_fault_event(vm, False)  # for all vCPUs at once, so last
        save_blindly(vcpus[4])


_MEETING_TIMEOUT_S = 10.0


@_scenario(_lifecycle("delivered"))
def fd_duplicated(stage: Stage) -> None:
    """One of two fds of the vCPU is closed; it lives on."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        spare = os.dup(vcpu.fd)
        os.close(vcpu.fd)
        vcpu.fd = spare
        shut_down(vcpu)


@_scenario(_lifecycle("abandoned"))
def fds_closed(stage: Stage) -> None:
    """All fds are closed; only kvm_run's mapping keeps the VM.

    The mapping refers to the vCPU's file, and that file to the VM: it ends with the munmap.
    """
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        vcpu.close_fd()
        vcpu.vm.close()
        if "kvm-vcpu" not in Path("/proc/self/maps").read_text():
            raise LabError("closing the fd of a vCPU took the mapping of its kvm_run away")
        vcpu.unmap()


_GENERATION_ENDS: tuple[tuple[Lifecycle | None, Callable[[Vcpu], object]], ...] = (
    (_lifecycle("delivered"), shut_down),
    (_lifecycle("lost", blind_saves=1), save_blindly),
    (_lifecycle("abandoned"), lambda vcpu: None),
    (None, live_on),
)
_GENERATIONS = [_GENERATION_ENDS[vm % len(_GENERATION_ENDS)] for vm in range(GENERATIONS)]
_REUSED: list[Lifecycle] = [{**one, "vm": vm} for vm, (one, _) in enumerate(_GENERATIONS) if one]


@_scenario(*_REUSED, vms=GENERATIONS)
def reused(stage: Stage) -> None:
    """101 VMs in a row: KVM reuses the address of a vCPU."""
    for lifecycle, end in _GENERATIONS:
        with stage.guest() as vcpu:
            if lifecycle:
                raise_by_mce(vcpu)
            end(vcpu)


SCENARIOS: Mapping[str, Scenario] = _scenarios
