"""KVM's user-space interface as far as the scenarios need it: structs, ioctls, and Kvm, Vm and Vcpu.

A vCPU lives until the last reference to its VM is gone, not until its fd is closed: the kvm_run mapping holds
one too. So nothing here is closed behind the caller's back, and ``with`` closes in the order that is written.

Everything is named as in uapi linux/kvm.h and asm/kvm.h; a test compares the numbers and offsets with them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
import time
from collections.abc import Mapping
from enum import IntEnum
from types import TracebackType
from typing import TypeVar

# --- errors -------------------------------------------------------------------------------------------------
#
#   LabError              what failed, why, and what to do about it
#     CallFailed          a system call: carries its errno
#     TimedOut            KVM_RUN had to be ended by force


class LabError(Exception):
    """The lab cannot go on."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)


_HINTS: Mapping[int, str] = {
    errno.EACCES: "run as root, or as a member of the group that owns /dev/kvm",
    errno.EBADF: "it has been closed",
    errno.EBUSY: "another hypervisor may hold the CPU's virtualization",
    errno.EIO: "a VM can only be used by the process that created it",
    errno.ENODEV: "load kvm_intel or kvm_amd",
    errno.ENOENT: "load kvm_intel or kvm_amd",
}


class CallFailed(LabError):
    """A system call failed with ``errno``."""

    def __init__(self, call: str, number: int) -> None:
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"{call} failed: {name}, {os.strerror(number)}", hint=_HINTS.get(number, ""))
        self.errno = number


class TimedOut(LabError):
    """KVM_RUN did not return in time and was ended."""


# --- structs ------------------------------------------------------------------------------------------------


class KvmRegs(ctypes.Structure):
    """struct kvm_regs."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
            *("rip", "rflags"),
        )
    ]


class KvmSegment(ctypes.Structure):
    """struct kvm_segment."""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("selector", ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl")),
        *((name, ctypes.c_uint8) for name in ("unusable", "padding")),
    ]


class KvmDtable(ctypes.Structure):
    """struct kvm_dtable."""

    _fields_ = [("base", ctypes.c_uint64), ("limit", ctypes.c_uint16), ("padding", ctypes.c_uint16 * 3)]


class KvmSregs(ctypes.Structure):
    """struct kvm_sregs."""

    _fields_ = [
        *((name, KvmSegment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, KvmDtable) for name in ("gdt", "idt")),
        *((name, ctypes.c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", ctypes.c_uint64 * 4),
    ]


class _EventsException(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint8) for name in ("injected", "nr", "has_error_code", "pending")),
        ("error_code", ctypes.c_uint32),
    ]


class _EventsInterrupt(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint8) for name in ("injected", "nr", "soft", "shadow")]


class _EventsNmi(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint8) for name in ("injected", "pending", "masked", "pad")]


class _EventsSmi(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint8) for name in ("smm", "pending", "smm_inside_nmi", "latched_init")]


class _EventsTripleFault(ctypes.Structure):
    _fields_ = [("pending", ctypes.c_uint8)]


class KvmVcpuEvents(ctypes.Structure):
    """struct kvm_vcpu_events.

    triple_fault took a reserved byte in Linux commit ed2351174e38 ("KVM: x86: Extend
    KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0): the size never changed.
    """

    _fields_ = [
        ("exception", _EventsException),
        ("interrupt", _EventsInterrupt),
        ("nmi", _EventsNmi),
        ("sipi_vector", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("smi", _EventsSmi),
        ("triple_fault", _EventsTripleFault),
        ("reserved", ctypes.c_uint8 * 26),
        ("exception_has_payload", ctypes.c_uint8),
        ("exception_payload", ctypes.c_uint64),
    ]


class KvmX86Mce(ctypes.Structure):
    """struct kvm_x86_mce."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("status", "addr", "misc", "mcg_status")),
        ("bank", ctypes.c_uint8),
        ("pad1", ctypes.c_uint8 * 7),
        ("pad2", ctypes.c_uint64 * 3),
    ]


