"""What becomes of a request: each rule a small function over one event, in the order and the words of docs/proof.md.

The pass (analysis/walk.py) calls them; they are compiled, and the same source runs uncompiled. They work on the
records of analysis/columns.py: ``vcpu`` is what is known of it before the event, ``pending`` one of its requests.
"""

from __future__ import annotations

import numpy as np

from analysis.compiled import compiled
from analysis.events import CREATED, DEAD, NESTED, SYNC, Array, Event, fault_in_payload, holds, low, succeeded
from analysis.memory import Record
from analysis.words import IOCTLS, SITES, By, Place, Source, Verdict, Why
from probes.requests import STATE, TRIPLE_FAULT, stateless
from probes.schema import (
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    RAN,
    SEQUENCE,
    VALID_TRIPLE_FAULT,
    Kind,
    Site,
    SystemEvent,
)

# What the last save did to a request.
NO_SAVE, CARRIED, BLIND, UNSURE = range(4)

_DEATHS = np.array(
    [
        (SystemEvent.CRASH, Source.CRASH),
        (SystemEvent.SEV_TERM, Source.SEV_TERM),
        (SystemEvent.TDX_FATAL, Source.TDX_FATAL),
    ],
    np.int64,
)

# What keeps a request that a save must keep: probes.requests.State.carried_by, and two sorts that have none.
BY_FLAG, BY_EVENTS, BY_NOTHING, HARMLESS, UNNAMED = range(5)
_CARRIERS = {"vcpu_events_flag": BY_FLAG, "vcpu_events": BY_EVENTS, "nothing": BY_NOTHING}


def carrier(name: str) -> int:
    """Return what keeps a request in a save."""
    state = STATE.get(name)
    if state is not None:
        return _CARRIERS[state.carried_by]
    return HARMLESS if stateless(name) else UNNAMED


# --- 1. It was pending --------------------------------------------------------------------------------------------


@compiled
def raised_by(bit: int, event: Event) -> int:
    """Who raised it: the ioctl, or the function of KVM, that lies between a reading without it and this one with it."""
    if event.kind == Kind.VCPU_NEW:
        # KVM_CREATE_VCPU; of a vCPU that was there when tracing began nobody knows.
        return By.IOCTL if event.flags & CREATED else By.UNKNOWN
    if event.kind == Kind.RESTORE:
        return By.SET_VCPU_EVENTS
    if event.kind == Kind.IOCTL_EXIT:
        return _one_of(IOCTLS, low(event), By.IOCTL)
    if event.kind == Kind.SITE and bit == TRIPLE_FAULT:
        # What a function after which the word is read can raise is a triple fault: of others it says nothing.
        return _one_of(SITES, low(event), By.KVM_RUN)
    if event.kind == Kind.SITE or inside_run(event):
        return By.KVM_RUN
    return By.REMOTE


@compiled
def _one_of(table: Array, number: int, otherwise: int) -> int:
    for row in range(len(table)):
        if table[row, 0] == number:
            return int(table[row, 1])
    return otherwise


@compiled
def inside_run(event: Event) -> bool:
    """KVM_RUN returns, or the guest is entered or left: what changed since the reading before changed inside it."""
    return event.kind == Kind.RUN_EXIT or event.kind == Kind.GUEST_ENTRY or event.kind == Kind.GUEST_EXIT


@compiled
def raised_in(event: Event, last_kind: int) -> int:
    """Where the vCPU was until this event. ``last_kind``: of the one before it, below 0 unless it is certainly that."""
    sync = event.flags & SYNC != 0
    if event.kind == Kind.RUN_ENTER or event.kind == Kind.IOCTL_ENTER or (event.kind == Kind.RESET and low(event) != 0):
        return Place.USER_SPACE
    if not sync and (
        event.kind == Kind.IOCTL_EXIT
        or event.kind == Kind.SAVE
        or event.kind == Kind.RESTORE
        or event.kind == Kind.VCPU_NEW
    ):
        return Place.IOCTL
    if event.kind == Kind.SITE and last_kind == Kind.IOCTL_ENTER:
        return Place.IOCTL
    if event.kind == Kind.WAKEUP:
        return Place.HALTED if event.detail != 0 else Place.KERNEL
    if sync or event.kind == Kind.SITE or inside_run(event):
        if last_kind < 0:
            return Place.KVM_RUN
        if last_kind != Kind.GUEST_ENTRY:
            return Place.KERNEL
        return Place.GUEST if event.kind == Kind.GUEST_EXIT else Place.KVM_RUN
    return Place.UNKNOWN


@compiled
def own_thread_raised(bit: int, by: int) -> bool:
    """The vCPU's own thread raised it: inside KVM_RUN other threads can raise all but a triple fault."""
    return by != By.UNKNOWN and by != By.REMOTE and (bit == TRIPLE_FAULT or by != By.KVM_RUN)


