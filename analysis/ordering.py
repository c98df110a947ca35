"""What the rules of ordering have found, as tables. What they are about is in :mod:`analysis.promises`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import pandas as pd

from analysis import cases, columns
from analysis.cases import LATE_NS, STARVED, WAITED
from analysis.events import Array, Batch
from analysis.lifecycle import LIFECYCLE
from analysis.passes import Pass, Table
from analysis.promises import INTERRUPTS, KICKED, MASKED, OWN, RULES, TAKEN, hooks, missing
from analysis.words import By, Place, Verdict, words
from probes.requests import bit_name
from probes.schema import NO_BIT, Kind
from tracer.loss import Loss

#: How long a request may wait by default.
BOUND_NS = 1_000_000_000

#: Columns of :attr:`Ordered.rules`.
RULE = {
    "rule": "object",
    "title": "object",
    "source": "object",
    "checked": "i8",
    "broken": "i8",
    "undecided": "i8",
    "unchecked": "object",
}
#: Columns of :attr:`Ordered.breaks`.
BREAK = {
    "rule": "object",
    "vm": "u4",
    "pid": "u4",
    "vcpu": "u4",
    "vcpu_number": "u4",
    "request": "object",
    "time_ns": "i8",
    "since_ns": "i8",
    "story": "object",
}


# In which order breaks are told.
_FIRST: list[str] = ["time_ns", "vcpu_number", "request", "since_ns"]
_COLUMNS = tuple(column.name for column in columns.BREAK)


@dataclass(frozen=True)
class Ordered:
    """What the rules have found."""

    rules: pd.DataFrame  # columns: RULE; a row for each rule
    breaks: pd.DataFrame  # columns: BREAK; of each rule the first ones


class Findings:
    """What the rules find, batch by batch; of each rule and request the first breaks are kept.

    ``names`` and ``flags``: the watched requests; ``plan`` and ``detail``: as the recording has them. ``bound_ns``: how
    long a request may wait; ``most``: how many breaks of each rule are kept.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        flags: Mapping[str, Iterable[str]],
        plan: Iterable[Mapping[str, Any]],
        detail: str,
        *,
        bound_ns: int = BOUND_NS,
        most: int = 100,
    ) -> None:
        plan = list(plan)
        self._names, self._most, self._bound_ns = dict(names), most, bound_ns
        self._flags = {name: sorted(of) for name, of in flags.items()}
        self.unchecked = missing(plan, detail)
        self._bits = {name: bit for bit, name in names.items()}
        self._own = _mask(self._bits, OWN)
        there = hooks(plan)
        masks = any(target == "kvm_make_vcpus_request_mask" for _, target in there)
        kicked = KICKED if masks else KICKED - MASKED
        self._kicked = 0 if "raise_without_kick" in self.unchecked else _mask(self._bits, kicked)
        # An interrupt that finds a kprobe at work on its CPU runs without probes, and nobody is told.
        kprobes = any(via.startswith("kprobe") and target.endswith("kvm_vcpu_kick") for via, target in there)
        self._unsure = _mask(self._bits, INTERRUPTS) if kprobes else 0
        self._kept: dict[tuple[int, int], Array] = {}
        self._losses = 0

    @property
    def wanted(self) -> dict[str, Any]:
        """Return what the walk is to check: columns of analysis.columns.WANTED."""
        reason, earlier = np.zeros(64, np.uint64), np.zeros(64, np.uint64)
        for name, (exit_reason, before) in TAKEN.items():
            if name in self._bits and "service_order" not in self.unchecked:
                bit = self._bits[name]
                reason[bit], earlier[bit] = exit_reason, _mask(self._bits, before) & (self._own | self._kicked)
        place = np.zeros(64, np.int64)
        kicked = [bit for bit in range(64) if self._kicked >> bit & 1]
        place[kicked] = np.arange(len(kicked))
        return {
            "order": len(self.unchecked) < len(RULES),
            "starves": "starved" not in self.unchecked,
            "waits": "wait_returned_early" not in self.unchecked,
            "own": self._own,
            "kicked": self._kicked,
            "bounded": _mask(self._bits, OWN | KICKED),
            "bound_ns": self._bound_ns,
            "place": place,
            "takers": sum(1 << bit for bit in np.flatnonzero(reason).tolist()),
            "reason": reason,
            "earlier": earlier,
        }

    def dark(self, now: Any, batch: Batch, loss: Loss | None) -> None:
        """Note, before a batch is walked over, that something that may explain a case was lost until its end."""
        losses = loss.kicks + loss.blind if loss else 0
        if losses > self._losses:
            times = np.asarray(batch["time_ns"])
            until = int(times.max()) if times.size else 0
            now.dark_ns = max(int(now.dark_ns), int(now.top_ns), until)
            self._losses = losses

    def add(self, breaks: Table) -> None:
        """Take what a batch has found."""
        rows = np.empty(len(breaks["rule"]), columns.BROKEN)
        for name in _COLUMNS:
            rows[name] = breaks[name]
        keys = rows["rule"] << 8 | rows["request"]
        for key in np.unique(keys).tolist():
            place, found = (key >> 8, key & 0xFF), rows[keys == key]
            if place in self._kept:
                found = np.concatenate((self._kept[place], found))
            # By its time, so that no cut decides which.
            self._kept[place] = np.sort(found, order=_FIRST)[: self._most]

    def ordered(self, now: Any) -> Ordered:
        """Return what was found."""
        broken, undecided = np.zeros(len(RULES), np.int64), now.undecided.copy()
        shown = int(now.shown) & ~self._unsure
        proven = np.array([[self._proven(rule, bit, shown) for bit in range(NO_BIT + 1)] for rule in range(len(RULES))])
        broken += np.where(proven, now.broken, 0).sum(axis=1)
        undecided += np.where(proven, 0, now.broken).sum(axis=1)
        checked = np.array(
            [0 if name in self.unchecked else count for name, count in zip(RULES, now.checked, strict=True)]
        )
        rules = pd.DataFrame(
            {
                "rule": list(RULES),
                "title": [rule.title for rule in RULES.values()],
                "source": [rule.source for rule in RULES.values()],
                "checked": checked,
                "broken": broken,
                "undecided": undecided,
                "unchecked": [self.unchecked.get(name, "") for name in RULES],
            }
        ).astype(RULE)
        rows: list[tuple[Any, ...]] = []
        for number, name in enumerate(RULES):
            kept = [of for (rule, bit), of in self._kept.items() if rule == number and proven[rule, bit]]
            first = np.sort(np.concatenate(kept), order=_FIRST)[: self._most] if kept else ()
            rows += [self._break(name, dict(zip(_COLUMNS, one.tolist(), strict=True))) for one in first]
        told = list(zip(*rows, strict=True)) if rows else [()] * len(BREAK)
        breaks = pd.DataFrame(
            {name: pd.Series(list(of), dtype=dtype) for (name, dtype), of in zip(BREAK.items(), told, strict=True)}
        )
        return Ordered(rules, breaks)

    def _proven(self, rule: int, bit: int, shown: int) -> bool:
        # Where no kick for a request was ever seen, the hooks may not tell of them: a compiler that optimises the whole
        # module can have left out the calls.
        by_kicks = rule not in (STARVED, WAITED) and not self._own >> bit & 1
        return not by_kicks or bool(shown >> bit & 1)

    def _break(self, rule: str, one: Mapping[str, Any]) -> tuple[Any, ...]:
        who = tuple(one[name] for name in ("vm", "pid", "vcpu", "vcpu_number"))
        return rule, *who, self._name(one["request"]), one["time_ns"], one["since_ns"], self._story(one)

    def _name(self, bit: int) -> str:
        return self._names.get(bit, bit_name(bit))

    def _story(self, one: Mapping[str, Any]) -> str:
        detail = one["detail"]
        match one["rule"]:
            case cases.ENTERED:
                return f"pending at {Kind(detail).name} and at the GUEST_ENTRY that followed"
            case cases.WAITED:
                return (
                    f"the requester began at {one['since_ns']} ns and returned at {one['time_ns']} ns; the vCPU was in"
                    f" the guest before and left it at {detail} ns"
                )
            case cases.RAISED:
                return (
                    "raised between GUEST_ENTRY and GUEST_EXIT, and neither a kick for it nor a request to its VM"
                    f" within {LATE_NS // 1_000_000:,} ms after"
                )
            case cases.ORDER:
                return f"{self._name(detail)} was served, and {self._name(one['request'])}, which comes first, was not"
        waited_s = (one["time_ns"] - one["since_ns"]) / 1e9
        flags = "|".join(self._flags.get(self._name(one["request"]), ())) or "no flags"
        place, end = words(Place)[one["raised_in"]], words(Verdict)[detail]
        return f"pending for {waited_s:.3f} s at least, raised in {place} ({flags}); {end}"


