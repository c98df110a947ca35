"""What one event says about one request: who raised it, what ended it, whether a save carries it.

Tables and column functions without state. :mod:`analysis.lifecycle` knows which events belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from analysis.rows import Array
from analysis.verdicts import ENDS, RAISERS
from probes.schema import KVM_EXIT_SHUTDOWN, PAYLOAD_PENDING, VALID_TRIPLE_FAULT, Flag, Kind, Site

TRIPLE_FAULT = "triple_fault"

# Codes of the words of a verdict: their places in ENDS and RAISERS.
END = MappingProxyType({word: code for code, word in enumerate(ENDS)})
RAISER = MappingProxyType({word: code for code, word in enumerate(RAISERS)})

# ioctls of a vCPU on x86 (uapi linux/kvm.h, stable ABI); a test compares them with the header.
IOCTLS: Mapping[int, str] = MappingProxyType(
    {
        0xAE80: "KVM_RUN",
        0x4090AE82: "KVM_SET_REGS",
        0x8138AE83: "KVM_GET_SREGS",
        0x4138AE84: "KVM_SET_SREGS",
        0x8140AECC: "KVM_GET_SREGS2",
        0x4140AECD: "KVM_SET_SREGS2",
        0xC008AE88: "KVM_GET_MSRS",
        0x4008AE89: "KVM_SET_MSRS",
        0x41A0AE8D: "KVM_SET_FPU",
        0x8400AE8E: "KVM_GET_LAPIC",
        0x4400AE8F: "KVM_SET_LAPIC",
        0x4008AE90: "KVM_SET_CPUID2",
        0xAE9A: "KVM_NMI",
        0xAEB7: "KVM_SMI",
        0x4004AE86: "KVM_INTERRUPT",
        0x8004AE98: "KVM_GET_MP_STATE",
        0x4004AE99: "KVM_SET_MP_STATE",
        0x4048AE9B: "KVM_SET_GUEST_DEBUG",
        0x4008AE9C: "KVM_X86_SETUP_MCE",
        0x4040AE9E: "KVM_X86_SET_MCE",
        0x8040AE9F: "KVM_GET_VCPU_EVENTS",
        0x4040AEA0: "KVM_SET_VCPU_EVENTS",
        0x4080AEA2: "KVM_SET_DEBUGREGS",
        0x4068AEA3: "KVM_ENABLE_CAP",
        0x5000AEA5: "KVM_SET_XSAVE",
        0x4188AEA7: "KVM_SET_XCRS",
        0xC080AEBE: "KVM_GET_NESTED_STATE",
        0x4080AEBF: "KVM_SET_NESTED_STATE",
        0xAEAD: "KVM_KVMCLOCK_CTRL",
        0xAEA2: "KVM_SET_TSC_KHZ",
    }
)
_CMDS = np.array(sorted(IOCTLS), "u8")

# Why an end is what it is, where the word alone does not say. Codes are places in WHYS; 0 needs no explanation.
IN_RUN = 1
_OUTSIDE = 2
_IOCTL = 3  # and up: one for each of _CMDS, then one for any other ioctl
WHYS = (
    "",
    "the request disappeared inside KVM_RUN without a shutdown exit",
    "the request disappeared while no ioctl was in progress",
    *(f"the request was gone when {IOCTLS[int(cmd)]} returned" for cmd in _CMDS),
    "the request was gone when another ioctl returned",
)


def _raiser_of_cmd(cmd: int) -> int:
    # "KVM_X86_SET_MCE" -> "set_mce", "KVM_SET_SREGS" -> "set_sregs"; an ioctl without a word of its own is "ioctl".
    return RAISER.get(IOCTLS[cmd].lower().removeprefix("kvm_").removeprefix("x86_"), RAISER["ioctl"])


_BY_CMD = np.array([*map(_raiser_of_cmd, map(int, _CMDS)), RAISER["ioctl"]], "i1")
_BY_SITE = np.full(256, RAISER["kvm_run"], "i1")
for _site, _word in {
    Site.EXCEPTION: "exception",
    Site.RSM: "rsm",
    Site.REALMODE_INTERRUPT: "realmode_interrupt",
    Site.EMULATION: "emulation",
    Site.NESTED_VMEXIT: "nested_vmexit",
    Site.NESTED_ABORT: "nested_abort",
    Site.SET_EFER: "set_efer",
    Site.MACHINE_CHECK: "machine_check",
    Site.SYNC_EVENTS: "set_vcpu_events",
}.items():
    _BY_SITE[_site] = RAISER[_word]
_BY_KIND = np.full(256, RAISER["remote"], "i1")
_BY_KIND[[Kind.RUN_EXIT, Kind.GUEST_ENTRY, Kind.GUEST_EXIT]] = RAISER["kvm_run"]
_BY_KIND[Kind.RESTORE] = RAISER["set_vcpu_events"]
_BY_KIND[Kind.VCPU_NEW] = RAISER["unknown"]


@dataclass(frozen=True)
class Rows:
    """Columns of events, sorted by vCPU and then in ring order. See probes.schema for what they hold."""

    time_ns: Array
    since_ns: Array
    requests: Array
    before: Array
    arg: Array
    detail: Array
    kind: Array
    flags: Array

    def take(self, index: Array) -> Rows:
        """Return some of the rows."""
        return Rows(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def _cmd_slot(arg: Array) -> Array:
    # Where a command stands in _CMDS; len(_CMDS) for one that is not there.
    cmd = arg & np.uint64(0xFFFF_FFFF)
    slot = np.minimum(np.searchsorted(_CMDS, cmd), len(_CMDS) - 1)
    return np.where(_CMDS[slot] == cmd, slot, len(_CMDS))


def _of_ioctl(rows: Rows) -> tuple[Array, Array]:
    # Which events end or follow an ioctl other than KVM_RUN, and which are inside KVM_RUN. A save through kvm_run is
    # inside KVM_RUN; a reset is where its cmd says.
    reset = rows.kind == Kind.RESET
    save = rows.kind == Kind.SAVE
    sync = (rows.flags & Flag.SYNC) != 0
    in_ioctl = (rows.kind == Kind.IOCTL_EXIT) | (rows.kind == Kind.RESTORE) | (save & ~sync) | (reset & (rows.arg != 0))
    in_run = np.isin(rows.kind, (Kind.RUN_EXIT, Kind.SITE, Kind.GUEST_ENTRY, Kind.GUEST_EXIT))
    return in_ioctl, in_run | (save & sync) | (reset & (rows.arg == 0))


def succeeded(rows: Rows) -> Array:
    """Return which ioctls returned 0: the errno is in the upper half of ``arg``."""
    return np.asarray((rows.arg >> np.uint64(32)) == 0)


def shutdown_exit(kind: Array, arg: Array) -> Array:
    """Return which events are KVM_RUN returning KVM_EXIT_SHUTDOWN, with errno 0."""
    return np.asarray((kind == Kind.RUN_EXIT) & (arg == KVM_EXIT_SHUTDOWN))


def sets_triple_fault(rows: Rows) -> Array:
    """Return which payloads say that a triple fault is pending."""
    both = VALID_TRIPLE_FAULT | PAYLOAD_PENDING
    return np.asarray((rows.detail & both) == both)


def leaves_triple_fault(rows: Rows) -> Array:
    """Return which payloads say nothing of a triple fault: KVM_SET_VCPU_EVENTS leaves it as it is."""
    return np.asarray((rows.detail & VALID_TRIPLE_FAULT) == 0)


#: How a save carries a request, if it can: a request that is not listed is neither carried nor lost by a save.
CARRIES: Mapping[str, Callable[[Rows], Array]] = MappingProxyType({TRIPLE_FAULT: sets_triple_fault})


def raised_by(rows: Rows) -> Array:
    """Return the code in RAISERS of who raised a request, from the first events that show it."""
    by = _BY_KIND[rows.kind]
    in_ioctl, in_run = _of_ioctl(rows)
    by = np.where(in_ioctl & (rows.kind != Kind.RESTORE), _BY_CMD[_cmd_slot(rows.arg)], by)
    by = np.where(in_run, RAISER["kvm_run"], by)
    return np.where(rows.kind == Kind.SITE, _BY_SITE[np.minimum(rows.arg, 255).astype("u1")], by).astype("i1")


def ended(rows: Rows, request: str) -> tuple[Array, Array]:
    """Return the code in ENDS, and the one in WHYS, of requests that are gone in these events and were there before."""
    in_ioctl, in_run = _of_ioctl(rows)
    through_ioctl = np.where(in_ioctl, _IOCTL + _cmd_slot(rows.arg), 0)
    if request != TRIPLE_FAULT:
        return np.where(in_ioctl, END["cleared"], END["serviced"]).astype("i1"), through_ioctl
    site = rows.kind == Kind.SITE
    flagged = (rows.kind == Kind.RESTORE) & succeeded(rows) & ~leaves_triple_fault(rows) & ~sets_triple_fault(rows)
    cases = (
        (shutdown_exit(rows.kind, rows.arg), END["delivered"], 0),
        (site & (rows.arg == Site.REFLECT), END["reflected"], 0),
        (flagged | (site & (rows.arg == Site.SYNC_EVENTS)), END["cleared"], 0),
        (in_ioctl, END["cleared"], through_ioctl),
        (in_run & ((rows.flags & Flag.NESTED) != 0), END["reflected"], 0),
        (in_run, END["undecided"], IN_RUN),
    )
    end: Array = np.full(rows.kind.size, END["undecided"], "i1")
    why: Array = np.full(rows.kind.size, _OUTSIDE, "i8")
    for holds, code, reason in reversed(cases):
        end = np.where(holds, np.int8(code), end)
        why = np.where(holds, reason, why)
    return end, why


# What the last save says of a request that is pending when its vCPU ends.
SAVED_NONE, SAVED_CARRIED, SAVED_BLIND = 0, 1, 2
AFTER_SAVE = np.array([END["abandoned"], END["handed_over"], END["lost"]], "i1")