@compiled
def another_raised(pending: Record, kick: Record, own_tid: int) -> bool:
    """The first kick of the vCPU since then tells of another thread.

    That is so where the vCPU's own thread could not raise it, in the guest or asleep, or where the other one was told
    to make this very request. Only the vCPU's own ioctls raise a triple fault.
    """
    elsewhere = pending.raised_in == Place.GUEST or pending.raised_in == Place.HALTED or not kick.seen
    return pending.raised_by == By.KVM_RUN and elsewhere and kick.tid != own_tid and pending.request != TRIPLE_FAULT


@compiled
def kicked(pending: Record, time_ns: int, tid: int, cpu: int, seen: bool) -> None:
    """Another thread kicked the vCPU for it: the first one counts. ``seen``: it had been raised by then."""
    if time_ns <= pending.raised_after_ns:
        return
    if pending.kicked_ns < 0 or time_ns < pending.kicked_ns:
        pending.kicked_ns = time_ns
        if pending.raised_by == By.REMOTE:
            pending.requester_tid, pending.requester_cpu = tid, cpu
    if seen and time_ns < pending.raised_ns:
        pending.raised_ns = time_ns


# --- 2. It was saved without it -----------------------------------------------------------------------------------


@compiled
def given(wanted: Record, pending: Record, event: Event, before: bool) -> int:
    """What KVM_GET_VCPU_EVENTS gave of a pending request: CARRIED, BLIND or UNSURE; NO_SAVE where that says nothing.

    kvm_vcpu_ioctl_x86_get_vcpu_events; what each request needs is in probes/requests.py with its source. With
    KVM_SYNC_X86_EVENTS every exit gives them: of what they never hold that says nothing.
    """
    if event.kind != Kind.SAVE or not succeeded(event):
        return NO_SAVE
    keeps = wanted.carrier[pending.request]
    if keeps == HARMLESS or (event.flags & SYNC and keeps in (BY_NOTHING, UNNAMED)):
        return NO_SAVE
    if keeps == BY_FLAG:
        return CARRIED if fault_in_payload(event) else BLIND
    if keeps == UNNAMED or not before:
        return UNSURE  # raised while the vCPU was saved: before or after that?
    return CARRIED if keeps == BY_EVENTS else BLIND


@compiled
def left_out(wanted: Record, pending: Record) -> int:
    """What a save did to a request that it says nothing of: it was made without the events, or before its raise."""
    keeps = wanted.carrier[pending.request]
    if keeps == HARMLESS:
        return NO_SAVE
    return UNSURE if keeps == UNNAMED else BLIND


@compiled
def save(pending: Record, outcome: int) -> None:
    """The last save decides what an end of the vCPU means; one that did not carry the request is a finding itself."""
    pending.last_save = outcome
    pending.saves += outcome == CARRIED
    pending.blind_saves += outcome == BLIND


# --- 3. What became of it -----------------------------------------------------------------------------------------


@compiled
def ended_by(pending: Record, event: Event) -> tuple[int, int]:
    """How a request ended that this event does not have any more, and why nobody can tell if so."""
    bit = pending.request
    ioctl = event.kind == Kind.IOCTL_EXIT or event.kind == Kind.SAVE or event.kind == Kind.RESTORE
    if bit != TRIPLE_FAULT:
        # A save takes what it can into the state that it gives.
        return (Verdict.CLEARED if ioctl and event.kind != Kind.SAVE else Verdict.SERVICED), Why.NOTHING
    if ioctl:
        return Verdict.CLEARED, (Why.NOTHING if event.kind == Kind.RESTORE else Why.OTHER_IOCTL)
    # vcpu_enter_guest turns it into KVM_EXIT_SHUTDOWN.
    if event.kind == Kind.RUN_EXIT and event.arg == np.uint64(KVM_EXIT_SHUTDOWN):
        return Verdict.DELIVERED, Why.NOTHING
    # nested_svm_triple_fault, nested_vmx_triple_fault: L1 receives it. It can run again by the time of this reading.
    if event.kind == Kind.SITE and low(event) == Site.REFLECT:
        return Verdict.REFLECTED, Why.NOTHING
    inside = event.kind == Kind.SITE or event.kind == Kind.WAKEUP or inside_run(event)
    if inside and pending.nested:
        # An engine that hooks KVM_SET_VCPU_EVENTS' function has seen it cleared before.
        return (Verdict.UNDECIDED, Why.SYNC_REGS) if event.flags & SYNC else (Verdict.REFLECTED, Why.NOTHING)
    return Verdict.UNDECIDED, (Why.VANISHED if inside else Why.OUTSIDE)


@compiled
def ended_with_vcpu(wanted: Record, pending: Record) -> tuple[int, int]:
    """How a request ended with which its vCPU ended: the last save decides."""
    keeps = wanted.carrier[pending.request]
    if pending.last_save == UNSURE:
        return Verdict.UNDECIDED, (Why.UNNAMED if keeps == UNNAMED else Why.MEANWHILE)
    unknown = pending.raised_by == By.UNKNOWN or pending.still
    if pending.last_save == NO_SAVE and unknown and keeps != HARMLESS and keeps != UNNAMED:
        # Not saved since tracing began, nor has it run: a save before that is what nobody can exclude.
        return Verdict.UNDECIDED, Why.OLDER
    if pending.missed and keeps != HARMLESS:
        # What stands for nothing that a save must keep is no loss, whatever else the tracer has missed.
        return Verdict.UNDECIDED, Why.BLIND
    if pending.last_save == CARRIED:
        return Verdict.HANDED_OVER, Why.NOTHING
    return (Verdict.LOST if pending.last_save == BLIND else Verdict.ABANDONED), Why.NOTHING


