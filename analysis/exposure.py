"""Exposure: which guests would lose a pending triple fault in a save, whether or not one is pending.

A guest is exposed while KVM_CAP_X86_TRIPLE_FAULT_EVENT (218) is off for its VM. Linux commit ed2351174e38
("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.rows import by_key, column, heads
from probes.schema import Flag, Kind

#: Columns: ``vm``: the number of the recording; ``pid``; ``triple_fault_cap``: is 218 on, or unknown; ``vcpus``: how
#: many were seen; ``first_ns``: CLOCK_MONOTONIC of the first sight.
VMS = {"vm": "u4", "pid": "u4", "triple_fault_cap": "boolean", "vcpus": "i8", "first_ns": "i8"}


class Exposure:
    """The VMs of a recording, fed batch by batch; what it holds is bounded by the VMs and vCPUs seen."""

    def __init__(self) -> None:
        self._vms: dict[int, dict[str, Any]] = {}
        self._vm_of: dict[int, int] = {}

    def feed(self, events: Any) -> None:
        """Take a batch of events."""
        kind, vcpu, seq, flags = (column(events, name) for name in ("kind", "vcpu", "seq", "flags"))
        detail, arg, pid, time_ns = (column(events, name) for name in ("detail", "arg", "pid", "time_ns"))
        # The capability as each vCPU's last event tells it, and every event that begins a vCPU or sets the capability.
        # What other threads saw of a vCPU (seq 0) tells nothing of its flags.
        own = np.flatnonzero(seq != 0)
        own = own[by_key(vcpu[own])]
        last = own[np.append(heads(vcpu[own])[1:], len(own)) - 1] if len(own) else own
        telling = np.union1d(last, np.flatnonzero((kind == Kind.VCPU_NEW) | (kind == Kind.VM_CAP)))
        for index in telling.tolist():
            number = int(vcpu[index])
            if kind[index] in (Kind.VCPU_NEW, Kind.VM_CAP):
                vm = self._vms.setdefault(
                    int(detail[index]),
                    {"pid": int(pid[index]), "triple_fault_cap": None, "vcpus": 0, "first_ns": int(time_ns[index])},
                )
                if kind[index] == Kind.VM_CAP:
                    vm["triple_fault_cap"] = bool(arg[index])
                    continue
                if number not in self._vm_of:
                    vm["vcpus"] += 1
                    self._vm_of[number] = int(detail[index])
            if number in self._vm_of and kind[index] != Kind.VMM_EXIT:
                on = (flags[index] & (Flag.CAP | Flag.CAP_EXISTS)) == (Flag.CAP | Flag.CAP_EXISTS)
                self._vms[self._vm_of[number]]["triple_fault_cap"] = bool(on)

    def table(self) -> pd.DataFrame:
        """Return one row for each VM, in the order in which they were seen."""
        rows = [{"vm": number, **vm} for number, vm in self._vms.items()]
        return pd.DataFrame(rows, columns=list(VMS)).astype(VMS)
