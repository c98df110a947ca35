"""Scenarios that raise KVM's other requests on purpose, with counts that are known.

Where KVM raises the same request for reasons of its own (KVM_REQ_EVENT, KVM_REQ_CLOCK_UPDATE), what is raised while no
ioctl is in progress is still exact: ``raised_by`` is "remote" then, and the vCPU's own raises are not.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import cast

from lab.kvm import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SMM,
    MSI_LEVEL,
    MSI_NMI,
    RUN_TIMEOUT_S,
    Cap,
    Exit,
    Kvm,
    KvmCpuidEntry2,
    KvmVcpuEvents,
    LabError,
    MpState,
    Pages,
    TimedOut,
    Vcpu,
    Vm,
    cpuid_of,
)
from lab.scratch import raise_by_mce
from lab.stage import (
    CODE_GPA,
    EXITS,
    Lifecycle,
    Outcome,
    Several,
    Stage,
    bounce,
    check_exit,
    lifecycle,
    no_hardware,
    no_immediate_exit,
    no_mce,
    no_single_step,
    no_smm,
    run_until,
    save_blindly,
    save_events,
    scenario,
    shut_down,
)

# --- needs --------------------------------------------------------------------------------------------------


def no_user_nmi(kvm: Kvm) -> str | None:
    """Say why user space cannot send NMIs."""
    return None if kvm.check_extension(Cap.KVM_CAP_USER_NMI) else "no KVM_CAP_USER_NMI"


def no_set_clock(kvm: Kvm) -> str | None:
    """Say why a VM's clock cannot be set."""
    return None if kvm.check_extension(Cap.KVM_CAP_ADJUST_CLOCK) else "no KVM_CAP_ADJUST_CLOCK"


def no_hyperv(kvm: Kvm) -> str | None:
    """Say why a guest has none of Hyper-V's MSRs."""
    return None if kvm.check_extension(Cap.KVM_CAP_HYPERV) else "no KVM_CAP_HYPERV"


def no_x2apic(kvm: Kvm) -> str | None:
    """Say why a guest cannot reach its local APIC by MSRs.

    CPUID 1, ECX bit 21 (Intel SDM volume 3, "Detecting and Enabling x2APIC Mode").
    """
    return None if kvm.supports(1, "ecx", 21) else "no x2APIC"


def no_tpr_reports(kvm: Kvm) -> str | None:
    """Say why KVM does not report what a guest does with its TPR."""
    return None if kvm.check_extension(Cap.KVM_CAP_VAPIC) else "no KVM_CAP_VAPIC"


def no_split_irqchip(kvm: Kvm) -> str | None:
    """Say why the I/O APIC cannot be in user space, with the local APICs in the kernel."""
    return None if kvm.check_extension(Cap.KVM_CAP_SPLIT_IRQCHIP) else "no KVM_CAP_SPLIT_IRQCHIP"


# --- guests -------------------------------------------------------------------------------------------------

_IDLE_PORT, _HANDLER_PORT = 0x80, 0x81
_HANDLER_AT = 0x40

# Writes to memory at 0x2000 and goes to user space, for ever; to another port in its interrupt handler.
#   fb              sti
#   ff 06 00 20     1: incw 0x2000
#   e6 80              out %al, $0x80
#   eb f8              jmp 1b
# the handler:
#   e6 81           out %al, $0x81
#   cf              iret
_HANDLER = bytes.fromhex("e681 cf")
INTERRUPTED = bytes.fromhex("fb ff060020 e680 ebf8").ljust(_HANDLER_AT, b"\xf4") + _HANDLER
_NMI_VECTOR, _VECTOR = 2, 0x20
_MOST_EXITS = 5  # to the handler, from where the guest may be

# The same, and goes to user space in its interrupt handler only.
#   fb              sti
#   ff 06 00 20     1: incw 0x2000
#   eb fa              jmp 1b
COUNTING = bytes.fromhex("fb ff060020 ebfa").ljust(_HANDLER_AT, b"\xf4") + _HANDLER
_COUNTER_GPA = 0x2000

# Goes to user space, and leaves SMM.
#   e6 81   out %al, $0x81
#   0f aa   rsm
SMI_HANDLER = bytes.fromhex("e681 0faa")
_MOST_EXITS = 5  # to the handler, from where the guest may be


def _handle(vm: Vm, vector: int) -> None:
    """Have the guest's interrupt table lead to the handler."""
    vm.write(4 * vector, struct.pack("<HH", CODE_GPA + _HANDLER_AT, 0))


