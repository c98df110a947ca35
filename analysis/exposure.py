"""Exposure: which guests would lose a pending triple fault in a save, whether or not one is pending.

A guest is exposed while KVM_CAP_X86_TRIPLE_FAULT_EVENT (218) is off for its VM. Linux commit ed2351174e38
("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0). What each vCPU's own last event
tells of it is noted by the pass (analysis/walk.py); what other threads saw of a vCPU tells nothing.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.events import Array, Batch
from analysis.passes import Pass

#: Columns: ``vm``: the number of the recording; ``pid``; ``triple_fault_cap``: is 218 on, or unknown; ``vcpus``: how
#: many were seen; ``alive``: one of them has not ended; ``first_ns``: CLOCK_MONOTONIC of the first sight.
VMS = {"vm": "u4", "pid": "u4", "triple_fault_cap": "boolean", "vcpus": "i8", "alive": "bool", "first_ns": "i8"}


def vm_table(vms: Array) -> pd.DataFrame:
    """Return one row for each VM (columns.VM), in the order in which they were seen."""
    on: Any = pd.array([None if cap < 0 else cap > 0 for cap in vms["cap"].tolist()], "boolean")
    columns = {"vm": vms["number"], "pid": vms["pid"], "triple_fault_cap": on, "alive": vms["alive"] > 0}
    columns |= {name: vms[name] for name in ("vcpus", "first_ns")}
    return pd.DataFrame(columns)[[*VMS]].astype(VMS)


class Exposure:
    """The VMs of a recording alone, fed batch by batch; what it holds is bounded by the VMs seen."""

    def __init__(self) -> None:
        self._pass = Pass({}, exposure=True)

    def feed(self, events: Batch) -> None:
        """Take a batch of events."""
        self._pass.feed(events)

    def table(self) -> pd.DataFrame:
        """Return one row for each VM, see :data:`VMS`."""
        return vm_table(self._pass.vms())
