"""Loss is data: what the tracer could not record, counted where it happened.

Counts are totals since the recording began, so that the newest one is the whole story and a lost one costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VcpuLoss:
    """Events of one vCPU that were produced and not recorded."""

    count: int
    first_ns: int
    last_ns: int


@dataclass(frozen=True)
class Loss:
    """Everything that was not recorded, by cause.

    ``vcpus`` tells the events that the ring had no room for by the vCPU number of the recording; number 0 stands for
    events of whole VMs and VMMs, which concern every vCPU.
    """

    ring_full: int = 0  # events for which the ring had no room
    map_full: int = 0  # vCPUs, threads or VMs that did not fit the tracer's maps: they are not traced
    missed: int = (
        0  # hooks that did not run, or did not find the vCPU of an ioctl: what they would have read is unknown
    )
    not_written: int = 0  # events that reached the tracer but not the disk
    unanswered: int = 0  # vCPUs that ran already and were not seen when they were asked, or could not be
    kicks: int = 0  # kicks for which the ring had no room: no verdict hangs on them
    vcpus: Mapping[int, VcpuLoss] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Return how many events, vCPUs and hook runs are missing in all."""
        return self.ring_full + self.map_full + self.missed + self.not_written + self.unanswered + self.kicks

    @property
    def blind(self) -> int:
        """Return the losses that no event's sequence number reveals: any verdict may hang on them."""
        told = sum(loss.count for loss in self.vcpus.values()) - self.ring_full
        return self.map_full + self.not_written + max(0, self.missed - max(0, told))

    def as_json(self) -> dict[str, Any]:
        """Return the loss as it stands in a recording's segments."""
        return {
            "ring_full": self.ring_full,
            "map_full": self.map_full,
            "missed": self.missed,
            "not_written": self.not_written,
            "unanswered": self.unanswered,
            "kicks": self.kicks,
            "vcpus": {str(number): [loss.count, loss.first_ns, loss.last_ns] for number, loss in self.vcpus.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Loss:
        """Return the loss that :meth:`as_json` gave."""
        return cls(
            ring_full=document["ring_full"],
            map_full=document["map_full"],
            missed=document["missed"],
            not_written=document["not_written"],
            unanswered=document.get("unanswered", 0),  # earlier recordings did not count them
            kicks=document.get("kicks", 0),  # recordings of schema 1 have none
            vcpus={int(number): VcpuLoss(*loss) for number, loss in document["vcpus"].items()},
        )
