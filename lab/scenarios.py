"""Scenarios: what a VMM can do with a pending triple fault, and what must become of it.

A scenario checks what user space can see (exit reasons, errno, event flags) and raises LabError where KVM
differs. What it cannot see, the request itself, is in ``expect``: what a trace of the scenario must show. Where
kernels differ, the steps tell by what they saw which of the declared outcomes it was.

"The capability" is KVM_CAP_X86_TRIPLE_FAULT_EVENT, off until a VMM enables it; Linux commit ed2351174e38
("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

from lab import userfault
from lab.child import HELD, child, wait_for
from lab.kvm import (
    KICK,
    KVM_EXIT_IO_IN,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    RUN_TIMEOUT_S,
    CallFailed,
    Cap,
    Exit,
    Kvm,
    KvmRun,
    KvmSegment,
    KvmVcpuEvents,
    KvmX86Mce,
    LabError,
    MpState,
    Pages,
    TimedOut,
    Vcpu,
    Vm,
)

# --- what a scenario is -------------------------------------------------------------------------------------


class Lifecycle(TypedDict, total=False):
    """What became of one request, in the report's words."""

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


#: Words of ``raised_by`` for what KVM does inside KVM_RUN. An engine without a hook there says "kvm_run".
RAISED_INSIDE_KVM_RUN = frozenset(
    {
        *("rsm", "exception", "realmode_interrupt", "emulation", "nested_vmexit", "nested_abort", "set_efer"),
        "machine_check",
    }
)


def never_outside(lifecycle: Lifecycle) -> bool:
    """Tell whether one KVM_RUN raised a request and serviced it: at no boundary of an ioctl was it pending."""
    inside = lifecycle["raised_by"] in RAISED_INSIDE_KVM_RUN
    return inside and lifecycle["end"] in ("delivered", "reflected") and not lifecycle["userspace_exits"]


