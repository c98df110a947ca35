"""What a vCPU can be doing between two of its events, and what that proves: each rule a small function over one event.

A kind of event tells where the vCPU is before it and where after it, as sets: between two events that follow each other
it is doing what both of them allow, and where that is one thing it is proved. The walk (analysis/walk.py) calls
:func:`period` for each own event of a vCPU; what begins and ends are columns.EDGE.
"""

from __future__ import annotations

import numpy as np

from analysis.compiled import compiled
from analysis.events import NOTHING, SYNC, Event, low, signed
from analysis.memory import Memory, Record, take
from probes.schema import End, Kind

# What a vCPU can be doing, as a set.
UNKNOWN, USER, IOCTL, KERNEL, GUEST, HALTED = 0, 1, 2, 4, 8, 16
RUN, ANYTHING = KERNEL | GUEST, 31

# Not events: the moment at which a vCPU that slept began to, as its WAKEUP tells; and what tells nothing.
SLEEPS, SILENT = 255, 0

#: Periods by number, outer and inner ones. KVM_RUN is divided only where hooks of the guest's entry and exit prove it.
PERIODS = ("", "user space", "ioctl", "KVM_RUN", "kernel", "guest", "halted")
NO_PERIOD, IN_USER_SPACE, IN_IOCTL, IN_RUN, IN_KERNEL, IN_GUEST, ASLEEP = range(len(PERIODS))

_REUSED = np.uint64(End.REUSED)

# Columns.over of an edge: what its end is also the end of.
NOT_OVER, VCPU_OVER, PROCESS_OVER = range(3)

#: By kind: what the vCPU can have been doing before such an event, and after it. Others are silent.
TELLS: dict[int, tuple[int, int]] = {
    Kind.IOCTL_ENTER: (USER, IOCTL),
    Kind.IOCTL_EXIT: (IOCTL, USER),
    Kind.SAVE: (IOCTL, USER | IOCTL),  # one engine sees it in the ioctl, the other one at its end
    Kind.RESTORE: (IOCTL, USER | IOCTL),
    Kind.RUN_ENTER: (USER, RUN),
    Kind.RUN_EXIT: (RUN, USER),
    Kind.GUEST_ENTRY: (KERNEL, GUEST),
    Kind.GUEST_EXIT: (GUEST, KERNEL),
    # Where no hook tells of the guest's entry it can have been entered since, and before.
    SLEEPS: (RUN, HALTED),
    Kind.WAKEUP: (RUN | HALTED, RUN),
}


_BEFORE, _AFTER = np.array([TELLS.get(kind, (ANYTHING, UNKNOWN)) for kind in range(256)], np.int64).T.copy()


# --- what an event tells ------------------------------------------------------------------------------------------


@compiled
def tells(event: Event) -> int:
    """Return the kind of event that this is as good as.

    A reset by user space is told in place of the beginning of its ioctl; a save through kvm_run is no ioctl.
    """
    if event.kind == Kind.RESET and event.arg != NOTHING:
        return signed(Kind.IOCTL_ENTER)
    if event.kind == Kind.SAVE and event.flags & SYNC:
        return SILENT
    return event.kind


@compiled
def slept(event: Event) -> bool:
    """It gave up its CPU, and did not only poll: kvm_vcpu_block."""
    return bool(event.kind == Kind.WAKEUP and event.detail != 0 and event.arg != NOTHING)


@compiled
def asleep_since(vcpu: Record, event: Event) -> int:
    """When it began to: not before its last event."""
    asleep_ns = signed(min(event.arg, np.uint64(event.time_ns)))
    return int(max(event.time_ns - asleep_ns, vcpu.period_ns))


@compiled
def in_order(vcpu: Record, event: Event, missing: int) -> bool:
    """The event is after the one before it; else two threads tell of the vCPU at once, and neither proves anything."""
    return bool(missing >= 0 and event.time_ns >= vcpu.period_ns)


@compiled
def follows(vcpu: Record, event: Event) -> bool:
    """The word was not read between the event before and this one: the vCPU met no hook in between, lost or not.

    By the time that its memory is used again, a vCPU has long ended.
    """
    reused = event.kind == Kind.VCPU_END and event.arg == _REUSED
    return bool(not reused and 0 < event.since_ns <= vcpu.period_ns)


