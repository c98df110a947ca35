"""Scenarios: what a VMM can do with a pending triple fault, and what must become of it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path

from lab import userfault
from lab.kvm import (
    KICK,
    KVM_EXIT_IO_IN,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_MEM_LOG_DIRTY_PAGES,
    RUN_TIMEOUT_S,
    CallFailed,
    Cap,
    Exit,
    KvmVcpuEvents,
    LabError,
    MpState,
    Pages,
    TimedOut,
    Vcpu,
)
from lab.scratch import raise_by_mce
from lab.stage import (
    AFTER_RSM,
    DIRTY_GPA,
    DIRTY_PAGES,
    DIRTY_SIZE,
    ENDLESS_IO,
    EXITS,
    GENERATIONS,
    HYPERVISOR,
    L2_IN,
    L2_TRIPLE_FAULT,
    OWN_TRIPLE_FAULT,
    READ_AND_FAULT,
    RING_SIZE,
    RSM,
    SVM_EXIT_SHUTDOWN,
    Lifecycle,
    Outcome,
    Stage,
    bounce,
    check_exit,
    check_written,
    exit_name,
    impossible_state,
    inject_double_fault,
    lifecycle,
    live_on,
    must_refuse,
    no_dirty_ring,
    no_halted_vcpus,
    no_hardware,
    no_immediate_exit,
    no_mce,
    no_nested_svm,
    no_single_step,
    no_smm,
    no_sync_regs,
    no_triple_fault_event,
    no_userfault,
    run_until,
    save,
    save_blindly,
    scenario,
    set_triple_fault_event,
    shut_down,
    start,
    start_protected,
    triple_fault,
)


@scenario(lifecycle("delivered"))
def delivered(stage: Stage) -> None:
    """A machine check raises it, KVM_RUN delivers it."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        shut_down(vcpu)


@scenario(lifecycle("delivered", raised_by="set_vcpu_events"), needs=[no_triple_fault_event])
def delivered_by_events(stage: Stage) -> None:
    """SET_VCPU_EVENTS raises it, KVM_RUN delivers it."""
    with stage.guest(triple_fault_event=True) as vcpu:
        vcpu.set_vcpu_events(triple_fault(pending=True))
        shut_down(vcpu)


@scenario(lifecycle("delivered"), lifecycle("delivered"))
def delivered_twice(stage: Stage) -> None:
    """Two requests of one vCPU, one after the other."""
    with stage.guest() as vcpu:
        for _ in range(2):
            raise_by_mce(vcpu)
            shut_down(vcpu)


@scenario(lifecycle("delivered", userspace_exits=EXITS), needs=[no_mce, no_immediate_exit])
def pending(stage: Stage) -> None:
    """It waits across 23 exits to user space."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        for _ in range(EXITS):
            bounce(vcpu)
        shut_down(vcpu)


@scenario(lifecycle("delivered", userspace_exits=1), needs=[no_mce, no_sync_regs])
def pending_bad_registers(stage: Stage) -> None:
    """It waits while KVM_RUN refuses kvm_run's registers.

    kvm_arch_vcpu_ioctl_run() checks kvm_valid_regs before it enters the guest (KVM_CAP_SYNC_REGS).
    """
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        vcpu.kvm_run.kvm_valid_regs = _UNKNOWN_REGISTERS
        must_refuse(errno.EINVAL, vcpu.run)
        vcpu.kvm_run.kvm_valid_regs = 0
        shut_down(vcpu)


# Far from KVM_SYNC_X86_VALID_FIELDS; Linux 6.12 takes bits above this one without a word: seen by this scenario.
_UNKNOWN_REGISTERS = 1 << 31


@scenario(
    lifecycle("handed_over", saves=1),
    lifecycle("delivered", vm=1, raised_by="set_vcpu_events"),
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


@scenario(lifecycle("lost", blind_saves=1), vms=2)
def lost(stage: Stage) -> None:
    """A save drops it: the bug. The new guest lives on."""
    with stage.guest() as source:
        raise_by_mce(source)
        events = save_blindly(source)
    with stage.guest() as destination:
        destination.set_vcpu_events(events)
        live_on(destination)


@scenario(lifecycle("abandoned"))
def abandoned(stage: Stage) -> None:
    """The VM ends while it is pending; nothing was saved."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)


