"""The rules of ordering, each a small state machine over one event, in the order and the words of docs/full.md.

What they are about, and why an innocent kernel never breaks one, is in analysis/promises.py. A rule either counts a
break at once, or opens a *case*: what breaks the rule unless somebody kicks the vCPU for it, or asks it among others,
before LATE_NS have gone by. Of each rule, vCPU and request one case is open at a time.
"""

from __future__ import annotations

import numpy as np

from analysis import rules
from analysis.cases import (
    ENTERED,
    ORDER,
    RAISED,
    STARVED,
    WAITED,
    accuse,
    broke,
    drop_case,
    found_in,
    vcpu_of,
)
from analysis.compiled import compiled
from analysis.events import ONE, Event, asked_for, holds, lowest, without_lowest
from analysis.memory import NONE, THREAD, Memory, Record, drop, give, look, put, take
from analysis.words import By, Place, Verdict
from probes.schema import REQUEST_FLAGS, Kind

# A mask of vCPUs that means every one.
_EVERY_VCPU = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_WAIT = np.uint64(REQUEST_FLAGS["WAIT"])


# --- one own event of a vCPU --------------------------------------------------------------------------------------


@compiled
def own_event(memory: Memory, wanted: Record, vcpu: Record, event: Event) -> None:
    """Check an own event against the one before it; ``follows``: nothing is missing between them."""
    follows = vcpu.seen and not vcpu.cut and rules.missing_before(vcpu, event) == 0
    if vcpu.staying:
        waited(memory, vcpu, event)
    if event.kind == Kind.GUEST_ENTRY:
        entered(memory, wanted, vcpu, event, follows)
    elif event.kind == Kind.GUEST_EXIT:
        raised(memory, wanted, vcpu, event, follows)
    elif event.kind == Kind.RUN_EXIT:
        served(memory, wanted, vcpu, event, follows)


@compiled
def went_by_service(kind: int) -> bool:
    """Between such a hook and the guest's entry KVM goes by its service point: inside KVM_RUN, outside the guest."""
    return kind == Kind.RUN_ENTER or kind == Kind.GUEST_EXIT or kind == Kind.WAKEUP or kind == Kind.SITE


@compiled
def entered(memory: Memory, wanted: Record, vcpu: Record, event: Event, follows: bool) -> None:
    """entered_with_request: it was pending at the hook before, and the guest is entered all the same."""
    memory.now.checked[ENTERED] += 1
    pending = event.requests & event.before & (wanted.own | wanted.kicked)
    if pending == 0:
        return
    if not follows:
        memory.now.undecided[ENTERED] += 1
    elif went_by_service(vcpu.kind):
        # After a GUEST_ENTRY this is an engine's second sight of one entry.
        accuse(memory, wanted, vcpu, event, ENTERED, pending, vcpu.kind)


