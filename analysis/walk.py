"""The pass over a batch: one walk, one event at a time, and each event goes to the rules that it concerns.

Lifecycles (analysis/transitions.py and rules.py), ordering (order_rules.py) and exposure come out of the same walk.
Compiled; with NUMBA_DISABLE_JIT=1 the same source runs plain. How a stream is cut into batches never changes a result.
"""

from __future__ import annotations

from analysis import alive, cases, copies, exit_rules, order_rules, period_rules, rules, transitions
from analysis.columns import BROKEN, COPIES, EDGES, ENDED, SHUT
from analysis.compiled import compiled, each_of
from analysis.events import (
    CAP,
    CAP_EXISTS,
    NOTHING,
    Array,
    Columns,
    Event,
    asked_for,
    end_with_process,
    event_at,
    without_change,
)
from analysis.exit_rules import Counted
from analysis.memory import NONE, VCPU, VM, Memory, Record, give, look
from analysis.words import Source
from probes.schema import NO_BIT, Kind

# What one event can need at most: requests that rise, what others did about them, cases and breaks, one for each bit;
# and edges of periods.
_PLACES = 512
_ENDED, _SHUT, _BROKEN, _EDGES, _COPIES = (of.names or () for of in (ENDED, SHUT, BROKEN, EDGES, COPIES))


@compiled
def walk(columns: Columns, begin: int, wanted: Record, lost: Array, memory: Memory, counted: Counted) -> int:
    """Handle the events of a batch from ``begin`` on; return where more room is needed, or the length of the batch.

    ``lost``: rows of vCPU and for how many of its events the ring had no room, ascending.
    """
    at, end = begin, len(columns.kind)
    while at < end:
        until = min(end, at + _room(wanted, memory, counted))
        if until == at:
            return at
        while at < until:
            event = event_at(columns, at)
            if _concerns_many(event) and not room_for_many(memory):
                return at
            _handle(wanted, lost, memory, counted, event)
            at += 1
    return end


