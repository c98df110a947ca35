"""KVM's requests: which bit of ``vcpu->requests`` is which, on which kernel, and which of them a save must keep.

The numbers are macros, so BTF does not hold them; the table comes from the kernels' sources. Most bits never moved:
KVM_REQ_TRIPLE_FAULT is bit 10 in every release of the table. docs/requests.md tells of each request at length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Literal, NamedTuple

from probes.schema import NO_BIT

#: Bits of ``vcpu->requests``, a u64.
BITS = 64
#: The bit of KVM_REQ_TRIPLE_FAULT. Linux's arch/x86/include/asm/kvm_host.h: KVM_ARCH_REQ(2), on every kernel checked.
TRIPLE_FAULT = 10


class UnknownRequest(LookupError):
    """No request of this kernel has such a name."""


class Names(NamedTuple):
    """The requests of one kernel: bit -> name, in lower case and without KVM_REQ_; and how they were chosen."""

    by_bit: Mapping[int, str]
    table: str  # the release whose table was taken
    exact: bool  # whether that is the kernel's own release, and no vendor's build of it
    flags: Mapping[str, frozenset[str]]  # name -> KVM_REQUEST_* without the prefix: NO_WAKEUP, WAIT, NO_ACTION

    @property
    def dead(self) -> int:
        """Return the mask of the requests that KVM makes of each vCPU of a VM that it gives up."""
        return sum(1 << bit for bit, name in self.by_bit.items() if name in ("vm_dead", "vm_bugged"))

    def doubt(self, shown: Iterable[str]) -> str:
        """Say which of the names that are shown may be wrong; empty if none may."""
        return "" if self.exact else doubt(self.table, shown)


class State(NamedTuple):
    """What a request stands for that a save of its vCPU must keep, and what keeps it.

    ``carried_by`` is about a KVM_GET_VCPU_EVENTS before and after which the request was pending:

    - ``vcpu_events_flag``: it carries the request exactly if its payload has the flag and the request is pending there;
    - ``vcpu_events``: it always saves what the request stands for;
    - ``nothing``: neither it nor any other ioctl saves that.
    """

    what: str
    carried_by: Literal["vcpu_events_flag", "vcpu_events", "nothing"]
    source: str


@cache
def _tables() -> dict[tuple[int, int], dict[int, tuple[str, frozenset[str]]]]:
    document = json.loads(files("probes").joinpath("kvm-requests.json").read_text())
    return {
        _version(release): {
            int(bit): (request["name"].removeprefix("KVM_REQ_").lower(), frozenset(request["flags"]))
            for bit, request in requests.items()
            if bit.isdigit()
        }
        for release, requests in document.items()
        if not release.startswith("_")
    }


def _version(release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


# Releases whose KVM is the one of that number: upstream's own, and Debian's builds, which end in -amd64. Others build a
# number with the KVM of a newer one (5.14.0-503.el9.x86_64), or with patches of their own (6.8.0-45-generic).
_UPSTREAM = re.compile(r"\d+\.\d+(\.\d+)*(-rc\d+)?\+?|.*-amd64")


def names(release: str) -> Names:
    """Return the requests of a kernel release such as ``6.1.0-25-amd64``.

    A release that the table does not know gets the names of the newest one before it. Then ``exact`` is false, as it is
    for a vendor's build.
    """
    tables = _tables()
    wanted = _version(release)
    known = max((version for version in tables if version <= wanted), default=min(tables))
    return Names(
        by_bit=MappingProxyType({bit: name for bit, (name, _) in tables[known].items()}),
        table=f"{known[0]}.{known[1]}",
        exact=known == wanted and _UPSTREAM.fullmatch(release) is not None,
        flags=MappingProxyType(dict(tables[known].values())),
    )


def bit_name(bit: int) -> str:
    """Return what a bit is called that has no name: ``bit_43``; and what the request is that has no bit."""
    return "outside_guest_mode" if bit == NO_BIT else f"bit_{bit}"


def _called(bit: int) -> frozenset[str]:
    """Return every name that a bit has in some release of the table."""
    return frozenset(of[bit][0] for of in _tables().values() if bit in of)


@cache
def _moved() -> frozenset[str]:
    """Return the names of bits that have not the same one in all releases that name them."""
    return frozenset(name for bit in range(BITS) if len(_called(bit)) > 1 for name in _called(bit))


# So many doubtful names are listed.
_LISTED = 5


def doubt(table: str, shown: Iterable[str]) -> str:
    """Say which names may be wrong on a kernel that has no table of its own and got this one; empty if none may.

    Between two releases of the table, or built from them, it can only differ where they do; what comes after the newest
    one nobody knows, and goes by what never moved before.
    """
    may = (STATE.keys() | STATELESS.keys()) - {"triple_fault"} if _version(table) >= max(_tables()) else _moved()
    doubtful = sorted(may.intersection(shown))
    if not doubtful:
        return ""
    which = ", ".join(doubtful[:_LISTED]) + (f" and {len(doubtful) - _LISTED} more" if doubtful[_LISTED:] else "")
    return (
        f"the names of requests are those of Linux {table}, the nearest release known: "
        f"{which} may be {'others' if doubtful[1:] else 'another request'} on this kernel"
    )


def stateless(name: str) -> bool:
    """Whether nothing is lost with a request that is dropped with its vCPU.

    A bit without a name on this kernel may be what it is on another one (Ubuntu's 6.8 and RHEL's 5.14 have requests of
    newer releases at their bits): it counts if every name that it has anywhere does.
    """
    bit = re.fullmatch(r"bit_(\d+)", name)
    called = _called(int(bit[1])) if bit else {name}
    return bool(called) and called <= STATELESS.keys()


def selected(wanted: Iterable[str], known: Names) -> dict[int, str]:
    """Return bit -> name of the requests asked for: ``all``, or names in any case, with or without KVM_REQ_.

    A bit that the table does not name is ``bit_43``; ``all`` has them too, since the kernel may be newer than the
    table. Raises :class:`UnknownRequest`, with the names that exist.
    """
    every = {bit: known.by_bit.get(bit, bit_name(bit)) for bit in range(BITS)}
    bits = {name: bit for bit, name in every.items()}
    chosen: dict[int, str] = {}
    for word in wanted:
        name = word.strip().lower().removeprefix("kvm_req_")
        if name == "all":
            chosen |= every
        elif name in bits:
            chosen[bits[name]] = name
        else:
            there = ", ".join(sorted(known.flags))
            raise UnknownRequest(f"unknown request {word!r}: this kernel has {there}, a bit without a name, or all")
    return dict(sorted(chosen.items()))


#: Requests that stand for something which the guest, its user or its VMM would miss if it were dropped with the vCPU.
STATE: Mapping[str, State] = MappingProxyType(
    {
        "triple_fault": State(
            "the shutdown of the guest",
            "vcpu_events_flag",
            # Read in 5.10 too: there the ioctl has no such flag, and no save carries it.
            'kvm_vcpu_ioctl_x86_get_vcpu_events; Linux commit ed2351174e38 ("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS '
            'to support pending triple fault") (in v6.0)',
        ),
        "nmi": State(
            "a non-maskable interrupt",
            "vcpu_events",
            "kvm_vcpu_ioctl_x86_get_vcpu_events: it calls process_nmi, which moves queued NMIs to nmi.pending of the "
            "payload and leaves the request as it is (read in 5.10, 6.1, 6.12, 7.3)",
        ),
        "smi": State(
            "a system management interrupt",
            # Kernels that save it take the request in the same ioctl: then it is gone, serviced. Where it stays, it is
            # not in the payload either.
            "nothing",
            'kvm_vcpu_ioctl_x86_get_vcpu_events; Linux commit 1f7becf1b7e2 ("KVM: x86: get smi pending status '
            'correctly") (in v5.11, and in 5.10.262): before it, the ioctl left the request and saved nothing of it',
        ),
        "pmi": State(
            "an interrupt of a performance counter that has overflown",
            "nothing",
            "kvm_pmu_deliver_pmi in vcpu_enter_guest is what gives it to the local APIC; the overflow itself is in "
            "IA32_PERF_GLOBAL_STATUS, and restoring that raises no interrupt (read in 5.10, 6.1, 6.12, 7.3)",
        ),
        "ioapic_eoi_exit": State(
            "the end of an interrupt, which an I/O APIC in user space waits for",
            "nothing",
            "kvm_ioapic_send_eoi; vcpu->arch.pending_ioapic_eoi is in no ioctl (read in 5.10, 6.1, 6.12, 7.3)",
        ),
        "hv_crash": State(
            "the guest's report of its own crash (HV_X64_MSR_CRASH_CTL)",
            "nothing",
            "kvm_hv_set_msr_pw: the guest's write is kept nowhere but in the request, and a write by user space makes "
            "none (read in 5.10, 6.1, 6.12, 7.3)",
        ),
        "hv_reset": State(
            "the guest's order to be reset (HV_X64_MSR_RESET)",
            "nothing",
            "kvm_hv_set_msr_pw: the guest's write is kept nowhere but in the request (read in 5.10, 6.1, 6.12, 7.3)",
        ),
        "report_tpr_access": State(
            "a report to the VMM that the guest used its TPR (KVM_TPR_ACCESS_REPORTING)",
            "nothing",
            "__report_tpr_access: which instruction it was is in kvm_run, for the exit that the request makes; the "
            "access itself is done, and the next one makes another report (read in 5.10, 6.1, 6.12, 7.3)",
        ),
    }
)

#: The other requests of the table, and why dropping them with the vCPU loses nothing that a restored guest would see.
STATELESS: Mapping[str, str] = MappingProxyType(
    {
        "apf_halt": "the guest faults on the same page again",
        "apf_ready": "restoring MSR_KVM_ASYNC_PF_EN wakes every task of the guest that waits for a page",
        "apic_page_reload": "an address of the host, looked up anew",
        "apicv_update": "worked out anew from the settings of the VM",
        "clock_update": "restoring the clock raises it anew",
        "dirty_ring_soft_full": "user space reads the ring itself; raised anew while the ring is full",
        "event": "only has events looked at again; KVM_SET_VCPU_EVENTS raises it anew",
        "get_nested_state_pages": "KVM_SET_NESTED_STATE raises it anew",
        "global_clock_update": "restoring the clock raises it anew",
        "hv_exit": "reports an MSR that is saved, so user space can tell by itself",
        "hv_stimer": "restoring the timer's MSRs raises it anew",
        "hv_tlb_flush": "a new vCPU has no TLB entries",
        "load_eoi_exitmap": "worked out anew from the local APIC and its routes",
        "load_mmu_pgd": "page tables are loaded anew",
        "masterclock_update": "restoring the clock raises it anew",
        "mclock_inprogress": "only keeps vCPUs out of the guest while the clock changes",
        "migrate_timer": "moves a timer of the host to another CPU",
        "mmu_free_obsolete_roots": "page tables are built anew",
        "mmu_reload": "page tables are built anew",
        "mmu_sync": "page tables are built anew",
        "msr_filter_changed": "worked out anew from the settings of the VM",
        "pending_timer": "only wakes the vCPU; the timer is in the local APIC's state",
        "pmu": "counters are set up anew from their MSRs",
        "recalc_intercepts": "worked out anew from the settings of the VM",
        "scan_ioapic": "worked out anew from the local APIC and its routes",
        "steal_update": "restoring MSR_KVM_STEAL_TIME raises it anew",
        "tlb_flush": "a new vCPU has no TLB entries",
        "tlb_flush_current": "a new vCPU has no TLB entries",
        "tlb_flush_guest": "a new vCPU has no TLB entries",
        # Not of a Xen guest whose vcpu_info page is not mapped: its event is in evtchn_pending_sel, which no ioctl
        # reads (kvm_xen_set_evtchn_fast; read in 7.1). The word does not tell such a guest from others.
        "unblock": "only wakes the vCPU; what it wakes for is kept elsewhere",
        "unhalt": "lives within KVM_RUN only; what it woke for is kept elsewhere",
        "update_cpu_dirty_logging": "worked out anew from the settings of the VM",
        "update_protected_guest_state": "SEV-SNP guests only, whose vCPUs cannot be saved by these ioctls",
        "vm_bugged": "a VM that is bugged refuses every ioctl: it cannot be saved",
        "vm_dead": "a VM that is dead refuses every ioctl: it cannot be saved",
        "vmsa_page_reload": "SEV-SNP guests only, whose vCPUs cannot be saved by these ioctls",
    }
)
