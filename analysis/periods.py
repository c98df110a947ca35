"""What each vCPU is doing, as periods: in user space, in an ioctl, in KVM_RUN; there in the guest or asleep.

Fed batch by batch. A period is told only where two events that follow each other prove it: in detail full that is
nearly everywhere, in detail boundary nearly nowhere. The rules are in analysis/period_rules.py; here they become
columns.
"""

from __future__ import annotations

from typing import NamedTuple

from analysis.events import Array, Batch
from analysis.passes import Pass, Table, in_order
from analysis.period_rules import IN_KERNEL, PERIODS
from tracer.loss import Loss

__all__ = ["IN_KERNEL", "PERIODS", "Edges", "Periods", "edges_of"]


class Edges(NamedTuple):
    """Beginnings and ends of periods; those of one vCPU are in the order in which they must be read."""

    vcpu: Array
    time_ns: Array
    begins: Array
    period: Array  # place in PERIODS
    left: Array  # why the guest was left there: instruction set << 32 | reason; -1: it was not


def edges_of(given: Table) -> Edges:
    """Return what a pass gave out (columns.EDGE) by vCPU: of those that have ended with their process the ends last."""
    table = in_order(given, "over", "vcpu")
    return Edges(*(table[name] for name in Edges._fields))


class Periods:
    """What each vCPU does, fed batch by batch. A period that goes on in the next batch is left open."""

    def __init__(self) -> None:
        self._pass = Pass({}, periods=True)

    def feed(self, events: Batch) -> Edges:
        """Take a batch of events and return what begins and ends in it."""
        self._pass.feed(events)
        return edges_of(self._pass.edges())

    def finish(self) -> Edges:
        """Return the ends of all that is open, and forget everything."""
        self._pass.finish(Loss())
        return edges_of(self._pass.edges())
