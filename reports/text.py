"""The report for a terminal.

Strictly under 80 columns, whatever guests are called and however large the numbers are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reports.advice import findings, survives
from reports.document import records
from reports.judged import (
    Fact,
    Guest,
    guest_of,
    guests,
    headline,
    losses,
    names_remark,
    outcome,
    ranked,
    unseen,
    watched,
    where,
)
from reports.words import Clock, Column, aligned, columns, interval, native, plural, short, shown, wrap

if TYPE_CHECKING:
    import pandas as pd

    from analysis.judge import Judgement

#: Rows of a table that a terminal gets; those that need an operator come first.
MOST_ROWS = 40


def report(judgement: Judgement, latency: pd.DataFrame) -> str:
    """Return the whole report; ``latency`` is the summary by request and end."""
    parts = (
        _headline(judgement),
        _verdicts(judgement),
        _findings(judgement),
        _latency(latency),
        _shutdowns(judgement),
        _exposure(judgement.vms),
        _losses(judgement),
        _unseen(judgement),
    )
    return "\n\n".join("\n".join(lines) for lines in map(list, parts) if lines) + "\n"


# --- the live stream ----------------------------------------------------------------------------------------

# Each column of a live line and its cells.
_LIVE = (
    (Column("UTC"), 8),
    (Column("guest"), 14),
    (Column("vCPU", right=True), 4),
    (Column("raised by"), 15),
    (Column("exits", right=True), 6),
    (Column("saves", right=True), 5),
    (Column("blind", right=True), 5),
    (Column("end"), 11),
)


def live_heading() -> str:
    """Return the line above the first live line."""
    return _live_line([column.heading for column, _ in _LIVE])


def live(row: Mapping[str, Any], guest: Guest, clock: Clock) -> str:
    """Return the line about a lifecycle that has just ended.

    Of requests other than triple_fault it gives the name, not who raised them.
    """
    at = native(row["ended_ns"])
    at = native(row["ended_after_ns"]) if at is None or at < 0 else at
    raised_by = str(row["raised_by"]) if row["request"] == "triple_fault" else str(row["request"])
    counts = [short(int(row[name])) for name in ("userspace_exits", "saves", "blind_saves")]
    end = outcome(row).split(", ")[-1]  # what qualifies an end implies it
    return _live_line([clock.time(at)[:8], guest.name, str(row["vcpu"]), shown(raised_by), *counts, end])


def _live_line(values: Sequence[str]) -> str:
    return " ".join(aligned(text, width, column) for text, (column, width) in zip(values, _LIVE, strict=True)).rstrip()


# --- sections -----------------------------------------------------------------------------------------------


def _headline(judgement: Judgement) -> Iterator[str]:
    yield from wrap(headline(judgement).text)
    yield from wrap(watched(judgement), first="  ")
    yield from wrap(where(judgement), first="  ")
    if remark := names_remark(judgement):
        yield from wrap(remark, first="  ")


def _verdicts(judgement: Judgement) -> Iterator[str]:
    if judgement.lifecycles.empty:
        return
    known = guests(judgement.vms)
    rows = ranked(judgement.lifecycles)
    requests = list(rows["request"].unique())
    alone = len(requests) == 1
    layout = [
        Column("guest", least=8),
        Column("vCPU", right=True),
        *([] if alone else [Column("request", least=8)]),
        Column("raised by", least=7),
        Column("exits", right=True),
        Column("saves", right=True),
        Column("blind", right=True),
        Column("end", least=11),
    ]
    table = [
        [
            guest_of(row, known).name,
            str(row["vcpu"]),
            *([] if alone else [shown(row["request"])]),
            shown(row["raised_by"]),
            *(short(row[name]) for name in ("userspace_exits", "saves", "blind_saves")),
            outcome(row),
        ]
        for row in records(rows.head(MOST_ROWS))
    ]
    yield from wrap(f"Verdicts on {shown(requests[0])}" if alone else "Verdicts")
    yield from columns(layout, table)
    if len(rows) > MOST_ROWS:
        yield from wrap(f"and {plural(len(rows) - MOST_ROWS, 'more', 'more')}, with --format csv or json", first="  ")
    summary = ", ".join(f"{end} {count:,}" for end, count in judgement.summary.items() if count)
    yield from wrap(f"In all: {summary}", first="  ", rest=" " * 10)
    yield "  exits: returns to user space while pending; blind: saves that left it out"


def _findings(judgement: Judgement) -> Iterator[str]:
    for index, finding in enumerate(findings(judgement)):
        if index:
            yield ""
        yield from wrap(finding.title)
        for case in finding.cases:
            yield from wrap(case, first="  - ")
        if finding.more:
            yield from wrap(f"and {finding.more:,} more, with --format csv or json", first="    ")
        yield "  What to do"
        for number, step in enumerate(finding.steps, start=1):
            yield from wrap(step, first=f"  {number}. ")


def _latency(latency: pd.DataFrame) -> Iterator[str]:
    if latency.empty:
        return
    rows = records(latency)
    alone = len({row["request"] for row in rows}) == 1
    quantiles = ("p50", "p99", "max")
    layout = [
        *([] if alone else [Column("request", least=8)]),
        Column("end"),
        Column("count", right=True),
        *(Column(name if name == "max" else f"{name[1:]} %", right=True) for name in quantiles),
    ]
    table = [
        [
            *([] if alone else [shown(row["request"])]),
            row["end"],
            short(row["count"]),
            *(bounds(row, name) for name in quantiles),
        ]
        for row in rows
    ]
    yield "Time from raise to end"
    yield from columns(layout, table)


def bounds(row: Mapping[str, Any], quantile: str) -> str:
    """Return a quantile of a latency table's row as the interval that it is known within."""
    lower, upper = row[f"{quantile}_lower_ns"], row[f"{quantile}_upper_ns"]
    return "not known" if lower is None else interval(int(lower), None if upper is None else int(upper))


