"""Copies of a guest: which saves left a request out, and which vCPU was restored from one (docs/proof.md).

A save is what becomes a copy: the registers of a vCPU (probes.schema.SAVED_STATE), read by user space since it last
ran, with its events or without. Less is a look, and decides nothing.
"""

from __future__ import annotations

from analysis import rules
from analysis.compiled import compiled
from analysis.events import HALF, NOTHING, READ, STILL, SYNC, Event, fault_in_payload, holds, signed, succeeded
from analysis.memory import NONE, Memory, Record, take
from analysis.words import Copy
from probes.requests import TRIPLE_FAULT
from probes.schema import RAN, STATE_BITS, Kind

_EVENTS = STATE_BITS["events"]


@compiled
def rose(pending: Record, event: Event) -> None:
    """A request was raised: a save that was made before, since the vCPU last ran, has left it out."""
    pending.look = pending.sync = rules.NO_SAVE
    pending.without, pending.left_out = False, event.flags & READ != 0
    pending.still, pending.set_in_pause = event.flags & STILL != 0, False


@compiled
def pause_ends(memory: Memory, wanted: Record, vcpu: Record, event: Event) -> None:
    """The vCPU has run since it was saved, or was given another state: what was raised after that no save left out."""
    if event.kind == Kind.READ:
        vcpu.state, vcpu.fingerprint = event.detail, event.arg
    if not vcpu.saved or event.flags & READ:
        return
    place = vcpu.pending
    while place != NONE:
        pending = memory.rows[place]
        if pending.without:
            _save(memory, wanted, vcpu, pending, rules.left_out(wanted, pending), event)
        pending.left_out, pending.sync = False, rules.NO_SAVE
        place = pending.next
    ran = vcpu.ran or event.kind != Kind.WRITTEN
    _close(memory, vcpu, event.time_ns, ran)
    if ran:
        vcpu.fingerprint = NOTHING


@compiled
def of_request(memory: Memory, wanted: Record, vcpu: Record, pending: Record, event: Event, before: bool) -> None:
    """Handle an event of a vCPU for a request that is pending."""
    if event.flags & STILL == 0:
        pending.still = False
    if event.kind == Kind.SAVE:
        _given(memory, wanted, vcpu, pending, event, before)
    elif event.kind == Kind.READ and not vcpu.saved:
        _complete(memory, wanted, vcpu, pending, event)
    elif event.kind == Kind.RUN_EXIT:
        pending.sync = rules.NO_SAVE


@compiled
def _given(memory: Memory, wanted: Record, vcpu: Record, pending: Record, event: Event, before: bool) -> None:
    """KVM_GET_VCPU_EVENTS returned: with the registers that is a save, else it is a look so far."""
    outcome = rules.given(wanted, pending, event, before)
    if outcome == rules.NO_SAVE:
        return
    if not wanted.reads or (event.flags & READ and event.flags & SYNC == 0):
        _save(memory, wanted, vcpu, pending, outcome, event)
    elif event.flags & SYNC:
        pending.sync = outcome
    else:
        pending.look = outcome


@compiled
def _complete(memory: Memory, wanted: Record, vcpu: Record, pending: Record, event: Event) -> None:
    """The registers have been read: what was given of the request since the vCPU last ran is saved with them."""
    if event.detail & _EVENTS == 0:
        if pending.sync == rules.NO_SAVE:
            pending.without = True
            return
        pending.look = pending.sync
    if pending.look == rules.NO_SAVE:
        pending.left_out = True  # raised after the events were read
    else:
        _save(memory, wanted, vcpu, pending, pending.look, event)


@compiled
def before_end(memory: Memory, wanted: Record, vcpu: Record, pending: Record, event: Event) -> None:
    """A request ends: a save without events did not have it. With its vCPU, neither did one that was made before it."""
    without = pending.without and event.kind != Kind.SAVE  # which may take what it gives
    if without or (pending.left_out and event.kind == Kind.VCPU_END and vcpu.kind != Kind.RUN_ENTER):
        _save(memory, wanted, vcpu, pending, rules.left_out(wanted, pending), event)


