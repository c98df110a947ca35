"""From one reading of a vCPU's word to the next: which requests rose, which ended, and what happened to those between.

An event holds the word as it is (``requests``) and as it was last read (``before``). Against the word of the previous
event that was received this gives three readings of each bit: *known*, *before* and *now*. ``before`` and not *now*, or
the other way round, is a transition that the event saw; *known* unlike *before* is one whose event was lost.
"""

from __future__ import annotations

import numpy as np

from analysis import copies, rules
from analysis.compiled import compiled
from analysis.events import ONE, Event, holds, lowest, without_lowest
from analysis.memory import NONE, Memory, Record, give, take, without
from analysis.words import By, Place, Verdict, Why
from probes.schema import Kind


@compiled
def requests_of(memory: Memory, wanted: Record, vcpu: Record, event: Event, missing: int) -> None:
    """Handle an own event of a vCPU for each of its requests."""
    copies.pause_ends(memory, wanted, vcpu, event)
    touched = (vcpu.word | event.before | event.requests) & wanted.mask
    while touched != 0:
        _request(memory, wanted, vcpu, event, lowest(touched), missing)
        touched = without_lowest(touched)


@compiled
def _request(memory: Memory, wanted: Record, vcpu: Record, event: Event, bit: int, missing: int) -> None:
    known, before, now = holds(vcpu.word, bit), holds(event.before, bit), holds(event.requests, bit)
    place = _of(memory, vcpu, bit)
    if known and missing != 0:
        rules.gap(memory.rows[place], missing, vcpu.last_ns, event.time_ns)
    if known and not before:
        copies.before_end(memory, wanted, vcpu, memory.rows[place], event)
        _finish(memory, vcpu, place, Verdict.UNDECIDED, Why.END_UNSEEN, vcpu.last_ns, event.since_ns, False)
    if not known and before:
        place = _rose_unseen(memory, vcpu, event, bit, missing)
    if now and not before:
        place = _rose(memory, wanted, vcpu, event, bit, known, missing)
    if not before and not now:
        return
    pending = memory.rows[place]
    if rules.in_nested(event):
        pending.nested = True
    if not now:
        copies.before_end(memory, wanted, vcpu, pending, event)
        end, why = rules.ended_by(pending, event)
        entered = event.kind == Kind.GUEST_ENTRY
        _finish(memory, vcpu, place, end, why, event.since_ns, event.time_ns, entered)
        return
    if event.kind == Kind.RUN_EXIT:
        pending.userspace_exits += 1
    copies.of_request(memory, wanted, vcpu, pending, event, before)
    rules.reset_or_restored(pending, event, before)
    if event.kind == Kind.VCPU_END:
        copies.before_end(memory, wanted, vcpu, pending, event)
        end, why = rules.ended_with_vcpu(wanted, pending)
        _finish(memory, vcpu, place, end, why, event.since_ns, event.time_ns, False)


@compiled
def _of(memory: Memory, vcpu: Record, bit: int) -> int:
    place: int = vcpu.pending
    while place != NONE and memory.rows[place].request != bit:
        place = memory.rows[place].next
    return place


@compiled
def _new(memory: Memory, vcpu: Record, bit: int) -> int:
    place = take(memory)
    pending = memory.rows[place]
    pending.vcpu_number, pending.request, pending.raised_by, pending.raised_in = (
        vcpu.number,
        bit,
        By.UNKNOWN,
        Place.UNKNOWN,
    )
    pending.raised_after_ns = pending.raised_ns = 0
    pending.userspace_exits = pending.saves = pending.blind_saves = 0
    pending.last_save, pending.missed = rules.NO_SAVE, memory.now.blind
    pending.nested = pending.reset = pending.set_since_reset = pending.restored_without = False
    pending.unseen = pending.cut = pending.gap = False
    pending.gap_lost = pending.gap_from = pending.gap_to = 0
    pending.requester_tid, pending.requester_cpu, pending.kicked_ns, pending.left_guest_ns = 0, -1, -1, -1
    pending.next = vcpu.pending
    vcpu.pending = place
    memory.now.pending += 1
    return place


@compiled
def _rose_unseen(memory: Memory, vcpu: Record, event: Event, bit: int, missing: int) -> int:
    """The event before this one had it already: the one that saw it rise was lost."""
    place = _new(memory, vcpu, bit)
    pending = memory.rows[place]
    copies.rose(pending, event)
    pending.unseen, pending.cut = True, vcpu.cut
    pending.raised_after_ns, pending.raised_ns = vcpu.last_ns, event.since_ns
    if missing != 0:
        rules.gap(pending, missing, vcpu.last_ns, event.time_ns)
    return place


@compiled
def _rose(memory: Memory, wanted: Record, vcpu: Record, event: Event, bit: int, known: bool, missing: int) -> int:
    """It was clear at the reading before, and is set at this one."""
    place = _new(memory, vcpu, bit)
    pending = memory.rows[place]
    copies.rose(pending, event)
    pending.raised_by = rules.raised_by(bit, event)
    pending.raised_ns = event.time_ns
    if event.kind == Kind.VCPU_NEW and pending.raised_by == By.UNKNOWN:
        return place  # it was pending when tracing began, since some time after boot
    pending.raised_after_ns = event.since_ns
    contiguous = missing == 0 and not vcpu.cut and event.since_ns == vcpu.last_ns
    pending.raised_in = rules.raised_in(event, vcpu.kind if contiguous and wanted.full else -1)
    if pending.raised_in == Place.GUEST:
        pending.left_guest_ns = event.time_ns
    if rules.own_thread_raised(bit, pending.raised_by):
        pending.requester_tid, pending.requester_cpu = event.tid, event.cpu
    if contiguous and not known and event.kind != Kind.VCPU_NEW:
        _tell_kicks(memory, vcpu, pending, event.tid)
    return place


