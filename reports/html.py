"""One HTML file that needs nothing else: no script, no font, no address. To be mailed, printed and kept.

Guests choose their names, so everything is escaped by the template, and a content security policy forbids the
page to load or run anything should that ever fail.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from analysis.verdicts import ENDS
from reports import judged, pictures, text
from reports.advice import findings, survives
from reports.document import records
from reports.source import MOST_ROWS
from reports.words import Clock, duration, interval, plural, shown
from tracer.errors import BadRecording
from tracer.files import replace

if TYPE_CHECKING:
    import pandas as pd

    from reports.source import Source

# Rows of the table of verdicts that are seen at once.
_FIRST_ROWS = 20
# Guests in the table of exposure.
_MOST_GUESTS = 50

_XLINK = "{http://www.w3.org/1999/xlink}href"


def write(path: Path, sources: Sequence[Source]) -> None:
    """Write the page about some recordings, whole or not at all."""
    try:
        replace(path, content(sources))
    except OSError as error:
        raise BadRecording(
            f"the report {path} cannot be written: {error.strerror}",
            hint="name a file in a directory that you can write to",
        ) from error


def content(sources: Sequence[Source]) -> bytes:
    """Return the page as it is in a file."""
    return page(sources).encode("utf-8", errors="backslashreplace")


def page(sources: Sequence[Source]) -> str:
    """Return the page about some recordings, the most serious verdict first."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reports", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = [_part(source, f"r{number}") for number, source in enumerate(sources, start=1)]
    order = ("bad", "unsure", "good")
    return environment.get_template("report.html.j2").render(
        parts=sorted(parts, key=lambda part: order.index(part["headline"].tone)),
        plural=plural,
        first_rows=_FIRST_ROWS,
    )


# --- what the template shows --------------------------------------------------------------------------------


# Everything about one recording; `prefix` keeps the ids of several apart.
def _part(source: Source, prefix: str) -> dict[str, Any]:
    judgement, guests, clock = source.judgement, source.guests, source.clock
    exposure = judged.exposure(source.guests)
    own = judged.other_shutdowns(judgement)
    saves, more_saves = judged.blind_saves(judgement, guests, MOST_ROWS)
    return {
        "id": prefix,
        "headline": judged.headline(judgement),
        "watched": judged.watched(judgement),
        "where": judged.where(judgement),
        "summary": {shown(str(end)): count for end, count in judgement.summary.items() if count},
        "figures": {picture.name: _svg(picture, prefix) for picture in pictures.pictures(source)},
        "raised": len(judgement.lifecycles),
        "verdicts": [_verdict(row, guests, clock) for row in records(source.verdicts)],
        "more_verdicts": source.more_verdicts,
        "ends": [end for end in ENDS if end in source.others.columns],
        "others": [
            {**row, "request": shown(row["request"]), "raised_by": judged.mostly(row)}
            for row in records(source.others.head(MOST_ROWS))
        ],
        "dropped": judged.dropped(judgement.lifecycles),
        "findings": findings(judgement),
        "more_lanes": len(source.verdicts) + source.more_verdicts - len(source.lanes),
        "stories": list(_stories(source.lanes, source.story, guests, clock)) if len(source.lanes) else [],
        "latency": [
            {**_bounded(row, ("p50", "p90", "p99", "p999", "max")), "request": shown(row["request"])}
            for row in records(source.latency.head(MOST_ROWS))
        ],
        "unknown_latencies": source.unknown_latencies,
        "states": [
            {
                **_bounded(row, ("p50", "p99", "max")),
                "request": shown(row["request"]),
                "raised_in": judged.PLACES.get(row["raised_in"], shown(row["raised_in"])),
            }
            for row in records(source.states.head(MOST_ROWS))
        ],
        "maps": [
            {
                "request": shown(request),
                "figure": pictures.map_name(request),
                "rows": [
                    {**_bounded(row, ("p50", "p99", "max")), "begin": clock.when(row["begin_ns"])}
                    for row in records(source.series[request])
                ],
            }
            for request in source.heat
        ],
        "ordering": _ordering(source),
        "timeline": _timeline(source),
        "saves": [(save, clock.when(save.time_ns)) for save in saves],
        "more_saves": more_saves,
        "shutdowns": [
            {
                "guest": judged.guest_of(row, guests).name,
                "vcpu": row["vcpu"],
                "time": clock.when(row["time_ns"]),
                "source": row["source"],
            }
            for row in records(own.head(MOST_ROWS))
        ],
        "sources": judged.sources_told(own),
        "more_shutdowns": max(len(own) - MOST_ROWS, 0),
        "exposure": [(guest, survives(guest)) for guest in exposure[:_MOST_GUESTS]],
        "more_exposure": max(len(exposure) - _MOST_GUESTS, 0),
        "losses": judged.losses(judgement),
        "plan": [
            {key: shown(str(entry[key])) if entry.get(key) else "" for key in ("fact", "hook", "unseen")}
            for entry in judgement.meta.get("plan") or ()
        ],
        "facts": judged.recording_facts(judgement),
    }


