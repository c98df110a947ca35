"""Breaks of the rules of ordering, and cases: what breaks a rule unless somebody explains it before it is too late.

A case is explained by a kick of the vCPU for the request, or by a request of many vCPUs that concerns it. Of each rule,
vCPU and request one case is open at a time.
"""

from __future__ import annotations

import numpy as np

from analysis.compiled import compiled
from analysis.events import Event, holds, lowest, without_lowest
from analysis.memory import NONE, VCPU, Memory, Record, give, into, look, out_of, take, without

# The rules by number, in the order of analysis.promises.RULES.
ENTERED, WAITED, RAISED, STARVED, ORDER = range(5)

#: How late a kick can follow its request, by far: a requester can lose its CPU between the two.
LATE_NS = 1_000_000_000
# A requester that has not returned for so long has: its REQUEST_ALL_END was lost.
GONE_NS = 60_000_000_000
NEVER = np.iinfo(np.int64).max


@compiled
def accuse(memory: Memory, wanted: Record, vcpu: Record, event: Event, rule: int, bits: int, detail: int) -> None:
    """Requests that only the vCPU's own thread makes break a rule at once; for the others a case is opened."""
    while bits != 0:
        bit = lowest(bits)
        bits = without_lowest(bits)
        if holds(wanted.own, bit):
            broke(memory, found_in(memory, vcpu, event, rule, bit, event.time_ns, event.since_ns, detail))
        elif not _is_open(memory, vcpu, rule, bit) and not _explained(memory, wanted, vcpu, event, bit):
            open_case(memory, vcpu, found_in(memory, vcpu, event, rule, bit, event.time_ns, event.since_ns, detail))


@compiled
def found_in(
    memory: Memory, vcpu: Record, event: Event, rule: int, bit: int, time_ns: int, since_ns: int, detail: int
) -> int:
    """Write down what breaks a rule, or may."""
    place = take(memory)
    row = memory.rows[place]
    row.rule, row.request, row.vcpu_number, row.named = rule, bit, vcpu.number, vcpu.named
    row.vm, row.pid, row.vcpu = 0, event.pid, 0
    if vcpu.named:
        row.vm, row.pid, row.vcpu = vcpu.vm, vcpu.pid, vcpu.vcpu
    row.time_ns, row.since_ns, row.detail, row.raised_in = time_ns, since_ns, detail, 0
    return place


@compiled
def broke(memory: Memory, place: int) -> None:
    """Count a break, and give it out."""
    row, now = memory.rows[place], memory.now
    now.broken[row.rule, row.request] += 1
    row.next, now.breaks = now.breaks, place
    now.many_breaks += 1


@compiled
def _is_open(memory: Memory, vcpu: Record, rule: int, bit: int) -> bool:
    at = vcpu.cases
    while at != NONE and (memory.rows[at].rule != rule or memory.rows[at].request != bit):
        at = memory.rows[at].next
    return bool(at != NONE)


@compiled
def _explained(memory: Memory, wanted: Record, vcpu: Record, event: Event, bit: int) -> bool:
    """A kick with the request, or a request to the VM, has come since the reading before."""
    place = wanted.place[bit]
    if vcpu.last_kick_ns[place] >= event.since_ns:
        return True
    return bool(vcpu.named and memory.rows[vcpu.of_vm].last_ask_ns[place] >= event.since_ns)


@compiled
def open_case(memory: Memory, vcpu: Record, place: int) -> None:
    """Wait for what may explain it."""
    case, now = memory.rows[place], memory.now
    case.next, vcpu.cases = vcpu.cases, place
    now.first_case = into(memory, now.first_case, place)
    now.cases += 1
    if now.top_ns > case.time_ns + LATE_NS:
        close_case(memory, vcpu, place, False)
    else:
        now.due_ns = min(now.due_ns, case.time_ns + LATE_NS)


@compiled
def close_case(memory: Memory, vcpu: Record, place: int, ended: bool) -> None:
    """Its time is over, or its vCPU has ended: a break, unless something is not known that may explain it."""
    case = memory.rows[place]
    _take_out(memory, vcpu, place)
    if _about_to_explain(memory, case):
        give(memory, place)
    elif ended or not case.named or case.since_ns <= memory.now.dark_ns:
        memory.now.undecided[case.rule] += 1
        give(memory, place)
    else:
        broke(memory, place)


@compiled
def drop_case(memory: Memory, vcpu: Record, place: int) -> None:
    """It is explained."""
    _take_out(memory, vcpu, place)
    give(memory, place)


@compiled
def _take_out(memory: Memory, vcpu: Record, place: int) -> None:
    vcpu.cases = without(memory, vcpu.cases, place)
    memory.now.first_case = out_of(memory, memory.now.first_case, place)
    memory.now.cases -= 1


@compiled
def _about_to_explain(memory: Memory, case: Record) -> bool:
    """A requester that began before and has not returned may be about to make it."""
    at = memory.now.first_thread
    while at != NONE:
        thread = memory.rows[at]
        of_case = thread.vm == case.vm and thread.request == case.request
        if thread.going and of_case and thread.begin_ns > case.time_ns + LATE_NS - GONE_NS:
            return True
        at = thread.next
    return False


@compiled
def close_due(memory: Memory) -> None:
    """The stream has come so far that cases are due."""
    now = memory.now
    now.due_ns = NEVER
    at = now.first_case
    while at != NONE:
        case = memory.rows[at]
        after = case.after
        if now.top_ns > case.time_ns + LATE_NS:
            close_case(memory, vcpu_of(memory, case), at, False)
        else:
            now.due_ns = min(now.due_ns, case.time_ns + LATE_NS)
        at = after


@compiled
def vcpu_of(memory: Memory, case: Record) -> Record:
    """Return the vCPU that a case is about."""
    return memory.rows[look(memory, VCPU, case.vcpu_number)]


@compiled
def vcpu_ended(memory: Memory, vcpu: Record) -> None:
    """What is still open of a vCPU when it ends."""
    if vcpu.staying:
        memory.now.undecided[WAITED] += 1
        vcpu.staying = False
    while vcpu.cases != NONE:
        close_case(memory, vcpu, vcpu.cases, True)


@compiled
def nothing_follows(memory: Memory, vcpu: Record) -> None:
    """The recording ends, or a part of it is missing here: nothing that is open will be explained."""
    if vcpu.staying:
        memory.now.undecided[WAITED] += 1
        vcpu.staying = False
    while vcpu.cases != NONE:
        memory.now.undecided[memory.rows[vcpu.cases].rule] += 1
        drop_case(memory, vcpu, vcpu.cases)
