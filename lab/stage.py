"""What a scenario is, the guests that it is played on, and what a VMM does with them.

A scenario checks what user space can see (exit reasons, errno, event flags) and raises LabError where KVM
differs. What it cannot see, the requests themselves, is in ``expect``: what a trace of the scenario must show. Where
kernels differ, the steps tell by what they saw which of the declared outcomes it was.

"The capability" is KVM_CAP_X86_TRIPLE_FAULT_EVENT, off until a VMM enables it; Linux commit ed2351174e38
("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0).
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar

from lab import userfault
from lab.child import HELD, child, wait_for
from lab.kvm import (
    KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    CallFailed,
    Cap,
    Exit,
    Kvm,
    KvmRegs,
    KvmRun,
    KvmSegment,
    KvmSregs,
    KvmVcpuEvents,
    LabError,
    MpState,
    Pages,
    Vcpu,
    Vm,
)
from lab.scratch import MCE_BANK, TSS_GPA

# --- what a scenario is -------------------------------------------------------------------------------------


TRIPLE_FAULT = "triple_fault"


class Lifecycle(TypedDict, total=False):
    """What became of one request, in the report's words; what is not said may be anything."""

    request: str  # TRIPLE_FAULT if it is not said
    vm: int  # in order of creation, from 0
    vcpu: int
    raised_by: str
    end: str
    userspace_exits: int
    saves: int
    blind_saves: int
    copies_without: bool
    stale: bool
    nested: bool
    exposed: bool


@dataclass(frozen=True)
class Several:
    """Lifecycles that are alike, and between how many and how many of them there are.

    For what nobody can count beforehand: several raises of a request that is pending are one lifecycle, KVM raises
    requests for reasons of its own, and one KVM_RUN can raise and service a request between two readings of the word.
    """

    like: Lifecycle
    least: int = 0
    most: int | None = None
    """None: any number."""
    least_full: int | None = None
    """As ``least``, in detail full: there guest entries and exits are readings, too."""
    stays: bool = False
    """Counted is how often the vCPU was in user space with it: KVM merges raises of what is pending."""

    def few(self, full: bool) -> int:
        """Return how many there must be in a recording of detail full, or boundary."""
        return self.least if self.least_full is None or not full else self.least_full

    def allows(self, count: int, full: bool) -> bool:
        """Tell whether there may be so many."""
        return self.few(full) <= count and (self.most is None or count <= self.most)

    def of_vms_from(self, start: int) -> Several:
        """Return the same of VMs that are numbered from ``start``."""
        return replace(self, like={**self.like, "vm": start + self.like.get("vm", 0)})


class Shutdown(TypedDict):
    """A KVM_EXIT_SHUTDOWN, and whether a request made it or the guest's own triple fault did; or a guest's crash."""

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
    inside = lifecycle.get("raised_by") in RAISED_INSIDE_KVM_RUN
    return inside and lifecycle["end"] in ("delivered", "reflected") and not lifecycle["userspace_exits"]


@dataclass(frozen=True)
class Outcome:
    """What a trace of one run must show."""

    lifecycles: tuple[Lifecycle, ...] = ()
    hardware_shutdowns: tuple[tuple[int, int], ...] = ()
    """(VM, vCPU) of each shutdown exit that no request made."""
    several: tuple[Several, ...] = ()
    """What of the other lifecycles is known; each of those counts for the first one that it is like."""
    crashes: tuple[tuple[int, int], ...] = ()
    """(VM, vCPU) of each KVM_SYSTEM_EVENT_CRASH."""

    @property
    def shutdowns(self) -> list[Shutdown]:
        """Every shutdown exit."""
        delivered = (one for one in self.lifecycles if one["end"] == "delivered")
        return [
            *(Shutdown(vm=one["vm"], vcpu=one["vcpu"], source="request") for one in delivered),
            *(Shutdown(vm=vm, vcpu=vcpu, source="hardware") for vm, vcpu in self.hardware_shutdowns),
            *(Shutdown(vm=vm, vcpu=vcpu, source="crash") for vm, vcpu in self.crashes),
        ]

    def __str__(self) -> str:
        known = (*self.lifecycles, *(one.like for one in self.several if one.least or one.few(full=True)))
        requests: dict[str, dict[str, None]] = {}
        for one in known:
            requests.setdefault(one.get("end", "seen"), {})[request_of(one)] = None
        told: dict[tuple[str, ...], list[str]] = {}
        for end, names in requests.items():
            told.setdefault(tuple(names), []).append(end)
        ends = ", ".join(_of_requests(several, names) for names, several in told.items()) or "no request"
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
                {**one, "raised_by": "kvm_run"} if one.get("raised_by") in anonymous else one
                for one in self.lifecycles
                if one not in hidden
            ),
            (
                *self.hardware_shutdowns,
                *((one["vm"], one["vcpu"]) for one in hidden if one["end"] == "delivered"),
            ),
            self.several,
            self.crashes,
        )