@scenario(lifecycle("cleared"), needs=[no_mce, no_triple_fault_event])
def cleared(stage: Stage) -> None:
    """SET_VCPU_EVENTS takes it back; the guest goes on."""
    with stage.guest(triple_fault_event=True) as vcpu:
        raise_by_mce(vcpu)
        vcpu.set_vcpu_events(triple_fault(pending=False))
        live_on(vcpu)


@scenario(needs=[])
def refused(stage: Stage) -> None:
    """With the capability off nothing can be raised by events."""
    with stage.guest() as vcpu:
        must_refuse(errno.EINVAL, lambda: vcpu.set_vcpu_events(triple_fault(pending=True)))
        live_on(vcpu)


@scenario(lifecycle("delivered", stale=True))
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


@scenario(lifecycle("lost", saves=1, blind_saves=1), needs=[no_mce, no_triple_fault_event])
def saved_then_blind(stage: Stage) -> None:
    """Saved with it, then without it: the last save decides."""
    with stage.guest(triple_fault_event=True) as vcpu:
        raise_by_mce(vcpu)
        save(vcpu)
        set_triple_fault_event(vcpu.vm, False)
        save_blindly(vcpu)


@scenario(lifecycle("handed_over", saves=1, blind_saves=1), needs=[no_mce, no_triple_fault_event])
def blind_then_saved(stage: Stage) -> None:
    """Saved without it, then with it: the last save decides."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        save_blindly(vcpu)
        set_triple_fault_event(vcpu.vm, True)
        save(vcpu)


@scenario(lifecycle("delivered", blind_saves=1))
def blind_then_run(stage: Stage) -> None:
    """A snapshot without it: each copy of it lives on."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        save_blindly(vcpu)
        shut_down(vcpu)


_OPEN: Lifecycle = {**lifecycle("open"), "exposed": False}
_EXPOSED: Lifecycle = {**lifecycle("open", blind_saves=1), "exposed": True}


@scenario(lifecycle("abandoned"), held=(_OPEN,))
def open_(stage: Stage) -> None:
    """It stays pending for as long as the scenario is held."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        stage.hold()


@scenario(lifecycle("lost", blind_saves=1), held=(_EXPOSED,))
def exposed(stage: Stage) -> None:
    """The same, after a blind save."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        save_blindly(vcpu)
        stage.hold()


@scenario(lifecycle("abandoned"))
def killed(stage: Stage) -> None:
    """The VMM is killed while it is pending."""
    stage.killed("open")


@scenario(lifecycle("lost", blind_saves=1))
def killed_exposed(stage: Stage) -> None:
    """The VMM is killed after a blind save."""
    stage.killed("exposed")


@scenario(code=ENDLESS_IO, needs=[])
def quiet(stage: Stage) -> None:
    """23 exits for I/O, and no request at all."""
    with stage.guest() as vcpu:
        for _ in range(EXITS):
            run_until(vcpu, Exit.KVM_EXIT_IO)


# On Linux 5.10 a triple fault does not wake a halted vCPU, on 6.1 and later it does: seen by this scenario.
_WOKEN_BY_HAND = Outcome((lifecycle("delivered", userspace_exits=1),))


@scenario(lifecycle("delivered"), needs=[no_mce, no_halted_vcpus], held=(_OPEN,), otherwise=(_WOKEN_BY_HAND,))
def halted(stage: Stage) -> Outcome | None:
    """It wakes a halted vCPU, or is stuck: held only if stuck.

    On 5.10 KVM_RUN sleeps on with the request pending, until user space wakes it.
    """
    with stage.guest(irqchip=True) as vcpu, ThreadPoolExecutor(1) as thread:
        vcpu.set_mp_state(MpState.KVM_MP_STATE_HALTED)
        raise_by_mce(vcpu)
        running = thread.submit(vcpu.run, _STUCK_LIMIT_S)
        try:
            running.result(_WAKES_WITHIN_S)
        except NotYet:
            try:
                stage.hold()
            finally:
                vcpu.stop()
        with contextlib.suppress(TimedOut):
            running.result()
            check_exit(vcpu, Exit.KVM_EXIT_SHUTDOWN)
            return None
        vcpu.set_mp_state(MpState.KVM_MP_STATE_RUNNABLE)
        shut_down(vcpu)
        return _WOKEN_BY_HAND