@dataclass(frozen=True)
class Outcome:
    """What a trace of one run must show."""

    lifecycles: tuple[Lifecycle, ...] = ()
    hardware_shutdowns: tuple[tuple[int, int], ...] = ()
    """(VM, vCPU) of each shutdown exit that no request made."""

    @property
    def shutdowns(self) -> list[Shutdown]:
        """Every shutdown exit."""
        delivered = (one for one in self.lifecycles if one["end"] == "delivered")
        return [
            *(Shutdown(vm=one["vm"], vcpu=one["vcpu"], source="request") for one in delivered),
            *(Shutdown(vm=vm, vcpu=vcpu, source="hardware") for vm, vcpu in self.hardware_shutdowns),
        ]

    def __str__(self) -> str:
        ends = ", ".join(dict.fromkeys(lifecycle["end"] for lifecycle in self.lifecycles)) or "no request"
        return f"{ends}; hardware shutdown" if self.hardware_shutdowns else ends

    def seen(self, tells: Collection[str]) -> Outcome:
        """Return what an engine must show that tells of the words RAISED_INSIDE_KVM_RUN only ``tells``.

        Any other such word becomes kvm_run. A request that was never pending outside of that KVM_RUN is not seen at
        all: nothing is left of it but a shutdown, if it made one, that seems to be the hardware's.
        """
        hidden = [one for one in self.lifecycles if never_outside(one) and one["raised_by"] not in tells]
        anonymous = RAISED_INSIDE_KVM_RUN.difference(tells)
        return Outcome(
            tuple(
                {**one, "raised_by": "kvm_run"} if one["raised_by"] in anonymous else one
                for one in self.lifecycles
                if one not in hidden
            ),
            (
                *self.hardware_shutdowns,
                *((one["vm"], one["vcpu"]) for one in hidden if one["end"] == "delivered"),
            ),
        )


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
    steps: Callable[[Stage], Outcome | None]
    """Returns which of ``otherwise`` it was, or None."""
    vms: int
    """How many VMs it creates."""
    expect: tuple[Lifecycle, ...]
    held: tuple[Lifecycle, ...]
    """What to expect instead while the scenario is held, if it can be."""
    hardware_shutdowns: tuple[tuple[int, int], ...] = ()
    """(VM, vCPU) of each shutdown exit that no request made."""
    otherwise: tuple[Outcome, ...] = ()
    """What other kernels than new ones make of it."""

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Everything that it can come to, that of new kernels first."""
        return Outcome(self.expect, self.hardware_shutdowns), *self.otherwise

    @property
    def outcome(self) -> str:
        """What it can come to, in words."""
        return " | ".join(dict.fromkeys(map(str, self.outcomes)))

    @property
    def shutdowns(self) -> list[Shutdown]:
        """Every shutdown exit that it makes, on new kernels."""
        return self.outcomes[0].shutdowns

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


def no_smm(kvm: Kvm) -> str | None:
    """Say why a guest cannot be in system management mode, with memory that it sees only there."""
    if not kvm.check_extension(Cap.KVM_CAP_X86_SMM):
        return "no KVM_CAP_X86_SMM"
    return None if kvm.check_extension(Cap.KVM_CAP_MULTI_ADDRESS_SPACE) > _SMM else "no KVM_CAP_MULTI_ADDRESS_SPACE"


def no_single_step(kvm: Kvm) -> str | None:
    """Say why a guest cannot be single-stepped."""
    return None if kvm.check_extension(Cap.KVM_CAP_SET_GUEST_DEBUG) else "no KVM_CAP_SET_GUEST_DEBUG"


def no_userfault(kvm: Kvm) -> str | None:
    """Say why KVM cannot be stopped while it reads guest memory."""
    return userfault.unmet()


def no_dirty_ring(kvm: Kvm) -> str | None:
    """Say why a vCPU cannot have a dirty ring.

    Linux commit fb04a1eddb1a ("KVM: X86: Implement ring-based dirty memory tracking") (in v5.11).
    """
    if kvm.check_extension(Cap.KVM_CAP_DIRTY_LOG_RING) >= _RING_SIZE:
        return None
    return "no KVM_CAP_DIRTY_LOG_RING, which came with Linux 5.11"


def no_hardware(kvm: Kvm) -> str | None:
    """Say why a guest's own triple fault need not end KVM_RUN.

    KVM learns of it by a VM-exit. A KVM that runs guests without VMX and SVM (PVM) has none: there KVM_RUN ends with
    KVM_EXIT_INTERNAL_ERROR, or not at all.
    """
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    return None if {"svm", "vmx"} & set(flags) else "no VMX and no SVM: KVM does not see a guest's own triple fault"


def no_nested_svm(kvm: Kvm) -> str | None:
    """Say why a guest cannot run a guest of its own with SVM.

    CPUID 0x80000001, ECX bit 2 (AMD64 Architecture Programmer's Manual volume 3, appendix E).
    """
    return None if kvm.supports(0x8000_0001, "ecx", 2) else "no nested SVM: its L1 is for AMD, and kvm_amd's nested=1"


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

# Leaves SMM; where that fails and nothing comes of it, the guest goes on.
#   0f aa   rsm
RSM = bytes.fromhex("0faa") + SIGN_OF_LIFE
_AFTER_RSM = CODE_GPA + 2

# Reads where there is no memory, and writes beyond the end of ES.
#   a4      movsb
READ_AND_FAULT = bytes.fromhex("a4 f4")

# Takes its interrupt table away, then needs it. What it loads, at 0x2000, is 0.
#   0f 01 1e 00 20   lidt 0x2000
#   cc               int3
TRIPLE_FAULT = bytes.fromhex("0f011e0020 cc")

# Writes to one page after the other, in protected mode.
#   bf 00 00 10 00      mov  $0x100000, %edi
#   c6 07 01         1: movb $1, (%edi)
#   81 c7 00 10 00 00   add  $0x1000, %edi
#   eb f5               jmp  1b
DIRTY_PAGES = bytes.fromhex("bf00001000 c60701 81c700100000 ebf5")
_DIRTY_GPA, _DIRTY_SIZE = 0x10_0000, 0x80_0000

# Runs a guest, and writes the exit code that it got to port 0x80.
#   b9 17 01 01 c0   mov $0xc0010117, %ecx   VM_HSAVE_PA
#   b8 00 50 00 00   mov $0x5000, %eax
#   31 d2            xor %edx, %edx
#   0f 30            wrmsr
#   b8 00 40 00 00   mov $0x4000, %eax
#   0f 01 d8         vmrun
#   a1 70 40 00 00   mov 0x4070, %eax        the VMCB's exit code
#   e6 80            out %al, $0x80
#   f4               hlt
# Its guests, in real mode:
#   e4 80            in  $0x80, %al
#   cc               int3
_GUESTS_AT = 0x80
HYPERVISOR = bytes.fromhex("b9170101c0 b800500000 31d2 0f30 b800400000 0f01d8 a170400000 e680 f4").ljust(
    _GUESTS_AT, b"\xf4"
) + bytes.fromhex("e480 cc")
_L2_IN, _L2_TRIPLE_FAULT = CODE_GPA + _GUESTS_AT, CODE_GPA + _GUESTS_AT + 2
_PAGE_DIRECTORY_GPA, _VMCB_GPA = 0x3000, 0x4000

# The state that RSM returns to: the page that ends at SMBASE + 0x10000, SMBASE as after a reset.
_PAGE = 0x1000
_SMM = 1  # address space
_SAVED_STATE_GPA = 0x3_0000 + 0x1_0000 - _PAGE


def impossible_state() -> bytes:
    """Return a state that RSM cannot return to: CR0 with paging and without protection.

    CR0 is at offset 0x7f58 of the save area of a CPU with long mode, at 0x7ffc of another's (AMD64 Architecture
    Programmer's Manual volume 2, "SMRAM State-Save Area"); that area begins at SMBASE + 0x8000.
    """
    page = bytearray(_PAGE)
    for offset in (0x7F58, 0x7FFC):
        struct.pack_into("<I", page, offset % _PAGE, 1 << 31)
    return bytes(page)


# Of 1024 pages; KVM calls it full before it is, on Intel 576 entries before. Intel takes none of 4096 bytes.
_RING_SIZE = 0x4000

# Prime, so that a trace that counts anything twice cannot be right by chance.
EXITS = 23
GENERATIONS = 101


class Stage:
    """The VMs of one run of a scenario. ``hold`` is called where the scenario can stand still."""

    def __init__(self, kvm: Kvm, code: bytes, hold: Callable[[], None]) -> None:
        self.hold = hold
        self.vms = 0
        self.pids: set[int] = set()
        """The processes that had them."""
        self._kvm = kvm
        self._code = code

    @contextlib.contextmanager
    def vm(self, *, triple_fault_event: bool = False, irqchip: bool = False) -> Iterator[Vm]:
        """Create a VM with the scenario's code in its memory."""
        with self._kvm.create_vm() as vm:
            self.vms += 1
            self.pids.add(os.getpid())
            vm.set_tss_addr(_TSS_GPA)
            if irqchip:
                vm.create_irqchip()
            vm.add_memory(0, _MEMORY_SIZE).write(CODE_GPA, self._code)
            if triple_fault_event:
                set_triple_fault_event(vm, True)
            yield vm

    @contextlib.contextmanager
    def guest(self, *, triple_fault_event: bool = False, irqchip: bool = False, rip: int = CODE_GPA) -> Iterator[Vcpu]:
        """Create a VM with one vCPU that is about to run the scenario's code."""
        with self.vm(triple_fault_event=triple_fault_event, irqchip=irqchip) as vm, vm.create_vcpu(0) as vcpu:
            start(vcpu, rip)
            yield vcpu

    @contextlib.contextmanager
    def smm(self) -> Iterator[tuple[Vcpu, Pages]]:
        """Create a guest in system management mode, and the page of the state that RSM returns it to.

        The page has not been touched yet.
        """
        with self.vm() as vm:
            vm.add_memory(0, _MEMORY_SIZE, address_space=_SMM).write(CODE_GPA, self._code)
            saved_state = vm.add_memory(_SAVED_STATE_GPA, _PAGE, address_space=_SMM)
            with vm.create_vcpu(0) as vcpu:
                start(vcpu)
                events = KvmVcpuEvents(flags=KVM_VCPUEVENT_VALID_SMM)
                events.smi.smm = 1
                vcpu.set_vcpu_events(events)
                yield vcpu, saved_state

    @contextlib.contextmanager
    def hypervisor(self, guest: int, *, intercept: bool) -> Iterator[Vcpu]:
        """Create a guest that is about to VMRUN a guest of its own, at ``guest``, which has no interrupt table.

        ``intercept``: it asks for a #VMEXIT when that one shuts down.
        """
        with self.vm() as vm, vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid(self._kvm.get_supported_cpuid())
            vm.write(_PAGE_DIRECTORY_GPA, struct.pack("<I", _PAGE_4M_AT_0))
            vm.write(_VMCB_GPA, vmcb(guest, intercept))
            start_protected(vcpu, paging=True, efer=_EFER_SVME)
            yield vcpu

    def killed(self, name: str) -> None:
        """Hold another scenario in a process of its own, and kill that process."""
        self.vms += SCENARIOS[name].vms
        with child("run", name, "--hold", str(_KILLED_HOLD_S)) as vmm:
            self.pids.add(vmm.pid)
            wait_for(vmm, HELD)
            vmm.kill()


_KILLED_HOLD_S = 10  # it is killed long before


# --- what a VMM does ----------------------------------------------------------------------------------------


def start(vcpu: Vcpu, rip: int = CODE_GPA) -> None:
    """Point a vCPU at the scenario's code, in real mode."""
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    _set_rip(vcpu, rip)


def start_protected(vcpu: Vcpu, *, paging: bool = False, efer: int = 0) -> None:
    """Point a vCPU at the scenario's code, in 32-bit protected mode with flat segments."""
    sregs = vcpu.get_sregs()
    sregs.cs = _flat(_CODE_SEGMENT, 8)
    sregs.ds = sregs.es = sregs.ss = _flat(_DATA_SEGMENT, 16)
    sregs.cr0 |= _CR0_PE
    sregs.efer = efer
    if paging:
        sregs.cr3, sregs.cr4 = _PAGE_DIRECTORY_GPA, _CR4_PSE
        sregs.cr0 |= _CR0_PG
    vcpu.set_sregs(sregs)
    _set_rip(vcpu, CODE_GPA)


def _set_rip(vcpu: Vcpu, rip: int) -> None:
    regs = vcpu.get_regs()
    regs.rip = rip
    vcpu.set_regs(regs)


_CR0_PE, _CR0_PG = 1 << 0, 1 << 31
_CR4_PSE = 1 << 4
_EFER_SVME = 1 << 12
_PAGE_4M_AT_0 = 1 << 7 | 1 << 1 | 1 << 0  # page directory entry: PS, RW, P
_CODE_SEGMENT, _DATA_SEGMENT = 0xB, 0x3  # accessed; execute and read, read and write


def _flat(kind: int, selector: int) -> KvmSegment:
    return KvmSegment(limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, db=1, s=1, g=1)


# AMD64 Architecture Programmer's Manual volume 2, appendix B, "Layout of VMCB": offsets.
_VMCB_INTERCEPTS, _VMCB_ASID = 0x0C, 0x58
_VMCB_EXITCODE = 0x70
_VMCB_SEGMENTS = {  # offset, and attributes: those of a segment's descriptor
    **dict.fromkeys((0x400, 0x420, 0x430, 0x440, 0x450), 0x93),  # ES, SS, DS, FS, GS
    0x410: 0x9B,  # CS
    0x470: 0x82,  # LDTR
    0x490: 0x8B,  # TR
}
_VMCB_GDTR = 0x460  # IDTR stays 0: no exception can be delivered
_VMCB_REGISTERS = {
    0x4D0: _EFER_SVME,  # EFER
    0x558: 1 << 4,  # CR0: ET
    0x560: 0x400,  # DR7
    0x568: 0xFFFF_0FF0,  # DR6
    0x570: 1 << 1,  # RFLAGS
}
_VMCB_RIP = 0x578
_INTERCEPT_SHUTDOWN, _INTERCEPT_VMRUN = 1 << 31, 1 << 32
_SVM_EXIT_SHUTDOWN = 0x7F


def vmcb(rip: int, intercept: bool) -> bytes:
    """Return what VMRUN starts a guest in real mode from."""
    page = bytearray(_PAGE)
    intercepts = _INTERCEPT_VMRUN | (_INTERCEPT_SHUTDOWN if intercept else 0)
    struct.pack_into("<Q", page, _VMCB_INTERCEPTS, intercepts)
    struct.pack_into("<I", page, _VMCB_ASID, 1)
    for offset, attributes in _VMCB_SEGMENTS.items():
        struct.pack_into("<HHIQ", page, offset, 0, attributes, 0xFFFF, 0)
    struct.pack_into("<HHIQ", page, _VMCB_GDTR, 0, 0, 0xFFFF, 0)
    for offset, value in {**_VMCB_REGISTERS, _VMCB_RIP: rip}.items():
        struct.pack_into("<Q", page, offset, value)
    return bytes(page)


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


def inject_double_fault(vcpu: Vcpu) -> None:
    """Make a double fault the exception that is being delivered."""
    events = KvmVcpuEvents()
    events.exception.injected = events.exception.has_error_code = 1
    events.exception.nr = 8
    vcpu.set_vcpu_events(events)


def shut_down(vcpu: Vcpu) -> None:
    """Run a vCPU, which must shut down."""
    _run_until(vcpu, Exit.KVM_EXIT_SHUTDOWN)


def live_on(vcpu: Vcpu) -> None:
    """Run SIGN_OF_LIFE to its end."""
    _run_until(vcpu, Exit.KVM_EXIT_IO)
    _check_written(vcpu, _ALIVE)
    _run_until(vcpu, Exit.KVM_EXIT_HLT)


def _check_written(vcpu: Vcpu, byte: int) -> None:
    if (vcpu.kvm_run.io.port, vcpu.io_data()) != (_PORT, bytes([byte])):
        raise LabError(f"the guest wrote {vcpu.io_data().hex()} to port {vcpu.kvm_run.io.port:#x}, not {byte:02x}")


def bounce(vcpu: Vcpu) -> None:
    """Enter KVM_RUN and return at once, before requests are looked at."""
    vcpu.kvm_run.immediate_exit = 1
    _refused(errno.EINTR, vcpu.run)
    vcpu.kvm_run.immediate_exit = 0


def _run_until(vcpu: Vcpu, wanted: Exit) -> None:
    vcpu.run()
    _check_exit(vcpu, wanted)


def _check_exit(vcpu: Vcpu, wanted: Exit) -> None:
    if vcpu.kvm_run.exit_reason != wanted:
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
Steps = TypeVar("Steps", bound=Callable[["Stage"], "Outcome | None"])


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
    nested: bool = False,
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
        nested=nested,
    )