@compiled
def waited(memory: Memory, vcpu: Record, event: Event) -> None:
    """wait_returned_early: a requester with WAIT returned while the vCPU had been in the guest all the time.

    Why that proves a break: let the vCPU's own hooks be GUEST_ENTRY at *a* and, as the very next one, GUEST_EXIT at
    *d*, and let the requester begin at *b* and return at *c*, with a < b and c < d. vcpu->mode became IN_GUEST_MODE
    before *a*, and it becomes OUTSIDE_GUEST_MODE only after the guest was left. At *c* the requester read that it was
    not OUTSIDE_GUEST_MODE. So, as the vCPU read no word in between and every way into the guest has its hook, it was
    one and the same stay. The requester asked for this vCPU after *b* (it asks for all of them; of a mask nobody knows
    here which), saw a mode that is not OUTSIDE_GUEST_MODE, and with WAIT that is enough to make it send an IPI and to
    wait until its function has run there. The vCPU's CPU has interrupts off from before *a* until after it has set
    OUTSIDE_GUEST_MODE, so the function ran after that, and the requester returned later still. It cannot have seen
    IN_GUEST_MODE or EXITING_GUEST_MODE then.

    What is not used: that the request is still pending. Another requester can have made it again; but that the vCPU
    never left the guest says more. READING_SHADOW_PAGE_TABLES is a mode outside the guest. A requester on the vCPU's
    own CPU sends itself no IPI, but then the vCPU is not in the guest. What can look like a break is a lost event,
    which the numbers of the vCPU's own ones tell, and a hook that did not run.
    """
    vcpu.staying = False
    if rules.missing_before(vcpu, event) != 0:
        memory.now.undecided[WAITED] += 1
    elif event.kind == Kind.GUEST_EXIT and event.time_ns > vcpu.stay_ns:
        if vcpu.stay_begin_ns <= memory.now.dark_ns:
            memory.now.undecided[WAITED] += 1
        else:
            found = found_in(
                memory, vcpu, event, WAITED, vcpu.stay_request, vcpu.stay_ns, vcpu.stay_begin_ns, event.time_ns
            )
            broke(memory, found)


@compiled
def raised(memory: Memory, wanted: Record, vcpu: Record, event: Event, follows: bool) -> None:
    """raise_without_kick: what others only make with a kick was made while the vCPU was in the guest, without one."""
    rose = event.requests & ~event.before & wanted.kicked
    if rose == 0:
        return
    if not follows:
        memory.now.undecided[RAISED] += 1
    elif vcpu.kind == Kind.GUEST_ENTRY:
        memory.now.checked[RAISED] += _count(rose)
        accuse(memory, wanted, vcpu, event, RAISED, rose, 0)


@compiled
def starved(memory: Memory, wanted: Record, vcpu: Record, row: Record) -> None:
    """starved: a lifecycle that waited longer than the bound, neither asleep nor in user space.

    The vCPU sleeps only inside KVM_RUN, and each of its sleeps ends with a WAKEUP.
    """
    if not wanted.starves or not holds(wanted.bounded, row.request):
        return
    memory.now.checked[STARVED] += 1
    if not waited_too_long(wanted.bound_ns, row) or vcpu.slept_ns > row.raised_ns:
        return
    if row.end == Verdict.UNDECIDED or row.raised_by == By.UNKNOWN:
        memory.now.undecided[STARVED] += 1
    else:
        place = take(memory)
        found = memory.rows[place]
        found.rule, found.request, found.named, found.detail = STARVED, row.request, True, row.end
        found.vm, found.pid, found.vcpu, found.vcpu_number = row.vm, row.pid, row.vcpu, row.vcpu_number
        found.time_ns, found.since_ns, found.raised_in = row.ended_after_ns, row.raised_ns, row.raised_in
        broke(memory, place)


@compiled
def waited_too_long(bound_ns: int, row: Record) -> bool:
    """It was pending for longer than the bound, and its vCPU inside KVM_RUN all the time."""
    inside = row.raised_in == Place.GUEST or row.raised_in == Place.KERNEL or row.raised_in == Place.KVM_RUN
    return bool(inside and row.userspace_exits == 0 and row.ended_after_ns - row.raised_ns > bound_ns)


@compiled
def served(memory: Memory, wanted: Record, vcpu: Record, event: Event, follows: bool) -> None:
    """service_order: KVM returned to user space for a request while one that it looks for earlier was still pending."""
    taken = event.before & ~event.requests & wanted.takers
    while taken != 0:
        bit = lowest(taken)
        taken = without_lowest(taken)
        if event.arg != wanted.reason[bit]:
            continue
        inside = went_by_service(vcpu.kind)
        if follows and inside:
            memory.now.checked[ORDER] += 1
        left = event.before & event.requests & wanted.earlier[bit]
        if left == 0:
            continue
        if not follows:
            memory.now.undecided[ORDER] += 1
        elif inside:
            accuse(memory, wanted, vcpu, event, ORDER, left, bit)


