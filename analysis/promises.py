"""The order in which KVM promises to handle requests, as rules, and what breaks them.

Each rule is a named check with its source. A rule never cries wolf: what an innocent kernel can show too is not
counted, and where something that may explain a case was lost the case is undecided. Three facts carry all of them; they
were read in the sources of 5.10.262, 6.1.192, 6.12.118 and 7.3.4, and hold in each:

- The last thing that vcpu_enter_guest does before it enters the guest, with interrupts off and vcpu->mode at
  IN_GUEST_MODE, is to ask kvm_vcpu_exit_request whether *any* request is pending; then it does not enter. Tracepoint
  kvm_entry comes after that. So a request that kvm_entry sees was made between the two: by KVM_REQ_EVENT's own line
  there (an exit at once is wanted), in an NMI of the host, or by another CPU.
- Some requests are only made by the vCPU's own thread (:data:`OWN`), and none of these between the two.
- Some are, when another thread makes them, always made together with a kick of the vCPU or by a function that asks many
  vCPUs at once (:data:`KICKED`). Both are functions of their own that can be hooked: whoever makes such a request shows
  as KICK or as REQUEST_ALL. A requester may be held up between the request and the kick, which :data:`LATE_NS` allows.
  All others can be made by a timer, an interrupt or a loop over vCPUs that nobody sees: no rule accuses them.

The rules themselves, each a small state machine over one event, are in :mod:`analysis.order_rules`; here is what they
are about. What they have found becomes tables in :mod:`analysis.ordering`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from probes.schema import KVM_EXIT_SHUTDOWN


class Rule(NamedTuple):
    """A check: what it is called, what a break of it means, what promises it, and what it cannot do without."""

    title: str
    says: str
    source: str
    needs: tuple[str, ...] = ()


_REQUESTS = "Documentation/virt/kvm/vcpu-requests.rst"
_GUEST, _WAKEUPS, _KICKS, _RETURNS = "guest", "wakeups", "kicks", "returns"
#: What a rule can need, and what is missing without it.
_NEEDS = {
    _GUEST: "no hook tells when the guest is entered and left",
    _WAKEUPS: "no hook tells when a vCPU stops blocking: it may have slept",
    _KICKS: "no hook tells of kicks: whoever made a request anew stays unseen",
    _RETURNS: "no hook tells when kvm_make_all_cpus_request returns",
}

#: The rules, in the order in which they are told.
RULES: Mapping[str, Rule] = {
    "entered_with_request": Rule(
        "entered the guest with a request pending",
        "the request was pending at the hook before, KVM went by its service point, and entered the guest all the same",
        f"{_REQUESTS}, Ensuring Requests Are Seen; x86.c: vcpu_enter_guest, kvm_vcpu_exit_request",
        (_GUEST,),
    ),
    "wait_returned_early": Rule(
        "returned before the vCPU had left the guest",
        "a request with KVM_REQUEST_WAIT was made, and its requester went on while the vCPU was in the guest as before",
        f"{_REQUESTS}, Waiting for Acknowledgements; kvm_main.c: kvm_request_needs_ipi, kvm_kick_many_cpus",
        (_GUEST, _KICKS, _RETURNS),
    ),
    "raise_without_kick": Rule(
        "raised in the guest without a kick",
        "the request was made while the vCPU was in the guest, and nobody kicked it out",
        f"{_REQUESTS}, VCPU Kicks; lapic.c: __apic_accept_irq; kvm_main.c: kvm_make_all_cpus_request",
        (_GUEST, _KICKS),
    ),
    "starved": Rule(
        "waited longer than the bound",
        "it was pending that long while the vCPU was neither asleep nor in user space: KVM did not serve it, was held"
        " up, or the host gave the vCPU no CPU",
        f"{_REQUESTS}, Ensuring Requests Are Seen: not handled for an arbitrarily long time",
        (_WAKEUPS,),
    ),
    "service_order": Rule(
        "served before one that comes first",
        "KVM returned to user space for a request, and one that it looks for earlier was still pending",
        "x86.c: vcpu_enter_guest, the order of kvm_check_request",
        (_KICKS,),
    ),
}

#: Requests that only the vCPU's own thread makes, in its ioctls or with preemption on inside KVM_RUN.
OWN = frozenset(
    {
        "get_nested_state_pages", "migrate_timer", "mmu_sync", "load_mmu_pgd", "tlb_flush_current",
        "report_tpr_access", "triple_fault", "apf_halt", "steal_update", "ioapic_eoi_exit", "load_eoi_exitmap",
        "hv_crash", "hv_reset", "hv_exit",
    }
)  # fmt: skip
#: Requests that another thread only makes with a kick (__apic_accept_irq) or through kvm_make_all_cpus_request and its
#: kin, and the vCPU's own thread not between kvm_entry and kvm_exit. Not here although they have KVM's flags:
#: tlb_flush, mmu_reload and vm_dead, which kvm_main.c makes itself, so that the compiler may leave the call out;
#: tlb_flush_guest, apicv_update, update_protected_guest_state and vmsa_page_reload, which other functions make, too.
KICKED = frozenset(
    {
        "nmi", "smi", "mclock_inprogress", "scan_ioapic", "apic_page_reload", "msr_filter_changed",
        "update_cpu_dirty_logging", "mmu_free_obsolete_roots", "hv_tlb_flush",
    }
)  # fmt: skip
# Of KICKED, those that an interrupt handler can make, too, by delivering an interrupt message.
INTERRUPTS = frozenset({"nmi", "smi"})
# Of KICKED, those that are also made of a mask of vCPUs.
MASKED = frozenset({"scan_ioapic", "hv_tlb_flush"})
# What vcpu_enter_guest returns to user space for, with the exit that says so (KVM_EXIT_*, uapi linux/kvm.h), and what
# it looks for before that: the requests of OWN and KICKED that stand before it in every release that was read, and
# that nothing makes between there and the return to user space but another thread. Not migrate_timer and steal_update,
# which the vCPU makes when it is scheduled in again, nor nmi and smi before one another: 6.1 and 6.12 differ.
_FIRST = ("get_nested_state_pages", "mmu_sync", "load_mmu_pgd")
_MIDDLE = (*_FIRST, "report_tpr_access", "triple_fault", "apf_halt", "smi", "nmi")
_LAST = (*_MIDDLE, "ioapic_eoi_exit", "scan_ioapic", "load_eoi_exitmap", "apic_page_reload")
TAKEN: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "report_tpr_access": (12, _FIRST),
    "triple_fault": (KVM_EXIT_SHUTDOWN, (*_FIRST, "report_tpr_access")),
    "ioapic_eoi_exit": (26, _MIDDLE),
    "hv_crash": (24, _LAST),
    "hv_reset": (24, (*_LAST, "hv_crash")),
    "hv_exit": (27, (*_LAST, "hv_crash", "hv_reset")),
}


def missing(plan: Iterable[Mapping[str, Any]], detail: str) -> dict[str, str]:
    """Return the rules that a recording with this plan cannot check, and why."""
    if detail != "full":
        return dict.fromkeys(RULES, f"recorded with detail {detail}")
    there_are = hooks(plan)
    targets = {target for _, target in there_are}
    returning = {target for via, target in there_are if via in ("kretprobe", "fexit")}
    asks = any(target.startswith("kvm_make_all_cpus_request") for target in targets)
    there = {
        _GUEST: {"kvm_entry", "kvm_exit"} <= targets,
        _WAKEUPS: "kvm_vcpu_wakeup" in targets,
        _KICKS: bool(targets & {"kvm_vcpu_kick", "__kvm_vcpu_kick"}) and asks,
        _RETURNS: any(target.startswith("kvm_make_all_cpus_request") for target in returning),
    }
    return {
        name: lacking[0]
        for name, rule in RULES.items()
        if (lacking := [_NEEDS[need] for need in rule.needs if not there[need]])
    }


def hooks(plan: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return how and where each hook of a plan is set."""
    parts = (str(line.get("hook") or "").split(":") for line in plan)
    return [(part[0], part[-1]) for part in parts]