def _await_counting(vm: Vm) -> None:
    """Wait until the guest COUNTING has counted on: it runs."""
    before, end = vm.read(_COUNTER_GPA, 2), time.monotonic() + RUN_TIMEOUT_S
    while vm.read(_COUNTER_GPA, 2) == before:
        if time.monotonic() > end:
            raise LabError(f"the guest does not count within {RUN_TIMEOUT_S:g} s")
        time.sleep(0)


def _run_to(vcpu: Vcpu, port: int) -> None:
    """Run the guest until it has written to a port."""
    for _ in range(_MOST_EXITS):
        run_until(vcpu, Exit.KVM_EXIT_IO)
        if vcpu.kvm_run.io.port == port:
            return
    raise LabError(f"the guest does not write to port {port:#x}")


def _serviced(request: str, vcpu: int = 0, vm: int = 0, **more: str) -> Lifecycle:
    return cast(Lifecycle, {"request": request, "vm": vm, "vcpu": vcpu, "end": "serviced", **more})


# --- NMI ----------------------------------------------------------------------------------------------------


@scenario(
    *[lifecycle("serviced", request="nmi", raised_by="nmi")] * EXITS,
    needs=[no_user_nmi],
    code=INTERRUPTED,
    about=["nmi"],
)
def nmi(stage: Stage) -> None:
    """23 NMIs from user space, each handled by the guest."""
    with stage.guest() as vcpu:
        _handle(vcpu.vm, _NMI_VECTOR)
        for _ in range(EXITS):
            vcpu.nmi()
            _run_to(vcpu, _HANDLER_PORT)


def no_msi(kvm: Kvm) -> str | None:
    """Say why a message cannot be sent to a local APIC."""
    caps = (Cap.KVM_CAP_IRQCHIP, Cap.KVM_CAP_SIGNAL_MSI, Cap.KVM_CAP_MP_STATE)
    missing = [cap.name for cap in caps if not kvm.check_extension(cap)]
    return f"no {' and no '.join(missing)}" if missing else None


@scenario(
    *[lifecycle("serviced", request="nmi", raised_by="remote")] * EXITS,
    needs=[no_msi],
    code=INTERRUPTED,
    about=["nmi"],
)
def nmi_remote(stage: Stage) -> None:
    """23 NMIs sent to a vCPU that is in user space."""
    with stage.vcpus(1, irqchip=True) as (vcpu,):
        _handle(vcpu.vm, _NMI_VECTOR)
        _run_to(vcpu, _IDLE_PORT)
        for _ in range(EXITS):
            vcpu.vm.signal_msi(0, MSI_NMI)
            _run_to(vcpu, _HANDLER_PORT)


# An emulated guest does not leave: one KVM_RUN raises the request and services it, and has no reading between.
_KICKS_UNSEEN = Outcome(several=(Several(_serviced("nmi"), most=EXITS),))


@scenario(
    several=(Several(_serviced("nmi"), most=EXITS, least_full=1),),
    needs=[no_msi],
    code=COUNTING,
    otherwise=(_KICKS_UNSEEN,),
    about=["nmi"],
)
def nmi_kicked(stage: Stage) -> Outcome | None:
    """23 NMIs kick a vCPU out of its guest."""
    with stage.vcpus(1, irqchip=True) as (vcpu,), ThreadPoolExecutor(1) as thread:
        _handle(vcpu.vm, _NMI_VECTOR)
        for _ in range(EXITS):
            running = thread.submit(_run_to, vcpu, _HANDLER_PORT)
            _await_counting(vcpu.vm)
            vcpu.vm.signal_msi(0, MSI_NMI)
            running.result()
    return _KICKS_UNSEEN if no_hardware(stage.kvm) else None


# Whether KVM_SET_VCPU_EVENTS queues the NMI with a request (7.3 does) or makes it pending without one (6.1): user space
# cannot tell, and the guest gets it either way.
_NMI_RESTORED = Several(_serviced("nmi", vm=1, raised_by="set_vcpu_events"), most=1)


