"""The canary: a scratch VM of kvmreq's own, whose life must be seen through the hooks that were just set.

Hooks can be set and yet tell nothing: an address that the kernel hides, a program that is never called, a field that is
not where BTF has it. A trace through them is empty, and looks like a host on which nothing was lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lab import scratch
from lab.kvm import LabError
from probes.requests import TRIPLE_FAULT
from probes.schema import KVM_EXIT_SHUTDOWN, Flag, Kind
from tracer import host
from tracer.engines import Engine
from tracer.errors import CannotTrace

_AWAIT_S = 2.0
_LIVES = 3
_LOOK_S = 0.001
_BIT = 1 << TRIPLE_FAULT
# Events of a whole VM, which have its number in their detail.
_OF_A_VM = (Kind.VM_CAP, Kind.REQUEST_ALL, Kind.REQUEST_ALL_END)

Batch = npt.NDArray[np.void]
#: What is missing in the events of a vCPU that was created, had a triple fault, delivered it and ended.
Misses = Callable[[Batch], Iterable[str]]


class Heard(NamedTuple):
    """What was drained while the canary lived."""

    others: Batch  # events of everyone else
    own: Batch  # events of the canary
    untried: str | None = None  # why there was none


def misses(own: Batch) -> list[str]:
    """Return what is missing in the events of the canary."""
    ended = own[(own["kind"] == Kind.RUN_EXIT) & (own["arg"] == KVM_EXIT_SHUTDOWN)]
    before, after = ended["before"] & _BIT != 0, ended["requests"] & _BIT != 0
    return [
        what
        for what, seen in (
            ("the request that was pending", before.any()),
            ("its delivery", (before & ~after).any()),
        )
        if not seen
    ]


def listen(engine: Engine, misses: Misses = misses) -> Heard:
    """Let canaries live until one is seen whole, and return what the hooks told meanwhile.

    Raises CannotTrace if they saw none of them. One may be missed where hooks work: the kernel leaves a program out
    that it runs already.

    ``misses``: what its events lack beside its creation and its end.
    """
    batches = [engine.drain()]
    why_not = host.no_dev_kvm()
    gone: list[int] = []
    missing: list[str] = []
    with engine.watching(os.getpid()):
        for _ in range(_LIVES if why_not is None else 0):
            try:
                scratch.life()
            except LabError as error:
                why_not = f"a scratch VM cannot be made: {error}"
                break
            own = _own_of_one(engine, batches, gone)
            missing = [*_lifetime(own), *misses(own)]
            if not missing:
                break
            gone += np.unique(own["vcpu"]).tolist()
    if why_not is None and missing:
        raise CannotTrace(
            f"the {engine.plan.engine} engine's hooks are set and do not see a scratch VM: {', '.join(missing)}",
            hint="kvmreq doctor tells what works here",
        )
    seen = np.concatenate(batches)
    mine = _mine(seen)
    return Heard(seen[~mine], seen[mine], why_not)


def _own_of_one(engine: Engine, batches: list[Batch], gone: list[int]) -> Batch:
    """Drain into ``batches`` until the canary has ended, and return its events. ``gone``: numbers of earlier ones."""
    end = time.monotonic() + _AWAIT_S
    while True:
        engine.settle()
        batches.append(engine.drain())
        seen = np.concatenate(batches)
        own: Batch = seen[_mine(seen) & ~np.isin(seen["vcpu"], gone)]
        if (own["kind"] == Kind.VCPU_END).any() or time.monotonic() > end:
            return own
        time.sleep(_LOOK_S)


def _lifetime(own: Batch) -> list[str]:
    """Return which end of its life is missing in the events of the canary."""
    ends = (("its creation", Kind.VCPU_NEW), ("its end", Kind.VCPU_END))
    return [what for what, kind in ends if not (own["kind"] == kind).any()]


def untried(heard: Heard) -> list[dict[str, Any]]:
    """Return the line of a recording's plan that says so, where there was no canary."""
    if heard.untried is None:
        return []
    return [
        {
            "fact": "a scratch VM is seen through the hooks",
            "hook": None,
            "unseen": f"whether the hooks see anything, before the first event ({heard.untried})",
        }
    ]


def _mine(events: Batch) -> npt.NDArray[Any]:
    """Tell of each event whether it is about the canary."""
    new = events[(events["kind"] == Kind.VCPU_NEW) & (events["arg"] == scratch.UNUSUAL_ID)]
    new = new[(new["flags"] & Flag.CREATED != 0) & (new["pid"] == os.getpid())]
    of_its_vm = np.isin(events["kind"], _OF_A_VM) & np.isin(events["detail"], new["detail"])
    mine: npt.NDArray[Any] = np.isin(events["vcpu"], new["vcpu"]) | of_its_vm
    return mine
