"""The fetch arguments of the ftrace engine's probes: what tracefs reads for it, in tracefs's own words.

Where a function begins, its arguments are in registers. Where it returns they are not; but whoever called it keeps the
vCPU in a register that calls preserve, if it needs it again. So all of those are read, and the one that holds the vCPU
of this thread is believed (tracer/vcpus.py): a value that equals its address cannot be anything else.
"""

from __future__ import annotations

from collections.abc import Mapping

from probes.btf import Btf, MissingField

# The name that fetch arguments use, the field, and whether the engine can do without it.
_FIELDS = (
    ("requests", "kvm_vcpu.requests", False),
    ("kvm", "kvm_vcpu.kvm", False),
    ("vcpu_id", "kvm_vcpu.vcpu_id", False),
    ("run", "kvm_vcpu.run", False),
    ("cr0", "kvm_vcpu.arch.cr0", False),
    # As the programs read it, see probes/program.py.
    ("exits", "kvm_vcpu.stat.exits", False),
    ("private_data", "file.private_data", False),
    ("valid_regs", "kvm_run.kvm_valid_regs", False),
    ("sync_events", "kvm_run.s.regs.events", False),
    ("tgid", "task_struct.tgid", False),
    ("mm", "kvm.mm", False),
    # The VM's process by its memory; a part of CONFIG_MEMCG. Else by the thread that created it.
    ("owner", "mm_struct.owner", True),
    ("userspace_pid", "kvm.userspace_pid", True),
    # Linux commit ed2351174e38 ("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0).
    ("triple_fault_event", "kvm.arch.triple_fault_event", True),
    # As the programs read it, see probes/program.py: the statistic where there is one, else HF_GUEST_MASK.
    ("guest_mode", "kvm_vcpu.stat.guest_mode", True),
    ("hflags", "kvm_vcpu.arch.hflags", True),
    # As the programs read them, see probes/program.py.
    ("system_event", "kvm_run.system_event.type", True),
    ("dead", "kvm.vm_dead", True),
    ("bugged", "kvm.vm_bugged", True),
    ("protected", "kvm_vcpu.arch.guest_state_protected", True),
    ("mode", "kvm_vcpu.mode", False),
    ("vcpu_idx", "kvm_vcpu.vcpu_idx", True),
    # A kernel that has it counts a fault of a fetch argument as a miss of its probe, though the record is written:
    # kprobe_fault_handler() in arch/x86/kernel/kprobes/core.c, until Linux commit ec6aba3d2be1 ("kprobes: Remove
    # kprobe::fault_handler") (in v5.14).
    ("fault_handler", "kprobe.fault_handler", True),
)

# Registers that a call preserves (x86-64 psABI).
PRESERVED = ("bx", "bp", "r12", "r13", "r14", "r15")

#: The functions that are given a vCPU that gets no request, or a bitmap of those that get it.
EXCEPTING, MASKED = "kvm_make_all_cpus_request_except", "kvm_make_vcpus_request_mask"

# offsetof in struct kvm_vcpu_events (uapi asm/kvm.h): flags, triple_fault.pending.
_EVENTS_FLAGS, _EVENTS_PENDING = 20, 28


def offsets(btf: Btf) -> dict[str, int]:
    """Return the offset of every field that the probes read.

    Raises :class:`probes.btf.MissingField` for one that they cannot do without.
    """
    found = btf.offsets(_FIELDS)
    if "owner" not in found and "userspace_pid" not in found:
        raise MissingField("the kernel's BTF has neither mm_struct.owner nor kvm.userspace_pid")
    return found


def _vcpu(at: Mapping[str, int], vcpu: str) -> list[str]:
    arguments = [f"vcpu={vcpu}:x64", f"requests=+{at['requests']}({vcpu}):x64"]
    if "triple_fault_event" in at:
        arguments.append(f"cap=+{at['triple_fault_event']}(+{at['kvm']}({vcpu})):u8")
    return arguments + _nested(at, "nested", vcpu)


def _nested(at: Mapping[str, int], name: str, vcpu: str) -> list[str]:
    if "guest_mode" in at:
        return [f"{name}=+{at['guest_mode']}({vcpu}):u64"]
    if "hflags" in at:
        return [f"{name}=+{at['hflags']}({vcpu}):b1@5/32"]
    return []


def _exits(at: Mapping[str, int], vcpu: str) -> str:
    """How often the vCPU has left the guest."""
    return f"exits=+{at['exits']}({vcpu}):u64"


def _dead(at: Mapping[str, int], kvm: str) -> list[str]:
    """Whether KVM has given the VM up."""
    name = next((name for name in ("dead", "bugged") if name in at), None)
    return [f"dead=+{at[name]}({kvm}):u8"] if name else []


