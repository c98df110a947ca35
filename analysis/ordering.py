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

One incremental core, as in :mod:`analysis.lifecycle`: batches in, breaks out, and what is carried over is bounded by
the vCPUs alive. How a stream is cut into batches never changes a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.periods import PERIODS, Periods
from analysis.rows import Events, by_key, column, find
from probes.schema import EVENT, KVM_EXIT_SHUTDOWN, REMOTE, REQUEST_FLAGS, REQUEST_MASK, Kind
from tracer.loss import Loss

Array = npt.NDArray[Any]


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
_INTERRUPTS = frozenset({"nmi", "smi"})
# Of KICKED, those that are also made of a mask of vCPUs.
_MASKED = frozenset({"scan_ioapic", "hv_tlb_flush"})
# What vcpu_enter_guest returns to user space for, with the exit that says so (KVM_EXIT_*, uapi linux/kvm.h), and what
# it looks for before that: the requests of OWN and KICKED that stand before it in every release that was read, and
# that nothing makes between there and the return to user space but another thread. Not migrate_timer and steal_update,
# which the vCPU makes when it is scheduled in again, nor nmi and smi before one another: 6.1 and 6.12 differ.
_FIRST = ("get_nested_state_pages", "mmu_sync", "load_mmu_pgd")
_MIDDLE = (*_FIRST, "report_tpr_access", "triple_fault", "apf_halt", "smi", "nmi")
_LAST = (*_MIDDLE, "ioapic_eoi_exit", "scan_ioapic", "load_eoi_exitmap", "apic_page_reload")
_TAKEN: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "report_tpr_access": (12, _FIRST),
    "triple_fault": (KVM_EXIT_SHUTDOWN, (*_FIRST, "report_tpr_access")),
    "ioapic_eoi_exit": (26, _MIDDLE),
    "hv_crash": (24, _LAST),
    "hv_reset": (24, (*_LAST, "hv_crash")),
    "hv_exit": (27, (*_LAST, "hv_crash", "hv_reset")),
}

#: How late a kick can follow its request, by far: a requester can lose its CPU between the two.
LATE_NS = 1_000_000_000
#: How long a request may wait by default.
BOUND_NS = 1_000_000_000
# A requester that has not returned for so long has: its REQUEST_ALL_END was lost.
_GONE_NS = 60_000_000_000
# A mask of vCPUs that means every one.
_EVERY_VCPU = np.uint64(0xFFFF_FFFF_FFFF_FFFF)

#: Columns of :attr:`Ordered.rules`.
RULE = {
    "rule": "object",
    "title": "object",
    "source": "object",
    "checked": "i8",
    "broken": "i8",
    "undecided": "i8",
    "unchecked": "object",
}
#: Columns of :attr:`Ordered.breaks`.
BREAK = {
    "rule": "object",
    "vm": "u4",
    "pid": "u4",
    "vcpu": "u4",
    "vcpu_number": "u4",
    "request": "object",
    "time_ns": "i8",
    "since_ns": "i8",
    "story": "object",
}


#: Columns of :func:`timeline`.
TIMELINE = {"track": "object", "name": "object", "begin_ns": "i8", "end_ns": "i8"}
# The track of each period; KVM_RUN as a whole has none.
_TRACKS = {"guest": "guest", "kernel": "kernel", "ioctl": "kernel", "user space": "user space", "halted": "halted"}


@dataclass(frozen=True)
class Ordered:
    """What the rules have found."""

    rules: pd.DataFrame  # columns: RULE; a row for each rule
    breaks: pd.DataFrame  # columns: BREAK; of each rule the first ones


class _Break(NamedTuple):
    rule: str
    vm: int
    pid: int
    vcpu: int
    vcpu_number: int
    bit: int
    time_ns: int
    since_ns: int
    story: str


class _Case(NamedTuple):
    """What breaks a rule unless somebody kicks the vCPU for it, or asks it among others, before it is too late."""

    found: _Break
    position: int  # in the batch; -1: in an earlier one
    named: bool  # the VM of the vCPU is known


class _Stay(NamedTuple):
    """A vCPU that was in the guest when a requester with WAIT returned; ``entered`` is the seq of its GUEST_ENTRY."""

    entered: int
    begin_ns: int
    time_ns: int
    arg: int


class _Asking(NamedTuple):
    """What a thread last asked vCPUs for, and whether it has not returned from that."""

    begin_ns: int
    vm: int
    bit: int
    everyone: bool
    going: bool


# What is carried over of a vCPU that is alive.
_VCPU = np.dtype(
    [
        ("number", "u4"),
        ("vm", "u4"),
        ("pid", "u4"),
        ("vcpu", "u4"),
        ("named", "?"),  # the three before are known
        ("seq", "u4"),
        ("kind", "u1"),  # of its last own event; 0: not known
        ("time_ns", "i8"),
        ("slept_ns", "i8"),  # its last WAKEUP from a sleep
    ]
)

_IS_OWN = np.ones(256, bool)
_IS_OWN[[*REMOTE, Kind.REQUEST_ALL, Kind.REQUEST_ALL_END, Kind.VMM_EXIT, Kind.VM_CAP]] = False
# Hooks inside KVM_RUN, outside the guest, after which KVM goes by its service point before it enters the guest.
_INSIDE = np.zeros(256, bool)
_INSIDE[[Kind.RUN_ENTER, Kind.GUEST_EXIT, Kind.WAKEUP, Kind.SITE]] = True

_STARVING = ("guest", "kernel", "kvm_run")


def missing(plan: Iterable[Mapping[str, Any]], detail: str) -> dict[str, str]:
    """Return the rules that a recording with this plan cannot check, and why."""
    if detail != "full":
        return dict.fromkeys(RULES, f"recorded with detail {detail}")
    hooks = _hooks(plan)
    targets = {target for _, target in hooks}
    returning = {target for via, target in hooks if via in ("kretprobe", "fexit")}
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