@compiled
def doing_until(doing: int, kind: int) -> int:
    """Return what a vCPU was doing until such an event, of what it can have been doing since the one before."""
    if _AFTER[kind] == UNKNOWN:
        return left_unseen(doing)
    return int(doing & _BEFORE[kind])


@compiled
def doing_since(doing: int, kind: int) -> int:
    """Return what a vCPU can be doing after such an event: a silent one changes nothing."""
    if _AFTER[kind] == UNKNOWN:
        return left_unseen(doing)
    return int(_AFTER[kind])


@compiled
def left_unseen(doing: int) -> int:
    """A hook in KVM's own code, after the guest was entered: it has been left since, and when that was is not known."""
    return RUN if doing == GUEST else doing


@compiled
def why_left(event: Event) -> int:
    """Return the instruction set and the reason for which the guest is left, or -1: it is not."""
    return event.detail << 32 | low(event) if event.kind == Kind.GUEST_EXIT else -1


# --- periods ------------------------------------------------------------------------------------------------------


@compiled
def outer(doing: int) -> int:
    """Return the outer period that is proved."""
    if doing == USER:
        return IN_USER_SPACE
    if doing == IOCTL:
        return IN_IOCTL
    return IN_RUN if doing == RUN or inner(doing) != NO_PERIOD else NO_PERIOD


@compiled
def inner(doing: int) -> int:
    """Return the period inside KVM_RUN that is proved."""
    if doing == KERNEL:
        return IN_KERNEL
    if doing == GUEST:
        return IN_GUEST
    return ASLEEP if doing == HALTED else NO_PERIOD


@compiled
def period(memory: Memory, vcpu: Record, event: Event, missing: int) -> None:
    """Handle an own event of a vCPU: what it was doing since the one before it is one period, or goes on with one."""
    ordered, kind = in_order(vcpu, event, missing), tells(event)
    since = vcpu.doing if ordered and follows(vcpu, event) else UNKNOWN
    if ordered and slept(event):
        # It did, whatever was lost before.
        goes_on(memory, vcpu, doing_until(since, SLEEPS))
        vcpu.period_ns, vcpu.why_left = asleep_since(vcpu, event), -1
        goes_on(memory, vcpu, HALTED)
    else:
        goes_on(memory, vcpu, doing_until(since, kind))
    vcpu.doing = doing_since(since, kind) if ordered else UNKNOWN
    vcpu.period_ns, vcpu.why_left = max(vcpu.period_ns, event.time_ns), why_left(event)


@compiled
def goes_on(memory: Memory, vcpu: Record, doing: int) -> None:
    """Since its last event the vCPU was doing this: end there what it is not, and begin what it is."""
    is_outer, is_inner = outer(doing), inner(doing)
    if is_outer == vcpu.outer and is_inner == vcpu.inner:
        return
    edge(memory, vcpu, False, vcpu.inner, NOT_OVER)
    if is_outer != vcpu.outer:
        edge(memory, vcpu, False, vcpu.outer, NOT_OVER)
        edge(memory, vcpu, True, is_outer, NOT_OVER)
    edge(memory, vcpu, True, is_inner, NOT_OVER)
    vcpu.outer, vcpu.inner = is_outer, is_inner


@compiled
def over(memory: Memory, vcpu: Record, how: int) -> None:
    """The vCPU, its process or the recording ends: so does what is open."""
    vcpu.why_left = -1
    edge(memory, vcpu, False, vcpu.inner, how)
    edge(memory, vcpu, False, vcpu.outer, how)
    vcpu.outer = vcpu.inner = NO_PERIOD


@compiled
def edge(memory: Memory, vcpu: Record, begins: bool, number: int, how: int) -> None:
    """Give out that a period begins, or ends, at the last event of its vCPU."""
    if number == NO_PERIOD:
        return
    place, now = take(memory), memory.now
    row = memory.rows[place]
    row.vcpu, row.time_ns, row.begins, row.period = vcpu.number, vcpu.period_ns, begins, number
    row.left, row.over = vcpu.why_left, how
    row.next, now.edges = now.edges, place
    now.many_edges += 1