_WAKES_WITHIN_S = 1.0
_STUCK_LIMIT_S = 600.0  # of standing still


@scenario(
    lifecycle("delivered", vcpu=0, userspace_exits=EXITS),
    lifecycle("cleared", vcpu=1),
    lifecycle("handed_over", vcpu=2, saves=1),
    lifecycle("abandoned", vcpu=3),
    lifecycle("lost", vcpu=4, blind_saves=1),
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

# Where the emulation of RSM fails, KVM raises a triple fault since Linux commit 25b17226cd9a ("KVM: x86: Emulate
# triple fault shutdown if RSM emulation fails") (in v5.14). Before, KVM_RUN returned an emulation error.
_NO_REQUEST = Outcome()


def _gives_up(vcpu: Vcpu) -> bool:
    """Tell whether KVM_RUN returned that an instruction cannot be emulated."""
    kvm_run = vcpu.kvm_run
    return (kvm_run.exit_reason, kvm_run.internal.suberror) == (
        Exit.KVM_EXIT_INTERNAL_ERROR,
        KVM_INTERNAL_ERROR_EMULATION,
    )


@scenario(lifecycle("delivered", raised_by="rsm"), needs=[no_smm], code=RSM, otherwise=(_NO_REQUEST,))
def rsm(stage: Stage) -> Outcome | None:
    """RSM raises it: the saved state is impossible."""
    with stage.smm() as (vcpu, saved_state):
        saved_state.write(0, impossible_state())
        vcpu.run()
        if _gives_up(vcpu):
            return _NO_REQUEST
        check_exit(vcpu, Exit.KVM_EXIT_SHUTDOWN)
        return None


@scenario(
    lifecycle("delivered", raised_by="rsm", userspace_exits=1),
    needs=[no_smm, no_single_step],
    code=RSM,
    otherwise=(_NO_REQUEST,),
)
def rsm_single_step(stage: Stage) -> Outcome | None:
    """RSM raises it, and single-stepping ends KVM_RUN first."""
    with stage.smm() as (vcpu, saved_state):
        saved_state.write(0, impossible_state())
        vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
        vcpu.run()
        if _gives_up(vcpu):
            return _NO_REQUEST
        check_exit(vcpu, Exit.KVM_EXIT_DEBUG)
        vcpu.set_guest_debug(0)
        shut_down(vcpu)
        return None


@scenario(
    lifecycle("delivered", raised_by="rsm", userspace_exits=1),
    needs=[no_smm, no_userfault],
    code=RSM,
    otherwise=(_NO_REQUEST,),
)
def rsm_signal(stage: Stage) -> Outcome | None:
    """RSM raises it, and a signal ends KVM_RUN first."""
    with stage.smm() as (vcpu, saved_state):
        if not _left_pending_by_signal(vcpu, saved_state):
            return _NO_REQUEST
        shut_down(vcpu)
        return None


@scenario(
    lifecycle("lost", raised_by="rsm", userspace_exits=1, blind_saves=1),
    needs=[no_smm, no_userfault],
    code=RSM,
    vms=2,
    otherwise=(_NO_REQUEST,),
)
def rsm_lost(stage: Stage) -> Outcome | None:
    """The same, then a save drops it: the bug as it was reported."""
    with stage.smm() as (source, saved_state):
        pending = _left_pending_by_signal(source, saved_state)
        events = save_blindly(source)
    with stage.guest(rip=AFTER_RSM) as destination:
        if pending:  # else the source is stuck at its RSM, and so would be this one
            destination.set_vcpu_events(events)
        live_on(destination)
    return None if pending else _NO_REQUEST


def _left_pending_by_signal(vcpu: Vcpu, saved_state: Pages) -> bool:
    """Signal a vCPU's thread while its RSM reads the saved state; return whether KVM_RUN left a request pending.

    KVM looks for signals once the instruction has been emulated, and for requests at the next entry only.
    """
    fault = userfault.UserFault(saved_state)
    vcpu_thread = threading.get_ident()

    def interrupt() -> None:
        with fault:  # however this ends, KVM does not wait any longer
            fault.wait(RUN_TIMEOUT_S)
            signal.pthread_kill(vcpu_thread, KICK)
            fault.fill(impossible_state())

    with ThreadPoolExecutor(1) as helper:
        interrupted = helper.submit(interrupt)
        try:
            vcpu.run()
        except CallFailed as error:
            if error.errno != errno.EINTR:
                raise
            interrupted.result()
            return True
        interrupted.result()
    if not _gives_up(vcpu):
        raise LabError(f"after a signal KVM_RUN returned {exit_name(vcpu.kvm_run)}, not -EINTR")
    return False


@contextlib.contextmanager
def _faulting_twice(stage: Stage) -> Iterator[Vcpu]:
    """A guest that waits for what it reads, with a double fault that a second fault will meet."""
    with stage.guest() as vcpu:
        sregs = vcpu.get_sregs()
        sregs.ds.base = _NO_MEMORY_GPA
        sregs.ds.selector = _NO_MEMORY_GPA >> 4
        sregs.es.limit = 0xFF
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rdi = 0x1000
        vcpu.set_regs(regs)
        run_until(vcpu, Exit.KVM_EXIT_MMIO)
        inject_double_fault(vcpu)
        yield vcpu


_NO_MEMORY_GPA = 0x2_0000


@scenario(lifecycle("delivered", raised_by="exception"), needs=[], code=READ_AND_FAULT)
def double_fault(stage: Stage) -> None:
    """A fault while a double fault is delivered raises it."""
    with _faulting_twice(stage) as vcpu:
        shut_down(vcpu)


@scenario(
    lifecycle("delivered", raised_by="exception", userspace_exits=1),
    needs=[no_immediate_exit],
    code=READ_AND_FAULT,
)
def double_fault_pending(stage: Stage) -> None:
    """The same, and KVM_RUN returns before it is delivered.

    KVM completes what user space read for the guest, and that is what faults, before it looks at immediate_exit.
    """
    with _faulting_twice(stage) as vcpu:
        bounce(vcpu)
        shut_down(vcpu)


@scenario(lifecycle("delivered", userspace_exits=1), needs=[no_mce, no_dirty_ring], code=DIRTY_PAGES)
def dirty_ring_full(stage: Stage) -> None:
    """It waits while the dirty ring is full."""
    with stage.vm() as vm:
        vm.enable_cap(Cap.KVM_CAP_DIRTY_LOG_RING, RING_SIZE)
        vm.add_memory(DIRTY_GPA, DIRTY_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)
        with vm.create_vcpu(0) as vcpu:
            start_protected(vcpu)
            run_until(vcpu, Exit.KVM_EXIT_DIRTY_RING_FULL)
            raise_by_mce(vcpu)
            run_until(vcpu, Exit.KVM_EXIT_DIRTY_RING_FULL)
            if not vcpu.harvest(RING_SIZE):
                raise LabError("the dirty ring is full, and has no dirty page in it")
            vm.reset_dirty_rings()
            shut_down(vcpu)


@scenario(needs=[no_hardware], code=OWN_TRIPLE_FAULT, hardware_shutdowns=((0, 0),))
def hardware(stage: Stage) -> None:
    """The guest's own triple fault: a shutdown without a request."""
    with stage.guest() as vcpu:
        shut_down(vcpu)


_ALL_SHUT_DOWN = Outcome((lifecycle("delivered", nested=True),))
_REFLECTED = Outcome((lifecycle("reflected", nested=True),))


# Before Linux commit cb6a32c2b877 ("KVM: x86: Handle triple fault in L2 without killing L1") (after v5.10) KVM shut
# the whole VM down. From then until commit 92e7d5c83aff ("KVM: x86: allow L1 to not intercept triple fault") (in
# v6.1) L1 got the #VMEXIT whether it asked or not.
@scenario(*_REFLECTED.lifecycles, needs=[no_mce, no_nested_svm], code=HYPERVISOR, otherwise=(_ALL_SHUT_DOWN,))
def nested_reflected(stage: Stage) -> Outcome | None:
    """Raised in L2, it becomes the #VMEXIT that L1 asked for.

    Where KVM does not know that, it shuts the whole VM down.
    """
    with stage.hypervisor(L2_IN, intercept=True) as vcpu:
        _wait_for_l2(vcpu)
        raise_by_mce(vcpu)
        if vcpu.run() == Exit.KVM_EXIT_SHUTDOWN:
            return _ALL_SHUT_DOWN
        _check_reflected(vcpu)
        return None


@scenario(*_ALL_SHUT_DOWN.lifecycles, needs=[no_mce, no_nested_svm], code=HYPERVISOR, otherwise=(_REFLECTED,))
def nested_shutdown(stage: Stage) -> Outcome | None:
    """Raised in L2, of which L1 did not ask: all shut down."""
    with stage.hypervisor(L2_IN, intercept=False) as vcpu:
        _wait_for_l2(vcpu)
        raise_by_mce(vcpu)
        if vcpu.run() == Exit.KVM_EXIT_SHUTDOWN:
            return None
        _check_reflected(vcpu)
        return _REFLECTED


@scenario(needs=[no_nested_svm], code=HYPERVISOR)
def nested_hw_reflected(stage: Stage) -> None:
    """L2's own triple fault is the #VMEXIT that L1 asked for."""
    with stage.hypervisor(L2_TRIPLE_FAULT, intercept=True) as vcpu:
        vcpu.run()
        _check_reflected(vcpu)


@scenario(needs=[no_nested_svm], code=HYPERVISOR, hardware_shutdowns=((0, 0),))
def nested_hw_shutdown(stage: Stage) -> None:
    """L2's own triple fault, of which L1 did not ask."""
    with stage.hypervisor(L2_TRIPLE_FAULT, intercept=False) as vcpu:
        shut_down(vcpu)


def _wait_for_l2(vcpu: Vcpu) -> None:
    run_until(vcpu, Exit.KVM_EXIT_IO)
    if vcpu.kvm_run.io.direction != KVM_EXIT_IO_IN:
        raise LabError(f"L1 has no guest: VMRUN gave exit code {vcpu.io_data().hex()}")


def _check_reflected(vcpu: Vcpu) -> None:
    check_exit(vcpu, Exit.KVM_EXIT_IO)
    check_written(vcpu, SVM_EXIT_SHUTDOWN)


@scenario(lifecycle("delivered"))
def fd_duplicated(stage: Stage) -> None:
    """One of two fds of the vCPU is closed; it lives on."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        spare = os.dup(vcpu.fd)
        os.close(vcpu.fd)
        vcpu.fd = spare
        shut_down(vcpu)


@scenario(lifecycle("abandoned"))
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
    (lifecycle("delivered"), shut_down),
    (lifecycle("lost", blind_saves=1), save_blindly),
    (lifecycle("abandoned"), lambda vcpu: None),
    (None, live_on),
)
_GENERATIONS = [_GENERATION_ENDS[vm % len(_GENERATION_ENDS)] for vm in range(GENERATIONS)]
_REUSED: list[Lifecycle] = [{**one, "vm": vm} for vm, (one, _) in enumerate(_GENERATIONS) if one]


@scenario(*_REUSED, vms=GENERATIONS)
def reused(stage: Stage) -> None:
    """101 VMs in a row: KVM reuses the address of a vCPU."""
    for raised, end in _GENERATIONS:
        with stage.guest() as vcpu:
            if raised:
                raise_by_mce(vcpu)
            end(vcpu)
