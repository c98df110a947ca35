"""What each vCPU is doing, as periods: in user space, in an ioctl, in KVM_RUN; there in the guest or asleep.

Fed batch by batch. A period is told only where two events that follow each other prove it: in detail full that is
nearly everywhere, in detail boundary nearly nowhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.rows import find
from probes.schema import End, Flag, Kind

Array = npt.NDArray[Any]

# What a vCPU can be doing, as a set: between two events it is what both of them allow.
_USER, _IOCTL, _KERNEL, _GUEST, _HALTED = 1, 2, 4, 8, 16
_RUN, _ANY = _KERNEL | _GUEST, 31

# Not an event: the moment at which a vCPU that slept began to, as its WAKEUP tells.
_SLEEPS = 255

# By kind: what it can have been doing before such an event, and after it. A kind that is not here tells nothing.
_BEFORE = np.full(256, _ANY, "u1")
_AFTER = np.zeros(256, "u1")
for _kind, _was, _is in (
    (Kind.IOCTL_ENTER, _USER, _IOCTL),
    (Kind.IOCTL_EXIT, _IOCTL, _USER),
    (Kind.SAVE, _IOCTL, _USER | _IOCTL),  # one engine sees it in the ioctl, the other one at its end
    (Kind.RESTORE, _IOCTL, _USER | _IOCTL),
    (Kind.RUN_ENTER, _USER, _RUN),
    (Kind.RUN_EXIT, _RUN, _USER),
    (Kind.GUEST_ENTRY, _KERNEL, _GUEST),
    (Kind.GUEST_EXIT, _GUEST, _KERNEL),
    # Where no hook tells of the guest's entry it can have been entered since, and before.
    (_SLEEPS, _RUN, _HALTED),
    (Kind.WAKEUP, _RUN | _HALTED, _RUN),
):
    _BEFORE[_kind], _AFTER[_kind] = _was, _is

# A hook in KVM's own code, after the guest was entered: it has been left since, and when that was is not known.
_LEFT = np.arange(32, dtype="u1")
_LEFT[_GUEST] = _RUN

#: Periods by number, outer and inner ones. KVM_RUN is divided only where hooks of the guest's entry and exit prove it.
PERIODS = ("", "user space", "ioctl", "KVM_RUN", "kernel", "guest", "halted")
IN_KERNEL = PERIODS.index("kernel")
_OUTER = np.zeros(32, "u1")
_OUTER[[_USER, _IOCTL, _KERNEL, _GUEST, _RUN, _HALTED]] = [1, 2, 3, 3, 3, 3]
_INNER = np.zeros(32, "u1")
_INNER[[_KERNEL, _GUEST, _HALTED]] = [4, 5, 6]

# What is carried over of a vCPU that is alive.
_STATE = np.dtype(
    [
        ("vcpu", "u4"),
        ("pid", "u4"),
        ("time_ns", "i8"),
        ("after", "u1"),
        ("outer", "u1"),
        ("inner", "u1"),
        ("left", "i8"),  # why the guest was left just now: isa << 32 | reason; -1: it was not
    ]
)


class Edges:
    """Beginnings and ends of periods; those of one vCPU are in the order in which they must be read."""

    def __init__(self, vcpu: Array, time_ns: Array, begins: Array, period: Array, left: Array) -> None:
        self.vcpu, self.time_ns, self.begins, self.period, self.left = vcpu, time_ns, begins, period, left

    @classmethod
    def between(
        cls, vcpu: Array, time_ns: Array, old: tuple[Array, Array], new: tuple[Array, Array], left: Array
    ) -> Edges:
        """Return what ends and begins where the (outer, inner) periods change from old ones to new ones.

        ``left``: why the guest was left there, or -1.
        """
        changes = old[0] != new[0]
        inner = changes | (old[1] != new[1])
        period = np.stack((old[1], old[0], new[0], new[1]), axis=1)
        there = np.stack((inner, changes, changes, inner), axis=1) & (period != 0)
        row, place = np.nonzero(there)
        return cls(vcpu[row], time_ns[row], place >= 2, period[there], left[row])

    @classmethod
    def ends(cls, state: Array) -> Edges:
        """Return the ends of all that is open."""
        none = np.zeros(len(state), "u1")
        old = state["outer"], state["inner"]
        return cls.between(state["vcpu"], state["time_ns"], old, (none, none), np.full(len(state), -1))

    def __add__(self, other: Edges) -> Edges:
        return Edges(
            np.concatenate((self.vcpu, other.vcpu)),
            np.concatenate((self.time_ns, other.time_ns)),
            np.concatenate((self.begins, other.begins)),
            np.concatenate((self.period, other.period)),
            np.concatenate((self.left, other.left)),
        )


def _low(arg: Array) -> Array:
    return (arg & np.uint64(0xFFFFFFFF)).astype("i8")


class Periods:
    """What each vCPU does, fed batch by batch. A period that goes on in the next batch is left open."""

    def __init__(self) -> None:
        self._state = np.empty(0, _STATE)

    def feed(self, events: Array) -> Edges:
        """Take a batch of records and return what begins and ends in it."""
        left = events[events["kind"] == Kind.VMM_EXIT]
        events = events[(events["vcpu"] != 0) & (events["seq"] != 0)]
        edges = self._feed(events) if len(events) else Edges.ends(self._state[:0])
        if len(left):
            # The end of a process is the end of its vCPUs; one of the same number that came later is another one.
            pids, last = np.unique(left["pid"][::-1], return_index=True)
            slot, found = find(pids, self._state["pid"])
            when = left["time_ns"][::-1][last].astype("i8")
            over = found & (self._state["time_ns"] <= when[np.minimum(slot, len(when) - 1)])
            edges += Edges.ends(self._state[over])
            self._state = self._state[~over]
        return edges

    def _feed(self, events: Array) -> Edges:
        order = np.lexsort((events["time_ns"], events["vcpu"]))
        events = events[order]
        slept = np.flatnonzero((events["kind"] == Kind.WAKEUP) & (events["detail"] != 0) & (events["arg"] > 0))
        events = events[np.insert(np.arange(len(events)), slept, slept)]
        sleeps = slept + np.arange(len(slept))
        vcpu, kind, time_ns = events["vcpu"], events["kind"].copy(), events["time_ns"].astype("i8")
        kind[sleeps] = _SLEEPS
        # A reset by user space is told in place of the beginning of its ioctl; a save through kvm_run is no ioctl.
        kind[(kind == Kind.RESET) & (events["arg"] != 0)] = Kind.IOCTL_ENTER
        kind[(kind == Kind.SAVE) & ((events["flags"] & Flag.SYNC) != 0)] = 0
        first = np.flatnonzero(np.append(True, vcpu[1:] != vcpu[:-1]))
        count = len(events)
        slot, found = find(self._state["vcpu"], vcpu[first])
        state = np.zeros(len(first), _STATE)
        state[found] = self._state[slot[found]]

        def earlier(values: Array, name: str) -> Array:
            moved = np.roll(values, 1)
            moved[first] = state[name]
            return moved

        # It cannot have begun to sleep before its last reading.
        last_ns = earlier(time_ns, "time_ns")
        blocked_ns = np.minimum(events["arg"][sleeps], np.uint64(1 << 62)).astype("i8")
        time_ns[sleeps] = np.clip(time_ns[sleeps] - blocked_ns, last_ns[sleeps], time_ns[sleeps])
        last_ns = earlier(time_ns, "time_ns")
        follows = (last_ns > 0) & (events["since_ns"].astype("i8") <= last_ns) & (events["since_ns"] > 0)
        # By the time that its memory is used again, a vCPU has long ended.
        follows &= (kind != Kind.VCPU_END) | (events["arg"] != End.REUSED)
        # A kind that tells nothing leaves what the one before it told, if nothing was between them.
        after = _AFTER[kind]
        silent = after == 0
        begun = silent[first] & follows[first]
        after[first[begun]] = state["after"][begun]
        told = ~silent | ~follows
        told[first] = True
        after = after[np.maximum.accumulate(np.where(told, np.arange(count), 0))]
        after[silent] = _LEFT[after[silent]]
        before = earlier(after, "after")
        before[silent] = _LEFT[before[silent]]
        doing = np.where(follows, before & _BEFORE[kind], 0)
        # A vCPU that slept did, whatever was lost before.
        doing[sleeps + 1] = _HALTED
        outer, inner = _OUTER[doing], _INNER[doing]
        left = np.where(kind == Kind.GUEST_EXIT, events["detail"].astype("i8") << 32 | _low(events["arg"]), -1)
        # Where the vCPU was not yet known there is nothing to end: its period is 0 in the state.
        edges = Edges.between(
            vcpu, np.where(last_ns > 0, last_ns, time_ns), (earlier(outer, "outer"), earlier(inner, "inner")),
            (outer, inner), earlier(left, "left"),
        )  # fmt: skip

        at = np.append(first[1:], count) - 1
        state["vcpu"], state["pid"], state["time_ns"] = vcpu[at], events["pid"][at], time_ns[at]
        state["after"], state["outer"], state["inner"], state["left"] = after[at], outer[at], inner[at], left[at]
        over = kind[at] == Kind.VCPU_END
        edges += Edges.ends(state[over])
        others = np.ones(len(self._state), bool)
        others[slot[found]] = False
        merged = np.concatenate((self._state[others], state[~over]))
        self._state = merged[np.argsort(merged["vcpu"])]
        return edges

    def finish(self) -> Edges:
        """Return the ends of all that is open, and forget everything."""
        edges = Edges.ends(self._state)
        self._state = self._state[:0]
        return edges
