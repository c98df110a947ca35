"""How a request can end, and what a report's exit status says of it. Written once; every report uses these words."""

from __future__ import annotations

from collections.abc import Mapping

#: Each end and what it means, in the order in which a person should read them.
ENDS: Mapping[str, str] = {
    "delivered": "serviced: KVM_RUN returned KVM_EXIT_SHUTDOWN and the request is gone",
    "reflected": "nested: L1 received the shutdown VM-exit",
    "serviced": "KVM took the request, on its way into the guest or into the state that it saved",
    "cleared": "user space cleared it: KVM_SET_VCPU_EVENTS with the flag and pending=0",
    "handed_over": "the vCPU ended with it pending, after a save that carried it",
    "lost": "the vCPU ended with it pending, after a save that did not carry it",
    "abandoned": "the vCPU ended with it pending, and nothing was saved, or nothing that a save must keep was lost",
    "open": "still pending when the recording ended",
    "undecided": "events that decide it were not seen",
}

# Exit statuses of `report` and `demo`.
EXIT_NOTHING_LOST = 0
EXIT_LOST = 3
EXIT_UNDECIDED = 4
