"""The one event: what every engine writes and every analysis reads.

Written down once, in :data:`FIELDS`. The C struct, the numpy dtype and the Arrow schema are derived from it; a test
compiles the C and compares every offset. An event is one reading of a vCPU's requests word, so what changed between
two hooks is ``before ^ requests`` and when it changed is the interval [``since_ns``, ``time_ns``].
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

# Version of the recorded schema. A reader refuses a newer one: a field that it does not know may change a verdict.
SCHEMA_VERSION = 3
#: From this one on READ tells what user space reads of a vCPU. Before it any KVM_GET_VCPU_EVENTS passes for a save.
TELLS_READS = 3


class Field(NamedTuple):
    """A field of the event: its name, its numpy type, and what it holds."""

    name: str
    dtype: str
    meaning: str


#: After so many events of a vCPU their numbers begin again with 1: at 1 M a second, after 72 minutes.
SEQUENCE = (1 << 32) - 1

FIELDS = (
    Field("time_ns", "u8", "CLOCK_MONOTONIC at the hook"),
    Field("since_ns", "u8", "CLOCK_MONOTONIC when this vCPU's word was last read before; 0 if it never was"),
    Field("requests", "u8", "vcpu->requests as read at the hook"),
    Field("before", "u8", "vcpu->requests as it was last read before, at since_ns"),
    Field("arg", "u8", "by kind: see Kind"),
    Field("vcpu", "u4", "number of the vCPU, unique in the recording, from 1; 0: the event concerns a whole VM or VMM"),
    Field(
        "seq", "u4", "number of this event among those produced for this vCPU, from 1: a gap is a loss; 0: see REMOTE"
    ),
    Field("pid", "u4", "process (tgid) that owns the VM"),
    Field("tid", "u4", "thread that ran the hook"),
    Field("detail", "u4", "by kind: see Kind"),
    Field("cpu", "u2", "host CPU that ran the hook"),
    Field("kind", "u1", "what was hooked, a Kind"),
    Field("flags", "u1", "what holds at the hook, a set of Flag"),
)

#: One event as numpy sees it in the ring and in a batch.
EVENT = np.dtype([(field.name, field.dtype) for field in FIELDS], align=True)


class Kind(IntEnum):
    """What was hooked. Numbers are part of the recorded schema: append, never renumber.

    ``cmd`` is the ioctl number; ``errno`` is the negative return of the ioctl as a 32-bit integer (0: success).
    """

    VCPU_NEW = 1  # first sight of a vCPU (Flag.CREATED: its creation); arg: vcpu_id; detail: number of its VM
    VCPU_END = 2  # nothing can run or save the vCPU any more; arg: an End; detail: RAN, as of RUN_EXIT
    VMM_EXIT = 3  # vcpu 0: every vCPU of pid has ended; arg: an End
    VM_CAP = 4  # vcpu 0: KVM_CAP_X86_TRIPLE_FAULT_EVENT was set; arg: 0 or 1; detail: number of the VM
    IOCTL_ENTER = 5  # a vCPU ioctl begins, other than KVM_RUN; arg: cmd
    IOCTL_EXIT = 6  # it returned; arg: cmd | errno << 32
    SAVE = 7  # KVM_GET_VCPU_EVENTS returned; arg: cmd | errno << 32; detail: see payload()
    RESTORE = 8  # KVM_SET_VCPU_EVENTS returned; arg: cmd | errno << 32; detail: see payload()
    RUN_ENTER = 9  # KVM_RUN begins
    RUN_EXIT = 10  # KVM_RUN returns to user space; arg: exit_reason | errno << 32; detail: of KVM_EXIT_SYSTEM_EVENT its
    #                type, a SystemEvent; and RAN, where the guest was entered for the first time since its registers
    #                were WRITTEN, or a RESTORE of it failed
    RESET = 11  # the vCPU was reset: kvm_vcpu_reset, or registers written in real mode by user space; arg: cmd or 0
    SITE = 12  # inside KVM, after a function that raises, clears or explains a request; arg: a Site
    # From here on in detail full only.
    GUEST_ENTRY = 13  # the guest is entered
    GUEST_EXIT = 14  # the guest was left; arg: hardware exit reason; detail: its instruction set (1 VMX, 2 SVM), or 0
    WAKEUP = 15  # the vCPU stops blocking; arg: for how many ns it did; detail: 1 if it slept, 0 if it only polled
    KICK = 16  # REMOTE: kvm_vcpu_kick of it begins; detail: vcpu->mode as the kicker sees it
    REQUEST_ALL = (
        17  # vcpu 0: vCPUs of a VM are about to get a request; arg: see REQUEST_MASK; detail: number of the VM;
    )
    #                   requests: mask of the vCPUs by index, all ones: every one
    REQUEST_ALL_END = 18  # vcpu 0: that returned; since_ns: when it began; the rest as there
    IN_GUEST_STILL = 19  # REMOTE: at the REQUEST_ALL_END of a request with WAIT the vCPU was in guest mode and had it
    #                      pending, unless it has no bit; arg: as there; since_ns: when it began; detail: vcpu->mode
    # Again in every detail.
    READ = 20  # since the vCPU last ran user space has read SAVED_STATE of it, or more; detail: set of STATES;
    #            arg: fingerprint of its registers, 0 where the engine makes none
    WRITTEN = 21  # since the vCPU last ran user space has written RESTORED_STATE of it, or a part of that again,
    #               and not what it had read; arg and detail: as of READ


#: In ``detail`` of RUN_EXIT and VCPU_END.
RAN = 1 << 16

#: Events about a vCPU from another thread. They have no sequence number and stand apart from its own: the word that
#: they hold is as that thread saw it, ``before`` the same, and the next event of the vCPU does not know of them.
REMOTE = (Kind.KICK, Kind.IN_GUEST_STILL)

# In ``arg`` of REQUEST_ALL: the number of the request in the low 8 bits, KVM's flags above (include/linux/kvm_host.h).
REQUEST_MASK = 0xFF
REQUEST_FLAGS = {"NO_WAKEUP": 1 << 8, "WAIT": 1 << 9, "NO_ACTION": 1 << 10}
#: What stands for the number of a request with NO_ACTION, which sets no bit of the word (kvm_make_vcpu_request). The
#: only one, KVM_REQ_OUTSIDE_GUEST_MODE, has the number of KVM_REQ_TLB_FLUSH and is another request.
NO_BIT = 64

# enum of vcpu->mode (include/linux/kvm_host.h), as the kernel numbers it.
OUTSIDE_GUEST_MODE, IN_GUEST_MODE, EXITING_GUEST_MODE, READING_SHADOW_PAGE_TABLES = range(4)
MODES = ("OUTSIDE_GUEST_MODE", "IN_GUEST_MODE", "EXITING_GUEST_MODE", "READING_SHADOW_PAGE_TABLES")


class Flag(IntFlag):
    """What holds at the hook."""

    CREATED = 1  # the creation of this vCPU was seen: no request is older than its first event
    NESTED = 2  # the vCPU is in nested guest mode (L2)
    CAP = 4  # KVM_CAP_X86_TRIPLE_FAULT_EVENT is enabled for the VM
    CAP_EXISTS = 8  # this kernel has that capability
    SYNC = 16  # the save went through kvm_run (KVM_SYNC_X86_EVENTS), not through the ioctl; inside KVM_RUN, where a
    #            triple fault is gone: kvm_run's events have the flag without it, and may have cleared it
    READ = 32  # before the hook, and since the vCPU last ran, user space has read SAVED_STATE of it
    STILL = 64  # it was there when tracing began and has not run since: what was read of it before, nobody saw
    DEAD = 128  # KVM has given the VM up (kvm->vm_dead, kvm->vm_bugged): it refuses every ioctl from now on


class End(IntEnum):
    """How a vCPU ended."""

    CLOSED = 1  # nothing refers to its file any more
    EXITED = 2  # its process exited: nobody has that one's memory any more
    EXECED = 3  # its process executed another program
    DESTROYED = 4  # KVM destroyed it
    REUSED = 5  # KVM has created another vCPU in its place


class Site(IntEnum):
    """Functions of KVM after which the word is read, by what they mean for a triple fault."""

    EXCEPTION = 1
    RSM = 2
    REALMODE_INTERRUPT = 3
    EMULATION = 4
    NESTED_VMEXIT = 5
    NESTED_ABORT = 6
    SET_EFER = 7
    MACHINE_CHECK = 8
    REFLECT = 9  # nested_{svm,vmx}_triple_fault: L1 receives the shutdown VM-exit
    HARDWARE_SHUTDOWN = 10  # shutdown_interception, handle_triple_fault: a shutdown that no request made
    SYNC_EVENTS = 11  # kvm_vcpu_ioctl_x86_set_vcpu_events


class State(NamedTuple):
    """A part of the state of a vCPU that user space reads and writes: the numbers (_IOC_NR) of the ioctls that do."""

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]


#: By bit in a set of them, as READ and WRITTEN tell it (uapi linux/kvm.h).
STATES = (
    State("regs", (0x81,), (0x82,)),
    State("sregs", (0x83, 0xCC), (0x84, 0xCD)),  # KVM_GET_SREGS and KVM_GET_SREGS2
    State("msrs", (0x88,), (0x89,)),
    State("events", (0x9F,), (0xA0,)),
    State("fpu", (0x8C,), (0x8D,)),
    State("xsave", (0xA4, 0xCF), (0xA5,)),  # KVM_GET_XSAVE and KVM_GET_XSAVE2
    State("xcrs", (0xA6,), (0xA7,)),
    State("debugregs", (0xA1,), (0xA2,)),
    State("lapic", (0x8E,), (0x8F,)),
    State("mp_state", (0x98,), (0x99,)),
    State("nested_state", (0xBE,), (0xBF,)),
)
STATE_BITS = {state.name: 1 << bit for bit, state in enumerate(STATES)}
#: A copy of a guest has at least these; with the events it keeps what is pending.
SAVED_STATE = STATE_BITS["regs"] | STATE_BITS["sregs"] | STATE_BITS["msrs"]
#: With these user space gives a vCPU another state.
RESTORED_STATE = STATE_BITS["regs"] | STATE_BITS["sregs"]

# struct kvm_vcpu_events.flags (uapi asm/kvm.h); Linux commit ed2351174e38
# ("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0).
VALID_TRIPLE_FAULT = 0x20
#: In ``detail`` of SAVE and RESTORE: kvm_vcpu_events.flags in the low 16 bits, triple_fault.pending != 0 in bit 16.
PAYLOAD_FLAGS = 0xFFFF
PAYLOAD_PENDING = 1 << 16

# enum of KVM_EXIT_* (uapi linux/kvm.h), stable ABI.
KVM_EXIT_SHUTDOWN = 8
#: _IO(KVMIO, 0xff): no ioctl of a vCPU. KVM refuses it before it looks, for the asking process is not the VM's own.
NO_IOCTL = 0xAEFF
#: _IO(KVMIO, 0xfe): an ioctl of nothing, by which the tracer has a vCPU looked at.
LOOK = 0xAEFE
KVM_EXIT_SYSTEM_EVENT = 24


class SystemEvent(IntEnum):
    """Types of KVM_EXIT_SYSTEM_EVENT with which a guest ends, or says that it has: KVM_SYSTEM_EVENT_* (uapi)."""

    CRASH = 3  # a Hyper-V guest's own report
    SEV_TERM = 6  # an SEV-ES or SEV-SNP guest asks to be terminated (GHCB MSR protocol)
    TDX_FATAL = 7  # a TD reports a fatal error (TDG.VP.VMCALL<ReportFatalError>)


def requested(arg: Any) -> Any:
    """Return the numbers of requests from what ``arg`` of REQUEST_ALL holds; :data:`NO_BIT` for one without a bit."""
    mask, none = np.uint64(REQUEST_MASK), np.uint64(NO_BIT)
    return np.where(np.asarray(arg, np.uint64) & np.uint64(REQUEST_FLAGS["NO_ACTION"]), none, arg & mask)


_C_TYPES = {"u8": "u64", "u4": "u32", "u2": "u16", "u1": "u8"}


def c_struct() -> str:
    """Return the event as the C struct that the probes fill."""
    members = "\n".join(f"\t{_C_TYPES[field.dtype]} {field.name};\t/* {field.meaning} */" for field in FIELDS)
    return f"struct event {{\n{members}\n}};\n"


def c_constants() -> str:
    """Return every Kind, Flag, End and Site as a C constant, such as ``KIND_RUN_EXIT``, and the sets of STATES."""
    return "".join(
        f"#define {enum.__name__.upper()}_{member.name} {member.value}\n"
        for enum in (Kind, Flag, End, Site)
        for member in enum
    ) + "".join(
        f"#define {name} {value:#x}\n"
        for name, value in (
            ("RAN", RAN),
            ("STATE_MSRS", STATE_BITS["msrs"]),
            ("SAVED_STATE", SAVED_STATE),
            ("RESTORED_STATE", RESTORED_STATE),
        )
    )


def c_states() -> str:
    """Return the C functions that tell which of STATES an ioctl reads or writes, 0: none."""

    def function(verb: str, of: Callable[[State], tuple[int, ...]]) -> str:
        cases = "".join(
            "".join(f"\tcase {number:#x}:\n" for number in of(state)) + f"\t\treturn {bit:#x};\n"
            for state, bit in zip(STATES, STATE_BITS.values(), strict=True)
        )
        return (
            f"static inline u32 state_{verb}_by(u32 cmd)\n{{\n\tswitch (cmd & 0xff) {{\n{cases}\t}}\n\treturn 0;\n}}\n"
        )

    return function("read", lambda state: state.reads) + function("written", lambda state: state.writes)


def arrow_schema() -> pa.Schema:
    """Return the event as an Arrow schema: the columns of a recorded segment."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field(
                field.name, pa.from_numpy_dtype(np.dtype(field.dtype)), nullable=False, metadata={"": field.meaning}
            )
            for field in FIELDS
        ]
    )
