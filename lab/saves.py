"""Scenarios: what user space reads and writes of a vCPU, and which of that is a save of what is pending."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from lab.kvm import KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Exit, Ioctl, KvmVcpuEvents, Vcpu
from lab.requests import INTERRUPTED, no_user_nmi
from lab.scratch import raise_by_mce
from lab.stage import (
    Registers,
    Stage,
    bounce,
    lifecycle,
    live_on,
    must_refuse,
    no_mce,
    no_triple_fault_event,
    read_msr,
    run_until,
    save,
    save_events,
    scenario,
    shut_down,
    start_protected,
)

# An address where no process has memory (vm.mmap_min_addr).
_NOWHERE = 8


@scenario(lifecycle("delivered", blind_saves=1), vms=2)
def snapshot(stage: Stage) -> None:
    """Saved without it, a guest goes on: its copy lives on.

    The guest itself shuts down: that is how a snapshot loses it.
    """
    with stage.guest() as source:
        raise_by_mce(source)
        registers = Registers.of(source)
        events = source.get_vcpu_events()
        shut_down(source)
    with stage.guest() as copy:
        registers.put(copy)
        copy.set_vcpu_events(events)
        live_on(copy)


@scenario(lifecycle("abandoned", saves=0, blind_saves=0))
def looked_at(stage: Stage) -> None:
    """The events are read, not what makes a copy: no save."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        vcpu.get_vcpu_events()
        vcpu.get_regs()
        vcpu.get_sregs()


@scenario(lifecycle("abandoned", userspace_exits=1, saves=0, blind_saves=0), needs=[no_mce])
def looked_at_before(stage: Stage) -> None:
    """Registers are read, the guest runs, events are read."""
    with stage.guest() as vcpu:
        Registers.of(vcpu)
        run_until(vcpu, Exit.KVM_EXIT_IO)
        raise_by_mce(vcpu)
        bounce(vcpu)
        vcpu.get_vcpu_events()


@scenario(lifecycle("lost", saves=0, blind_saves=1), needs=[no_mce, no_triple_fault_event])
def without_events(stage: Stage) -> None:
    """Registers are copied without the events that carry it."""
    with stage.guest(triple_fault_event=True) as vcpu:
        raise_by_mce(vcpu)
        Registers.of(vcpu)


@scenario(lifecycle("delivered", saves=0, blind_saves=1), needs=[no_mce, no_triple_fault_event])
def snapshot_no_events(stage: Stage) -> None:
    """The same, and the guest goes on."""
    with stage.guest(triple_fault_event=True) as vcpu:
        raise_by_mce(vcpu)
        Registers.of(vcpu)
        shut_down(vcpu)


@scenario(lifecycle("handed_over", saves=1, blind_saves=0), needs=[no_mce, no_triple_fault_event])
def events_first(stage: Stage) -> None:
    """A save that reads the events before the registers."""
    with stage.guest(triple_fault_event=True) as vcpu:
        raise_by_mce(vcpu)
        vcpu.get_vcpu_events()
        Registers.of(vcpu)


@scenario(lifecycle("handed_over", saves=1, blind_saves=0), needs=[no_mce, no_triple_fault_event])
def events_between(stage: Stage) -> None:
    """A save that reads the events amid the registers."""
    with stage.guest(triple_fault_event=True) as vcpu:
        raise_by_mce(vcpu)
        vcpu.get_regs()
        vcpu.get_sregs()
        vcpu.get_vcpu_events()
        read_msr(vcpu)


@scenario(lifecycle("lost", blind_saves=1))
def raised_after_the_save(stage: Stage) -> None:
    """Raised after the save, by a vCPU that never runs again."""
    with stage.guest() as vcpu:
        save_events(vcpu)
        raise_by_mce(vcpu)


@scenario(
    lifecycle("lost", request="nmi", raised_by="nmi", saves=0, blind_saves=1),
    needs=[no_user_nmi],
    code=INTERRUPTED,
    about=["nmi"],
)
def nmi_after_the_save(stage: Stage) -> None:
    """An operator's NMI comes after a guest has been saved."""
    with stage.guest() as vcpu:
        save_events(vcpu)
        vcpu.nmi()


@scenario(lifecycle("abandoned", userspace_exits=1, saves=0, blind_saves=0), needs=[no_mce])
def ran_after_the_save(stage: Stage) -> None:
    """Raised after the vCPU has run on: the copy is older."""
    with stage.guest() as vcpu:
        save_events(vcpu)
        run_until(vcpu, Exit.KVM_EXIT_IO)
        raise_by_mce(vcpu)
        bounce(vcpu)


@scenario(lifecycle("lost", saves=0, blind_saves=1), needs=[no_mce, no_triple_fault_event])
def failed_save(stage: Stage) -> None:
    """KVM gives the events, and user space does not get them."""
    with stage.guest(triple_fault_event=True) as vcpu:
        raise_by_mce(vcpu)
        must_refuse(errno.EFAULT, lambda: vcpu.ioctl(Ioctl.KVM_GET_VCPU_EVENTS, _NOWHERE))
        Registers.of(vcpu)


@scenario(lifecycle("delivered", stale=True), needs=[no_mce])
def rolled_back(stage: Stage) -> None:
    """A vCPU in protected mode is rolled back, it stays."""
    with stage.guest() as vcpu:
        start_protected(vcpu)
        registers = Registers.of(vcpu)
        run_until(vcpu, Exit.KVM_EXIT_IO)
        raise_by_mce(vcpu)
        registers.put(vcpu)
        shut_down(vcpu)


@scenario(lifecycle("delivered", blind_saves=1), needs=[no_mce])
def put_back(stage: Stage) -> None:
    """Registers that were read are put back: no other state.

    QEMU does so when a guest goes on.
    """
    with stage.guest() as vcpu:
        start_protected(vcpu)
        raise_by_mce(vcpu)
        registers = Registers.of(vcpu)
        registers.put(vcpu)
        shut_down(vcpu)


@contextlib.contextmanager
def _arriving(stage: Stage) -> Iterator[tuple[Vcpu, KvmVcpuEvents]]:
    """Save a guest with it, and yield another one that has its registers, and the events that it has yet to get.

    That one has not the capability, and lives on.
    """
    with stage.guest(triple_fault_event=True) as source:
        raise_by_mce(source)
        registers = Registers.of(source)
        events = save(source)
    with stage.guest() as copy:
        registers.put(copy)
        yield copy, events
        live_on(copy)


@scenario(lifecycle("handed_over", saves=1), needs=[no_mce, no_triple_fault_event], vms=2)
def refused_on_arrival(stage: Stage) -> None:
    """The save carries it, the restore is refused."""
    with _arriving(stage) as (copy, events):
        must_refuse(errno.EINVAL, lambda: copy.set_vcpu_events(events))


@scenario(lifecycle("handed_over", saves=1), needs=[no_mce, no_triple_fault_event], vms=2)
def dropped_on_arrival(stage: Stage) -> None:
    """The save carries it, the restore leaves it out."""
    with _arriving(stage) as (copy, events):
        events.flags &= ~KVM_VCPUEVENT_VALID_TRIPLE_FAULT
        copy.set_vcpu_events(events)
