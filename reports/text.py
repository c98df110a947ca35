"""The report for a terminal.

Strictly under 80 columns, whatever guests are called and however large the numbers are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.verdicts import ENDS
from reports.advice import findings, survives
from reports.document import records
from reports.judged import (
    PLACES,
    Fact,
    Guest,
    blind_saves,
    dropped,
    exposure,
    guest_of,
    guests,
    headline,
    losses,
    names_remark,
    other_shutdowns,
    outcome,
    sources_told,
    unseen,
    watched,
    where,
)
from reports.words import (
    WIDTH,
    Clock,
    Column,
    aligned,
    bound,
    cells,
    clip,
    columns,
    interval,
    native,
    plural,
    short,
    shown,
    wrap,
)

if TYPE_CHECKING:
    import pandas as pd

    from analysis.judge import Judgement
    from reports.source import Source

#: Rows of a table that a terminal gets; those that need an operator come first.
MOST_ROWS = 40
_MOST_LATENCIES, _MOST_STATES, _MOST_BREAKS = 20, 12, 5


def report(source: Source) -> str:
    """Return the whole report."""
    judgement = source.judgement
    parts = (
        _headline(judgement),
        _verdicts(source),
        _saves(source),
        _findings(judgement),
        _latency(source),
        _states(source),
        _ordering(source),
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


def _verdicts(source: Source) -> Iterator[str]:
    judgement, rows, others = source.judgement, source.verdicts, source.others
    if judgement.lifecycles.empty:
        return
    alone = judgement.lifecycles["request"].nunique() == 1
    if len(rows):
        title = f"Verdicts on {shown(str(rows['request'].iloc[0]))}" if alone else "Verdicts"
        yield from _one_by_one(source, title, alone=alone)
    if len(others):
        if len(rows):
            yield ""
        yield "The others, by how they ended" if len(rows) else "Requests, by how they ended"
        ends = [end for end in ENDS if end in others.columns]
        layout = [Column("request", least=8), *(Column(end, right=True) for end in ends)]
        table = [[shown(row["request"]), *(short(row[end]) for end in ends)] for row in records(others.head(MOST_ROWS))]
        yield from columns(layout, table)
        if len(others) > MOST_ROWS:
            yield f"  and {plural(len(others) - MOST_ROWS, 'more', 'more')}, with --html"
    summary = ", ".join(f"{end} {count:,}" for end, count in judgement.summary.items() if count)
    yield from wrap(f"In all: {summary}", first="  ", rest=" " * 10)
    if len(rows):
        yield "  exits: returns to user space while pending; blind: saves that left it out"
    lost_nothing = dropped(judgement.lifecycles)
    if lost_nothing:
        yield from wrap(lost_nothing, first="  ")


def _one_by_one(source: Source, title: str, *, alone: bool) -> Iterator[str]:
    rows = source.verdicts
    layout = [
        Column("guest", least=8),
        Column("vCPU", right=True),
        *([] if alone else [Column("request", least=8)]),
        Column("raised by" if alone else "by", least=7),
        Column("exits", right=True),
        Column("saves", right=True),
        Column("blind", right=True),
        Column("end", least=11),
    ]
    table = [
        [
            guest_of(row, source.guests).name,
            str(row["vcpu"]),
            *([] if alone else [shown(row["request"])]),
            shown(row["raised_by"]),
            *(short(row[name]) for name in ("userspace_exits", "saves", "blind_saves")),
            outcome(row),
        ]
        for row in records(rows.head(MOST_ROWS))
    ]
    yield title
    yield from columns(layout, table)
    more = len(rows) + source.more_verdicts - len(table)
    if more:
        yield from wrap(f"and {plural(more, 'more', 'more')}, with --format csv or json", first="  ")


def _saves(source: Source) -> Iterator[str]:
    """Yield which saves left a request out, and where a copy runs that was made from one."""
    saves, more = blind_saves(source.judgement, source.guests, MOST_ROWS)
    if not saves:
        return
    layout = [
        Column("guest", least=8),
        Column("vCPU", right=True),
        Column("request", least=8),
        Column("UTC"),
        Column("then", least=8),
        Column("a copy runs as", least=8),
    ]
    yield "Saves that left a request out"
    rows = [
        [one.guest, str(one.vcpu), one.request, source.clock.time(one.time_ns), one.then, one.runs_as] for one in saves
    ]
    yield from columns(layout, rows)
    if more:
        yield f"  and {plural(more, 'more', 'more')}, with --format json"


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


def _latency(source: Source) -> Iterator[str]:
    latency = source.latency
    if latency.empty:
        return
    yield "Time from raise to end"
    if source.judgement.lifecycles["request"].nunique() == 1:
        rows = records(latency.head(MOST_ROWS))
        quantiles = ("p50", "p99", "max")
        layout = [
            Column("end"),
            Column("count", right=True),
            *(Column(_QUANTILES[name], right=True) for name in quantiles),
        ]
        lines = columns(
            layout, [[row["end"], short(row["count"]), *(bounds(row, name) for name in quantiles)] for row in rows]
        )
        if _fit(lines):
            yield from lines
            return
    # Of each request the end that most of them had. Four intervals do not fit beside each other: a line for what the
    # times were at least, and one for what they were at most.
    usual = latency.loc[sorted(latency.groupby("request", sort=False)["count"].idxmax())]
    rows = records(usual[usual["count"] > 0].head(_MOST_LATENCIES))
    layout = [
        Column("request, end", least=12),
        Column("count", right=True),
        Column(""),
        *(Column(heading, right=True) for heading in _QUANTILES.values()),
    ]
    table = []
    for row in rows:
        for first, count, word, side in (
            (shown(row["request"]), short(row["count"]), "from", "lower"),
            (f"  {row['end']}", "", "to", "upper"),
        ):
            values = (row[f"{name}_{side}_ns"] for name in _QUANTILES)
            told = ["-" if value is None else bound(value, up=side == "upper") for value in values]
            table.append([first, count, word, *told])
    yield from columns(layout, table)
    more = len(latency) - len(rows)
    if more:
        yield f"  and {plural(more, 'more', 'more')}, other ends and rarer ones, with --html"
    if source.unknown_latencies:
        left = plural(source.unknown_latencies, "request")
        yield from wrap(f"Left out: {left} that had not ended, or whose raise was not seen", first="  ")


# Whether a table that cannot be made narrower fits.
def _fit(lines: Sequence[str]) -> bool:
    return all(cells(line) <= WIDTH for line in lines)


# How a quantile is called.
_QUANTILES = {"p50": "50 %", "p99": "99 %", "p999": "99.9 %", "max": "longest"}


def _states(source: Source) -> Iterator[str]:
    states = source.states
    if states.empty:
        return
    order = states.sort_values("count", ascending=False, kind="stable")
    layout = [
        Column("request", least=8),
        Column("the vCPU was"),
        Column("count", right=True),
        Column("99 %", right=True),
        Column("longest", right=True),
    ]
    table = [
        [
            shown(row["request"]),
            clip(PLACES.get(row["raised_in"], shown(row["raised_in"])), 13),
            short(row["count"]),
            bounds(row, "p99"),
            bounds(row, "max"),
        ]
        for row in records(order.head(_MOST_STATES))
    ]
    yield "Where the vCPU was when they were raised"
    lines = columns(layout, table)
    yield from lines if _fit(lines) else columns(layout[:-1], [row[:-1] for row in table])
    if len(order) > _MOST_STATES:
        yield f"  the most frequent; and {plural(len(order) - _MOST_STATES, 'more', 'more')}, with --html"


def _ordering(source: Source) -> Iterator[str]:
    if source.ordering is None:
        return
    rules, breaks = records(source.ordering.rules), source.ordering.breaks
    yield "Rules of ordering"
    counted = [
        [_rule(row), *(short(row[name]) for name in ("checked", "broken", "undecided"))]
        for row in rules
        if not row["unchecked"] or row["checked"] or row["broken"] or row["undecided"]
    ]
    layout = [Column("rule", least=20), *(Column(name, right=True) for name in ("checked", "broken", "undecided"))]
    yield from columns(layout, counted)
    for row in rules:
        if row["unchecked"]:
            yield from wrap(f"{_rule(row)} not checked: {shown(row['unchecked'])}", first="  - ")
    for row in records(breaks.head(_MOST_BREAKS)):
        where = f"{guest_of(row, source.guests).name} vCPU {row['vcpu']}, {source.clock.time(row['time_ns'])} UTC"
        yield from wrap(f"{_rule(row)}, {where}: {shown(row['story'])}", first="  - ")
    more = sum(row["broken"] for row in rules) - min(len(breaks), _MOST_BREAKS)
    if more > 0:
        yield f"  and {plural(more, 'break')} more, with --format json"


def _rule(row: Mapping[str, Any]) -> str:
    return shown(str(row["rule"])).replace("_", " ")


def bounds(row: Mapping[str, Any], quantile: str) -> str:
    """Return a quantile of a latency table's row as the interval that it is known within."""
    lower, upper = row[f"{quantile}_lower_ns"], row[f"{quantile}_upper_ns"]
    return "not known" if lower is None else interval(int(lower), None if upper is None else int(upper))