# Makes a scenario of its steps: their name is its name, and the first line of their docstring its title.
def _scenario(
    *expect: Lifecycle,
    needs: Sequence[Need] = (no_mce,),
    vms: int = 1,
    code: bytes = SIGN_OF_LIFE,
    held: tuple[Lifecycle, ...] = (),
    hardware_shutdowns: tuple[tuple[int, int], ...] = (),
    otherwise: tuple[Outcome, ...] = (),
) -> Callable[[Steps], Steps]:
    def add(steps: Steps) -> Steps:
        name = steps.__name__.rstrip("_")
        title = (steps.__doc__ or "").partition("\n")[0].rstrip(".")
        _scenarios[name] = Scenario(
            name, title, code, tuple(needs), steps, vms, expect, held, hardware_shutdowns, otherwise
        )
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
        vcpu.kvm_run.kvm_valid_regs = _UNKNOWN_REGISTERS
        _refused(errno.EINVAL, vcpu.run)
        vcpu.kvm_run.kvm_valid_regs = 0
        shut_down(vcpu)


# Far from KVM_SYNC_X86_VALID_FIELDS; Linux 6.12 takes bits above this one without a word: seen by this scenario.
_UNKNOWN_REGISTERS = 1 << 31


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


# On Linux 5.10 a triple fault does not wake a halted vCPU, on 6.1 and later it does: seen by this scenario.
_WOKEN_BY_HAND = Outcome((_lifecycle("delivered", userspace_exits=1),))


