"""Names of exit reasons, parsed from what kernels print about their own tracepoints."""

from __future__ import annotations

import pytest

from probes.exits import GUEST_EXIT, UNREADABLE, USER_EXIT, Kind, parse, reason
from tracer import tracefs

# The shape of kvm_exit's format, with a few entries of each kind that kernels have.
GUEST = (
    '"vcpu %u reason %s%s%s rip 0x%lx", REC->vcpu_id, (REC->isa == 1) ? __print_symbolic(REC->exit_reason & 0xffff, '
    '{ 0, "EXCEPTION_NMI" }, { 33, "INVALID_STATE" }) : __print_symbolic(REC->exit_reason, { 0x040 + 14, "PF excp" }, '
    '{ 0x40U | 1, "DB excp" }, { (1 << 10), "npf" }, { SVM_EXIT_NEW, "unresolved" }, { -1, "invalid_guest_state" }), '
    '(REC->isa == 1 && REC->exit_reason & ~0xffff) ? " " : "", (REC->isa == 1) ? '
    '__print_flags(REC->exit_reason & ~0xffff, " ", { 0x80000000, "FAILED_VMENTRY" }) : "", REC->guest_rip'
)
USER = (
    '"reason %s (%d)", REC->errno < 0 ? (REC->errno == -4 ? "restart" : "error") : '
    '__print_symbolic(REC->reason, { 0, "KVM_EXIT_" "UNKNOWN" }, { 2, "KVM_EXIT_" "IO" }), REC->reason'
)
NAMES = {GUEST_EXIT: parse(GUEST), USER_EXIT: parse(USER)}
VMX, SVM = 1, 2


@pytest.mark.parametrize(
    ("number", "isa", "name"),
    [
        (0, VMX, "EXCEPTION_NMI"),
        (33 | 1 << 31, VMX, "INVALID_STATE FAILED_VMENTRY"),
        (34, VMX, "0x22"),
        (0x4E, SVM, "PF excp"),
        (0x41, SVM, "DB excp"),
        (0x400, SVM, "npf"),
        (0x400, 0, "npf"),
        (0xFFFF_FFFF, SVM, "invalid_guest_state"),
        (33, SVM, "0x21"),
        (UNREADABLE, SVM, "?"),
    ],
)
def test_each_instruction_set_has_its_own_table(number: int, isa: int, name: str) -> None:
    """With masks, flags and expressions; a number that the kernel does not name is printed as it prints it."""
    assert reason(NAMES, Kind.GUEST, number, isa) == name


@pytest.mark.parametrize(
    ("number", "error", "name"),
    [(2, 0, "KVM_EXIT_IO"), (0, 0, "KVM_EXIT_UNKNOWN"), (99, 0, "0x63"), (2, -4, "EINTR"), (2, -9999, "errno 9999")],
)
def test_an_error_of_kvm_run_goes_before_its_stale_reason(number: int, error: int, name: str) -> None:
    """kvm_run.exit_reason is not written when KVM_RUN fails."""
    assert reason(NAMES, Kind.USER, number, error) == name


def test_no_format_gives_numbers() -> None:
    """Where tracefs cannot be read."""
    assert parse("").name(0x7B) == "0x7b"


@pytest.mark.live
def test_the_running_kernel_names_its_exits() -> None:
    """The values are ABI (uapi linux/kvm.h, asm/vmx.h, asm/svm.h); the names are the kernel's own."""
    formats = tracefs.formats((GUEST_EXIT, USER_EXIT))
    assert formats.keys() == {GUEST_EXIT, USER_EXIT}
    names = {event: parse(text) for event, text in formats.items()}
    assert reason(names, Kind.USER, 2, 0) == "KVM_EXIT_IO"
    assert reason(names, Kind.GUEST, 12, VMX) == "HLT"
    assert reason(names, Kind.GUEST, 0x78, SVM) == "hlt"