def _shutdowns(judgement: Judgement) -> Iterator[str]:
    own = other_shutdowns(judgement)
    if not own.empty:
        yield "Shutdowns that no request made"
        known = guests(judgement.vms)
        clock = Clock.of(judgement.meta)
        table = [
            [guest_of(row, known).name, str(row["vcpu"]), clock.when(row["time_ns"]), str(row["source"])]
            for row in records(own.head(MOST_ROWS))
        ]
        layout = [Column("guest", least=8), Column("vCPU", right=True), Column("UTC"), Column("source")]
        yield from columns(layout, table)
        for line in sources_told(own):
            yield from wrap(line, first="  ")
        if len(own) > MOST_ROWS:
            yield f"  and {plural(len(own) - MOST_ROWS, 'more', 'more')}, with --format json"


def _exposure(vms: pd.DataFrame) -> Iterator[str]:
    if vms.empty:
        return
    known = exposure(guests(vms))
    layout = [
        Column("guest", least=8),
        Column("pid", right=True),
        Column("VMM", least=8),
        Column("vCPUs", right=True),
        Column("a pending shutdown"),
    ]
    table = [
        [each.name, str(each.pid or "-"), each.vmm or "-", short(each.vcpus), survives(each)]
        for each in known[:MOST_ROWS]
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