@_scenario(_lifecycle("delivered"), needs=[no_mce, no_halted_vcpus], held=(_OPEN,), otherwise=(_WOKEN_BY_HAND,))
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
            _check_exit(vcpu, Exit.KVM_EXIT_SHUTDOWN)
            return None
        vcpu.set_mp_state(MpState.KVM_MP_STATE_RUNNABLE)
        shut_down(vcpu)
        return _WOKEN_BY_HAND


_WAKES_WITHIN_S = 1.0
_STUCK_LIMIT_S = 600.0  # of standing still


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


@_scenario(_lifecycle("delivered", raised_by="rsm"), needs=[no_smm], code=RSM, otherwise=(_NO_REQUEST,))
def rsm(stage: Stage) -> Outcome | None:
    """RSM raises it: the saved state is impossible."""
    with stage.smm() as (vcpu, saved_state):
        saved_state.write(0, impossible_state())
        vcpu.run()
        if _gives_up(vcpu):
            return _NO_REQUEST
        _check_exit(vcpu, Exit.KVM_EXIT_SHUTDOWN)
        return None


@_scenario(
    _lifecycle("delivered", raised_by="rsm", userspace_exits=1),
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
        _check_exit(vcpu, Exit.KVM_EXIT_DEBUG)
        vcpu.set_guest_debug(0)
        shut_down(vcpu)
        return None


@_scenario(
    _lifecycle("delivered", raised_by="rsm", userspace_exits=1),
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


@_scenario(
    _lifecycle("lost", raised_by="rsm", userspace_exits=1, blind_saves=1),
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
    with stage.guest(rip=_AFTER_RSM) as destination:
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
        raise LabError(f"after a signal KVM_RUN returned {_exit_name(vcpu.kvm_run)}, not -EINTR")
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
        _run_until(vcpu, Exit.KVM_EXIT_MMIO)
        inject_double_fault(vcpu)
        yield vcpu


_NO_MEMORY_GPA = 0x2_0000


@_scenario(_lifecycle("delivered", raised_by="exception"), needs=[], code=READ_AND_FAULT)
def double_fault(stage: Stage) -> None:
    """A fault while a double fault is delivered raises it."""
    with _faulting_twice(stage) as vcpu:
        shut_down(vcpu)


@_scenario(
    _lifecycle("delivered", raised_by="exception", userspace_exits=1),
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


@_scenario(_lifecycle("delivered", userspace_exits=1), needs=[no_mce, no_dirty_ring], code=DIRTY_PAGES)
def dirty_ring_full(stage: Stage) -> None:
    """It waits while the dirty ring is full."""
    with stage.vm() as vm:
        vm.enable_cap(Cap.KVM_CAP_DIRTY_LOG_RING, _RING_SIZE)
        vm.add_memory(_DIRTY_GPA, _DIRTY_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)
        with vm.create_vcpu(0) as vcpu:
            start_protected(vcpu)
            _run_until(vcpu, Exit.KVM_EXIT_DIRTY_RING_FULL)
            raise_by_mce(vcpu)
            _run_until(vcpu, Exit.KVM_EXIT_DIRTY_RING_FULL)
            if not vcpu.harvest(_RING_SIZE):
                raise LabError("the dirty ring is full, and has no dirty page in it")
            vm.reset_dirty_rings()
            shut_down(vcpu)


@_scenario(needs=[no_hardware], code=TRIPLE_FAULT, hardware_shutdowns=((0, 0),))
def hardware(stage: Stage) -> None:
    """The guest's own triple fault: a shutdown without a request."""
    with stage.guest() as vcpu:
        shut_down(vcpu)


_ALL_SHUT_DOWN = Outcome((_lifecycle("delivered", nested=True),))
_REFLECTED = Outcome((_lifecycle("reflected", nested=True),))


# Before Linux commit cb6a32c2b877 ("KVM: x86: Handle triple fault in L2 without killing L1") (after v5.10) KVM shut
# the whole VM down. From then until commit 92e7d5c83aff ("KVM: x86: allow L1 to not intercept triple fault") (in
# v6.1) L1 got the #VMEXIT whether it asked or not.
@_scenario(*_REFLECTED.lifecycles, needs=[no_mce, no_nested_svm], code=HYPERVISOR, otherwise=(_ALL_SHUT_DOWN,))
def nested_reflected(stage: Stage) -> Outcome | None:
    """Raised in L2, it becomes the #VMEXIT that L1 asked for.

    Where KVM does not know that, it shuts the whole VM down.
    """
    with stage.hypervisor(_L2_IN, intercept=True) as vcpu:
        _wait_for_l2(vcpu)
        raise_by_mce(vcpu)
        if vcpu.run() == Exit.KVM_EXIT_SHUTDOWN:
            return _ALL_SHUT_DOWN
        _check_reflected(vcpu)
        return None


@_scenario(*_ALL_SHUT_DOWN.lifecycles, needs=[no_mce, no_nested_svm], code=HYPERVISOR, otherwise=(_REFLECTED,))
def nested_shutdown(stage: Stage) -> Outcome | None:
    """Raised in L2, of which L1 did not ask: all shut down."""
    with stage.hypervisor(_L2_IN, intercept=False) as vcpu:
        _wait_for_l2(vcpu)
        raise_by_mce(vcpu)
        if vcpu.run() == Exit.KVM_EXIT_SHUTDOWN:
            return None
        _check_reflected(vcpu)
        return _REFLECTED


@_scenario(needs=[no_nested_svm], code=HYPERVISOR)
def nested_hw_reflected(stage: Stage) -> None:
    """L2's own triple fault is the #VMEXIT that L1 asked for."""
    with stage.hypervisor(_L2_TRIPLE_FAULT, intercept=True) as vcpu:
        vcpu.run()
        _check_reflected(vcpu)


@_scenario(needs=[no_nested_svm], code=HYPERVISOR, hardware_shutdowns=((0, 0),))
def nested_hw_shutdown(stage: Stage) -> None:
    """L2's own triple fault, of which L1 did not ask."""
    with stage.hypervisor(_L2_TRIPLE_FAULT, intercept=False) as vcpu:
        shut_down(vcpu)


def _wait_for_l2(vcpu: Vcpu) -> None:
    _run_until(vcpu, Exit.KVM_EXIT_IO)
    if vcpu.kvm_run.io.direction != KVM_EXIT_IO_IN:
        raise LabError(f"L1 has no guest: VMRUN gave exit code {vcpu.io_data().hex()}")


def _check_reflected(vcpu: Vcpu) -> None:
    _check_exit(vcpu, Exit.KVM_EXIT_IO)
    _check_written(vcpu, _SVM_EXIT_SHUTDOWN)


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