@scenario(
    lifecycle("handed_over", request="nmi", raised_by="nmi", saves=1),
    several=(_NMI_RESTORED,),
    needs=[no_user_nmi],
    code=INTERRUPTED,
    vms=2,
    about=["nmi"],
)
def nmi_handed_over(stage: Stage) -> None:
    """A save carries an NMI to a new VM, which handles it.

    KVM_GET_VCPU_EVENTS moves a queued NMI to where it saves it, and leaves the request pending.
    """
    with stage.guest() as source:
        source.nmi()
        events = save_events(source)
        if not (events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING and events.nmi.pending == 1):
            raise LabError(f"saved events (flags {events.flags:#x}) lack the pending NMI")
    with stage.guest() as destination:
        _handle(destination.vm, _NMI_VECTOR)
        destination.set_vcpu_events(events)
        _run_to(destination, _HANDLER_PORT)


# --- SMI ----------------------------------------------------------------------------------------------------


@scenario(
    *[lifecycle("serviced", request="smi", raised_by="smi")] * EXITS,
    needs=[no_smm],
    code=INTERRUPTED,
    about=["smi"],
)
def smi(stage: Stage) -> None:
    """23 SMIs from user space, each handled by the guest."""
    with stage.with_smm(SMI_HANDLER) as vcpu:
        for _ in range(EXITS):
            vcpu.smi()
            _run_to(vcpu, _HANDLER_PORT)


_SMI_LOST = Outcome((lifecycle("lost", request="smi", raised_by="smi", blind_saves=1),))


# Before Linux commit 1f7becf1b7e2 ("KVM: x86: get smi pending status correctly") (in v5.11) a save left it behind.
@scenario(
    lifecycle("serviced", request="smi", raised_by="smi"),
    needs=[no_smm],
    code=INTERRUPTED,
    otherwise=(_SMI_LOST,),
    about=["smi"],
)
def smi_saved(stage: Stage) -> Outcome | None:
    """A save takes an SMI along, or loses it."""
    with stage.with_smm(SMI_HANDLER) as vcpu:
        vcpu.smi()
        events = save_events(vcpu)
        return None if events.flags & KVM_VCPUEVENT_VALID_SMM and events.smi.pending else _SMI_LOST


# --- events -------------------------------------------------------------------------------------------------


def _settle(vcpu: Vcpu) -> None:
    """Run the guest on until nothing that has just happened keeps KVM_REQ_EVENT pending.

    An emulated IRET that lets interrupts in raises it; the next KVM_RUN services it.
    """
    for _ in range(2):
        _run_to(vcpu, _IDLE_PORT)


@scenario(
    several=(Several(_serviced("event"), EXITS),),
    needs=[],
    code=INTERRUPTED,
    about=["event"],
)
def interrupt(stage: Stage) -> None:
    """23 interrupts from user space, each handled by the guest."""
    with stage.guest() as vcpu:
        _handle(vcpu.vm, _VECTOR)
        _settle(vcpu)
        for _ in range(EXITS):
            vcpu.interrupt(_VECTOR)
            _run_to(vcpu, _HANDLER_PORT)
            _settle(vcpu)


@scenario(
    several=(Several(_serviced("event", raised_by="set_vcpu_events"), EXITS, EXITS), Several(_serviced("event"))),
    needs=[],
    code=INTERRUPTED,
    about=["event"],
)
def interrupt_restored(stage: Stage) -> None:
    """23 interrupts injected by SET_VCPU_EVENTS."""
    with stage.guest() as vcpu:
        _handle(vcpu.vm, _VECTOR)
        _settle(vcpu)
        for _ in range(EXITS):
            vcpu.set_vcpu_events(_injected(_VECTOR))
            _run_to(vcpu, _HANDLER_PORT)
            _settle(vcpu)


def no_mp_state(kvm: Kvm) -> str | None:
    """Say why user space cannot tell KVM what a vCPU is doing."""
    return None if kvm.check_extension(Cap.KVM_CAP_MP_STATE) else "no KVM_CAP_MP_STATE"