# --- what other threads do ----------------------------------------------------------------------------------------


@compiled
def kick(memory: Memory, wanted: Record, vcpu: Record, event: Event) -> None:
    """A kick explains what its word holds; what comes late may find it served already, and explains it all the same."""
    word = event.requests & wanted.kicked
    memory.now.shown |= word
    while word != 0:
        place = wanted.place[lowest(word)]
        word = without_lowest(word)
        vcpu.last_kick_ns[place] = max(vcpu.last_kick_ns[place], event.time_ns)
    at = vcpu.cases
    while at != NONE:
        case = memory.rows[at]
        after, late = case.next, event.time_ns > case.time_ns
        if event.time_ns >= case.since_ns and (late or holds(event.requests, case.request)):
            drop_case(memory, vcpu, at)
        at = after


@compiled
def asks(memory: Memory, wanted: Record, vm: Record, event: Event, bit: int) -> None:
    """A request is being made of vCPUs of a VM: at its begin and at its return it explains what they show of it."""
    if not holds(wanted.kicked, bit):
        return
    memory.now.shown |= ONE << np.uint64(bit)
    place = wanted.place[bit]
    vm.last_ask_ns[place] = max(vm.last_ask_ns[place], event.time_ns)
    at = memory.now.first_case
    while at != NONE:
        case = memory.rows[at]
        after = case.after
        if case.vm == vm.number and case.request == bit and event.time_ns >= case.since_ns:
            drop_case(memory, vcpu_of(memory, case), at)
        at = after


@compiled
def requester(memory: Memory, wanted: Record, event: Event, bit: int) -> None:
    """A thread begins to ask vCPUs for a request, or returns from that."""
    everyone, place = event.requests == _EVERY_VCPU, look(memory, THREAD, event.tid)
    if event.kind == Kind.REQUEST_ALL_END:
        if wanted.waits and everyone and event.arg & _WAIT != 0:
            memory.now.checked[WAITED] += 1
        if place != NONE:
            memory.rows[place].going = False
        return
    if place == NONE:
        place = take(memory)
        put(memory, THREAD, event.tid, place)
        memory.rows[place].next, memory.now.first_thread = memory.now.first_thread, place
    thread = memory.rows[place]
    thread.tid, thread.begin_ns, thread.vm, thread.request = event.tid, event.time_ns, event.detail, bit
    thread.everyone, thread.going = everyone, True


@compiled
def in_guest_still(memory: Memory, wanted: Record, vcpu: Record, event: Event) -> None:
    """A requester that asked every vCPU has returned, and this one is in the guest: since before that one began?"""
    place = look(memory, THREAD, event.tid)
    if not wanted.waits or place == NONE or event.arg & _WAIT == 0:
        return
    thread = memory.rows[place]
    if not thread.everyone or thread.begin_ns != event.since_ns:
        return
    since_before = vcpu.kind == Kind.GUEST_ENTRY and vcpu.last_ns < event.since_ns
    if vcpu.seen and not vcpu.cut and since_before and not vcpu.staying:  # of each stay the first one
        vcpu.staying, vcpu.stay_begin_ns, vcpu.stay_ns = True, event.since_ns, event.time_ns
        vcpu.stay_request = asked_for(event)


@compiled
def forget_requesters(memory: Memory, until_ns: int) -> None:
    """Forget the threads that began no later."""
    at, kept = memory.now.first_thread, NONE
    while at != NONE:
        thread, after = memory.rows[at], memory.rows[at].next
        if thread.begin_ns <= until_ns:
            drop(memory, THREAD, thread.tid)
            give(memory, at)
        else:
            thread.next, kept = kept, at
        at = after
    memory.now.first_thread = kept


@compiled
def _count(word: int) -> int:
    count = 0
    while word != 0:
        word = without_lowest(word)
        count += 1
    return count