def request_of(lifecycle: Mapping[str, object]) -> str:
    """Return which request a lifecycle is of."""
    return str(lifecycle.get("request", TRIPLE_FAULT))


def in_words(lifecycle: Lifecycle) -> str:
    """Return what became of a request, and of which one if it is not a triple fault."""
    return _of_requests([lifecycle["end"]], [request_of(lifecycle)])


def _of_requests(ends: Sequence[str], requests: Sequence[str]) -> str:
    if list(requests) == [TRIPLE_FAULT]:
        return ", ".join(ends)
    return f"{requests[0] if len(requests) == 1 else f'{len(requests)} requests'} {' and '.join(ends)}"


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
    several: tuple[Several, ...] = ()
    """As in Outcome, on new kernels."""
    crashes: tuple[tuple[int, int], ...] = ()
    """(VM, vCPU) of each guest that says that it has crashed."""
    others: frozenset[str] = frozenset()
    """The requests that it is about, besides the triple fault: of these, too, it declares everything that there is."""

    @property
    def about(self) -> frozenset[str]:
        """Every request of which a trace can be compared; those that a kernel does not have are never seen."""
        return self.others | {TRIPLE_FAULT}

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Everything that it can come to, that of new kernels first."""
        return Outcome(self.expect, self.hardware_shutdowns, self.several, self.crashes), *self.otherwise

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
    return None if kvm.check_extension(Cap.KVM_CAP_MCE) > MCE_BANK else "no machine checks (KVM_CAP_MCE)"


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
    if kvm.check_extension(Cap.KVM_CAP_DIRTY_LOG_RING) >= RING_SIZE:
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
_IOAPIC_PINS = 24
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
AFTER_RSM = CODE_GPA + 2

# Reads where there is no memory, and writes beyond the end of ES.
#   a4      movsb
READ_AND_FAULT = bytes.fromhex("a4 f4")

# Takes its interrupt table away, then needs it. What it loads, at 0x2000, is 0.
#   0f 01 1e 00 20   lidt 0x2000
#   cc               int3
OWN_TRIPLE_FAULT = bytes.fromhex("0f011e0020 cc")

# Writes to one page after the other, in protected mode.
#   bf 00 00 10 00      mov  $0x100000, %edi
#   c6 07 01         1: movb $1, (%edi)
#   81 c7 00 10 00 00   add  $0x1000, %edi
#   eb f5               jmp  1b
DIRTY_PAGES = bytes.fromhex("bf00001000 c60701 81c700100000 ebf5")
DIRTY_GPA, DIRTY_SIZE = 0x10_0000, 0x80_0000

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
L2_IN, L2_TRIPLE_FAULT = CODE_GPA + _GUESTS_AT, CODE_GPA + _GUESTS_AT + 2
_PAGE_DIRECTORY_GPA, _VMCB_GPA = 0x3000, 0x4000

# The state that RSM returns to: the page that ends at SMBASE + 0x10000, SMBASE as after a reset.
_PAGE = 0x1000
_SMM = 1  # address space
_SAVED_STATE_GPA = 0x3_0000 + 0x1_0000 - _PAGE
_SMI_HANDLER_GPA = 0x3_0000 + 0x8000


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
RING_SIZE = 0x4000

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
        self.kvm = kvm
        self._code = code

    @contextlib.contextmanager
    def vm(
        self, *, triple_fault_event: bool = False, irqchip: bool = False, split_irqchip: bool = False
    ) -> Iterator[Vm]:
        """Create a VM with the scenario's code in its memory."""
        with self.kvm.create_vm() as vm:
            self.vms += 1
            self.pids.add(os.getpid())
            vm.set_tss_addr(TSS_GPA)
            if irqchip:
                vm.create_irqchip()
            if split_irqchip:
                vm.split_irqchip(_IOAPIC_PINS)
            vm.add_memory(0, _MEMORY_SIZE).write(CODE_GPA, self._code)
            if triple_fault_event:
                set_triple_fault_event(vm, True)
            yield vm

    @contextlib.contextmanager
    def guest(
        self,
        *,
        triple_fault_event: bool = False,
        irqchip: bool = False,
        split_irqchip: bool = False,
        rip: int = CODE_GPA,
    ) -> Iterator[Vcpu]:
        """Create a VM with one vCPU that is about to run the scenario's code."""
        made = self.vm(triple_fault_event=triple_fault_event, irqchip=irqchip, split_irqchip=split_irqchip)
        with made as vm, vm.create_vcpu(0) as vcpu:
            start(vcpu, rip)
            yield vcpu

    @contextlib.contextmanager
    def vcpus(self, count: int, *, irqchip: bool = False) -> Iterator[list[Vcpu]]:
        """Create a VM with so many vCPUs that are about to run the scenario's code."""
        with self.vm(irqchip=irqchip) as vm, contextlib.ExitStack() as stack:
            vcpus = [stack.enter_context(vm.create_vcpu(vcpu_id)) for vcpu_id in range(count)]
            for vcpu in vcpus:
                if irqchip:
                    vcpu.enable_lapic()
                    vcpu.set_mp_state(MpState.KVM_MP_STATE_RUNNABLE)  # else all but the first wait for an INIT
                start(vcpu)
            yield vcpus

    @contextlib.contextmanager
    def with_smm(self, handler: bytes) -> Iterator[Vcpu]:
        """Create a guest that handles SMIs: in system management mode it has the memory that this takes."""
        with self.vm() as vm:
            vm.add_memory(_SMI_HANDLER_GPA, _PAGE, address_space=_SMM).write(0, handler)
            vm.add_memory(_SAVED_STATE_GPA, _PAGE, address_space=_SMM)
            with vm.create_vcpu(0) as vcpu:
                start(vcpu)
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
            vcpu.set_cpuid(self.kvm.get_supported_cpuid())
            vm.write(_PAGE_DIRECTORY_GPA, struct.pack("<I", _PAGE_4M_AT_0))
            vm.write(_VMCB_GPA, vmcb(guest, intercept))
            start_protected(vcpu, paging=True, efer=_EFER_SVME)
            yield vcpu

    def killed(self, name: str) -> None:
        """Hold another scenario in a process of its own, and kill that process."""
        self.vms += DECLARED[name].vms
        with child("-m", "lab", "run", name, "--hold", str(_KILLED_HOLD_S)) as vmm:
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
SVM_EXIT_SHUTDOWN = 0x7F


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


