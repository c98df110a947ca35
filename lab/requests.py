"""Scenarios that raise KVM's other requests on purpose, with counts that are known.

Where KVM raises the same request for reasons of its own (KVM_REQ_EVENT, KVM_REQ_CLOCK_UPDATE), what is raised while no
ioctl is in progress is still exact: ``raised_by`` is "remote" then, and the vCPU's own raises are not.
"""

from __future__ import annotations

import struct
from typing import cast

from lab.kvm import Cap, Exit, Kvm, LabError, Vcpu, Vm
from lab.stage import (
    CODE_GPA,
    EXITS,
    Lifecycle,
    Several,
    Stage,
    bounce,
    lifecycle,
    no_immediate_exit,
    no_mce,
    raise_by_mce,
    run_until,
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


# --- guests -------------------------------------------------------------------------------------------------

_IDLE_PORT, _HANDLER_PORT = 0x80, 0x81
_HANDLER_AT = 0x40

# Goes to user space for ever, and to another port in its interrupt handler.
#   fb      sti
#   e6 80   1: out %al, $0x80
#   eb fc      jmp 1b
# the handler:
#   e6 81   out %al, $0x81
#   cf      iret
INTERRUPTED = bytes.fromhex("fb e680 ebfc").ljust(_HANDLER_AT, b"\xf4") + bytes.fromhex("e681 cf")
_NMI_VECTOR = 2
_MOST_EXITS = 5  # to the handler, from where the guest may be


def _handle(vm: Vm, vector: int) -> None:
    """Have the guest's interrupt table lead to the handler."""
    vm.write(4 * vector, struct.pack("<HH", CODE_GPA + _HANDLER_AT, 0))


def _run_to(vcpu: Vcpu, port: int) -> None:
    """Run the guest until it has written to a port."""
    for _ in range(_MOST_EXITS):
        run_until(vcpu, Exit.KVM_EXIT_IO)
        if vcpu.kvm_run.io.port == port:
            return
    raise LabError(f"the guest does not write to port {port:#x}")


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
_CLOCKS_OF_KVM = 2  # of the others' first KVM_RUN, and of kvmclock_update_work


def _serviced(request: str, vcpu: int = 0, **more: str) -> Lifecycle:
    return cast(Lifecycle, {"request": request, "vm": 0, "vcpu": vcpu, "end": "serviced", **more})


@scenario(
    several=(
        *(
            Several(_serviced("clock_update", vcpu, raised_by="remote"), CLOCKS, CLOCKS + _CLOCKS_OF_KVM)
            for vcpu in range(CLOCKED_VCPUS)
        ),
        *(Several(_serviced("clock_update", vcpu)) for vcpu in range(CLOCKED_VCPUS)),
    ),
    needs=[no_set_clock],
    code=INTERRUPTED,
    about=["clock_update"],
)
def clock_update(stage: Stage) -> None:
    """29 times KVM_SET_CLOCK, of which each vCPU must hear.

    No vCPU is in an ioctl then: the request is there when its next one begins. KVM itself raises some when a vCPU
    begins or changes its CPU, for that vCPU and, once and 100 ms later, for the others.
    """
    with stage.vcpus(CLOCKED_VCPUS) as vcpus:
        for vcpu in vcpus:
            _run_to(vcpu, _IDLE_PORT)
        for turn in range(CLOCKS):
            vcpus[0].vm.set_clock((turn + 1) * _CLOCK_NS)
            for vcpu in vcpus:
                _run_to(vcpu, _IDLE_PORT)