@compiled
def _tell_kicks(memory: Memory, vcpu: Record, pending: Record, own_tid: int) -> None:
    """Tell a request that has risen who kicked its vCPU meanwhile."""
    first, at = NONE, vcpu.kicks
    while at != NONE:
        kick = memory.rows[at]
        # The list begins with the newest one: of two at the same time the older one counts.
        sooner = first == NONE or kick.time_ns <= memory.rows[first].time_ns
        if kick.request == pending.request and kick.time_ns > pending.raised_after_ns and sooner:
            first = at
        at = kick.next
    if first == NONE:
        return
    if rules.another_raised(pending, memory.rows[first], own_tid):
        pending.raised_by = By.REMOTE
    _told(pending, memory.rows[first])
    at = vcpu.kicks
    while at != NONE:
        if memory.rows[at].request == pending.request:
            _told(pending, memory.rows[at])
        at = memory.rows[at].next


@compiled
def _told(pending: Record, kick: Record) -> None:
    rules.kicked(pending, kick.time_ns, kick.tid, kick.cpu, kick.seen)


@compiled
def _kick(memory: Memory, vcpu: Record, bit: int, event: Event, seen: bool) -> None:
    """Another thread kicked a vCPU for a request, or made it of the whole VM: told at once, or when the vCPU sees it.

    Of those that the vCPU has yet to see only the first one of each sort counts.
    """
    place = _of(memory, vcpu, bit)
    if place != NONE:
        rules.kicked(memory.rows[place], event.time_ns, event.tid, event.cpu, seen)
        return
    if event.time_ns <= vcpu.last_ns:
        return
    at = vcpu.kicks
    while at != NONE and (memory.rows[at].request != bit or memory.rows[at].seen != seen):
        at = memory.rows[at].next
    if at == NONE:
        at = take(memory)
        memory.now.kicks += 1
        memory.rows[at].next = vcpu.kicks
        vcpu.kicks = at
    elif memory.rows[at].time_ns <= event.time_ns:
        return
    noted = memory.rows[at]
    noted.request, noted.seen, noted.time_ns, noted.tid, noted.cpu = bit, seen, event.time_ns, event.tid, event.cpu


@compiled
def kicked(memory: Memory, wanted: Record, vcpu: Record, event: Event) -> None:
    """A kick shows the requests of the word: they had been raised."""
    rest = event.requests & wanted.mask
    while rest != 0:
        _kick(memory, vcpu, lowest(rest), event, True)
        rest = without_lowest(rest)


@compiled
def asked(memory: Memory, wanted: Record, vcpu: Record, event: Event, bit: int) -> None:
    """A request is about to be made of several vCPUs of the VM: since its last own event the first one counts.

    The mask is by index, which is the id of a vCPU where the VMM counts up, as all do. Beyond 64 it says nothing.
    """
    if not holds(wanted.mask, bit) or holds(vcpu.asked, bit):
        return
    if vcpu.vcpu < 64 and not holds(event.requests, vcpu.vcpu):
        return
    vcpu.asked |= ONE << np.uint64(bit)
    _kick(memory, vcpu, bit, event, False)


@compiled
def forget_kicks(memory: Memory, vcpu: Record) -> None:
    """An own event of the vCPU has come."""
    while vcpu.kicks != NONE:
        place = vcpu.kicks
        vcpu.kicks = memory.rows[place].next
        give(memory, place)
        memory.now.kicks -= 1
    vcpu.asked = np.uint64(0)


@compiled
def at_the_end(memory: Memory, vcpu: Record, lost: int, lost_of_all: bool, blind: bool) -> None:
    """The recording ends: finish what is still pending."""
    while vcpu.pending != NONE:
        end, why = rules.still_open(lost, lost_of_all, blind)
        _finish(memory, vcpu, vcpu.pending, end, why, vcpu.last_ns, -1, False)


@compiled
def _finish(
    memory: Memory, vcpu: Record, place: int, end: int, why: int, after_ns: int, ended_ns: int, entered: bool
) -> None:
    """Give out a lifecycle: what a gap may decide is undecided. ``entered``: its end was seen at the guest's entry."""
    vcpu.pending = without(memory, vcpu.pending, place)
    row, now = memory.rows[place], memory.now
    row.vm, row.pid, row.vcpu = vcpu.vm, vcpu.pid, vcpu.vcpu
    row.end, row.why = (end if rules.proved(row) else Verdict.UNDECIDED), why
    row.ended_after_ns, row.ended_ns, row.reentered_ns = after_ns, ended_ns, (ended_ns if entered else -1)
    row.stale, row.copies_without = rules.stale(row), row.blind_saves != 0
    row.exposed = row.end == Verdict.OPEN and row.last_save == rules.BLIND
    if 0 <= ended_ns < row.kicked_ns:
        row.kicked_ns = ended_ns  # clocks of two CPUs: a kick that came before the end did not come after it
    row.next, now.finished = now.finished, place
    now.many_finished += 1
    now.pending -= 1


@compiled
def shutdown(memory: Memory, vcpu: Record, event: Event, source: int) -> None:
    """Give out that the guest shut down, or died."""
    place, now = take(memory), memory.now
    row = memory.rows[place]
    row.vm, row.pid, row.vcpu, row.vcpu_number = vcpu.vm, vcpu.pid, vcpu.vcpu, vcpu.number
    row.time_ns, row.nested, row.source = event.time_ns, rules.in_nested(event), source
    row.next, now.shutdowns = now.shutdowns, place
    now.many_shutdowns += 1