def triple_fault(pending: bool) -> KvmVcpuEvents:
    """Return events that raise or clear a triple fault, and change nothing else."""
    events = KvmVcpuEvents(flags=KVM_VCPUEVENT_VALID_TRIPLE_FAULT)
    events.triple_fault.pending = pending
    return events


_SYSENTER_CS = 0x174  # IA32_SYSENTER_CS, which every CPU with long mode has


class Registers(NamedTuple):
    """What makes a copy of a vCPU: its general, special and model-specific registers, one of these for all."""

    regs: KvmRegs
    sregs: KvmSregs
    msr: int

    @classmethod
    def of(cls, vcpu: Vcpu) -> Registers:
        """Read them."""
        return cls(vcpu.get_regs(), vcpu.get_sregs(), read_msr(vcpu))

    def put(self, vcpu: Vcpu) -> None:
        """Write them."""
        vcpu.set_sregs(self.sregs)
        vcpu.set_regs(self.regs)
        vcpu.set_msr(_SYSENTER_CS, self.msr)


def read_msr(vcpu: Vcpu) -> int:
    """Read one of the model-specific registers, which stands for all."""
    return vcpu.get_msr(_SYSENTER_CS)


def save_events(vcpu: Vcpu) -> KvmVcpuEvents:
    """Save a vCPU with whatever is pending, its events last."""
    Registers.of(vcpu)
    return vcpu.get_vcpu_events()


def save(vcpu: Vcpu) -> KvmVcpuEvents:
    """Save a vCPU with a pending triple fault, which must be among the events."""
    events = save_events(vcpu)
    if not (events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT and events.triple_fault.pending):
        raise LabError(f"saved events (flags {events.flags:#x}) lack the pending triple fault")
    return events