@compiled
def _room(wanted: Record, memory: Memory, counted: Counted) -> int:
    """Return how many events there is room for, whatever they are."""
    free = min(len(memory.rows) - memory.now.used, len(memory.slots) // 4 - memory.now.indexed)
    events = max(free, 0) // _PLACES
    return int(min(events, exit_rules.room(counted, memory)) if wanted.counts else events)


@compiled
def _concerns_many(event: Event) -> bool:
    return event.vcpu == 0 and (event.kind == Kind.REQUEST_ALL or event.kind == Kind.VMM_EXIT)


@compiled
def room_for_many(memory: Memory) -> bool:
    """Such an event can need places for each vCPU: for its periods, its copies and its requests that are open."""
    now = memory.now
    return bool(len(memory.rows) - now.used >= _PLACES + 4 * now.vcpus + 2 * now.pending)


@compiled
def _handle(wanted: Record, lost: Array, memory: Memory, counted: Counted, event: Event) -> None:
    now = memory.now
    if event.time_ns > now.top_ns:
        now.top_ns = event.time_ns
        if event.time_ns > now.due_ns:
            cases.close_due(memory)
    if event.vcpu == 0:
        if event.kind == Kind.VMM_EXIT:
            _process_ended(wanted, lost, memory, event)
        elif event.kind == Kind.REQUEST_ALL or event.kind == Kind.REQUEST_ALL_END:
            _asked(wanted, memory, event)
        elif event.kind == Kind.VM_CAP and wanted.exposure:
            vm = memory.rows[alive.vm_of(memory, event)]
            alive.tell_vm(memory, vm, event)
            vm.cap = 1 if event.arg != NOTHING else 0
    elif event.kind == Kind.KICK:
        _kicked(wanted, memory, event)
    elif event.kind == Kind.IN_GUEST_STILL:
        place = look(memory, VCPU, event.vcpu)
        if place != NONE:
            order_rules.in_guest_still(memory, wanted, memory.rows[place], event)
    elif event.seq != 0:
        _own(wanted, memory, counted, event)


# --- one vCPU -----------------------------------------------------------------------------------------------------


@compiled
def _own(wanted: Record, memory: Memory, counted: Counted, event: Event) -> None:
    """Handle an event that a vCPU has numbered."""
    place = memory.now.last
    if place == NONE or memory.rows[place].number != event.vcpu:
        place = look(memory, VCPU, event.vcpu)
    if (place == NONE or not memory.rows[place].seen) and event.kind == Kind.VCPU_END and event.seq != 1:
        return  # it ended with its process
    if place == NONE:
        place = alive.new_vcpu(memory, event)
    memory.now.last = place
    vcpu = memory.rows[place]
    if wanted.order:
        order_rules.own_event(memory, wanted, vcpu, event)
    first = not vcpu.seen
    if first:
        vcpu.pid = event.pid
    missing = rules.missing_before(vcpu, event)
    if wanted.periods:
        period_rules.period(memory, vcpu, event, missing)
    if wanted.counts:
        exit_rules.count(counted, memory, vcpu, event, missing)
    if event.kind == Kind.VCPU_NEW:
        alive.join(wanted, memory, place, event)
        if missing != 0 or not first:
            event = without_change(event)
    if wanted.exposure and vcpu.named:
        memory.rows[vcpu.of_vm].cap = 1 if event.flags & CAP and event.flags & CAP_EXISTS else 0
    _requests(wanted, memory, vcpu, event, missing)
    copies.of_vcpu(memory, vcpu, event)
    source = rules.shutdown_source(event)
    if source >= 0:
        transitions.shutdown(memory, vcpu, event, source)
    if rules.given_up(memory.rows[vcpu.of_vm] if vcpu.named else vcpu, event):
        transitions.shutdown(memory, vcpu, event, Source.VM_DEAD)
    # What a missing part of the recording held is no loss.
    if not (vcpu.cut or (first and memory.now.interrupted)):
        vcpu.gaps += missing
    vcpu.seq, vcpu.word, vcpu.last_ns, vcpu.kind = event.seq, event.requests, event.time_ns, event.kind
    vcpu.seen, vcpu.cut, vcpu.flagged = True, False, event.flags
    transitions.forget_kicks(memory, vcpu)
    if event.kind == Kind.WAKEUP and event.detail == 1:
        vcpu.slept_ns = event.time_ns
    if event.kind == Kind.VCPU_END:
        _ended(wanted, memory, place, period_rules.VCPU_OVER)


@compiled
def _requests(wanted: Record, memory: Memory, vcpu: Record, event: Event, missing: int) -> None:
    """Handle an event for each request of its vCPU, and tell the rules of ordering of those that ended."""
    before = memory.now.many_finished
    transitions.requests_of(memory, wanted, vcpu, event, missing)
    if wanted.starves:
        _starved(wanted, memory, vcpu, memory.now.many_finished - before)


@compiled
def _starved(wanted: Record, memory: Memory, vcpu: Record, count: int) -> None:
    place = memory.now.finished
    for _ in range(count):
        order_rules.starved(memory, wanted, vcpu, memory.rows[place])
        place = memory.rows[place].next


@compiled
def _ended(wanted: Record, memory: Memory, place: int, how: int) -> None:
    """Forget a vCPU; ``how``: with what it ends, columns.EDGE."""
    vcpu = memory.rows[place]
    if wanted.periods:
        period_rules.over(memory, vcpu, how)
    cases.vcpu_ended(memory, vcpu)
    copies.forget(memory, vcpu, memory.now.top_ns)
    transitions.forget_kicks(memory, vcpu)
    alive.leave(memory, place)
    alive.forget_vcpu(memory, place)


@compiled
def _process_ended(wanted: Record, lost: Array, memory: Memory, event: Event) -> None:
    """The exit of a process ends each of its vCPUs.

    It has no number of theirs: that their last events were lost before it, only the losses so far tell.
    """
    place = memory.now.first_vcpu
    while place != NONE:
        vcpu = memory.rows[place]
        after = vcpu.after
        if vcpu.seen and vcpu.pid == event.pid:
            missing = max(_lost(lost, vcpu.number) - vcpu.gaps, 0)
            end = end_with_process(event, vcpu.number, vcpu.seq, vcpu.word, vcpu.last_ns, vcpu.flagged)
            _requests(wanted, memory, vcpu, end, missing)
            copies.of_vcpu(memory, vcpu, end)
            _ended(wanted, memory, place, period_rules.PROCESS_OVER)
        place = after


@compiled
def _lost(lost: Array, number: int) -> int:
    """Return for how many events of a vCPU the ring had no room."""
    low, high = 0, len(lost)
    while low < high:
        middle = (low + high) // 2
        if lost[middle, 0] < number:
            low = middle + 1
        else:
            high = middle
    return int(lost[low, 1]) if low < len(lost) and lost[low, 0] == number else 0


# --- what other threads do ----------------------------------------------------------------------------------------


@compiled
def _kicked(wanted: Record, memory: Memory, event: Event) -> None:
    place = look(memory, VCPU, event.vcpu)
    if place == NONE:
        if event.requests & wanted.kicked == NOTHING:
            return
        place = alive.new_vcpu(memory, event)  # the ring can hold a kick before the vCPU's own first event
    vcpu = memory.rows[place]
    if vcpu.seen:
        transitions.kicked(memory, wanted, vcpu, event)
    order_rules.kick(memory, wanted, vcpu, event)


@compiled
def _asked(wanted: Record, memory: Memory, event: Event) -> None:
    """A request is about to be made of several vCPUs of a VM, or its requester has returned."""
    bit = asked_for(event)
    place = look(memory, VM, event.detail)
    if wanted.order:
        order_rules.requester(memory, wanted, event, bit)
    if bit == NO_BIT:
        return  # it shows in no word
    if wanted.order:
        if place == NONE:
            place = alive.vm_of(memory, event)
        order_rules.asks(memory, wanted, memory.rows[place], event, bit)
    if place == NONE or event.kind != Kind.REQUEST_ALL:
        return
    member = memory.rows[place].members
    while member != NONE:
        transitions.asked(memory, wanted, memory.rows[member], event, bit)
        member = memory.rows[member].next_of_vm


# --- what is not a single event -----------------------------------------------------------------------------------


@compiled
def blind(memory: Memory) -> None:
    """Hooks were missed, of which no number tells: whatever is pending may hang on them."""
    place = memory.now.first_vcpu
    while place != NONE:
        at = memory.rows[place].pending
        while at != NONE:
            memory.rows[at].missed = True
            at = memory.rows[at].next
        place = memory.rows[place].after


@compiled
def interrupt(memory: Memory) -> None:
    """A part of the recording is missing here: nothing that is pending can be judged any more."""
    now = memory.now
    now.interrupted, now.dark_ns = True, max(now.dark_ns, now.top_ns)
    place = now.first_vcpu
    while place != NONE:
        vcpu = memory.rows[place]
        vcpu.cut = True
        cases.nothing_follows(memory, vcpu)
        at = vcpu.pending
        while at != NONE:
            memory.rows[at].cut = True
            at = memory.rows[at].next
        place = vcpu.after
    order_rules.forget_requesters(memory, cases.NEVER)


@compiled
def finish(wanted: Record, lost: Array, memory: Memory, lost_of_all: bool, is_blind: bool) -> None:
    """The recording ends: give out what is still pending, and forget every vCPU."""
    place = memory.now.first_vcpu
    while place != NONE:
        vcpu = memory.rows[place]
        after, before = vcpu.after, memory.now.many_finished
        cases.nothing_follows(memory, vcpu)
        transitions.at_the_end(memory, vcpu, _lost(lost, vcpu.number) - vcpu.gaps, lost_of_all, is_blind)
        if wanted.starves:
            _starved(wanted, memory, vcpu, memory.now.many_finished - before)
        _ended(wanted, memory, place, period_rules.VCPU_OVER)
        place = after


@compiled
def starved_rows(wanted: Record, memory: Memory, rows: Array) -> None:
    """Check lifecycles that were told elsewhere."""
    for at in range(len(rows)):
        place = look(memory, VCPU, rows[at].vcpu_number)
        if place != NONE:
            order_rules.starved(memory, wanted, memory.rows[place], rows[at])


# --- what is given out: a function for each sort, as compiled code takes the names of columns only literally -------


@compiled
def _given(memory: Memory, place: int) -> int:
    """Free the place of what was given out, and return the one before it."""
    before: int = memory.rows[place].next
    give(memory, place)
    return before


@compiled
def give_lifecycles(memory: Memory, place: int, into: Array) -> None:
    """Fill in the lifecycles that the walk has ended, from the newest one on, which comes last, and free them."""
    for at in range(len(into) - 1, -1, -1):
        row, given = memory.rows[place], into[at]
        for name in each_of(_ENDED):
            given[name] = row[name]
        place = _given(memory, place)


@compiled
def give_shutdowns(memory: Memory, place: int, into: Array) -> None:
    """Fill in the shutdown exits that it has seen."""
    for at in range(len(into) - 1, -1, -1):
        row, given = memory.rows[place], into[at]
        for name in each_of(_SHUT):
            given[name] = row[name]
        place = _given(memory, place)


@compiled
def give_breaks(memory: Memory, place: int, into: Array) -> None:
    """Fill in what has broken a rule."""
    for at in range(len(into) - 1, -1, -1):
        row, given = memory.rows[place], into[at]
        for name in each_of(_BROKEN):
            given[name] = row[name]
        place = _given(memory, place)


@compiled
def give_edges(memory: Memory, place: int, into: Array) -> None:
    """Fill in where periods begin and end."""
    for at in range(len(into) - 1, -1, -1):
        row, given = memory.rows[place], into[at]
        for name in each_of(_EDGES):
            given[name] = row[name]
        place = _given(memory, place)


@compiled
def give_copies(memory: Memory, place: int, into: Array) -> None:
    """Fill in what concerns copies."""
    for at in range(len(into) - 1, -1, -1):
        row, given = memory.rows[place], into[at]
        for name in each_of(_COPIES):
            given[name] = row[name]
        place = _given(memory, place)