def _shutdowns(judgement: Judgement) -> Iterator[str]:
    own = judgement.shutdowns[judgement.shutdowns["source"] == "hardware"]
    if not own.empty:
        yield "Shutdowns that no request made"
        known = guests(judgement.vms)
        clock = Clock(judgement.meta["clock"])
        table = [
            [guest_of(row, known).name, str(row["vcpu"]), clock.when(row["time_ns"])]
            for row in records(own.head(MOST_ROWS))
        ]
        yield from columns([Column("guest", least=8), Column("vCPU", right=True), Column("UTC")], table)
        if len(own) > MOST_ROWS:
            yield f"  and {plural(len(own) - MOST_ROWS, 'more', 'more')}, with --format json"


def _exposure(vms: pd.DataFrame) -> Iterator[str]:
    if vms.empty:
        return
    known = sorted(guests(vms).values(), key=lambda each: (each.cap is not False, each.cap is not None))
    layout = [
        Column("guest", least=8),
        Column("pid", right=True),
        Column("VMM", least=8),
        Column("vCPUs", right=True),
        Column("a pending shutdown"),
    ]
    table = [
        [each.name, str(each.pid), each.vmm or "-", short(each.vcpus), survives(each)] for each in known[:MOST_ROWS]
    ]
    yield "Exposure"
    yield from columns(layout, table)
    if len(known) > MOST_ROWS:
        yield f"  and {plural(len(known) - MOST_ROWS, 'more guest')}, with --format json"


def _losses(judgement: Judgement) -> Iterator[str]:
    lost = losses(judgement)
    if not lost:
        yield "Losses of the tracer: none"
        return
    yield "Losses of the tracer"
    yield from _facts(lost)


def _unseen(judgement: Judgement) -> Iterator[str]:
    hidden = unseen(judgement)
    if hidden:
        yield from wrap(f"What engine {shown(str(judgement.meta['engine']))} cannot see here")
        yield from _facts(hidden)


def _facts(facts: Sequence[Fact]) -> Iterator[str]:
    for fact in facts:
        yield from wrap(f"{fact.name}: {fact.text}", first="  - ")