@scenario(
    several=(
        *(Several(_serviced("event", raised_by=by), EXITS, EXITS) for by in ("set_regs", "set_sregs", "set_mp_state")),
        Several(_serviced("event")),
    ),
    needs=[no_mp_state],
    code=INTERRUPTED,
    about=["event"],
)
def registers_set(stage: Stage) -> None:
    """23 times SET_REGS, SET_SREGS and SET_MP_STATE.

    Each has KVM look for events again, KVM_SET_SREGS where it brings an interrupt that was to be injected.
    """
    with stage.guest() as vcpu:
        _handle(vcpu.vm, _VECTOR)
        _settle(vcpu)
        for _ in range(EXITS):
            vcpu.set_regs(vcpu.get_regs())
            _settle(vcpu)
            sregs = vcpu.get_sregs()
            sregs.interrupt_bitmap[_VECTOR // 64] |= 1 << _VECTOR % 64
            vcpu.set_sregs(sregs)
            _run_to(vcpu, _HANDLER_PORT)
            _settle(vcpu)
            vcpu.set_mp_state(MpState.KVM_MP_STATE_RUNNABLE)
            _settle(vcpu)


def _injected(vector: int) -> KvmVcpuEvents:
    """Return events in which an interrupt is being delivered."""
    events = KvmVcpuEvents()
    events.interrupt.injected, events.interrupt.nr = 1, vector
    return events


# --- memory -------------------------------------------------------------------------------------------------

SLOT_CHANGES, SLOT_VCPUS = 19, 3
_SLOT_GPA, _SLOT_SIZE = 0x10_0000, 0x1_0000
# What KVM has every vCPU do when a memslot goes: the first of them on Linux 5.10, the second on 6.1 and later, as seen.
_ROOTS = ("mmu_reload", "mmu_free_obsolete_roots")


def _end_of_vm(*requests: str) -> tuple[Several, ...]:
    """Return what Linux 5.10 raises when a VM ends, where no vCPU services it any more: seen by these scenarios."""
    ended: list[Lifecycle] = [{"request": one, "vm": 0, "end": "abandoned"} for one in requests]
    return tuple(Several(one, most=SLOT_VCPUS) for one in ended)


# Besides that KVM flushes, some kernels as often as slots go: on which vCPUs depends on who frees the last root.
_FLUSHES = (*_end_of_vm(*_ROOTS, "tlb_flush"), Several({"request": "tlb_flush", "vm": 0, "end": "serviced"}))


# Each change frees the roots of every vCPU.
_FREED = [
    lifecycle("serviced", request=request, vcpu=vcpu, raised_by="remote")
    for request in _ROOTS
    for vcpu in range(SLOT_VCPUS)
    for _ in range(SLOT_CHANGES)
]


@scenario(
    *_FREED,
    several=_FLUSHES,
    needs=[],
    code=INTERRUPTED,
    about=[*_ROOTS, "tlb_flush"],
)
def slot_deleted(stage: Stage) -> None:
    """A memslot goes 19 times, and every vCPU must hear of it."""
    with stage.vcpus(SLOT_VCPUS) as vcpus:
        vm = vcpus[0].vm
        pages = vm.add_memory(_SLOT_GPA, _SLOT_SIZE)
        _turn(vcpus)
        for _ in range(SLOT_CHANGES):
            vm.remove_memory(pages)
            _turn(vcpus)
            vm.place_memory(pages, _SLOT_GPA)


def _turn(vcpus: Sequence[Vcpu]) -> None:
    """Run each vCPU once."""
    for vcpu in vcpus:
        _run_to(vcpu, _IDLE_PORT)


@scenario(
    *_FREED,
    several=_FLUSHES,
    needs=[],
    code=INTERRUPTED,
    about=[*_ROOTS, "tlb_flush"],
)
def slot_moved(stage: Stage) -> None:
    """A memslot moves 19 times, and every vCPU must hear of it."""
    with stage.vcpus(SLOT_VCPUS) as vcpus:
        vm = vcpus[0].vm
        pages = vm.add_memory(_SLOT_GPA, _SLOT_SIZE)
        _turn(vcpus)
        for change in range(SLOT_CHANGES):
            vm.place_memory(pages, _SLOT_GPA + (change + 1) % 2 * _SLOT_SIZE)
            _turn(vcpus)


@scenario(
    several=(
        *(
            Several(_serviced("tlb_flush", vcpu, raised_by="remote"), SLOT_CHANGES, SLOT_CHANGES + 1)
            for vcpu in range(SLOT_VCPUS)
        ),
        *_end_of_vm("tlb_flush"),
    ),
    needs=[],
    code=INTERRUPTED,
    about=["tlb_flush"],
)
def slot_logged(stage: Stage) -> None:
    """Dirty logging of what the guest writes begins 19 times.

    Where several vCPUs share their page tables, the first one's first KVM_RUN has the others flush, too.
    """
    with stage.vcpus(SLOT_VCPUS) as vcpus:
        vm = vcpus[0].vm
        _turn(vcpus)
        for _ in range(SLOT_CHANGES):
            vm.place_memory(vm.memory[0], 0, flags=KVM_MEM_LOG_DIRTY_PAGES)
            _turn(vcpus)
            vm.place_memory(vm.memory[0], 0)
            _turn(vcpus)


def _while_running(*, least_full: int) -> tuple[Several, ...]:
    most = SLOT_CHANGES * SLOT_VCPUS
    return (
        *(Several({"request": one, "vm": 0, "end": "serviced"}, 0, most, least_full) for one in _ROOTS),
        *_FLUSHES,
    )


# As of _KICKS_UNSEEN.
_UNSEEN_WHILE_RUNNING = Outcome(several=_while_running(least_full=0))


@scenario(
    several=_while_running(least_full=1),
    needs=[],
    code=COUNTING,
    otherwise=(_UNSEEN_WHILE_RUNNING,),
    about=[*_ROOTS, "tlb_flush"],
)
def slot_while_running(stage: Stage) -> Outcome | None:
    """A memslot goes 19 times while three vCPUs run.

    How many of the requests are seen depends on the detail; those that are raised before a vCPU has serviced the last
    one are one.
    """
    with stage.vcpus(SLOT_VCPUS) as vcpus, ThreadPoolExecutor(SLOT_VCPUS) as threads:
        vm = vcpus[0].vm
        pages = vm.add_memory(_SLOT_GPA, _SLOT_SIZE)
        running = [threads.submit(vcpu.run) for vcpu in vcpus]
        try:
            for _ in range(SLOT_CHANGES):
                _await_counting(vm)
                vm.remove_memory(pages)
                vm.place_memory(pages, _SLOT_GPA)
        finally:
            for vcpu in vcpus:
                vcpu.stop()
        for one in running:
            with contextlib.suppress(TimedOut):
                one.result()
    return _UNSEEN_WHILE_RUNNING if no_hardware(stage.kvm) else None


# --- what a guest orders by an MSR, and user space has to do -------------------------------------------------

# Goes to user space for ever. Its handler writes to an MSR.
#   fb              sti
#   e6 80           1: out %al, $0x80
#   eb fc              jmp 1b
# the handler:
#   e6 81           out %al, $0x81
#   0f 30           wrmsr
#   e6 80           out %al, $0x80
#   cf              iret
ORDERING = bytes.fromhex("fb e680 ebfc").ljust(_HANDLER_AT, b"\xf4") + bytes.fromhex("e681 0f30 e680 cf")
_WRMSR_AT = CODE_GPA + _HANDLER_AT + 2
_AFTER_WRMSR = _WRMSR_AT + 2
_MOST_STEPS = 3  # the OUT before it may be one

# Intel SDM volume 3, "x2APIC Register Address Space".
_X2APIC_TPR, _X2APIC_EOI = 0x808, 0x80B
# Hypervisor Top Level Functional Specification: "Reset", "Crash Enlightenments", and CPUID 0x40000001, without which
# KVM refuses a guest those MSRs (Linux commit 8f014550dfb1 ("KVM: x86: hyper-v: Make Hyper-V emulation enablement
# conditional")).
_HV_X64_MSR_RESET, _HV_X64_MSR_CRASH_CTL = 0x4000_0003, 0x4000_0105
_HV_CRASH_NOTIFY = 1 << 63
_HYPERV = KvmCpuidEntry2(function=0x4000_0001, eax=int.from_bytes(b"Hv#1", "little"))


def _order(vcpu: Vcpu, msr: int, value: int = 0) -> None:
    """Have the guest write to an MSR. Single-stepping ends KVM_RUN then, before KVM looks at requests again.

    Where KVM_RUN ends otherwise, that is left to be looked at.
    """
    regs = vcpu.get_regs()
    regs.rcx, regs.rdx, regs.rax = msr, value >> 32, value & 0xFFFF_FFFF
    vcpu.set_regs(regs)
    vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
    for _ in range(_MOST_STEPS):
        if vcpu.run() != Exit.KVM_EXIT_DEBUG or vcpu.get_regs().rip == _AFTER_WRMSR:
            break
    vcpu.set_guest_debug(0)


def _ordered(request: str) -> tuple[Lifecycle, Lifecycle]:
    """Return what becomes of one that KVM services, and of one that a save drops."""
    return (
        lifecycle("serviced", request=request, raised_by="kvm_run", userspace_exits=1),
        lifecycle("lost", request=request, vm=1, raised_by="kvm_run", userspace_exits=1, blind_saves=1),
    )


def _hyperv(stage: Stage, msr: int, value: int, event: int) -> None:
    """Give an order in two VMs; let KVM tell user space of the first one, and save the second VM instead."""
    for saved in (False, True):
        with stage.guest(rip=_WRMSR_AT) as vcpu:
            vcpu.set_cpuid(cpuid_of(_HYPERV))
            _order(vcpu, msr, value)
            check_exit(vcpu, Exit.KVM_EXIT_DEBUG)
            if saved:
                save_blindly(vcpu)
                continue
            run_until(vcpu, Exit.KVM_EXIT_SYSTEM_EVENT)
            if vcpu.kvm_run.system_event.type != event:
                raise LabError(f"KVM_EXIT_SYSTEM_EVENT has type {vcpu.kvm_run.system_event.type}, not {event}")
            _run_to(vcpu, _IDLE_PORT)


@scenario(
    *_ordered("hv_reset"),
    needs=[no_hyperv, no_single_step],
    code=ORDERING,
    vms=2,
    about=["hv_reset"],
)
def hv_reset(stage: Stage) -> None:
    """Two guests order their reset; a save drops one order."""
    _hyperv(stage, _HV_X64_MSR_RESET, 1, KVM_SYSTEM_EVENT_RESET)


@scenario(
    *_ordered("hv_crash"),
    needs=[no_hyperv, no_single_step],
    code=ORDERING,
    vms=2,
    crashes=((0, 0),),
    about=["hv_crash"],
)
def hv_crash(stage: Stage) -> None:
    """Two guests say that they crashed; a save drops one word."""
    _hyperv(stage, _HV_X64_MSR_CRASH_CTL, _HV_CRASH_NOTIFY, KVM_SYSTEM_EVENT_CRASH)


# Where hardware has the TPR (VMX's virtual x2APIC, SVM's x2AVIC), KVM does not see the guest use it.
_UNREPORTED = Outcome()


@scenario(
    *_ordered("report_tpr_access"),
    needs=[no_msi, no_x2apic, no_tpr_reports, no_single_step],
    code=ORDERING,
    vms=2,
    otherwise=(_UNREPORTED,),
    about=["report_tpr_access"],
)
def tpr_access(stage: Stage) -> Outcome | None:
    """Two guests use their TPR; a save drops one report."""
    reported = False
    for saved in (False, True):
        with stage.guest(irqchip=True, rip=_WRMSR_AT) as vcpu:
            vcpu.set_cpuid(stage.kvm.get_supported_cpuid())
            vcpu.enable_x2apic()
            vcpu.report_tpr_access()
            _order(vcpu, _X2APIC_TPR)
            check_exit(vcpu, Exit.KVM_EXIT_DEBUG)
            if saved:
                save_blindly(vcpu)
                continue
            reported = vcpu.run() == Exit.KVM_EXIT_TPR_ACCESS
            if reported:
                _run_to(vcpu, _IDLE_PORT)
            else:
                check_exit(vcpu, Exit.KVM_EXIT_IO)
    return None if reported else _UNREPORTED


# Where KVM learns of the end before single-stepping ends KVM_RUN: of hardware that has the local APIC, or, where KVM
# emulates guests, as the guest gets the interrupt.
_TOLD_FIRST = Outcome(several=tuple(Several(_serviced("ioapic_eoi_exit", vm=vm), most=1) for vm in range(2)))


@scenario(
    *_ordered("ioapic_eoi_exit"),
    needs=[no_msi, no_x2apic, no_split_irqchip, no_single_step],
    code=ORDERING,
    vms=2,
    otherwise=(_TOLD_FIRST,),
    about=["ioapic_eoi_exit"],
)
def interrupt_ended(stage: Stage) -> Outcome | None:
    """Two guests end a level interrupt; a save drops one end."""
    told_first = False
    for saved in (False, True):
        with stage.guest(split_irqchip=True) as vcpu:
            _handle(vcpu.vm, _VECTOR)
            vcpu.set_cpuid(stage.kvm.get_supported_cpuid())
            vcpu.enable_x2apic()
            vcpu.enable_lapic()
            vcpu.vm.route_msi(0, 0, MSI_LEVEL | _VECTOR)
            _run_to(vcpu, _IDLE_PORT)
            vcpu.vm.signal_msi(0, MSI_LEVEL | _VECTOR)
            _run_to(vcpu, _HANDLER_PORT)
            _order(vcpu, _X2APIC_EOI)
            if vcpu.kvm_run.exit_reason == Exit.KVM_EXIT_IOAPIC_EOI:
                told_first = True
            else:
                check_exit(vcpu, Exit.KVM_EXIT_DEBUG)
                if saved:
                    save_blindly(vcpu)
                    continue
                run_until(vcpu, Exit.KVM_EXIT_IOAPIC_EOI)
            if vcpu.kvm_run.eoi.vector != _VECTOR:
                raise LabError(f"KVM_EXIT_IOAPIC_EOI has vector {vcpu.kvm_run.eoi.vector:#x}, not {_VECTOR:#x}")
            _run_to(vcpu, _IDLE_PORT)
    return _TOLD_FIRST if told_first else None


# --- the end ------------------------------------------------------------------------------------------------


def _abandoned(request: str, vm: int) -> Lifecycle:
    return {"request": request, "vm": vm, "vcpu": 0, "raised_by": "remote", "end": "abandoned"}


@scenario(
    *(_abandoned(request, vm) for vm in range(2) for request in (*_ROOTS, "clock_update")),
    several=tuple(
        several
        for vm in range(2)
        for several in (
            Several({"request": "event", "vm": vm, "end": "abandoned"}, 1, 1),
            Several(_serviced("event", vm=vm)),
            Several(_serviced("clock_update", vm=vm)),
            Several({"request": "tlb_flush", "vm": vm}),
        )
    ),
    needs=[no_set_clock],
    code=INTERRUPTED,
    vms=2,
    about=[*_ROOTS, "tlb_flush", "clock_update", "event"],
)
def dropped(stage: Stage) -> None:
    """VMs end with requests pending that carry no state: no loss.

    One of them after a save, which could not have carried them.
    """
    for saved in (False, True):
        with stage.guest() as vcpu:
            pages = vcpu.vm.add_memory(_SLOT_GPA, _SLOT_SIZE)
            _settle(vcpu)
            vcpu.set_vcpu_events(KvmVcpuEvents())
            vcpu.vm.set_clock(_CLOCK_NS)
            vcpu.vm.remove_memory(pages)
            if saved:
                save_events(vcpu)


# --- immediate exits ----------------------------------------------------------------------------------------

STORM = 1009


@scenario(
    lifecycle("delivered", userspace_exits=STORM),
    lifecycle("serviced", request="nmi", raised_by="nmi", userspace_exits=STORM + 1),
    needs=[no_mce, no_user_nmi, no_immediate_exit],
    code=INTERRUPTED,
    about=["nmi"],
)
def exit_storm(stage: Stage) -> None:
    """Two requests wait across 1009 immediate exits.

    KVM looks for the triple fault first, and its KVM_EXIT_SHUTDOWN leaves the NMI pending once more.
    """
    with stage.guest() as vcpu:
        _handle(vcpu.vm, _NMI_VECTOR)
        vcpu.nmi()
        raise_by_mce(vcpu)
        for _ in range(STORM):
            bounce(vcpu)
        shut_down(vcpu)
        _run_to(vcpu, _HANDLER_PORT)


# --- clock --------------------------------------------------------------------------------------------------

CLOCKS, CLOCKED_VCPUS = 29, 3
_CLOCK_NS = 1_000_000_000
_CLOCKS_OF_KVM = 2  # before the vCPU's first KVM_RUN, and after its last; others are pending with a KVM_SET_CLOCK's


@scenario(
    several=(
        *(
            Several({"request": "clock_update", "vm": 0, "vcpu": vcpu}, CLOCKS, CLOCKS + _CLOCKS_OF_KVM, stays=True)
            for vcpu in range(CLOCKED_VCPUS)
        ),
        *(Several(_serviced("clock_update", vcpu)) for vcpu in range(CLOCKED_VCPUS)),
        Several({"request": "clock_update", "vm": 0, "end": "abandoned"}, most=CLOCKED_VCPUS),
    ),
    needs=[no_set_clock],
    code=INTERRUPTED,
    about=["clock_update"],
)
def clock_update(stage: Stage) -> None:
    """29 times KVM_SET_CLOCK, of which each vCPU must hear.

    No vCPU is in an ioctl then: the request is there when its next one begins. KVM itself raises some when a vCPU
    begins or changes its CPU, for that vCPU and, at once or 100 ms later (kvmclock_update_fn), for the others. One of
    those that comes inside KVM_RUN after requests were looked at is still pending in user space, where KVM_SET_CLOCK
    then raises what is raised already. That is one lifecycle, also where the same KVM_RUN had serviced an earlier one:
    so what is counted is not lifecycles but stays in user space with the request pending.
    """
    with stage.vcpus(CLOCKED_VCPUS) as vcpus:
        for vcpu in vcpus:
            _run_to(vcpu, _IDLE_PORT)
        for turn in range(CLOCKS):
            vcpus[0].vm.set_clock((turn + 1) * _CLOCK_NS)
            for vcpu in vcpus:
                _run_to(vcpu, _IDLE_PORT)


# --- load ---------------------------------------------------------------------------------------------------

BUSY_VCPUS, BUSY_S = 4, 1.0
_IPI_VECTOR = 0x21

# Goes to user space, interrupts the next vCPU and waits for an interrupt, for ever. DS is where the local APIC is, EBX
# the next vCPU's APIC id in bits 24 to 31.
#   fb                            sti
#   e6 80                         1: out %al, $0x80
#   66 89 1e 10 03                   mov %ebx, 0x310          interrupt command register: destination
#   66 c7 06 00 03 21 00 00 00       movl $0x21, 0x300        fixed delivery of vector 0x21
#   f4                               hlt
#   eb ed                            jmp 1b
# the handler of NMIs:
#   e6 81                         out %al, $0x81
#   cf                            iret
# the handler of interrupts:
#   66 c7 06 b0 00 00 00 00 00    movl $0, 0xb0               end of interrupt
#   cf                            iret
BUSY = (
    bytes.fromhex("fb e680 66891e1003 66c706000321000000 f4 ebed").ljust(_HANDLER_AT, b"\xf4")
    + _HANDLER
    + bytes.fromhex("66c706b00000000000 cf")
)
_INTERRUPT_HANDLER_AT = _HANDLER_AT + len(_HANDLER)
_LAPIC_GPA = 0xFEE0_0000


@scenario(needs=[no_msi, no_set_clock], code=BUSY)
def busy(stage: Stage) -> None:
    """Four vCPUs at work for a second: to measure latencies.

    They go to user space, sleep, and wake each other. NMIs, interrupts, memslots that go and a clock that is set
    disturb them; nothing raises a triple fault.
    """
    with stage.vcpus(BUSY_VCPUS, irqchip=True) as vcpus, ThreadPoolExecutor(BUSY_VCPUS) as threads:
        vm = vcpus[0].vm
        _handle(vm, _NMI_VECTOR)
        for vector in (_VECTOR, _IPI_VECTOR):
            vm.write(4 * vector, struct.pack("<HH", CODE_GPA + _INTERRUPT_HANDLER_AT, 0))
        pages = vm.add_memory(_SLOT_GPA, _SLOT_SIZE)
        for number, vcpu in enumerate(vcpus):
            sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
            sregs.ds.base = _LAPIC_GPA
            regs.rbx = (number + 1) % BUSY_VCPUS << 24
            vcpu.set_sregs(sregs)
            vcpu.set_regs(regs)
        exits, over = threading.Semaphore(0), threading.Event()

        def work(vcpu: Vcpu) -> None:
            while not over.is_set():
                run_until(vcpu, Exit.KVM_EXIT_IO)
                exits.release()

        working = [threads.submit(work, vcpu) for vcpu in vcpus]
        try:
            _disturb(vm, pages, exits, working)
        finally:
            over.set()
            while wait(working, _DISTURB_S).not_done:
                for vcpu_id in range(BUSY_VCPUS):
                    vm.signal_msi(vcpu_id, _VECTOR)
        for one in working:
            one.result()


_DISTURB_S = 0.005  # without an exit: all sleep


def _disturb(vm: Vm, pages: Pages, exits: threading.Semaphore, working: Sequence[Future[None]]) -> None:
    """Do something to the vCPUs after each of their exits, until time is up or one of them has failed."""
    end = time.monotonic() + BUSY_S
    for turn in itertools.count():
        exits.acquire(timeout=_DISTURB_S)
        if time.monotonic() > end or any(one.done() for one in working):
            return
        vcpu_id = turn % BUSY_VCPUS
        if turn % 61 == 0:
            vm.set_clock((turn + 1) * _CLOCK_NS)
        elif turn % 31 == 0:
            vm.remove_memory(pages)
            vm.place_memory(pages, _SLOT_GPA)
        else:
            vm.signal_msi(vcpu_id, MSI_NMI if turn % 7 == 0 else _VECTOR)