class OneMsr(ctypes.Structure):
    """struct kvm_msrs with one struct kvm_msr_entry behind it."""

    _fields_ = [
        ("nmsrs", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("index", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("data", ctypes.c_uint64),
    ]


class KvmUserspaceMemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = [
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("guest_phys_addr", "memory_size", "userspace_addr")),
    ]


class KvmCpuidEntry2(ctypes.Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", ctypes.c_uint32 * 3),
    ]


class KvmCpuid2(ctypes.Structure):
    """struct kvm_cpuid2, which ends in an array of any length."""

    _fields_ = [("nent", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("entries", KvmCpuidEntry2 * 0)]


# KVM_MAX_CPUID_ENTRIES of new kernels; KVM_GET_SUPPORTED_CPUID cuts it down to its own.
_CPUID_ENTRIES = 256


class _Cpuid(KvmCpuid2):
    _fields_ = [("room", KvmCpuidEntry2 * _CPUID_ENTRIES)]


def cpuid_of(entry: KvmCpuidEntry2) -> KvmCpuid2:
    """Return a CPUID with this entry alone."""
    cpuid = _Cpuid(nent=1)
    cpuid.room[0] = entry
    return cpuid


class _GuestDebugArch(ctypes.Structure):
    _fields_ = [("debugreg", ctypes.c_uint64 * 8)]


class KvmGuestDebug(ctypes.Structure):
    """struct kvm_guest_debug."""

    _fields_ = [("control", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("arch", _GuestDebugArch)]


class KvmDirtyGfn(ctypes.Structure):
    """struct kvm_dirty_gfn: a page that the guest has written to, in the ring of its vCPU."""

    _fields_ = [("flags", ctypes.c_uint32), ("slot", ctypes.c_uint32), ("offset", ctypes.c_uint64)]


class KvmEnableCap(ctypes.Structure):
    """struct kvm_enable_cap."""

    _fields_ = [
        ("cap", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("args", ctypes.c_uint64 * 4),
        ("pad", ctypes.c_uint8 * 64),
    ]


class KvmInterrupt(ctypes.Structure):
    """struct kvm_interrupt."""

    _fields_ = [("irq", ctypes.c_uint32)]


class KvmClockData(ctypes.Structure):
    """struct kvm_clock_data."""

    _fields_ = [
        ("clock", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("flags", "pad0")),
        *((name, ctypes.c_uint64) for name in ("realtime", "host_tsc")),
        ("pad", ctypes.c_uint32 * 4),
    ]


class KvmMsi(ctypes.Structure):
    """struct kvm_msi."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("address_lo", "address_hi", "data", "flags", "devid")),
        ("pad", ctypes.c_uint8 * 12),
    ]


class _RoutingMsi(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("address_lo", "address_hi", "data", "devid")]


class _Routing(ctypes.Union):
    _fields_ = [("msi", _RoutingMsi), ("pad", ctypes.c_uint32 * 8)]


class KvmIrqRoutingEntry(ctypes.Structure):
    """struct kvm_irq_routing_entry: of its union, the member that is used here."""

    _fields_ = [*((name, ctypes.c_uint32) for name in ("gsi", "type", "flags", "pad")), ("u", _Routing)]


class KvmIrqRouting(ctypes.Structure):
    """struct kvm_irq_routing, which ends in an array of any length."""

    _fields_ = [("nr", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("entries", KvmIrqRoutingEntry * 0)]


class _OneRoute(KvmIrqRouting):
    _fields_ = [("room", KvmIrqRoutingEntry * 1)]


class KvmTprAccessCtl(ctypes.Structure):
    """struct kvm_tpr_access_ctl."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("enabled", "flags")),
        ("reserved", ctypes.c_uint32 * 8),
    ]


class KvmLapicState(ctypes.Structure):
    """struct kvm_lapic_state: the registers of a local APIC, each in the first 4 of 16 bytes."""

    _fields_ = [("regs", ctypes.c_char * 1024)]


class KvmMpState(ctypes.Structure):
    """struct kvm_mp_state."""

    _fields_ = [("mp_state", ctypes.c_uint32)]


class _RunIo(ctypes.Structure):
    _fields_ = [
        ("direction", ctypes.c_uint8),
        ("size", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
        ("count", ctypes.c_uint32),
        ("data_offset", ctypes.c_uint64),
    ]


class _RunMmio(ctypes.Structure):
    _fields_ = [
        ("phys_addr", ctypes.c_uint64),
        ("data", ctypes.c_uint8 * 8),
        ("len", ctypes.c_uint32),
        ("is_write", ctypes.c_uint8),
    ]


class _RunInternal(ctypes.Structure):
    _fields_ = [("suberror", ctypes.c_uint32), ("ndata", ctypes.c_uint32), ("data", ctypes.c_uint64 * 16)]


class _RunSystemEvent(ctypes.Structure):
    _fields_ = [("type", ctypes.c_uint32)]


class _RunEoi(ctypes.Structure):
    _fields_ = [("vector", ctypes.c_uint8)]


class _RunExit(ctypes.Union):
    _fields_ = [
        ("io", _RunIo),
        ("mmio", _RunMmio),
        ("internal", _RunInternal),
        ("system_event", _RunSystemEvent),
        ("eoi", _RunEoi),
        ("padding", ctypes.c_char * 256),
    ]


class KvmRun(ctypes.Structure):
    """struct kvm_run: of its unions, the members that a scenario reads.

    immediate_exit came with Linux commit 460df4c1fc7c ("KVM: race-free exit from KVM_RUN without POSIX
    signals") (in v4.11).
    """

    _anonymous_ = ("exit",)
    _fields_ = [
        ("request_interrupt_window", ctypes.c_uint8),
        ("immediate_exit", ctypes.c_uint8),
        ("padding1", ctypes.c_uint8 * 6),
        ("exit_reason", ctypes.c_uint32),
        ("ready_for_interrupt_injection", ctypes.c_uint8),
        ("if_flag", ctypes.c_uint8),
        ("flags", ctypes.c_uint16),
        ("cr8", ctypes.c_uint64),
        ("apic_base", ctypes.c_uint64),
        ("exit", _RunExit),
        ("kvm_valid_regs", ctypes.c_uint64),
        ("kvm_dirty_regs", ctypes.c_uint64),
        ("s", ctypes.c_char * 2048),
    ]


# --- numbers ------------------------------------------------------------------------------------------------


# _IO, _IOR, _IOW and _IOWR of uapi asm-generic/ioctl.h, with KVMIO as their type.
def _io(number: int, size: int = 0, direction: int = 0) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | number


def _iow(number: int, struct: type[ctypes.Structure | ctypes.c_uint64]) -> int:
    return _io(number, ctypes.sizeof(struct), 1)


def _ior(number: int, struct: type[ctypes.Structure]) -> int:
    return _io(number, ctypes.sizeof(struct), 2)


def _iowr(number: int, struct: type[ctypes.Structure]) -> int:
    return _io(number, ctypes.sizeof(struct), 3)


class Ioctl(IntEnum):
    """The ioctls that the lab uses."""

    KVM_GET_API_VERSION = _io(0x00)
    KVM_CREATE_VM = _io(0x01)
    KVM_CHECK_EXTENSION = _io(0x03)
    KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
    KVM_GET_SUPPORTED_CPUID = _iowr(0x05, KvmCpuid2)
    KVM_CREATE_VCPU = _io(0x41)
    KVM_SET_USER_MEMORY_REGION = _iow(0x46, KvmUserspaceMemoryRegion)
    KVM_SET_TSS_ADDR = _io(0x47)
    KVM_CREATE_IRQCHIP = _io(0x60)
    KVM_SET_GSI_ROUTING = _iow(0x6A, KvmIrqRouting)
    KVM_SET_CLOCK = _iow(0x7B, KvmClockData)
    KVM_RUN = _io(0x80)
    KVM_GET_REGS = _ior(0x81, KvmRegs)
    KVM_SET_REGS = _iow(0x82, KvmRegs)
    KVM_GET_SREGS = _ior(0x83, KvmSregs)
    KVM_SET_SREGS = _iow(0x84, KvmSregs)
    KVM_INTERRUPT = _iow(0x86, KvmInterrupt)
    KVM_GET_MSRS = 0xC008AE88  # their size is that of struct kvm_msrs without entries
    KVM_SET_MSRS = 0x4008AE89
    KVM_GET_LAPIC = _ior(0x8E, KvmLapicState)
    KVM_SET_LAPIC = _iow(0x8F, KvmLapicState)
    KVM_SET_CPUID2 = _iow(0x90, KvmCpuid2)
    KVM_TPR_ACCESS_REPORTING = _iowr(0x92, KvmTprAccessCtl)
    KVM_GET_MP_STATE = _ior(0x98, KvmMpState)
    KVM_SET_MP_STATE = _iow(0x99, KvmMpState)
    KVM_NMI = _io(0x9A)
    KVM_SET_GUEST_DEBUG = _iow(0x9B, KvmGuestDebug)
    KVM_X86_SETUP_MCE = _iow(0x9C, ctypes.c_uint64)
    KVM_X86_SET_MCE = _iow(0x9E, KvmX86Mce)
    KVM_GET_VCPU_EVENTS = _ior(0x9F, KvmVcpuEvents)
    KVM_SET_VCPU_EVENTS = _iow(0xA0, KvmVcpuEvents)
    KVM_ENABLE_CAP = _iow(0xA3, KvmEnableCap)
    KVM_SIGNAL_MSI = _iow(0xA5, KvmMsi)
    KVM_SMI = _io(0xB7)
    KVM_RESET_DIRTY_RINGS = _io(0xC7)


class Cap(IntEnum):
    """The capabilities that the lab asks for."""

    KVM_CAP_IRQCHIP = 0
    KVM_CAP_VAPIC = 6
    KVM_CAP_MP_STATE = 14
    KVM_CAP_USER_NMI = 22
    KVM_CAP_SET_GUEST_DEBUG = 23
    KVM_CAP_MCE = 31
    KVM_CAP_ADJUST_CLOCK = 39
    KVM_CAP_HYPERV = 44
    KVM_CAP_SYNC_REGS = 74
    KVM_CAP_SIGNAL_MSI = 77
    KVM_CAP_X86_SMM = 117
    KVM_CAP_MULTI_ADDRESS_SPACE = 118
    KVM_CAP_SPLIT_IRQCHIP = 121
    KVM_CAP_IMMEDIATE_EXIT = 136
    KVM_CAP_DIRTY_LOG_RING = 192
    KVM_CAP_X86_TRIPLE_FAULT_EVENT = 218


class Exit(IntEnum):
    """The exit reasons that a scenario expects or explains."""

    KVM_EXIT_IO = 2
    KVM_EXIT_DEBUG = 4
    KVM_EXIT_HLT = 5
    KVM_EXIT_MMIO = 6
    KVM_EXIT_SHUTDOWN = 8
    KVM_EXIT_FAIL_ENTRY = 9
    KVM_EXIT_INTR = 10
    KVM_EXIT_TPR_ACCESS = 12
    KVM_EXIT_INTERNAL_ERROR = 17
    KVM_EXIT_SYSTEM_EVENT = 24
    KVM_EXIT_IOAPIC_EOI = 26
    KVM_EXIT_DIRTY_RING_FULL = 31


class MpState(IntEnum):
    """kvm_mp_state.mp_state."""

    KVM_MP_STATE_RUNNABLE = 0
    KVM_MP_STATE_HALTED = 3


# kvm_vcpu_events.flags. The last one: Linux commit ed2351174e38, as above.
KVM_VCPUEVENT_VALID_NMI_PENDING = 0x01
KVM_VCPUEVENT_VALID_SMM = 0x08
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 0x20

KVM_GUESTDBG_ENABLE = 1
KVM_GUESTDBG_SINGLESTEP = 2
KVM_INTERNAL_ERROR_EMULATION = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3
KVM_IRQ_ROUTING_MSI = 2
KVM_EXIT_IO_IN = 0

# The dirty ring: where a vCPU's fd maps it, in pages, and what KVM and the VMM say of its entries.
KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_DIRTY_LOG_PAGE_OFFSET = 64
KVM_DIRTY_GFN_F_DIRTY = 1
KVM_DIRTY_GFN_F_RESET = 2

KVM_API_VERSION = 12

# --- calls --------------------------------------------------------------------------------------------------

# Not fcntl.ioctl and mmap.mmap. The first copies; the second keeps a duplicate of the fd, and with it a
# reference to the vCPU that closing the vCPU's fd would not drop.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


class Pages:
    """Pages shared with KVM: guest memory (anonymous), or what a vCPU's ``fd`` maps, kvm_run to begin with."""

    def __init__(self, size: int, fd: int = -1, offset: int = 0) -> None:
        flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
        if address == _MAP_FAILED:
            raise CallFailed("mmap", ctypes.get_errno())
        self.address: int = address
        self.size = size

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes at ``offset``."""
        return ctypes.string_at(self._at(offset, size), size)

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``."""
        ctypes.memmove(self._at(offset, len(data)), data, len(data))

    def close(self) -> None:
        """Unmap the pages, once."""
        if self.size:
            _libc.munmap(self.address, self.size)
            self.size = 0

    def _at(self, offset: int, size: int) -> int:
        if not 0 <= offset <= offset + size <= self.size:
            raise LabError(f"{size} bytes at {offset} are outside of a mapping of {self.size}")
        return self.address + offset


_FileType = TypeVar("_FileType", bound="_File")
_StructType = TypeVar("_StructType", bound=ctypes.Structure)


# An fd that answers ioctls. Nothing is left to the garbage collector: scenarios are about when a VM ends.
class _File:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self: _FileType) -> _FileType:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def ioctl(self, request: Ioctl, argument: int | ctypes.Structure | ctypes.c_uint64 = 0) -> int:
        """Return what the ioctl returns; a failure is a CallFailed."""
        value = argument if isinstance(argument, int) else ctypes.addressof(argument)
        result: int = _libc.ioctl(self.fd, request, value)
        if result < 0:
            raise CallFailed(request.name, ctypes.get_errno())
        return result

    def check_extension(self, cap: Cap) -> int:
        """Return what this kernel offers of a capability: 0 is nothing."""
        return self.ioctl(Ioctl.KVM_CHECK_EXTENSION, cap)


class Kvm(_File):
    """/dev/kvm. The first one of a process must be opened on its main thread.

    Without ``kicks`` any thread may open it: no KVM_RUN of its VMs can be ended by force.
    """

    def __init__(self, *, kicks: bool = True) -> None:
        if kicks:
            _let_kicks_interrupt()
        try:
            super().__init__(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise CallFailed("opening /dev/kvm", error.errno or 0) from error
        version = self.ioctl(Ioctl.KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            self.close()
            raise LabError(f"/dev/kvm speaks API {version}, not {KVM_API_VERSION}", hint="is it Linux's own KVM?")
        self.vcpu_mmap_size = self.ioctl(Ioctl.KVM_GET_VCPU_MMAP_SIZE)

    def get_supported_cpuid(self) -> KvmCpuid2:
        """Return the CPUID of the most capable vCPU that this KVM can make."""
        cpuid = _Cpuid(nent=_CPUID_ENTRIES)
        self.ioctl(Ioctl.KVM_GET_SUPPORTED_CPUID, cpuid)
        return cpuid

    def supports(self, function: int, register: str, bit: int) -> bool:
        """Tell whether a vCPU can have a feature, by its place in CPUID."""
        cpuid = self.get_supported_cpuid()
        entries = (KvmCpuidEntry2 * cpuid.nent).from_buffer(cpuid, KvmCpuid2.entries.offset)
        return any(entry.function == function and getattr(entry, register) >> bit & 1 for entry in entries)

    def create_vm(self) -> Vm:
        """Create a VM without memory."""
        return Vm(self.ioctl(Ioctl.KVM_CREATE_VM), self.vcpu_mmap_size)


# Intel SDM volume 3, "Message Address Register Format": bits 12 to 19 are the destination's APIC id.
_MSI_ADDRESS = 0xFEE0_0000
# "Message Data Register Format", beside a vector: an NMI instead of it; level-triggered, and asserted.
MSI_NMI = 4 << 8
MSI_LEVEL = 1 << 15 | 1 << 14


class Vm(_File):
    """A VM, and the memory that was added to it. Its vCPUs are closed on their own."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self.vcpu_mmap_size = vcpu_mmap_size
        self.memory: list[Pages] = []
        """In order of its slots."""

    def close(self) -> None:
        """Close the VM, then give back its memory."""
        super().close()
        while self.memory:
            self.memory.pop().close()

    def write(self, gpa: int, data: bytes) -> None:
        """Put ``data`` into the memory that was added first, at 0."""
        self.memory[0].write(gpa, data)

    def read(self, gpa: int, size: int) -> bytes:
        """Return what is in the memory that was added first, at 0."""
        return self.memory[0].read(gpa, size)

    def add_memory(self, gpa: int, size: int, *, address_space: int = 0, flags: int = 0) -> Pages:
        """Give the guest ``size`` bytes of memory at ``gpa``; in address space 1 it sees them in SMM only."""
        pages = Pages(size)
        self.memory.append(pages)
        slot = address_space << 16 | len(self.memory) - 1
        region = KvmUserspaceMemoryRegion(slot, flags, gpa, size, pages.address)
        self.ioctl(Ioctl.KVM_SET_USER_MEMORY_REGION, region)
        return pages

    def place_memory(self, pages: Pages, gpa: int, *, flags: int = 0) -> None:
        """Put memory that was added before at another address, or change the flags of its slot."""
        self._set_slot(pages, gpa, pages.size, flags)

    def remove_memory(self, pages: Pages) -> None:
        """Take memory away from the guest; place_memory gives it back."""
        self._set_slot(pages, 0, 0, 0)

    def _set_slot(self, pages: Pages, gpa: int, size: int, flags: int) -> None:
        region = KvmUserspaceMemoryRegion(self.memory.index(pages), flags, gpa, size, pages.address)
        self.ioctl(Ioctl.KVM_SET_USER_MEMORY_REGION, region)

    def set_clock(self, clock_ns: int) -> None:
        """Set the guest's kvmclock."""
        self.ioctl(Ioctl.KVM_SET_CLOCK, KvmClockData(clock=clock_ns))

    def signal_msi(self, vcpu_id: int, data: int) -> None:
        """Send a message to the local APIC of a vCPU; it takes an in-kernel irqchip."""
        if self.ioctl(Ioctl.KVM_SIGNAL_MSI, KvmMsi(address_lo=_MSI_ADDRESS | vcpu_id << 12, data=data)) == 0:
            raise LabError(f"the local APIC of vCPU {vcpu_id} took no MSI with data {data:#x}")

    def set_tss_addr(self, gpa: int) -> None:
        """Reserve three pages at ``gpa``, on which an Intel host may run real mode; before the first vCPU.

        Documentation/virt/kvm/api.rst, KVM_SET_TSS_ADDR: required on Intel hosts, harmless on others.
        """
        self.ioctl(Ioctl.KVM_SET_TSS_ADDR, gpa)

    def enable_cap(self, cap: Cap, argument: int) -> None:
        """Set a capability of the VM."""
        self.ioctl(Ioctl.KVM_ENABLE_CAP, KvmEnableCap(cap=cap, args=(argument, 0, 0, 0)))

    def reset_dirty_rings(self) -> None:
        """Have KVM take back the entries of dirty rings that are marked KVM_DIRTY_GFN_F_RESET."""
        self.ioctl(Ioctl.KVM_RESET_DIRTY_RINGS)

    def create_irqchip(self) -> None:
        """Put the interrupt controllers into the kernel; before the first vCPU."""
        self.ioctl(Ioctl.KVM_CREATE_IRQCHIP)

    def split_irqchip(self, pins: int) -> None:
        """Put the local APICs into the kernel, and leave an I/O APIC with so many pins to user space."""
        self.enable_cap(Cap.KVM_CAP_SPLIT_IRQCHIP, pins)

    def route_msi(self, pin: int, vcpu_id: int, data: int) -> None:
        """Have a pin of the I/O APIC, and no other, send a message to the local APIC of a vCPU."""
        routes = _OneRoute(nr=1)
        routes.room[0] = KvmIrqRoutingEntry(gsi=pin, type=KVM_IRQ_ROUTING_MSI)
        routes.room[0].u.msi = _RoutingMsi(address_lo=_MSI_ADDRESS | vcpu_id << 12, data=data)
        self.ioctl(Ioctl.KVM_SET_GSI_ROUTING, routes)

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """Create a vCPU in the state that follows a reset."""
        return Vcpu(self, self.ioctl(Ioctl.KVM_CREATE_VCPU, vcpu_id))


RUN_TIMEOUT_S = 5.0

# Intel SDM volume 3, "Spurious-Interrupt Vector Register".
_LAPIC_SPURIOUS_VECTOR = 0xF0
_LAPIC_ENABLED = 1 << 8
# Intel SDM volume 3, "Detecting and Enabling x2APIC Mode": IA32_APIC_BASE.
_X2APIC = 1 << 10


class Vcpu(_File):
    """A vCPU and its kvm_run."""

    def __init__(self, vm: Vm, fd: int) -> None:
        super().__init__(fd)
        self.vm = vm
        self._watchdog = _Watchdog()
        try:
            self._pages = Pages(vm.vcpu_mmap_size, fd)
        except CallFailed:
            super().close()
            raise

    def close(self) -> None:
        """Close the fd and unmap kvm_run."""
        self.close_fd()
        self.unmap()

    def close_fd(self) -> None:
        """Close the fd alone: the mapping of kvm_run still holds the vCPU and its VM."""
        self._watchdog.close()
        super().close()

    def unmap(self) -> None:
        """Unmap kvm_run."""
        self._pages.close()

    @property
    def kvm_run(self) -> KvmRun:
        """The struct kvm_run that this process shares with KVM."""
        if not self._pages.size:
            raise LabError("kvm_run has been unmapped")
        return KvmRun.from_address(self._pages.address)

    def io_data(self) -> bytes:
        """Return what the guest wrote, after KVM_EXIT_IO."""
        io = self.kvm_run.io
        return self._pages.read(io.data_offset, io.size * io.count)

    def run(self, timeout_s: float = RUN_TIMEOUT_S) -> int:
        """Run the guest until KVM_RUN returns, and return the exit reason.

        Any thread may call it. After ``timeout_s`` KVM_RUN is ended by force and that is a TimedOut.
        """
        kvm_run = self.kvm_run
        self._watchdog.arm(kvm_run, timeout_s)
        try:
            self.ioctl(Ioctl.KVM_RUN)
        except CallFailed:
            if self._watchdog.disarm():
                raise TimedOut(
                    f"KVM_RUN did not return within {timeout_s:g} s",
                    hint="this KVM cannot run that guest, or the host is too busy",
                ) from None
            raise
        finally:
            self._watchdog.disarm()
        return int(kvm_run.exit_reason)

    def get_regs(self) -> KvmRegs:
        """Return the general registers."""
        return self._get(Ioctl.KVM_GET_REGS, KvmRegs())

    def set_regs(self, regs: KvmRegs) -> None:
        """Set the general registers."""
        self.ioctl(Ioctl.KVM_SET_REGS, regs)

    def get_sregs(self) -> KvmSregs:
        """Return the segments and control registers."""
        return self._get(Ioctl.KVM_GET_SREGS, KvmSregs())

    def set_sregs(self, sregs: KvmSregs) -> None:
        """Set the segments and control registers."""
        self.ioctl(Ioctl.KVM_SET_SREGS, sregs)

    def get_msr(self, index: int) -> int:
        """Return a model-specific register."""
        msr = OneMsr(nmsrs=1, index=index)
        if self.ioctl(Ioctl.KVM_GET_MSRS, msr) != 1:
            raise LabError(f"KVM does not give MSR {index:#x}")
        return int(msr.data)

    def set_msr(self, index: int, value: int) -> None:
        """Set a model-specific register."""
        if self.ioctl(Ioctl.KVM_SET_MSRS, OneMsr(nmsrs=1, index=index, data=value)) != 1:
            raise LabError(f"KVM does not take {value:#x} for MSR {index:#x}")

    def get_mp_state(self) -> int:
        """Return the vCPU's MpState."""
        return int(self._get(Ioctl.KVM_GET_MP_STATE, KvmMpState()).mp_state)

    def set_mp_state(self, state: MpState) -> None:
        """Set the vCPU's MpState."""
        self.ioctl(Ioctl.KVM_SET_MP_STATE, KvmMpState(state))

    def enable_lapic(self) -> None:
        """Enable the local APIC, as a guest does: it takes interrupts now, and KVM finds it by its id."""
        lapic = self._get(Ioctl.KVM_GET_LAPIC, KvmLapicState())
        vector = ctypes.c_uint32.from_buffer(lapic, _LAPIC_SPURIOUS_VECTOR)
        vector.value |= _LAPIC_ENABLED
        self.ioctl(Ioctl.KVM_SET_LAPIC, lapic)

    def enable_x2apic(self) -> None:
        """Let the guest reach its local APIC by MSRs; its CPUID must allow it."""
        sregs = self.get_sregs()
        sregs.apic_base |= _X2APIC
        self.set_sregs(sregs)

    def report_tpr_access(self) -> None:
        """Ask for KVM_EXIT_TPR_ACCESS after each access of the guest to its TPR."""
        self.ioctl(Ioctl.KVM_TPR_ACCESS_REPORTING, KvmTprAccessCtl(enabled=1))

    def get_vcpu_events(self) -> KvmVcpuEvents:
        """Return the pending events: what a VMM saves."""
        return self._get(Ioctl.KVM_GET_VCPU_EVENTS, KvmVcpuEvents())

    def set_vcpu_events(self, events: KvmVcpuEvents) -> None:
        """Set the pending events: what a VMM restores."""
        self.ioctl(Ioctl.KVM_SET_VCPU_EVENTS, events)

    def nmi(self) -> None:
        """Queue an NMI."""
        self.ioctl(Ioctl.KVM_NMI)

    def smi(self) -> None:
        """Queue an SMI."""
        self.ioctl(Ioctl.KVM_SMI)

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt; it takes a VM without in-kernel irqchip."""
        self.ioctl(Ioctl.KVM_INTERRUPT, KvmInterrupt(irq=vector))

    def setup_mce(self, mcg_cap: int) -> None:
        """Set the vCPU's MCG_CAP: how many banks it has, and what they can do."""
        self.ioctl(Ioctl.KVM_X86_SETUP_MCE, ctypes.c_uint64(mcg_cap))

    def set_mce(self, mce: KvmX86Mce) -> None:
        """Inject a machine check."""
        self.ioctl(Ioctl.KVM_X86_SET_MCE, mce)

    def set_cpuid(self, cpuid: KvmCpuid2) -> None:
        """Set what CPUID tells the guest, and with it what the guest may use."""
        self.ioctl(Ioctl.KVM_SET_CPUID2, cpuid)

    def set_guest_debug(self, control: int) -> None:
        """Debug the guest, with KVM_GUESTDBG_* flags; 0 ends it."""
        self.ioctl(Ioctl.KVM_SET_GUEST_DEBUG, KvmGuestDebug(control=control))

    def stop(self) -> None:
        """End the KVM_RUN that another thread is inside: there it is a TimedOut."""
        self._watchdog.hurry()

    def harvest(self, ring_size: int) -> int:
        """Collect what is in the vCPU's dirty ring, and return how many pages it named."""
        ring = Pages(ring_size, self.fd, KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE)
        try:
            count = ring_size // ctypes.sizeof(KvmDirtyGfn)
            dirty = [
                one for one in (KvmDirtyGfn * count).from_address(ring.address) if one.flags & KVM_DIRTY_GFN_F_DIRTY
            ]
            for one in dirty:
                one.flags = KVM_DIRTY_GFN_F_RESET
            return len(dirty)
        finally:
            ring.close()

    def _get(self, request: Ioctl, struct: _StructType) -> _StructType:
        self.ioctl(request, struct)
        return struct


# --- the way out of KVM_RUN ---------------------------------------------------------------------------------

# Interrupts KVM_RUN and does nothing else. A real-time signal, since others have uses for SIGUSR1.
KICK = signal.SIGRTMIN
_TICK_S = 0.02


# Left alone, KICK would kill the process, and an ignored signal would not interrupt.
def _let_kicks_interrupt() -> None:
    if signal.getsignal(KICK) in (signal.SIG_DFL, signal.SIG_IGN):
        try:
            signal.signal(KICK, lambda number, frame: None)
        except ValueError as error:
            raise LabError(
                "only the main thread can set the signal handler of the lab",
                hint="open lab.kvm.Kvm there first",
            ) from error


# Ends a KVM_RUN whose time is up. The signal alone could arrive just before the thread enters the kernel;
# immediate_exit makes KVM_RUN return then, too. The thread starts with the first run and polls, so that
# arming costs no more than a lock.
class _Watchdog:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._armed: tuple[KvmRun, int, float] | None = None
        self._fired = False

    def arm(self, kvm_run: KvmRun, timeout_s: float) -> None:
        with self._lock:
            self._armed = kvm_run, threading.get_ident(), time.monotonic() + timeout_s
            self._fired = False
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="kvm-run-watchdog", daemon=True)
            self._thread.start()

    # Ends the run that is in progress.
    def hurry(self) -> None:
        with self._lock:
            if self._armed:
                self._armed = *self._armed[:2], time.monotonic()

    # Returns whether it had to end the run. Under the lock: a kick never meets a thread that has left run().
    def disarm(self) -> bool:
        with self._lock:
            if self._armed and self._fired:
                self._armed[0].immediate_exit = 0
            self._armed = None
            fired, self._fired = self._fired, False
            return fired

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(_TICK_S):
            with self._lock:
                if self._armed and time.monotonic() > self._armed[2]:
                    kvm_run, thread, _ = self._armed
                    kvm_run.immediate_exit = 1
                    signal.pthread_kill(thread, KICK)
                    self._fired = True