@compiled
def _save(memory: Memory, wanted: Record, vcpu: Record, pending: Record, outcome: int, event: Event) -> None:
    pending.without = pending.left_out = False
    pending.look = rules.NO_SAVE
    if outcome == rules.NO_SAVE:
        return
    rules.save(pending, outcome)
    if outcome == rules.UNSURE:
        return
    row = _row(memory, vcpu, Copy.SAVED, event.since_ns, event.time_ns)
    row.request, row.carried = pending.request, outcome == rules.CARRIED
    vcpu.copies += 1


@compiled
def _row(memory: Memory, vcpu: Record, what: int, after_ns: int, time_ns: int) -> Record:
    place, now = take(memory), memory.now
    row = memory.rows[place]
    row.what, row.vm, row.pid, row.vcpu, row.vcpu_number = what, vcpu.vm, vcpu.pid, vcpu.vcpu, vcpu.number
    row.request, row.pause, row.after_ns, row.time_ns = -1, vcpu.pause, after_ns, time_ns
    row.carried = row.ran = False
    row.read, row.errno, row.fingerprint, row.word = vcpu.state, 0, vcpu.fingerprint, NOTHING
    row.next, now.copies = now.copies, place
    now.many_copies += 1
    return row


@compiled
def _close(memory: Memory, vcpu: Record, time_ns: int, ran: bool) -> None:
    if vcpu.copies != 0:
        _row(memory, vcpu, Copy.CLOSED, vcpu.last_ns, time_ns).ran = ran
    vcpu.saved = vcpu.ran = False
    vcpu.state = vcpu.copies = 0
    vcpu.pause += 1


@compiled
def of_vcpu(memory: Memory, vcpu: Record, event: Event) -> None:
    """Note what an event says of the vCPU itself, after its requests have been handled."""
    if not vcpu.saved and (event.kind == Kind.READ or event.flags & READ):
        vcpu.saved, vcpu.ran = True, False
    if event.kind == Kind.WRITTEN:
        vcpu.restored_ns, vcpu.restored = event.time_ns, event.arg
    elif event.kind == Kind.RUN_EXIT and succeeded(event):
        vcpu.ran = True
        if event.detail & RAN or holds(event.before, TRIPLE_FAULT):
            _restored(memory, vcpu, event, True)
    elif event.kind == Kind.VCPU_END:
        _restored(memory, vcpu, event, event.detail & RAN != 0)
    elif event.kind == Kind.RESTORE and fault_in_payload(event):
        # KVM_SET_VCPU_EVENTS that raises a triple fault: the last one counts.
        vcpu.refused_ns, vcpu.refused = (NONE, 0) if succeeded(event) else (event.time_ns, _errno(event))


@compiled
def _errno(event: Event) -> int:
    """Return the number of the error that an ioctl has failed with."""
    return (1 << 32) - signed(event.arg >> HALF)


@compiled
def _restored(memory: Memory, vcpu: Record, event: Event, ran: bool) -> None:
    if vcpu.refused_ns >= 0:
        refused = _row(memory, vcpu, Copy.REFUSED, vcpu.refused_ns, event.time_ns)
        refused.request, refused.errno, refused.ran = TRIPLE_FAULT, vcpu.refused, ran
        vcpu.refused_ns = NONE
    if vcpu.restored_ns < 0:
        return
    row = _row(memory, vcpu, Copy.RESTORED, vcpu.restored_ns, event.time_ns)
    row.ran, row.fingerprint, row.word = ran, vcpu.restored, event.before
    vcpu.restored_ns = NONE


@compiled
def forget(memory: Memory, vcpu: Record, time_ns: int) -> None:
    """The vCPU, or the recording, ends."""
    if vcpu.saved:
        _close(memory, vcpu, time_ns, vcpu.ran)