def _owner(at: Mapping[str, int], kvm: str) -> list[str]:
    # The pointer, too: where that is 0 the kernel writes no number, and what lay there before would be read.
    if "owner" not in at:
        return [f"creator=+{at['userspace_pid']}({kvm}):u32"]
    owner = f"+{at['owner']}(+{at['mm']}({kvm}))"
    return [f"owner={owner}:x64", f"tgid=+{at['tgid']}({owner}):u32"]


def _known(at: Mapping[str, int], vcpu: str) -> list[str]:
    kvm = f"+{at['kvm']}({vcpu})"
    return [*_vcpu(at, vcpu), f"kvm={kvm}:x64", f"vcpu_id=+{at['vcpu_id']}({vcpu}):u32", *_owner(at, kvm)]


def _payload(events: str) -> list[str]:
    return [f"flags=+{_EVENTS_FLAGS}({events}):u32", f"pending=+{_EVENTS_PENDING}({events}):u8"]


def _preserved(at: Mapping[str, int]) -> list[str]:
    arguments = []
    for register in PRESERVED:
        arguments += [f"{register}=%{register}:x64", f"{register}_requests=+{at['requests']}(%{register}):x64"]
        arguments += _nested(at, f"{register}_nested", f"%{register}")
    return arguments


def arguments(program: str, at: Mapping[str, int]) -> list[str]:
    """Return the fetch arguments of a probe, by the program that its hook names."""
    sync = at["sync_events"]
    if program == "vcpu_ioctl":
        return [*_known(at, f"+{at['private_data']}(%di)"), "cmd=%si:u32"]
    if program == "vcpu_put":
        run = f"+{at['run']}(%di)"
        return [
            *_vcpu(at, "%di"),
            f"cr0=+{at['cr0']}(%di):x64",
            _exits(at, "%di"),
            f"valid_regs=+{at['valid_regs']}({run}):x64",
            f"flags=+{sync + _EVENTS_FLAGS}({run}):u32",
            f"pending=+{sync + _EVENTS_PENDING}({run}):u8",
            *_dead(at, f"+{at['kvm']}(%di)"),
            *([f"system_event=+{at['system_event']}({run}):u32"] if "system_event" in at else ()),
            *([f"protected=+{at['protected']}(%di):u8"] if "protected" in at else ()),
        ]
    if program == "vcpu_create":
        return [*_known(at, "%di"), _exits(at, "%di")]
    if program == "vcpu_destroy":
        return [*_known(at, "%di"), _exits(at, "%di"), *_dead(at, f"+{at['kvm']}(%di)")]
    if program in ("vcpu_reset", "get_events"):
        return _vcpu(at, "%di")
    if program == "set_events":
        return [*_vcpu(at, "%di"), *_payload("%si")]
    if program == "get_events_end":
        # A function's own arguments where it returns: Linux commit 25f00e40ce79 ("tracing/probes: Support $argN in
        # return probe (kprobe and fprobe)") (in v6.9).
        return _payload("$arg2")
    if program == "vm_destroy":
        return ["kvm=%di:x64"]
    if program == "enable_cap":
        return ["kvm=%di:x64", "cap=+0(%si):u32", "value=+8(%si):x64", *_owner(at, "%di")]
    if program in ("ioctl_end", "enable_cap_end"):
        return ["ret=$retval:s32"]
    if program == "set_events_end":
        # A verdict hangs on its misses, and most registers hold no address: where faults count as such, none is read.
        return ["ret=$retval:s32", *([] if "fault_handler" in at else _preserved(at))]
    role, function = called(program)
    if role in ("entering", "left", "awake"):
        return _vcpu(at, "%di")
    if role == "kick":
        return [*_vcpu(at, "%di"), f"mode=+{at['mode']}(%di):s32"]
    if role == "request":
        return ["kvm=%di:x64", "request=%si:u32", *_meant(function, at)]
    if role == "request_end":
        return []
    return _preserved(at)  # a site


def called(program: str) -> tuple[str, str]:
    """Return what a function tells, and its name, for a program that is named after both."""
    role, _, function = program.partition("__")
    return role, function


def _meant(function: str, at: Mapping[str, int]) -> list[str]:
    """Return what tells which vCPUs get a request."""
    if function == EXCEPTING and "vcpu_idx" in at:
        return ["spared=%dx:x64", f"index=+{at['vcpu_idx']}(%dx):u32"]
    if function != MASKED:
        return []
    # The bitmap is the third argument. On 5.10 it is the fourth, after a vCPU to leave out: its callers there, which
    # are those for the IOAPIC and Hyper-V's TLB flush, leave none out.
    return [
        f"{name}{part}"
        for name, register in (("third", "dx"), ("fourth", "cx"))
        for part in (f"=%{register}:x64", f"_mask=+0(%{register}):x64")
    ]