# Quantiles of a row as the intervals that they are known within.
def _bounded(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {**row, **{name: text.bounds(row, name) for name in names}}


def _ordering(source: Source) -> dict[str, Any]:
    if source.ordering is None:
        return {}
    rules, breaks = source.ordering.rules, source.ordering.breaks
    titles = dict(zip(rules["rule"], rules["title"], strict=True))
    return {
        "rules": [
            {**row, "tone": "bad" if row["broken"] else "unsure" if row["undecided"] or row["unchecked"] else "good"}
            for row in records(rules)
        ],
        "breaks": [
            {
                "rule": titles.get(row["rule"], row["rule"]),
                "guest": judged.guest_of(row, source.guests).name,
                "vcpu": row["vcpu"],
                "request": shown(row["request"]),
                "time": source.clock.when(row["time_ns"]),
                "story": shown(row["story"]),
            }
            for row in records(breaks.head(MOST_ROWS))
        ],
        "more": max(int(rules["broken"].sum()) - min(len(breaks), MOST_ROWS), 0),
    }


def _timeline(source: Source) -> dict[str, Any]:
    timeline = source.timeline
    if timeline is None:
        return {}
    rows = timeline.rows.sort_values(["begin_ns", "end_ns"], kind="stable")
    return {
        "title": shown(timeline.title),
        "since": timeline.since,
        "rows": [
            {
                "track": shown(row["track"]),
                "name": "" if row["name"] == row["track"] else shown(row["name"]),
                "begin": duration(row["begin_ns"] - timeline.begin_ns),
                "length": duration(row["end_ns"] - row["begin_ns"]) if row["end_ns"] > row["begin_ns"] else "",
            }
            for row in records(rows.head(MOST_ROWS))
        ],
        "more": max(len(rows) - MOST_ROWS, 0),
    }


def _verdict(row: Mapping[str, Any], guests: Mapping[int, judged.Guest], clock: Clock) -> dict[str, Any]:
    return {
        **row,
        "guest": judged.guest_of(row, guests).name,
        "request": shown(row["request"]),
        "raised_by": shown(row["raised_by"]),
        "raised": clock.when(row["raised_ns"]),
        "wait": interval(*judged.wait(row)),
        "outcome": judged.outcome(row) + (", nested" if row["nested"] and row["end"] != "reflected" else ""),
        "why": shown(str(row["why"] or "")),
        "tone": {"lost": "bad", "undecided": "unsure"}.get(
            row["end"], "unsure" if row["stale"] or row["end"] == "open" else "good"
        ),
    }


# What the swimlanes show, in words: a row for each run of equal happenings.
def _stories(
    lanes: pd.DataFrame, story: pd.DataFrame, guests: Mapping[int, judged.Guest], clock: Clock
) -> Iterable[dict[str, Any]]:
    told = judged.stories(story)
    for row in records(lanes):
        part = told.get((row["vcpu_number"], row["request"], row["raised_ns"]))
        if part is None:
            continue
        what = part["what"].astype("object")
        run = (what != what.shift()).cumsum()
        steps = part.groupby(run, sort=True).agg(
            what=("what", "first"),
            count=("what", "size"),
            first=("time_ns", "first"),
            last=("time_ns", "last"),
        )
        raised_ns = row["raised_ns"]
        yield {
            "title": f"{judged.guest_of(row, guests).name}, vCPU {row['vcpu']}: "
            f"{shown(row['request'])} {judged.outcome(row)}",
            "raised": clock.when(raised_ns),
            "steps": [
                {
                    "what": shown(str(step["what"])).replace("_", " "),
                    "count": step["count"],
                    "first": duration(step["first"] - raised_ns),
                    "last": duration(step["last"] - raised_ns) if step["count"] > 1 else "",
                }
                for step in records(steps.iloc[:MOST_ROWS])
            ],
            "more": max(len(steps) - MOST_ROWS, 0),
        }


# --- figures as part of a page ------------------------------------------------------------------------------


# A figure as an <svg> element: without matplotlib's metadata, which holds addresses, and with ids of its own.
def _svg(picture: pictures.Picture, part: str) -> Markup:
    prefix = f"{part}-{picture.name}"
    root = ET.fromstring(pictures.svg(picture))
    for parent in root.iter():
        for child in [child for child in parent if child.tag.endswith(("metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            name: _own(name, value, prefix)
            for name, value in element.attrib.items()
            if name != "id" or _needed(element)
        }
        if _XLINK in element.attrib:
            element.set("href", element.attrib.pop(_XLINK))
    root.attrib.update({"role": "img", "aria-label": picture.alternative})
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    return Markup(ET.tostring(root, encoding="unicode"))  # ElementTree escapes text and attributes


# Groups are named only for people who edit the picture; definitions are referred to.
def _needed(element: ET.Element) -> bool:
    return element.tag not in ("g", "svg")


def _own(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    return (
        value.replace("url(#", f"url(#{prefix}-")
        if "url(#" in value
        else f"#{prefix}-{value[1:]}"
        if name == _XLINK
        else value
    )