class Ordering:
    """The rules of ordering alone, of events and of lifecycles that were told elsewhere.

    The arguments are those of :class:`Findings`; ``limits`` are ``bound_ns`` and ``most``.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        flags: Mapping[str, Iterable[str]],
        plan: Iterable[Mapping[str, Any]],
        detail: str,
        **limits: int,
    ) -> None:
        self._findings = Findings(names, flags, plan, detail, **limits)
        self._bits = {name: bit for bit, name in names.items()}
        self._pass = Pass(names, full=True, order={**self._findings.wanted, "starves": False})

    @property
    def unchecked(self) -> dict[str, str]:
        """Return the rules that cannot be checked, and why."""
        return self._findings.unchecked

    @property
    def carried(self) -> int:
        """Return how much is carried over, in vCPUs and what belongs to one of them."""
        return int(self._pass.now.vcpus + self._pass.now.cases)

    def feed(self, events: Batch, loss: Loss | None = None, lifecycles: pd.DataFrame | None = None) -> None:
        """Take a batch, the losses so far, and the lifecycles that the batch has ended."""
        self._findings.dark(self._pass.now, events, loss)
        self._pass.feed(events, loss=loss)
        self._findings.add(self._pass.given().breaks)
        self._starved(lifecycles)

    def interrupt(self) -> None:
        """A part of the recording is missing here."""
        self._pass.interrupt()

    def finish(self, loss: Loss | None = None, lifecycles: pd.DataFrame | None = None) -> Ordered:
        """Return what was found; ``lifecycles``: those that had not ended."""
        self._starved(lifecycles)
        self._pass.finish(loss or Loss())
        self._findings.add(self._pass.given().breaks)
        return self._findings.ordered(self._pass.now)

    def _starved(self, lifecycles: pd.DataFrame | None) -> None:
        if lifecycles is None or "starved" in self.unchecked or not len(lifecycles):
            return
        rows = np.zeros(len(lifecycles), columns.PLACE)
        numbers = {
            "request": self._bits,
            "raised_by": _numbers(By),
            "raised_in": _numbers(Place),
            "end": _numbers(Verdict),
        }
        for name in LIFECYCLE:
            if name != "why":
                values = lifecycles[name]
                rows[name] = values.map(numbers[name]).to_numpy(np.int64) if name in numbers else values.to_numpy()
        self._pass.starved(rows, self._findings.wanted)
        self._findings.add(self._pass.given().breaks)


def _numbers(of: type[IntEnum]) -> dict[str, int]:
    return dict(zip(words(of), of, strict=True))


def _mask(bits: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(1 << bits[name] for name in names if name in bits)
