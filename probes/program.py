"""The C programs of an engine, with everything that the running kernel decides put in front of them.

Offsets come from BTF, so the same source serves every kernel; a field that a kernel does not have leaves out what
needs it, and ``doctor`` says so.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from probes import guest, schema
from probes.btf import Btf
from probes.exits import UNREADABLE
from probes.plan import Hook, Plan, Via
from probes.requests import TRIPLE_FAULT

# Every field that the programs read: the constant, the field, and whether the programs can do without it.
_FIELDS = (
    ("OFFSET_REQUESTS", "kvm_vcpu.requests", False),
    ("OFFSET_KVM", "kvm_vcpu.kvm", False),
    ("OFFSET_VCPU_ID", "kvm_vcpu.vcpu_id", False),
    ("OFFSET_RUN", "kvm_vcpu.run", False),
    ("OFFSET_CR0", "kvm_vcpu.arch.cr0", False),
    # ++vcpu->stat.exits in vcpu_enter_guest (arch/x86/kvm/x86.c): the guest has run.
    ("OFFSET_EXITS", "kvm_vcpu.stat.exits", False),
    # The general registers, RIP behind them (enum kvm_reg), and CR3: up to date once user space has read or written
    # them.
    ("OFFSET_REGS", "kvm_vcpu.arch.regs", False),
    ("OFFSET_CR3", "kvm_vcpu.arch.cr3", False),
    ("OFFSET_F_OP", "file.f_op", False),
    ("OFFSET_EXIT_REASON", "kvm_run.exit_reason", False),
    ("OFFSET_VALID_REGS", "kvm_run.kvm_valid_regs", False),
    ("OFFSET_SYNC_EVENTS", "kvm_run.s.regs.events", False),
    ("OFFSET_FILES", "task_struct.files", False),
    ("OFFSET_FDT", "files_struct.fdt", False),
    ("OFFSET_FD", "fdtable.fd", False),
    ("OFFSET_MAX_FDS", "fdtable.max_fds", False),
    ("OFFSET_UNLOCKED_IOCTL", "file_operations.unlocked_ioctl", False),
    ("OFFSET_STACK", "task_struct.stack", False),
    ("OFFSET_STATUS", "task_struct.thread_info.status", True),
    ("OFFSET_DX", "pt_regs.dx", False),
    # Whose a VM is. An mm's owner is a part of CONFIG_MEMCG.
    ("OFFSET_KVM_MM", "kvm.mm", False),
    ("OFFSET_MM", "task_struct.mm", False),
    ("OFFSET_TGID", "task_struct.tgid", False),
    ("OFFSET_OWNER", "mm_struct.owner", True),
    ("OFFSET_USERSPACE_PID", "kvm.userspace_pid", True),
    # Linux commit ed2351174e38 ("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0).
    ("OFFSET_TRIPLE_FAULT_EVENT", "kvm.arch.triple_fault_event", True),
    ("OFFSET_SYSTEM_EVENT", "kvm_run.system_event.type", True),
    # Linux commit 0b8f11737cff ("KVM: Add infrastructure and macro to mark VM as bugged") (in v5.15, and in 5.10's
    # updates); newer kernels have vm_dead besides, which each VM that is bugged is, too.
    ("OFFSET_VM_DEAD", "kvm.vm_dead", True),
    ("OFFSET_VM_BUGGED", "kvm.vm_bugged", True),
    # An SEV-ES guest, whose registers KVM cannot read ("KVM: SVM: Add required changes to support intercepts under
    # SEV-ES", in v5.11).
    ("OFFSET_STATE_PROTECTED", "kvm_vcpu.arch.guest_state_protected", True),
    # A statistic that is 1 while the vCPU runs L2 ("KVM: nVMX: nSVM: Add a new VCPU statistic to show if VCPU is in
    # guest mode", after v5.10). Kernels before it have a flag in hflags, which then was bit 5; it moved later, so it is
    # not asked where the statistic is there.
    ("OFFSET_GUEST_MODE", "kvm_vcpu.stat.guest_mode", True),
    ("OFFSET_HFLAGS", "kvm_vcpu.arch.hflags", True),
    # What detail full tells of other vCPUs.
    ("OFFSET_MODE", "kvm_vcpu.mode", True),
    ("OFFSET_VCPU_IDX", "kvm_vcpu.vcpu_idx", True),
)

# Who is inside an ioctl of a vCPU: the tracepoint engine cannot do without it. With CONFIG_PREEMPT_RT a mutex is an
# rt_mutex (include/linux/mutex_types.h); the low bits of either's owner are its own.
_MUTEX_OWNERS = ("kvm_vcpu.mutex.owner", "kvm_vcpu.mutex.rtmutex.owner")

# How that engine knows that a vCPU has ended.
_ENDS = (
    ("OFFSET_MM_USERS", "mm_struct.mm_users", False),
    # A number that no other mm has: init_new_context() in arch/x86/include/asm/mmu_context.h. Addresses come round.
    ("OFFSET_CTX_ID", "mm_struct.context.ctx_id", False),
    ("OFFSET_TASK_FLAGS", "task_struct.flags", False),
    # Linux commit 90ee6ed776c0 ("fs: port files to file_ref") (in v6.13); before it f_count.
    ("OFFSET_F_REF", "file.f_ref", True),
)

# Every type whose size they need where bpf_task_pt_regs() is missing. The stack of a task (THREAD_SIZE) is as large as
# that for interrupts (IRQ_STACK_SIZE): both are 4 pages, and more under KASAN (arch/x86/include/asm/page_64_types.h).
_SIZES = (("SIZE_STACK", "irq_stack"), ("SIZE_PT_REGS", "pt_regs"))


@dataclass(frozen=True)
class Addition:
    """More programs, which build on those of an engine: what is defined in front of all, and files that follow."""

    constants: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[str] = ()


NOTHING_MORE = Addition()


@dataclass(frozen=True)
class Settings:
    """What a user and the host decide about the programs."""

    watched: int  # mask of requests
    cpus: int  # one more than the highest number of a CPU
    dead: int = 0  # mask of the requests by which KVM gives a VM up: they are watched, whatever is asked for
    full: bool = False  # send every boundary
    filtered: bool = False  # only processes in the map `filter`
    ring_bytes: int = 32 << 20
    max_vcpus: int = 16384
    max_threads: int = 32768
    max_vms: int = 8192


def offsets(btf: Btf, engine: str) -> dict[str, int]:
    """Return the offset of every field that an engine's programs read, and the sizes, by the names of their constants.

    Raises :class:`probes.btf.MissingField` for one that they cannot do without.
    """
    found = btf.offsets(_FIELDS)
    owner = next(filter(btf.has, _MUTEX_OWNERS), None)
    if owner is not None or engine == "tracepoint":
        found["OFFSET_MUTEX_OWNER"] = btf.offset(owner or _MUTEX_OWNERS[0])
    if engine == "tracepoint":
        found |= btf.offsets(_ENDS)
        if "OFFSET_F_REF" not in found:
            found["OFFSET_F_COUNT"] = btf.offset("file.f_count")
    for constant, what in _SIZES:
        if btf.has(what):
            found[constant] = btf.size(what)
    found |= guest.mask_arguments(btf)
    found["OFFSET_PRIVATE_DATA"] = btf.offset("file.private_data") - found["OFFSET_F_OP"]
    return found


# The file of each engine's programs, and those that it has in detail full.
_FILES = {"tracepoint": "tracepoint.c", "kprobe": "functions.c", "fentry": "functions.c"}
_FULL = {"tracepoint": ("full.c", "guest.c"), **dict.fromkeys(("kprobe", "fentry"), ("kicks.c", "full.c", "guest.c"))}
#: Engines that are programs.
ENGINES = tuple(_FILES)
# How BCC finds out from the name of a program where it belongs: PREFIX__MODULE__FUNCTION.
_PREFIXES = {Via.FENTRY: "kfunc", Via.FEXIT: "kretfunc"}


def name(hook: Hook, modules: Mapping[str, str]) -> str:
    """Return the name of a hook's program; ``modules`` tells in which module a function is.

    It is empty for a BCC that knows no modules: there the function's name follows at once.
    """
    if hook.via not in _PREFIXES:
        return hook.program
    return "__".join(filter(None, (_PREFIXES[hook.via], modules[hook.target], hook.target)))


def source(
    plan: Plan,
    settings: Settings,
    found: Mapping[str, int],
    symbols: Mapping[str, int],
    modules: Mapping[str, str],
    more: Addition = NOTHING_MORE,
) -> str:
    """Return the C source of a plan's programs, and of those that are added to them.

    ``found`` is what :func:`offsets` gave; ``symbols`` holds the addresses of ``kvm_vcpu_ioctl`` and ``kvm_vm_ioctl``,
    by which the tracepoint engine knows a vCPU's file from another one, or 0 where the kernel hides them; ``modules``
    tells where the functions are.
    """
    constants = {
        "WATCHED": f"{settings.watched | settings.dead:#x}ULL",
        "DEAD": f"{settings.dead:#x}ULL",
        "FULL": str(int(settings.full)),
        "KICKS": str(int("kicks.c" in _FULL[plan.engine])),
        "UNREADABLE": f"{UNREADABLE:#x}",
        "FENTRY": str(int(plan.engine == "fentry")),
        "TRACE_EVENTS": str(int(any(hook.via is Via.TRACEPOINT for hook in plan.attachable))),
        "FILTER": str(int(settings.filtered)),
        "TRACER": str(os.getpid()),
        "HIDDEN": str(int(not symbols.get("kvm_vcpu_ioctl"))),
        "NO_IOCTL": f"{schema.NO_IOCTL:#x}",
        "LOOK": f"{schema.LOOK:#x}",
        **({"OWN_ENDS": "1"} if plan.engine == "tracepoint" else {}),
        "CPUS": str(settings.cpus),
        "RING_PAGES": str(settings.ring_bytes // os.sysconf("SC_PAGE_SIZE")),
        "MAX_VCPUS": str(settings.max_vcpus),
        "MAX_THREADS": str(settings.max_threads),
        "MAX_VMS": str(settings.max_vms),
        "TRIPLE_FAULT": str(TRIPLE_FAULT),
        **{f"FINGERPRINT_KEY{number}": f"{secrets.randbits(64):#x}ULL" for number in range(2)},
        # Whether all that is asked for is only ever raised by the vCPU's own ioctls; in detail full all is read.
        "OWN_ONLY": str(int(settings.watched == 1 << TRIPLE_FAULT and not settings.full)),
        **{f"{name.upper()}": f"{address:#x}ULL" for name, address in symbols.items()},
        **{name: str(offset) for name, offset in found.items()},
        **more.constants,
    }
    sites = [f"SITE({hook.target}, SITE_{hook.site.name})" for hook in plan.attachable if hook.site is not None]
    trampolines = [
        f"int {name(hook, modules)}(u64 *ctx)\n{{\n\treturn {hook.program}(ctx);\n}}"
        for hook in plan.attachable
        if hook.via in _PREFIXES
    ]
    programs = files("probes").joinpath("programs")
    return "\n".join(
        (
            *(f"#define {name} {value}" for name, value in constants.items()),
            schema.c_constants(),
            schema.c_struct(),
            schema.c_states(),
            programs.joinpath("vcpu.c").read_text(),
            programs.joinpath(_FILES[plan.engine]).read_text(),
            *(programs.joinpath(name).read_text() for name in (_FULL[plan.engine] if settings.full else ())),
            *sites,
            *trampolines,
            *(programs.joinpath(name).read_text() for name in more.files),
        )
    )


def headers() -> Path:
    """Return the stub header tree: the value of BCC_KERNEL_SOURCE that makes kernel headers unnecessary."""
    return Path(str(files("probes").joinpath("include"))).parent