def _hooks(plan: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return how and where each hook of a plan is set."""
    parts = (str(line.get("hook") or "").split(":") for line in plan)
    return [(part[0], part[-1]) for part in parts]


class Ordering:
    """The incremental core.

    ``names`` and ``flags``: the watched requests; ``plan`` and ``detail``: as the recording has them. ``bound_ns``: how
    long a request may wait; ``most``: how many breaks of each rule are kept.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        flags: Mapping[str, Iterable[str]],
        plan: Iterable[Mapping[str, Any]],
        detail: str,
        *,
        bound_ns: int = BOUND_NS,
        most: int = 100,
    ) -> None:
        plan = list(plan)
        self._names = dict(names)
        self._flags = {name: sorted(of) for name, of in flags.items()}
        self.unchecked = missing(plan, detail)
        self._bound_ns, self._most = bound_ns, most
        bits = {name: bit for bit, name in names.items()}
        self._own = _mask(bits, OWN)
        hooks = _hooks(plan)
        masks = any(target == "kvm_make_vcpus_request_mask" for _, target in hooks)
        kicked = KICKED if masks else KICKED - _MASKED
        self._kicked = np.uint64(0) if "raise_without_kick" in self.unchecked else _mask(bits, kicked)
        # An interrupt that finds a kprobe at work on its CPU runs without probes, and nobody is told.
        kprobes = any(via.startswith("kprobe") and target.endswith("kvm_vcpu_kick") for via, target in hooks)
        self._unsure = _mask(bits, _INTERRUPTS) if kprobes else np.uint64(0)
        self._order = {
            bits[name]: (reason, _mask(bits, earlier) & (self._own | self._kicked))
            for name, (reason, earlier) in _TAKEN.items()
            if name in bits and "service_order" not in self.unchecked
        }
        self._checked = dict.fromkeys(RULES, 0)
        self._broken: dict[tuple[str, int], int] = {}
        self._undecided = dict.fromkeys(RULES, 0)
        self._breaks: dict[tuple[str, int], list[_Break]] = {}
        self._vcpus = np.empty(0, _VCPU)
        self._kicks: dict[int, dict[int, int]] = {}  # by vCPU and bit: the last kick; bit -1: for whatever
        self._asked: dict[tuple[int, int], int] = {}  # by VM and bit: when that was last being asked for
        self._asking: dict[int, _Asking] = {}  # by thread
        self._cases: dict[tuple[str, int, int], _Case] = {}
        self._stays: dict[int, _Stay] = {}
        self._shown = 0  # requests for which a kick was seen: the hooks do tell of those
        self._top_ns = 0
        self._dark_ns = -1  # until here something that may explain a case was lost
        self._losses = 0

    @property
    def carried(self) -> int:
        """Return how much is carried over, in vCPUs and what belongs to one of them."""
        return len(self._vcpus) + len(self._cases) + len(self._stays)

    def feed(self, events: Events, loss: Loss | None = None, lifecycles: pd.DataFrame | None = None) -> None:
        """Take a batch, the losses so far, and the lifecycles that the batch has ended."""
        if len(self.unchecked) == len(RULES):
            return
        losses = loss.kicks + loss.blind if loss else 0
        if column(events, "kind").size:
            batch = _Batch(events, self._top_ns)
            if losses > self._losses:
                self._dark_ns = max(self._dark_ns, self._top_ns, batch.top_ns)
            self._feed(batch)
            if lifecycles is not None:
                self._starved(lifecycles, batch)
            self._carry(batch)
            self._top_ns = batch.top_ns
        elif losses > self._losses:
            self._dark_ns = max(self._dark_ns, self._top_ns)
        self._losses = max(losses, self._losses)

    def interrupt(self) -> None:
        """A part of the recording is missing here."""
        for case in self._cases.values():
            self._undecided[case.found.rule] += 1
        self._undecided["wait_returned_early"] += len(self._stays)
        self._cases.clear()
        self._stays.clear()
        self._asking.clear()
        self._vcpus["kind"] = 0
        self._dark_ns = max(self._dark_ns, self._top_ns)

    def finish(self, loss: Loss | None = None, lifecycles: pd.DataFrame | None = None) -> Ordered:
        """Return what was found; ``lifecycles``: those that had not ended."""
        if len(self.unchecked) < len(RULES):
            if lifecycles is not None:
                self._starved(lifecycles, None)
            for case in self._cases.values():
                self._undecided[case.found.rule] += 1
            self._undecided["wait_returned_early"] += len(self._stays)
        return self._ordered()

    # --- a batch --------------------------------------------------------------------------------------------------

    def _feed(self, batch: _Batch) -> None:
        self._know(batch)
        found = [*self._entered(batch), *self._raised(batch), *self._ordered_exits(batch)]
        for one in (*found, *self._waited(batch)):
            if isinstance(one, _Break):
                self._break(one)
        self._close(batch, [case for case in found if isinstance(case, _Case)])

    def _break(self, one: _Break) -> None:
        """Count a break, and keep it if it is one of the first: by its time, so that no cut decides which."""
        key = (one.rule, one.bit)
        self._broken[key] = self._broken.get(key, 0) + 1
        kept = self._breaks.setdefault(key, [])
        kept.append(one)
        if len(kept) > 2 * self._most:
            kept.sort(key=_first)
            del kept[self._most :]

    def _know(self, batch: _Batch) -> None:
        """Add the vCPUs of the batch to those that are carried over, and what a VCPU_NEW says of them."""
        numbers = batch.numbers
        batch.was = self._vcpus["number"]
        _, known = find(batch.was, numbers)
        if not known.all():
            fresh = np.zeros(int((~known).sum()), _VCPU)
            fresh["number"] = numbers[~known]
            merged = np.concatenate((self._vcpus, fresh))
            self._vcpus = merged[np.argsort(merged["number"])]
        new = np.flatnonzero(batch.kind == Kind.VCPU_NEW)
        batch.named_at = np.where(self._vcpus["named"], -1, len(batch.kind))
        if len(new):
            slot = np.searchsorted(self._vcpus["number"], batch.vcpu[new])
            for name, values in (("vm", "detail"), ("pid", "pid"), ("vcpu", "arg")):
                self._vcpus[name][slot] = column(batch.events, values)[new]
            self._vcpus["named"][slot] = True
            batch.named_at[slot[::-1]] = np.minimum(batch.named_at[slot[::-1]], new[::-1])

    def _candidates(self, batch: _Batch, rows: Array) -> tuple[_Rows, Array]:
        """Return some own events as whole rows with the event before each, and whether that is certainly the last."""
        picked = batch.whole(rows)
        place = batch.place(rows)
        first = batch.starts[place]
        before = batch.order[np.maximum(place - 1, 0)]
        slot = np.searchsorted(self._vcpus["number"], picked.vcpu)
        state = self._vcpus[slot]
        seqs, kinds = column(batch.events, "seq"), batch.kind
        picked.last_kind = np.where(first, state["kind"], kinds[before])
        last_seq = np.where(first, state["seq"], seqs[before])
        picked.state = state
        picked.named = batch.named_at[slot] < rows
        follows = (picked.last_kind != 0) & (picked.seq == last_seq + 1)
        return picked, follows

    def _found(self, rule: str, rows: _Rows, at: int, bit: int, story: str) -> _Break:
        who = rows.state[at]
        named = bool(rows.named[at])
        return _Break(
            rule,
            int(who["vm"]) if named else 0,
            int(who["pid"]) if named else int(rows.pid[at]),
            int(who["vcpu"]) if named else 0,
            int(rows.vcpu[at]),
            bit,
            int(rows.time_ns[at]),
            int(rows.since_ns[at]),
            story,
        )

    def _entered(self, batch: _Batch) -> list[_Break | _Case]:
        kind = batch.kind
        entries = np.flatnonzero(kind == Kind.GUEST_ENTRY)
        self._checked["entered_with_request"] += len(entries)
        accused = self._own | self._kicked
        pending = batch.requests[entries] & batch.before[entries] & accused
        at = np.flatnonzero(pending)
        if not len(at):
            return []
        pending = pending[at]
        rows, follows = self._candidates(batch, entries[at])
        # After a GUEST_ENTRY an event is missing, or this is an engine's second sight of one entry.
        inside = _INSIDE[rows.last_kind]
        self._undecided["entered_with_request"] += int((~follows).sum())
        found: list[_Break | _Case] = []
        for index in np.flatnonzero(follows & inside).tolist():
            last = Kind(int(rows.last_kind[index])).name
            for bit in _bits(int(pending[index])):
                story = f"pending at {last} and at the GUEST_ENTRY that followed"
                one = self._found("entered_with_request", rows, index, bit, story)
                position = int(rows.position[index])
                own = bool(int(self._own) >> bit & 1)
                found.append(one if own else _Case(one, position, bool(rows.named[index])))
        return found

    def _raised(self, batch: _Batch) -> list[_Break | _Case]:
        if not self._kicked:
            return []
        exits = np.flatnonzero(batch.kind == Kind.GUEST_EXIT)
        raised = batch.requests[exits] & ~batch.before[exits] & self._kicked
        at = np.flatnonzero(raised)
        if not len(at):
            return []
        raised = raised[at]
        rows, follows = self._candidates(batch, exits[at])
        in_guest = rows.last_kind == Kind.GUEST_ENTRY
        self._undecided["raise_without_kick"] += int((~follows).sum())
        chosen = np.flatnonzero(follows & in_guest)
        explained = self._explained(batch, rows, raised)
        self._checked["raise_without_kick"] += int(np.bitwise_count(raised[chosen]).sum())
        left = raised & ~explained
        found: list[_Break | _Case] = []
        for index in chosen[left[chosen] != 0].tolist():
            for bit in _bits(int(left[index])):
                story = (
                    f"raised between GUEST_ENTRY and GUEST_EXIT, and neither a kick for it nor a request to its VM"
                    f" within {LATE_NS // 1_000_000:,} ms after"
                )
                one = self._found("raise_without_kick", rows, index, bit, story)
                found.append(_Case(one, int(rows.position[index]), bool(rows.named[index])))
        return found

    def _explained(self, batch: _Batch, rows: _Rows, raised: Array) -> Array:
        """Return of each row's raises those that what came last before it in the ring explains: nearly all of them."""
        explained = np.zeros(len(raised), np.uint64)
        kicks, asks = batch.kicks, batch.asks
        words = batch.requests[kicks]
        numbers, places = batch.asked_bits, batch.asked_vms
        for bit in _bits(int(np.bitwise_or.reduce(raised))):
            mask = np.uint64(1 << bit)
            mine = np.flatnonzero(raised & mask)
            of, on = kicks[(words & mask) != 0], np.flatnonzero(numbers == bit)
            known = _last_before(batch.vcpu[of], of, rows.vcpu[mine], rows.position[mine])
            by_kick = np.where(known >= 0, batch.time_ns[known], -1) >= rows.since_ns[mine]
            known = _last_before(places[on], asks[on], rows.state["vm"][mine], rows.position[mine])
            by_ask = rows.named[mine] & (np.where(known >= 0, batch.time_ns[known], -1) >= rows.since_ns[mine])
            explained[mine[by_kick | by_ask]] |= mask
        return explained

    def _ordered_exits(self, batch: _Batch) -> list[_Break | _Case]:
        if not self._order:
            return []
        exits = np.flatnonzero(batch.kind == Kind.RUN_EXIT)
        takers = _union(1 << bit for bit in self._order)
        taken = batch.before[exits] & ~batch.requests[exits] & takers
        at = np.flatnonzero(taken)
        if not len(at):
            return []
        rows, follows = self._candidates(batch, exits[at])
        inside = _INSIDE[rows.last_kind]
        found: list[_Break | _Case] = []
        for bit, (reason, earlier) in self._order.items():
            mine = ((taken[at] >> np.uint64(bit)) & np.uint64(1)) != 0
            mine &= rows.arg == reason
            left = rows.before & rows.requests & earlier
            self._checked["service_order"] += int((mine & follows & inside).sum())
            self._undecided["service_order"] += int((mine & (left != 0) & ~follows).sum())
            for index in np.flatnonzero(mine & follows & inside & (left != 0)).tolist():
                for late in _bits(int(left[index])):
                    story = f"{self._names[bit]} was served, and {self._names[late]}, which comes first, was not"
                    one = self._found("service_order", rows, index, late, story)
                    position = int(rows.position[index])
                    own = bool(int(self._own) >> late & 1)
                    found.append(one if own else _Case(one, position, bool(rows.named[index])))
        return found

    # --- requesters that wait -------------------------------------------------------------------------------------

    def _waited(self, batch: _Batch) -> list[_Break | _Case]:
        r"""Find requesters with WAIT that returned while a vCPU had been in the guest all the time.

        Why that proves a break: let the vCPU's own hooks be GUEST_ENTRY at *a* and, as the very next one, GUEST_EXIT
        at *d*, and let the requester begin at *b* and return at *c*, with a < b and c < d. vcpu->mode became
        IN_GUEST_MODE before *a*, and it becomes OUTSIDE_GUEST_MODE only after the guest was left. At *c* the requester
        read that it was not OUTSIDE_GUEST_MODE. So, as the vCPU read no word in between and every way into the guest
        has its hook, it was one and the same stay. The requester asked for this vCPU after *b* (it asks for all of
        them; of a mask nobody knows here which), saw a mode that is not OUTSIDE_GUEST_MODE, and with WAIT that is
        enough to make it send an IPI and to wait until its function has run there. The vCPU's CPU has interrupts off
        from before *a* until after it has set OUTSIDE_GUEST_MODE, so the function ran after that, and the requester
        returned later still. It cannot have seen IN_GUEST_MODE or EXITING_GUEST_MODE then.

        What is not used: that the request is still pending. Another requester can have made it again; but that the
        vCPU never left the guest says more. READING_SHADOW_PAGE_TABLES is a mode outside the guest. A requester on the
        vCPU's own CPU sends itself no IPI, but then the vCPU is not in the guest. What can look like a break is a lost
        event, which the numbers of the vCPU's own ones tell, and a hook that did not run.
        """
        if "wait_returned_early" in self.unchecked:
            return []
        returned = batch.asks[batch.kind[batch.asks] == Kind.REQUEST_ALL_END]
        if len(returned):
            waits = (column(batch.events, "arg")[returned] & np.uint64(REQUEST_FLAGS["WAIT"])) != 0
            self._checked["wait_returned_early"] += int((waits & (batch.requests[returned] == _EVERY_VCPU)).sum())
        found: list[_Break | _Case] = []
        stills = np.flatnonzero(batch.kind == Kind.IN_GUEST_STILL)
        if not len(stills) and not self._stays:
            return found
        told = set(self._stays)
        for number in sorted(told):
            group = int(np.searchsorted(batch.numbers, number))
            if group < len(batch.numbers) and batch.numbers[group] == number:
                after = int(batch.order[batch.first[group]])
                self._left(batch, number, self._stays.pop(number), after, found)
        if not len(stills):
            return found
        rows = batch.whole(stills)
        everyone = self._everyone(batch, rows)
        slot = np.searchsorted(batch.keys, (rows.vcpu.astype(np.int64) << 32) | stills)
        last: tuple[int, int] = (0, 0)
        for index in np.argsort(slot, kind="stable").tolist():
            number, place = int(rows.vcpu[index]), int(slot[index])
            if not everyone[index] or (number, place) == last:
                continue  # of each stay the first one
            stay = self._stay(batch, rows, index, place)
            if stay is None or (number in told and place == self._begin(batch, number)):
                continue
            last = (number, place)
            if place < len(batch.keys) and int(batch.keys[place]) >> 32 == number:
                self._left(batch, number, stay, int(batch.order[place]), found)
            else:
                self._stays[number] = stay
        return found

    @staticmethod
    def _begin(batch: _Batch, number: int) -> int:
        return int(np.searchsorted(batch.keys, number << 32))

    def _stay(self, batch: _Batch, rows: _Rows, index: int, place: int) -> _Stay | None:
        """Return the stay in the guest that an IN_GUEST_STILL tells of, if it began before the requester did."""
        number = int(rows.vcpu[index])
        if place and int(batch.keys[place - 1]) >> 32 == number:
            entry = int(batch.order[place - 1])
            kind, seq, time_ns = (
                int(batch.kind[entry]), int(column(batch.events, "seq")[entry]), int(batch.time_ns[entry])
            )  # fmt: skip
        else:
            state, known = self._state(number)
            if not known:
                return None
            kind, seq, time_ns = int(state["kind"]), int(state["seq"]), int(state["time_ns"])
        begin_ns, arg = int(rows.since_ns[index]), int(rows.arg[index])
        if kind != Kind.GUEST_ENTRY or time_ns >= begin_ns or not arg & REQUEST_FLAGS["WAIT"]:
            return None
        return _Stay(seq, begin_ns, int(rows.time_ns[index]), arg)

    def _left(self, batch: _Batch, number: int, stay: _Stay, row: int, found: list[_Break | _Case]) -> None:
        """Judge a stay by the vCPU's own event that came next."""
        rows = batch.whole(np.array([row]))
        if int(rows.kind[0]) != Kind.GUEST_EXIT or int(rows.time_ns[0]) <= stay.time_ns:
            if int(rows.seq[0]) != stay.entered + 1:
                self._undecided["wait_returned_early"] += 1
            return
        if int(rows.seq[0]) != stay.entered + 1 or stay.begin_ns <= self._dark_ns:
            self._undecided["wait_returned_early"] += 1
            return
        rows.state = self._vcpus[np.searchsorted(self._vcpus["number"], rows.vcpu)]
        rows.named = batch.named_at[np.searchsorted(self._vcpus["number"], rows.vcpu)] < row
        story = (
            f"the requester began at {stay.begin_ns} ns and returned at {stay.time_ns} ns; the vCPU was in the guest"
            f" before and left it at {int(rows.time_ns[0])} ns"
        )
        one = self._found("wait_returned_early", rows, 0, stay.arg & REQUEST_MASK, story)
        found.append(one._replace(time_ns=stay.time_ns, since_ns=stay.begin_ns))

    def _everyone(self, batch: _Batch, rows: _Rows) -> Array:
        """Tell of each IN_GUEST_STILL whether its requester had asked every vCPU: its REQUEST_ALL came before it."""
        asks = batch.asks[batch.kind[batch.asks] == Kind.REQUEST_ALL]
        last = _last_before(column(batch.events, "tid")[asks], asks, rows.tid, rows.position)
        begun = np.where(last >= 0, batch.time_ns[last], -1)
        everyone = batch.requests[last] == _EVERY_VCPU
        for index in np.flatnonzero(last < 0).tolist():
            ask = self._asking.get(int(rows.tid[index]))
            if ask is not None:
                begun[index], everyone[index] = ask.begin_ns, ask.everyone
        told: Array = everyone & (begun == rows.since_ns)
        return told

    # --- cases that a kick explains -------------------------------------------------------------------------------

    def _close(self, batch: _Batch, new: list[_Case]) -> None:
        """Close the cases that this batch decides. Of each rule, vCPU and request one case is open at a time."""
        groups: dict[tuple[str, int, int], list[_Case]] = {}
        carried = [case._replace(position=-1) for case in self._cases.values()]
        for case in [*carried, *sorted(new, key=lambda case: case.position)]:
            groups.setdefault((case.found.rule, case.found.vcpu_number, case.found.bit), []).append(case)
        self._cases.clear()
        for key, cases in groups.items():
            until = -1
            for case in cases:
                if case.position >= until:
                    until = self._judge(batch, key, case)

    def _judge(self, batch: _Batch, key: tuple[str, int, int], case: _Case) -> int:
        """Decide a case, or leave it open. Return the row of the batch until which it was open."""
        one = case.found
        due = max(int(np.searchsorted(batch.tops, one.time_ns + LATE_NS, side="right")), case.position)
        over = min(due, batch.end_of(one.vcpu_number, one.pid, case.position))
        explained = self._explains(batch, one, case.position, over)
        if explained is not None:
            return max(explained, case.position + 1)
        if over == len(batch.kind):
            self._cases[key] = case
        elif over < due or not case.named or one.since_ns <= self._dark_ns:
            self._undecided[one.rule] += 1  # the vCPU ended meanwhile, or something is not known that may explain it
        else:
            self._break(one)
        return over

    def _explains(self, batch: _Batch, one: _Break, position: int, over: int) -> int | None:
        """Return the row of the batch that explains a case, -1 if an earlier batch does, None if nothing does yet."""
        since_ns, bit = one.since_ns, one.bit
        if position >= 0:
            kicked = self._kicks.get(one.vcpu_number, {}).get(bit, -1)
            if max(kicked, self._asked.get((one.vm, bit), -1)) >= since_ns:
                return -1
        kicks = batch.kicks[batch.vcpu[batch.kicks] == one.vcpu_number]
        kicks = kicks[kicks < over]
        times = batch.time_ns[kicks]
        holds = ((batch.requests[kicks] >> np.uint64(bit)) & np.uint64(1)) != 0
        # What comes late may find the request served already: then it explains it whatever its word is.
        late = (kicks > position) & (times > one.time_ns)
        kicks = kicks[(times >= since_ns) & (holds | late)]
        early = batch.asks < over
        asks = batch.asks[early & (batch.asked_bits == bit) & (batch.asked_vms == one.vm)]
        asks = asks[batch.time_ns[asks] >= since_ns]
        if len(kicks) or len(asks):
            return int(min([*kicks[:1], *asks[:1]]))
        if over == len(batch.kind):
            return None
        # A requester that began before and has not returned may be about to make it.
        rows = np.flatnonzero(early)
        tids = column(batch.events, "tid")[batch.asks[rows]]
        threads, last = np.unique(tids[::-1], return_index=True)
        last = rows[len(rows) - 1 - last]
        begun = batch.kind[batch.asks[last]] == Kind.REQUEST_ALL
        begun &= (batch.asked_bits[last] == bit) & (batch.asked_vms[last] == one.vm)
        since_begun = [
            *batch.time_ns[batch.asks[last[begun]]].tolist(),
            *(
                ask.begin_ns
                for tid, ask in self._asking.items()
                if ask.going and tid not in threads and (ask.vm, ask.bit) == (one.vm, bit)
            ),
        ]
        return over if any(begin_ns > one.time_ns + LATE_NS - _GONE_NS for begin_ns in since_begun) else None

    # --- starvation -----------------------------------------------------------------------------------------------

    def _starved(self, lifecycles: pd.DataFrame, batch: _Batch | None) -> None:
        """Look at lifecycles. The vCPU sleeps only inside KVM_RUN, and each of its sleeps ends with a WAKEUP."""
        if "starved" in self.unchecked or not len(lifecycles):
            return
        accused = lifecycles["request"].isin(OWN | KICKED).to_numpy(bool)
        self._checked["starved"] += int(accused.sum())
        raised, after = (lifecycles[name].to_numpy(np.int64) for name in ("raised_ns", "ended_after_ns"))
        long = accused & (after - raised > self._bound_ns) & (lifecycles["userspace_exits"].to_numpy() == 0)
        rows = lifecycles[long & lifecycles["raised_in"].isin(_STARVING).to_numpy(bool)]
        bits = {name: bit for bit, name in self._names.items()}
        for row in rows.to_dict("records"):
            if self._slept(batch, row["vcpu_number"], row["ended_after_ns"]) > row["raised_ns"]:
                continue
            if row["end"] == "undecided" or row["raised_by"] == "unknown":
                self._undecided["starved"] += 1
                continue
            waited = row["ended_after_ns"] - row["raised_ns"]
            flags = "|".join(self._flags.get(row["request"], ())) or "no flags"
            self._break(
                _Break(
                    "starved", row["vm"], row["pid"], row["vcpu"], row["vcpu_number"], bits[row["request"]],
                    row["ended_after_ns"], row["raised_ns"],
                    f"pending for {waited / 1e9:.3f} s at least, raised in {row['raised_in']} ({flags}); {row['end']}",
                )
            )  # fmt: skip

    def _slept(self, batch: _Batch | None, number: int, until_ns: int) -> int:
        state, known = self._state(number)
        slept = int(state["slept_ns"]) if known else 0
        if batch is not None:
            times = batch.time_ns[batch.sleeps[batch.vcpu[batch.sleeps] == number]]
            times = times[times <= until_ns]
            slept = max(slept, int(times.max())) if len(times) else slept
        return slept

    # --- what is carried over -------------------------------------------------------------------------------------

    def _state(self, number: int) -> tuple[Any, bool]:
        slot, found = find(self._vcpus["number"], np.array([number], "u4"))
        return (self._vcpus[slot[0]], True) if found[0] else (None, False)

    def _carry(self, batch: _Batch) -> None:
        state, events = self._vcpus, batch.events
        slot = np.searchsorted(state["number"], batch.numbers)
        last = batch.order[np.append(batch.first[1:], len(batch.order)) - 1] if len(batch.first) else batch.first
        state["seq"][slot], state["kind"][slot] = column(events, "seq")[last], batch.kind[last]
        state["time_ns"][slot] = batch.time_ns[last]
        unnamed = ~state["named"][slot]
        state["pid"][slot[unnamed]] = column(events, "pid")[last[unnamed]]
        slept = np.searchsorted(state["number"], batch.vcpu[batch.sleeps])
        state["slept_ns"][slept] = batch.time_ns[batch.sleeps]
        if self._kicked:
            self._carry_kicks(batch)
        ended = np.zeros(len(state), bool)
        ended[slot[batch.kind[last] == Kind.VCPU_END]] = True
        for row in np.flatnonzero(batch.kind == Kind.VMM_EXIT).tolist():
            seen = np.full(len(state), -1)
            seen[slot] = batch.order[batch.first]
            seen[np.isin(state["number"], batch.was)] = -1
            ended |= (state["pid"] == column(events, "pid")[row]) & (seen < row)
        for number in state["number"][ended].tolist():
            if self._stays.pop(number, None):
                self._undecided["wait_returned_early"] += 1
        self._vcpus = state[~ended]
        if self._kicked:
            self._forget_kicks(batch)

    def _carry_kicks(self, batch: _Batch) -> None:
        kicks, asks = batch.kicks, batch.asks
        words = batch.requests[kicks]
        seen = int(np.bitwise_or.reduce(words) & self._kicked) if len(kicks) else 0
        for bit in _bits(seen):
            of = kicks[((words >> np.uint64(bit)) & np.uint64(1)) != 0]
            for number, time_ns in _latest(batch.vcpu[of], batch.time_ns[of]):
                of_vcpu = self._kicks.setdefault(number, {})
                of_vcpu[bit] = max(of_vcpu.get(bit, -1), time_ns)
        for key, time_ns in _latest(batch.asked_vms << 8 | batch.asked_bits, batch.time_ns[asks]):
            self._asked[key >> 8, key & 0xFF] = max(self._asked.get((key >> 8, key & 0xFF), -1), time_ns)
            seen |= (1 << (key & 0xFF)) & int(self._kicked)
        self._shown |= seen
        if len(asks):
            tids, begins = column(batch.events, "tid")[asks], batch.kind[asks] == Kind.REQUEST_ALL
            everyone = batch.requests[asks] == _EVERY_VCPU
            for at in _last_of(tids, begins):
                self._asking[int(tids[at])] = _Asking(
                    int(batch.time_ns[asks[at]]),
                    int(batch.asked_vms[at]),
                    int(batch.asked_bits[at]),
                    bool(everyone[at]),
                    True,
                )
            for at in _last_of(tids, np.ones(len(asks), bool)):
                ask = self._asking.get(int(tids[at]))
                if ask is not None and not begins[at]:
                    self._asking[int(tids[at])] = ask._replace(going=False)
        if self._asking:
            old = batch.top_ns - _GONE_NS
            self._asking = {tid: ask for tid, ask in self._asking.items() if ask.begin_ns > old}

    def _forget_kicks(self, batch: _Batch) -> None:
        """Keep of vCPUs that are not alive only what is young: a kick can come before a vCPU's first event."""
        old = batch.top_ns - 2 * LATE_NS
        alive = set(self._vcpus["number"].tolist())
        self._kicks = {
            number: of for number, of in self._kicks.items() if number in alive or max(of.values(), default=-1) > old
        }
        vms = set(self._vcpus["vm"].tolist())
        self._asked = {key: time_ns for key, time_ns in self._asked.items() if key[0] in vms or time_ns > old}

    # --- the result -----------------------------------------------------------------------------------------------

    def _ordered(self) -> Ordered:
        undecided, broken = dict(self._undecided), dict.fromkeys(RULES, 0)

        def proven(rule: str, bit: int) -> bool:
            # Where no kick for a request was ever seen, the hooks may not tell of them: a compiler that optimises the
            # whole module can have left out the calls.
            by_kicks = rule not in ("starved", "wait_returned_early") and not int(self._own) >> bit & 1
            return not by_kicks or bool((self._shown & ~int(self._unsure)) >> bit & 1)

        for (rule, bit), count in self._broken.items():
            if proven(rule, bit):
                broken[rule] += count
            else:
                undecided[rule] += count
        rules = pd.DataFrame(
            {
                "rule": list(RULES),
                "title": [rule.title for rule in RULES.values()],
                "source": [rule.source for rule in RULES.values()],
                "checked": [0 if name in self.unchecked else self._checked[name] for name in RULES],
                "broken": [broken[name] for name in RULES],
                "undecided": [undecided[name] for name in RULES],
                "unchecked": [self.unchecked.get(name, "") for name in RULES],
            }
        ).astype(RULE)
        kept = []
        for name in RULES:
            of_rule = [
                one for (rule, bit), of in self._breaks.items() if rule == name and proven(rule, bit) for one in of
            ]
            kept += sorted(of_rule, key=_first)[: self._most]
        names = {bit: self._names.get(bit, f"bit_{bit}") for bit in {one.bit for one in kept}}
        values = [(*one[:5], names[one.bit], *one[6:]) for one in kept]
        columns = list(zip(*values, strict=True)) if values else [()] * len(BREAK)
        breaks = pd.DataFrame(
            {name: pd.Series(list(of), dtype=dtype) for (name, dtype), of in zip(BREAK.items(), columns, strict=True)}
        )
        return Ordered(rules, breaks)