@compiled
def still_open(lost: int, lost_of_all: bool, blind: bool) -> tuple[int, int]:
    """What is said of a request that is pending when the recording ends.

    ``lost``: events of its vCPU that the ring had no room for and that no gap has told.
    """
    if lost > 0:
        return Verdict.UNDECIDED, Why.LAST_LOST
    if lost_of_all:
        return Verdict.UNDECIDED, Why.ALL_LOST
    return (Verdict.UNDECIDED, Why.BLIND) if blind else (Verdict.OPEN, Why.NOTHING)


@compiled
def shutdown_source(event: Event) -> int:
    """What the guest shut down of where KVM_RUN returns, below 0 if it did not.

    KVM_EXIT_SHUTDOWN is a request that it took, or hardware (shutdown_interception, handle_triple_fault).
    KVM_EXIT_SYSTEM_EVENT is a guest that says so itself: kvm_hv_set_msr_pw (CRASH), sev_handle_vmgexit_msr_protocol
    (SEV_TERM), tdx_report_fatal_error (TDX_FATAL).
    """
    if event.kind != Kind.RUN_EXIT:
        return -1
    if event.arg == np.uint64(KVM_EXIT_SHUTDOWN):
        taken = holds(event.before, TRIPLE_FAULT) and not holds(event.requests, TRIPLE_FAULT)
        return Source.REQUEST if taken else Source.HARDWARE
    return _one_of(_DEATHS, event.detail & ~RAN, -1) if event.arg == np.uint64(KVM_EXIT_SYSTEM_EVENT) else -1


@compiled
def given_up(vm: Record, event: Event) -> bool:
    """KVM has given the VM up (kvm_vm_dead, kvm_vm_bugged): it refuses every ioctl from now on. Told once."""
    if event.flags & DEAD == 0 or vm.dead:
        return False
    vm.dead = True
    return True


# --- 4. Nothing is missing ----------------------------------------------------------------------------------------


@compiled
def missing_before(vcpu: Record, event: Event) -> int:
    """How many events of its vCPU are missing before this one; below 0: two threads, whose order is not certain."""
    missing = int(event.seq - vcpu.seq - 1)
    if missing == 0:
        return 0
    missing %= SEQUENCE  # the numbers have begun again
    return missing if missing <= SEQUENCE // 2 else missing - SEQUENCE


@compiled
def gap(pending: Record, missing: int, last_ns: int, time_ns: int) -> None:
    """Events were lost while it was pending, or while it was raised."""
    if not pending.gap:
        pending.gap = True
        pending.gap_from = max(last_ns, 1)
    pending.gap_lost += max(missing, 0)
    pending.gap_to = time_ns


@compiled
def proved(pending: Record) -> bool:
    """Every event of its vCPU from its raise on is there."""
    return not (pending.gap or pending.cut or pending.unseen)


# --- What stale means ---------------------------------------------------------------------------------------------


@compiled
def reset_or_restored(pending: Record, event: Event, before: bool) -> None:
    """Note a reset while a triple fault is pending, and what KVM_SET_VCPU_EVENTS said of it since.

    kvm_vcpu_reset does not clear it, nor does user space that writes the registers (read in 5.10, 6.1, 6.12, 7.3).
    Registers that were read since the vCPU last ran and are put back, as QEMU does, are no other state: no WRITTEN
    tells.
    """
    if pending.request != TRIPLE_FAULT or not before:
        return
    if event.kind == Kind.RESET or event.kind == Kind.WRITTEN:
        pending.reset, pending.set_since_reset = True, event.kind == Kind.WRITTEN and pending.set_in_pause
    elif event.kind == Kind.RESTORE and succeeded(event):
        if event.detail & VALID_TRIPLE_FAULT == 0:
            pending.restored_without = True
        elif fault_in_payload(event):
            pending.set_in_pause, pending.set_since_reset = True, pending.set_since_reset or pending.reset
    elif event.kind == Kind.RUN_EXIT:
        pending.set_in_pause = False


@compiled
def stale(pending: Record) -> bool:
    """It was raised before a reset and delivered after it: it shuts down a guest that had rebooted.

    A restore of a saved vCPU writes registers, too: what KVM_SET_VCPU_EVENTS raised, and no such ioctl without the flag
    followed, is not stale.
    """
    restored = pending.raised_by == By.SET_VCPU_EVENTS and not pending.restored_without
    return pending.end == Verdict.DELIVERED and pending.reset and not pending.set_since_reset and not restored


@compiled
def in_nested(event: Event) -> bool:
    """The vCPU is in nested guest mode (L2): what is gone inside KVM_RUN without a shutdown was reflected to L1."""
    return event.flags & NESTED != 0
