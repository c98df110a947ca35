"""The vectorised core against the oracle and against the truth, on streams that a host can produce."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.lifecycle import LIFECYCLE, SHUTDOWN, Lifecycles
from probes.schema import EVENT, Kind
from tests.examples import examples
from tests.property.model import NAMES, Machine, loss_of, played
from tests.property.oracle import Event, Oracle, Row
from tracer.loss import Loss

Stream: TypeAlias = list[Event | None]

THOROUGH = settings(
    max_examples=examples(200), deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip
STEPS = st.lists(st.tuples(st.integers(0, 37), st.integers(0, 7), st.integers(0, 255)), max_size=60)
FULL = st.sets(st.integers(1, 150), max_size=40)
CUTS = st.lists(st.integers(0, 200), max_size=12)
DECIDED = ("delivered", "reflected", "serviced", "cleared", "handed_over", "lost", "abandoned")


def batch(events: Sequence[Event]) -> Any:
    made = np.array([event.record() for event in events], EVENT)
    made.flags.writeable = False  # as those of a segment are
    return made


def judged(
    stream: Stream, loss: Loss, cuts: Sequence[int] = (), *, blind: bool = False, full: bool = False
) -> tuple[list[Row], list[Row]]:
    """Return the rows of the core, fed in batches that end at each cut and each missing part."""
    core = Lifecycles(NAMES, full=full)
    lifecycles, shutdowns = [], []
    holes = [index for index, event in enumerate(stream) if event is None]
    ends = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts), *holes, *(hole + 1 for hole in holes)})
    for begin, end in pairwise(ends):
        if stream[begin] is None:
            core.interrupt()
            continue
        finished = core.feed(batch([event for event in stream[begin:end] if event]), blind=blind, loss=loss)
        lifecycles.append(finished.lifecycles)
        shutdowns.append(finished.shutdowns)
    lifecycles.append(core.finish(loss).lifecycles)
    assert core.carried == 0
    return _rows(lifecycles, LIFECYCLE), _rows(shutdowns, SHUTDOWN)


def _rows(tables: list[pd.DataFrame], columns: dict[str, str]) -> list[Row]:
    rows: list[Row] = []
    for table in tables:
        assert list(table.columns) == list(columns)
        rows += [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
    return in_order(rows)


def in_order(rows: list[Row]) -> list[Row]:
    """Return rows in an order that is theirs alone, with why as a bool."""
    for row in rows:
        if "why" in row:
            row["why"] = bool(row["why"])
    return sorted(rows, key=lambda row: [str(value) for value in row.values()])


def expected(stream: Stream, loss: Loss, *, blind: bool = False, full: bool = False) -> tuple[list[Row], list[Row]]:
    oracle = Oracle(NAMES, loss, blind, full)
    oracle.run(stream)
    return in_order(oracle.lifecycles), in_order(oracle.shutdowns)


def without(machine: Machine, dropped: set[int]) -> tuple[Stream, Loss]:
    """Return the stream without some of the events that the ring had room for, and what is lost in all."""
    lost = Counter(machine.lost)
    stream: Stream = []
    for index, event in enumerate(machine.events):
        if index in dropped:
            lost[event.vcpu] += event.seq > 0 or event.kind in (Kind.VMM_EXIT, Kind.VM_CAP)
        else:
            stream.append(event)
    return stream, loss_of(lost)


def with_hole(stream: Stream, hole: tuple[int, int] | None) -> Stream:
    """Return the stream with a part of it missing, of which no loss tells."""
    return stream if hole is None else [*stream[: hole[0]], None, *stream[hole[0] + hole[1] :]]


def check_decided(found: list[Row], truth: list[Row]) -> None:
    """A verdict that was decided in spite of losses is the true one, and so is what it says.

    Without the kick that shows who raised a request it was raised inside KVM_RUN, no more.
    """
    same = ("end", "userspace_exits", "saves", "blind_saves", "nested", "stale")
    true = {(row["vcpu_number"], row["request"], row["raised_after_ns"]): row for row in truth}
    for row in found:
        if row["end"] in DECIDED:
            match = true.get((row["vcpu_number"], row["request"], row["raised_after_ns"]))
            assert match is not None, row
            assert {name: row[name] for name in same} == {name: match[name] for name in same}
            assert row["raised_ns"] >= match["raised_ns"]
            assert row["raised_by"] == match["raised_by"] or (row["raised_by"], match["raised_by"]) == (
                "kvm_run",
                "remote",
            )


HOLES = st.none() | st.tuples(st.integers(0, 150), st.integers(1, 60))


@THOROUGH
@given(STEPS, st.booleans(), st.booleans(), CUTS)
def test_core_is_the_oracle_without_loss(
    steps: list[tuple[int, int, int]], deep: bool, blind: bool, cuts: list[int]
) -> None:
    machine = played(steps, deep=deep)
    stream: Stream = [*machine.events]
    found = judged(stream, machine.loss, cuts, blind=blind, full=deep)
    assert found == expected(stream, machine.loss, blind=blind, full=deep)


@THOROUGH
@given(STEPS, FULL, st.sets(st.integers(0, 150), max_size=10), st.booleans(), CUTS, HOLES)
def test_core_is_the_oracle_with_loss(
    steps: list[tuple[int, int, int]],
    full: set[int],
    dropped: set[int],
    deep: bool,
    cuts: list[int],
    hole: tuple[int, int] | None,
) -> None:
    stream, loss = without(played(steps, full, deep=deep), dropped)
    stream = with_hole(stream, hole)
    assert judged(stream, loss, cuts, full=deep) == expected(stream, loss, full=deep)


@THOROUGH
@given(STEPS, FULL, st.sets(st.integers(0, 150), max_size=10), st.booleans(), CUTS, CUTS, HOLES)
def test_batches_change_nothing(
    steps: list[tuple[int, int, int]],
    full: set[int],
    dropped: set[int],
    deep: bool,
    cuts: list[int],
    others: list[int],
    hole: tuple[int, int] | None,
) -> None:
    stream, loss = without(played(steps, full, deep=deep), dropped)
    stream = with_hole(stream, hole)
    found = judged(stream, loss, cuts, full=deep)
    assert found == judged(stream, loss, others, full=deep) == judged(stream, loss, range(len(stream)), full=deep)


@THOROUGH
@given(STEPS, FULL, st.booleans(), st.booleans())
def test_columns_do_as_records(steps: list[tuple[int, int, int]], full: set[int], deep: bool, end_all: bool) -> None:
    machine = played(steps, full, deep=deep, end_all=end_all)
    events = batch(machine.events)
    of_columns, of_records = Lifecycles(NAMES, full=deep), Lifecycles(NAMES, full=deep)
    found = of_columns.feed({name: events[name] for name in EVENT.names or ()}, loss=machine.loss)
    pd.testing.assert_frame_equal(found.lifecycles, of_records.feed(events, loss=machine.loss).lifecycles)


@THOROUGH
@given(STEPS, st.lists(st.integers(0, 150), max_size=10), CUTS)
def test_order_of_two_threads(steps: list[tuple[int, int, int]], swaps: list[int], cuts: list[int]) -> None:
    stream: Stream = [*played(steps).events]
    for index in swaps:
        pair = stream[index : index + 2]
        if len(pair) == 2 and all(event and event.vcpu and event.kind not in (1, 2) for event in pair):
            stream[index : index + 2] = reversed(pair)
    assert judged(stream, Loss(), cuts) == expected(stream, Loss())


@THOROUGH
@given(STEPS, FULL, st.sets(st.integers(0, 150), max_size=10), st.booleans(), HOLES)
def test_loss_never_changes_a_verdict(
    steps: list[tuple[int, int, int]], full: set[int], dropped: set[int], deep: bool, hole: tuple[int, int] | None
) -> None:
    truth = played(steps, deep=deep, end_all=True)
    stream, loss = without(played(steps, full, deep=deep, end_all=True), dropped)
    true, _ = judged([*truth.events], truth.loss, full=deep)
    found, shutdowns = judged(with_hole(stream, hole), loss, full=deep)
    check_decided(found, true)
    told = {(row["vcpu_number"], row["time_ns"], row["source"]) for row in judged([*truth.events], truth.loss)[1]}
    assert {(row["vcpu_number"], row["time_ns"], row["source"]) for row in shutdowns} <= told


@THOROUGH
@given(STEPS)
def test_nothing_is_carried_of_vcpus_that_ended(steps: list[tuple[int, int, int]]) -> None:
    machine = played(steps, end_all=True)
    core = Lifecycles(NAMES)
    for event in machine.events:
        core.feed(batch([event]))
        assert core.carried <= machine.numbers * (1 + 3 * len(NAMES))
    assert core.carried == 0