class _Segment(Protocol):
    @property
    def columns(self) -> Mapping[str, Array]: ...


class Segments(Protocol):
    """A recording, or anything that yields its segments."""

    def segments(self) -> Iterable[_Segment | None]:
        """Yield the segments in order, and None where one is missing."""


def timeline(
    recording: Segments,
    vcpu_number: int,
    begin_ns: int,
    end_ns: int,
    names: Mapping[int, str],
    most: int = 2_000,
) -> pd.DataFrame:
    """Return what one vCPU did between two moments, what was pending, and who kicked it: a second reading.

    Rows: ``track``, ``name``, ``begin_ns``, ``end_ns``. Tracks: ``guest``, ``kernel`` (also other ioctls, by name),
    ``user space``, ``halted``; one for each request in ``names``, for as long as it was certainly pending; ``kick``,
    named after the requester. What only reaches into the stretch is whole. Of the vCPU's own events the first ``most``
    are looked at, and as many kicks: behind them the timeline ends.
    """
    own, kicks = _stretch(recording, vcpu_number, begin_ns, end_ns, most)
    rows: list[tuple[str, str, int, int]] = []
    if len(own):
        periods = Periods()
        edges = periods.feed(own) + periods.finish()
        for number, name in enumerate(PERIODS):
            if name in _TRACKS:
                of = edges.period == number
                begins, ends = edges.time_ns[of & edges.begins], edges.time_ns[of & ~edges.begins]
                rows += [
                    (_TRACKS[name], name, begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
                ]
        for bit, name in names.items():
            rows += [(name, name, begin, end) for begin, end in _pending(own, bit)]
    for kick in kicks:
        who = f"thread {kick['tid']} on CPU {kick['cpu']}"
        if kick["kind"] != Kind.KICK:
            bit = int(kick["arg"]) & REQUEST_MASK
            who = f"{names.get(bit, f'bit_{bit}')} for all, {who}"
        rows.append(("kick", who, int(kick["time_ns"]), int(kick["time_ns"])))
    rows = [row for row in rows if row[2] <= end_ns and row[3] >= begin_ns]
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(TIMELINE)
    return pd.DataFrame(
        {name: pd.Series(list(of), dtype=dtype) for (name, dtype), of in zip(TIMELINE.items(), columns, strict=True)}
    )


def _stretch(recording: Segments, number: int, begin_ns: int, end_ns: int, most: int) -> tuple[Array, Array]:
    """Return a vCPU's own events in a stretch, with one before and one after it, and the kicks of it there."""
    before, inside, kicks = np.empty(0, EVENT), np.empty(0, EVENT), np.empty(0, EVENT)
    vm = -1
    for segment in recording.segments():
        if segment is None:
            before, inside = before[:0], inside[:0]  # what was before a hole proves nothing of what came after it
            continue
        columns = segment.columns
        kind, times = columns["kind"], columns["time_ns"]
        mine = columns["vcpu"] == number
        own = np.flatnonzero(mine & _IS_OWN[kind])
        new = own[kind[own] == Kind.VCPU_NEW]
        vm = int(columns["detail"][new[-1]]) if len(new) else vm
        last = own[times[own] < begin_ns][-1:]
        before = _records(columns, last) if len(last) else before
        later = own[times[own] >= begin_ns]
        later = later[: int((times[later] <= end_ns).sum()) + 1]
        if not len(inside) or int(inside["time_ns"][-1]) <= end_ns:
            inside = np.concatenate((inside, _records(columns, later[: most + 1 - len(inside)])))
        asked = (kind == Kind.REQUEST_ALL) & (columns["detail"] == vm)
        of = np.flatnonzero(((kind == Kind.KICK) & mine | asked) & (times >= begin_ns) & (times <= end_ns))
        kicks = np.concatenate((kicks, _records(columns, of[: most - len(kicks)])))
        if len(times) and int(times.min()) > end_ns + LATE_NS:
            break
    return np.concatenate((before, inside)), kicks


def _records(columns: Mapping[str, Array], rows: Array) -> Array:
    records = np.empty(len(rows), EVENT)
    for name in EVENT.names or ():
        records[name] = columns[name][rows]
    return records


def _pending(own: Array, bit: int) -> Iterable[tuple[int, int]]:
    """Return from which event to which a request was certainly pending, each time."""
    mask = np.uint64(1 << bit)
    now, before = (own["requests"] & mask) != 0, (own["before"] & mask) != 0
    begins = np.flatnonzero(now & ~(before & np.append(False, now[:-1])))
    goes_on = np.append(before[1:] & now[1:] & now[:-1], False)
    ends = np.flatnonzero(now & ~goes_on)
    # Where the next event had it before, it was pending until then at least: until its last reading.
    after = np.minimum(ends + 1, len(own) - 1)
    until = np.where((after > ends) & before[after], own["since_ns"][after], own["time_ns"][ends])
    return zip(
        own["time_ns"][begins].tolist(), np.maximum(until, own["time_ns"][begins]).tolist(), strict=True
    )  # fmt: skip


class _Rows:
    """Some events as whole rows, by the names of their fields, with what is known beside each."""

    def __init__(self, events: Events, rows: Array) -> None:
        self.position = rows
        for name in ("requests", "before", "arg", "vcpu", "seq", "pid", "tid", "kind"):
            setattr(self, name, column(events, name)[rows])
        self.time_ns, self.since_ns = (column(events, name)[rows].astype(np.int64) for name in ("time_ns", "since_ns"))

    time_ns: Array
    since_ns: Array
    requests: Array
    before: Array
    arg: Array
    vcpu: Array
    seq: Array
    pid: Array
    tid: Array
    kind: Array
    last_kind: Array
    state: Array
    named: Array


class _Batch:
    """A batch, with its own events by vCPU and in order."""

    was: Array  # numbers of the vCPUs that were known before
    named_at: Array  # by slot of the vCPUs: the row that named it, -1 an earlier batch

    def __init__(self, events: Events, top_ns: int) -> None:
        self.events = events
        self.kind, self.vcpu = (np.ascontiguousarray(column(events, name)) for name in ("kind", "vcpu"))
        self.requests, self.before = column(events, "requests"), column(events, "before")
        self.time_ns = np.ascontiguousarray(column(events, "time_ns")).astype(np.int64)
        self._before_ns = top_ns
        self.top_ns = max(top_ns, int(self.time_ns.max()))
        own = np.flatnonzero(_IS_OWN[self.kind] & (self.vcpu != 0))
        self.order = own[by_key(self.vcpu[own])]
        numbers = self.vcpu[self.order]
        starts = np.ones(len(numbers), bool)
        np.not_equal(numbers[1:], numbers[:-1], out=starts[1:])
        self.starts, self.first = starts, np.flatnonzero(starts)
        self.numbers = numbers[self.first]
        wakes = np.flatnonzero(self.kind == Kind.WAKEUP)
        self.sleeps = wakes[column(events, "detail")[wakes] == 1]  # rows that end a sleep
        self.kicks = np.flatnonzero(self.kind == Kind.KICK)
        self.asks = np.flatnonzero((self.kind == Kind.REQUEST_ALL) | (self.kind == Kind.REQUEST_ALL_END))
        self.asked_bits = (column(events, "arg")[self.asks] & np.uint64(REQUEST_MASK)).astype(np.int64)
        self.asked_vms = column(events, "detail")[self.asks].astype(np.int64)
        self._ends = np.flatnonzero((self.kind == Kind.VCPU_END) | (self.kind == Kind.VMM_EXIT))
        self._place: Array | None = None
        self._keys: Array | None = None
        self._tops: Array | None = None

    def whole(self, rows: Array) -> _Rows:
        return _Rows(self.events, rows)

    def place(self, rows: Array) -> Array:
        """Return where own events stand in the order by vCPU."""
        if self._place is None:
            self._place = np.zeros(len(self.kind), np.intp)
            self._place[self.order] = np.arange(len(self.order))
        return self._place[rows]

    @property
    def keys(self) -> Array:
        """Return vCPU and row of the own events in one number, in order."""
        if self._keys is None:
            self._keys = (self.vcpu[self.order].astype(np.int64) << 32) | self.order
        return self._keys

    @property
    def tops(self) -> Array:
        """Return the latest time so far at each row: how far the stream has come."""
        if self._tops is None:
            self._tops = np.maximum(np.maximum.accumulate(self.time_ns), self._before_ns)
        return self._tops

    def end_of(self, number: int, pid: int, after: int) -> int:
        """Return the row after that one which ends a vCPU, or the length of the batch."""
        ends = self._ends[self._ends > after]
        own = (self.kind[ends] == Kind.VCPU_END) & (self.vcpu[ends] == number)
        ends = ends[own | ((self.kind[ends] == Kind.VMM_EXIT) & (column(self.events, "pid")[ends] == pid))]
        return int(ends[0]) if len(ends) else len(self.kind)


def _last_before(keys: Array, rows: Array, wanted: Array, before: Array) -> Array:
    """Return for each wanted key the last of the rows with that key before a row, or -1."""
    place = (keys.astype(np.int64) << 32) | rows
    order = np.argsort(place)
    slot = np.searchsorted(place[order], (wanted.astype(np.int64) << 32) | before) - 1
    if not len(rows):
        return np.full(len(wanted), -1)
    last = order[np.maximum(slot, 0)]
    return np.where((slot >= 0) & (keys[last] == wanted), rows[last], -1)


def _last_of(keys: Array, which: Array) -> list[int]:
    """Return where each key stands last, of the chosen ones."""
    chosen = np.flatnonzero(which)[::-1]
    _, first = np.unique(keys[chosen], return_index=True)
    places: list[int] = chosen[first].tolist()
    return places


def _latest(keys: Array, times: Array) -> Iterable[tuple[int, int]]:
    """Return each key with the latest of its times."""
    distinct, inverse = np.unique(keys, return_inverse=True)
    latest = np.full(len(distinct), -1, np.int64)
    np.maximum.at(latest, inverse, times)
    return zip(distinct.tolist(), latest.tolist(), strict=True)


def _first(one: _Break) -> tuple[int, ...]:
    return one.time_ns, one.vcpu_number, one.bit, one.since_ns


def _mask(bits: Mapping[str, int], names: Iterable[str]) -> Any:
    return _union(1 << bits[name] for name in names if name in bits)


def _union(masks: Iterable[int]) -> Any:
    union = 0
    for mask in masks:
        union |= mask
    return np.uint64(union)


def _bits(word: int) -> list[int]:
    return [bit for bit in range(word.bit_length()) if word >> bit & 1]
