"""The words of a lifecycle, and the small numbers that stand for them while events are handled."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from probes.schema import Site


class By(IntEnum):
    """Who raised a request."""

    UNKNOWN = 0
    REMOTE = 1
    IOCTL = 2
    KVM_RUN = 3
    SET_MCE = 4
    SET_VCPU_EVENTS = 5
    SET_REGS = 6
    SET_SREGS = 7
    SET_SREGS2 = 8
    SET_MSRS = 9
    SET_NESTED_STATE = 10
    SET_MP_STATE = 11
    INTERRUPT = 12
    NMI = 13
    SMI = 14
    EXCEPTION = 15
    RSM = 16
    REALMODE_INTERRUPT = 17
    EMULATION = 18
    NESTED_VMEXIT = 19
    NESTED_ABORT = 20
    SET_EFER = 21
    MACHINE_CHECK = 22


class Place(IntEnum):
    """Where a vCPU can be when a request is raised, see :data:`PLACES`."""

    UNKNOWN = 0
    USER_SPACE = 1
    IOCTL = 2
    KVM_RUN = 3
    KERNEL = 4
    HALTED = 5
    GUEST = 6


class Verdict(IntEnum):
    """How a request ended, see analysis.verdicts.ENDS."""

    DELIVERED = 0
    REFLECTED = 1
    SERVICED = 2
    CLEARED = 3
    HANDED_OVER = 4
    LOST = 5
    ABANDONED = 6
    OPEN = 7
    UNDECIDED = 8


class Why(IntEnum):
    """What a verdict hangs on, see :data:`WHYS`."""

    NOTHING = 0
    END_UNSEEN = 1
    VANISHED = 2
    OUTSIDE = 3
    OTHER_IOCTL = 4
    OLDER = 5
    BLIND = 6
    MEANWHILE = 7
    UNNAMED = 8
    LAST_LOST = 9
    ALL_LOST = 10
    SYNC_REGS = 11


class Source(IntEnum):
    """What a guest shut down of, or died of, see :data:`SOURCES`."""

    REQUEST = 0
    HARDWARE = 1
    CRASH = 2
    SEV_TERM = 3
    TDX_FATAL = 4
    VM_DEAD = 5


class Copy(IntEnum):
    """What a row of columns.COPY tells."""

    SAVED = 0  # a request: it was saved, or left out
    CLOSED = 1  # what came of a vCPU after that: it ran again or it did not
    RESTORED = 2  # a vCPU whose registers were written, and has run since
    REFUSED = 3  # a request: KVM_SET_VCPU_EVENTS that would have raised it failed


#: In detail boundary nobody sees more of a vCPU than that it was inside KVM_RUN.
PLACES: Mapping[str, str] = {
    "unknown": "not seen",
    "user_space": "in user space, between two ioctls",
    "ioctl": "in an ioctl other than KVM_RUN",
    "kvm_run": "in KVM_RUN, in the guest or in the kernel",
    "kernel": "in KVM_RUN, outside the guest",
    "halted": "asleep in KVM_RUN: it was halted",
    "guest": "in the guest",
}
#: Of KVM_EXIT_SHUTDOWN; of KVM_EXIT_SYSTEM_EVENT; and of a VM that KVM itself has given up.
SOURCES: Mapping[str, str] = {
    "request": "KVM_REQ_TRIPLE_FAULT",
    "hardware": "the guest's own triple fault: nothing was pending, nothing could be lost",
    "crash": "the guest reported its own crash (KVM_SYSTEM_EVENT_CRASH)",
    "sev_term": "the SEV guest asked to be terminated (KVM_SYSTEM_EVENT_SEV_TERM)",
    "tdx_fatal": "the TD reported a fatal error (KVM_SYSTEM_EVENT_TDX_FATAL)",
    "vm_dead": "KVM gave this VM up (KVM_BUG_ON, or its memory went to another VM by SEV intra-host migration)",
}
WHYS: Mapping[Why, str] = {
    Why.NOTHING: "",
    Why.END_UNSEEN: "its end was not seen",
    Why.VANISHED: "the request disappeared inside KVM_RUN without a shutdown exit",
    Why.SYNC_REGS: "it was reflected to L1, or cleared by events that user space left in kvm_run",
    Why.OUTSIDE: "the request disappeared while no ioctl was in progress",
    Why.OTHER_IOCTL: "cleared by another ioctl than KVM_SET_VCPU_EVENTS",
    Why.OLDER: "it was pending before tracing began: whether it had been saved by then is not known",
    Why.BLIND: "the tracer missed hooks, and they may be what decides it",
    Why.MEANWHILE: "it was raised while the vCPU was saved: whether before or after that is not known",
    Why.UNNAMED: "it was pending when the vCPU was saved, and this kvmreq does not know what it stands for",
    Why.LAST_LOST: "the last events of this vCPU were lost",
    Why.ALL_LOST: "events of whole VMs or VMMs were lost",
}


def words(of: type[IntEnum]) -> list[str]:
    """Return the words of numbers, by number."""
    return [member.name.lower() for member in of]


def _rows(of: Mapping[int, By]) -> npt.NDArray[np.int64]:
    return np.array(sorted(of.items()), np.int64)


#: vCPU ioctls that can change the word, by number (uapi linux/kvm.h), and KVM's name for who they are.
IOCTLS = _rows(
    {
        0x4040AE9E: By.SET_MCE,
        0x4040AEA0: By.SET_VCPU_EVENTS,
        0x4090AE82: By.SET_REGS,
        0x4138AE84: By.SET_SREGS,
        0x4140AECD: By.SET_SREGS2,
        0x4008AE89: By.SET_MSRS,
        0x4080AEBF: By.SET_NESTED_STATE,
        0x4004AE99: By.SET_MP_STATE,
        0x4004AE86: By.INTERRUPT,
        0xAE9A: By.NMI,
        0xAEB7: By.SMI,
    }
)
#: Functions of KVM after which the word is read, and that can raise a triple fault.
SITES = _rows(
    {
        Site.EXCEPTION: By.EXCEPTION,
        Site.RSM: By.RSM,
        Site.REALMODE_INTERRUPT: By.REALMODE_INTERRUPT,
        Site.EMULATION: By.EMULATION,
        Site.NESTED_VMEXIT: By.NESTED_VMEXIT,
        Site.NESTED_ABORT: By.NESTED_ABORT,
        Site.SET_EFER: By.SET_EFER,
        Site.MACHINE_CHECK: By.MACHINE_CHECK,
        Site.SYNC_EVENTS: By.SET_VCPU_EVENTS,
    }
)
