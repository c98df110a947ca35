"""What user space calls the things that it asks of a vCPU: names of ioctls and of the reasons why KVM_RUN returns.

The numbers are the kernel's stable ABI (uapi linux/kvm.h, x86-64); a test compares them with the system's own header.
"""

from __future__ import annotations

from collections.abc import Mapping

#: ioctls of a vCPU by number, as KVM names them without KVM_.
IOCTLS: Mapping[int, str] = {
    0xAE80: "RUN",
    0x8090AE81: "GET_REGS",
    0x4090AE82: "SET_REGS",
    0x8138AE83: "GET_SREGS",
    0x4138AE84: "SET_SREGS",
    0xC018AE85: "TRANSLATE",
    0x4004AE86: "INTERRUPT",
    0xC008AE88: "GET_MSRS",
    0x4008AE89: "SET_MSRS",
    0x4008AE8A: "SET_CPUID",
    0x4004AE8B: "SET_SIGNAL_MASK",
    0x81A0AE8C: "GET_FPU",
    0x41A0AE8D: "SET_FPU",
    0x8400AE8E: "GET_LAPIC",
    0x4400AE8F: "SET_LAPIC",
    0x4008AE90: "SET_CPUID2",
    0xC008AE91: "GET_CPUID2",
    0xC028AE92: "TPR_ACCESS_REPORTING",
    0x4008AE93: "SET_VAPIC_ADDR",
    0x8004AE98: "GET_MP_STATE",
    0x4004AE99: "SET_MP_STATE",
    0xAE9A: "NMI",
    0x4048AE9B: "SET_GUEST_DEBUG",
    0x4008AE9C: "X86_SETUP_MCE",
    0x8008AE9D: "X86_GET_MCE_CAP_SUPPORTED",
    0x4040AE9E: "X86_SET_MCE",
    0x8040AE9F: "GET_VCPU_EVENTS",
    0x4040AEA0: "SET_VCPU_EVENTS",
    0x8080AEA1: "GET_DEBUGREGS",
    0x4080AEA2: "SET_DEBUGREGS",
    0xAEA2: "SET_TSC_KHZ",
    0xAEA3: "GET_TSC_KHZ",
    0x4068AEA3: "ENABLE_CAP",
    0x9000AEA4: "GET_XSAVE",
    0x5000AEA5: "SET_XSAVE",
    0x8188AEA6: "GET_XCRS",
    0x4188AEA7: "SET_XCRS",
    0xAEAD: "KVMCLOCK_CTRL",
    0xAEB7: "SMI",
    0xC080AEBE: "GET_NESTED_STATE",
    0x4080AEBF: "SET_NESTED_STATE",
    0xC008AEC1: "GET_SUPPORTED_HV_CPUID",
    0x8140AECC: "GET_SREGS2",
    0x4140AECD: "SET_SREGS2",
    0xAECE: "GET_STATS_FD",
    0x9000AECF: "GET_XSAVE2",
}

#: Reasons why KVM_RUN returns, by number, as KVM names them without KVM_EXIT_.
EXITS: Mapping[int, str] = {
    0: "UNKNOWN",
    1: "EXCEPTION",
    2: "IO",
    3: "HYPERCALL",
    4: "DEBUG",
    5: "HLT",
    6: "MMIO",
    7: "IRQ_WINDOW_OPEN",
    8: "SHUTDOWN",
    9: "FAIL_ENTRY",
    10: "INTR",
    11: "SET_TPR",
    12: "TPR_ACCESS",
    16: "NMI",
    17: "INTERNAL_ERROR",
    24: "SYSTEM_EVENT",
    26: "IOAPIC_EOI",
    27: "HYPERV",
    29: "X86_RDMSR",
    30: "X86_WRMSR",
    31: "DIRTY_RING_FULL",
    32: "AP_RESET_HOLD",
    33: "X86_BUS_LOCK",
    34: "XEN",
    37: "NOTIFY",
}


def ioctl(number: int) -> str:
    """Return the name of an ioctl; of one that is not in the table, its number.

    >>> ioctl(0xAE80), ioctl(0xAEFF)
    ('RUN', '0xaeff')
    """
    return IOCTLS.get(number) or f"{number:#x}"


def exit_reason(number: int) -> str:
    """Return the name of a reason why KVM_RUN returned; of one that is not in the table, its number.

    >>> exit_reason(8), exit_reason(99)
    ('SHUTDOWN', '99')
    """
    return EXITS.get(number) or str(number)
