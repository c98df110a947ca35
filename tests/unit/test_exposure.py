"""Which VMs would lose a pending triple fault in a save: what each vCPU's own last event says."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.exposure import Exposure
from probes.schema import EVENT, Flag, Kind

ON = Flag.CAP | Flag.CAP_EXISTS


def _events(*rows: tuple[Kind, int, int, int, int]) -> Any:
    """Return events of VM 3: kind, vcpu, seq, arg and flags of each."""
    events = np.zeros(len(rows), EVENT)
    for place, row in enumerate(rows):
        events[place]["kind"], events[place]["vcpu"], events[place]["seq"] = row[:3]
        events[place]["arg"], events[place]["flags"] = row[3:]
    events["time_ns"], events["pid"], events["detail"] = np.arange(1, len(rows) + 1), 7, 3
    return events


def _caps(*batches: Any) -> dict[int, Any]:
    exposure = Exposure()
    for batch in batches:
        exposure.feed(batch)
    table = exposure.table()
    return dict(zip(table["vm"], table["triple_fault_cap"], strict=True))


def test_the_last_event_of_each_vcpu_tells_the_capability() -> None:
    new = _events((Kind.VCPU_NEW, 1, 1, 0, Flag.CREATED), (Kind.VCPU_NEW, 2, 1, 1, Flag.CREATED))
    assert _caps(new, _events((Kind.RUN_EXIT, 2, 2, 5, ON))) == {3: True}
    assert _caps(new, _events((Kind.RUN_EXIT, 2, 2, 5, ON), (Kind.RUN_EXIT, 2, 3, 5, Flag.CAP_EXISTS))) == {3: False}


def test_what_another_thread_saw_of_a_vcpu_tells_nothing_of_it() -> None:
    own = ((Kind.VCPU_NEW, 1, 1, 0, Flag.CREATED), (Kind.RUN_EXIT, 1, 2, 5, ON))
    assert _caps(_events(*own, (Kind.KICK, 1, 0, 0, 0))) == {3: True}
    assert _caps(_events(*own), _events((Kind.KICK, 1, 0, 0, 0))) == {3: True}


def test_nothing_is_known_of_no_events() -> None:
    assert _caps(_events()) == {}