def save_blindly(vcpu: Vcpu) -> KvmVcpuEvents:
    """Save a vCPU with a pending triple fault, which cannot be among the events."""
    events = save_events(vcpu)
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
    run_until(vcpu, Exit.KVM_EXIT_SHUTDOWN)


def live_on(vcpu: Vcpu) -> None:
    """Run SIGN_OF_LIFE to its end."""
    run_until(vcpu, Exit.KVM_EXIT_IO)
    check_written(vcpu, _ALIVE)
    run_until(vcpu, Exit.KVM_EXIT_HLT)


def check_written(vcpu: Vcpu, byte: int) -> None:
    """Check what the guest has written to the port."""
    if (vcpu.kvm_run.io.port, vcpu.io_data()) != (_PORT, bytes([byte])):
        raise LabError(f"the guest wrote {vcpu.io_data().hex()} to port {vcpu.kvm_run.io.port:#x}, not {byte:02x}")


def bounce(vcpu: Vcpu) -> None:
    """Enter KVM_RUN and return at once, before requests are looked at."""
    vcpu.kvm_run.immediate_exit = 1
    must_refuse(errno.EINTR, vcpu.run)
    vcpu.kvm_run.immediate_exit = 0


def run_until(vcpu: Vcpu, wanted: Exit) -> None:
    """Run a vCPU, whose KVM_RUN must end with this exit."""
    vcpu.run()
    check_exit(vcpu, wanted)


def check_exit(vcpu: Vcpu, wanted: Exit) -> None:
    """Check with which exit KVM_RUN has ended."""
    if vcpu.kvm_run.exit_reason != wanted:
        raise LabError(f"KVM_RUN returned {exit_name(vcpu.kvm_run)}, not {wanted.name}")


def exit_name(kvm_run: KvmRun) -> str:
    """Return how KVM_RUN has ended."""
    if kvm_run.exit_reason == Exit.KVM_EXIT_INTERNAL_ERROR:
        return f"KVM_EXIT_INTERNAL_ERROR, suberror {kvm_run.internal.suberror}"
    return next((one.name for one in Exit if one == kvm_run.exit_reason), f"exit {kvm_run.exit_reason}")


def must_refuse(number: int, call: Callable[[], object]) -> None:
    """Check that KVM refuses something with this errno."""
    try:
        call()
    except CallFailed as error:
        if error.errno == number:
            return
        raise
    raise LabError(f"KVM accepted what it had to refuse with {errno.errorcode[number]}")


# --- declaring one ------------------------------------------------------------------------------------------

DECLARED: dict[str, Scenario] = {}  # by name, as the modules that play them are imported
Steps = TypeVar("Steps", bound=Callable[["Stage"], "Outcome | None"])


def lifecycle(
    end: str,
    *,
    request: str = TRIPLE_FAULT,
    vm: int = 0,
    vcpu: int = 0,
    raised_by: str = "set_mce",
    userspace_exits: int = 0,
    saves: int = 0,
    blind_saves: int = 0,
    stale: bool = False,
    nested: bool = False,
) -> Lifecycle:
    """Return a lifecycle of which everything is known."""
    return Lifecycle(
        request=request,
        vm=vm,
        vcpu=vcpu,
        raised_by=raised_by,
        end=end,
        userspace_exits=userspace_exits,
        saves=saves,
        blind_saves=blind_saves,
        copies_without=blind_saves > 0,
        stale=stale,
        nested=nested,
    )


def scenario(
    *expect: Lifecycle,
    needs: Sequence[Need] = (no_mce,),
    vms: int = 1,
    code: bytes = SIGN_OF_LIFE,
    held: tuple[Lifecycle, ...] = (),
    hardware_shutdowns: tuple[tuple[int, int], ...] = (),
    otherwise: tuple[Outcome, ...] = (),
    several: tuple[Several, ...] = (),
    crashes: tuple[tuple[int, int], ...] = (),
    about: Collection[str] = (),
) -> Callable[[Steps], Steps]:
    """Make a scenario of its steps: their name is its name, and the first line of their docstring its title."""

    def add(steps: Steps) -> Steps:
        name = steps.__name__.rstrip("_")
        title = (steps.__doc__ or "").partition("\n")[0].rstrip(".")
        DECLARED[name] = Scenario(
            *(
                name,
                title,
                code,
                tuple(needs),
                steps,
                vms,
                expect,
                held,
                hardware_shutdowns,
                otherwise,
                several,
                crashes,
            ),
            frozenset(about),
        )
        return steps

    return add
