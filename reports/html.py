"""One HTML file that needs nothing else: no script, no font, no address. To be mailed, printed and kept.

Guests choose their names, so everything is escaped by the template, and a content security policy forbids the
page to load or run anything should that ever fail.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from reports import figures, judged, text
from reports.advice import findings, survives
from reports.document import records
from reports.words import Clock, duration, interval, plural, shown
from tracer.errors import BadRecording

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from analysis.judge import Judgement

#: Rows of a table, and lanes of the swimlane figure. Requests that need an operator come first.
MOST_ROWS = 200
MOST_LANES = 24
# Guests in the figure of exposure, and in the table beside it; those that would lose a shutdown come first.
_MOST_BARS, _MOST_GUESTS = 16, 50

_XLINK = "{http://www.w3.org/1999/xlink}href"
_LANE_INCHES, _MARGIN_INCHES = 0.46, 1.1


class Source(NamedTuple):
    """A judged recording, and what a page needs besides."""

    judgement: Judgement
    latency: pd.DataFrame  # the summary by request and end
    tell: Callable[[pd.DataFrame], pd.DataFrame]  # the story of some of its lifecycles


def write(path: Path, sources: Sequence[Source]) -> None:
    """Write the page about some recordings, whole or not at all."""
    content = page(sources).encode("utf-8", errors="backslashreplace")
    try:
        _replace(path, content)
    except OSError as error:
        raise BadRecording(
            f"the report {path} cannot be written: {error.strerror}",
            hint="name a file in a directory that you can write to",
        ) from error


# An older file stays until the new one is on the disk.
def _replace(path: Path, content: bytes) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # Ctrl-C too leaves nothing behind
            temporary.unlink(missing_ok=True)
            raise


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
        parts=sorted(parts, key=lambda part: order.index(part["headline"].tone)), plural=plural
    )


# --- what the template shows --------------------------------------------------------------------------------


# Everything about one recording; `prefix` keeps the ids of several apart.
def _part(source: Source, prefix: str) -> dict[str, Any]:
    judgement = source.judgement
    clock = Clock(judgement.meta["clock"])
    guests = judged.guests(judgement.vms)
    rows = judged.ranked(judgement.lifecycles)
    lanes = rows.head(MOST_LANES)
    story = source.tell(lanes)
    exposure = sorted(guests.values(), key=lambda guest: (guest.cap is not False, guest.cap is not None))
    own = judgement.shutdowns[judgement.shutdowns["source"] == "hardware"]
    waits = judged.waits(judgement.lifecycles)
    counts = {
        name.replace("_", " "): count for name, count in judgement.loss.as_json().items() if isinstance(count, int)
    }
    return {
        "id": prefix,
        "headline": judged.headline(judgement),
        "watched": judged.watched(judgement),
        "where": judged.where(judgement),
        "summary": {shown(str(end)): count for end, count in judgement.summary.items() if count},
        "verdicts": [_verdict(row, guests, clock) for row in records(rows.head(MOST_ROWS))],
        "more_verdicts": max(len(rows) - MOST_ROWS, 0),
        "findings": findings(judgement),
        "lanes": len(lanes),
        "more_lanes": len(rows) - len(lanes),
        "swimlanes": len(lanes)
        and _svg(
            lambda axes: figures.draw_swimlanes(lanes, story, guests, axes),
            _LANE_INCHES * len(lanes) + _MARGIN_INCHES,
            f"Swimlanes of {plural(len(lanes), 'request')}, from raise to end; the table below says the same.",
            f"{prefix}-lanes",
        ),
        "stories": list(_stories(lanes, story, guests, clock)),
        "latency": [
            {**row, **{name: text.bounds(row, name) for name in ("p50", "p90", "p99", "max")}}
            for row in records(source.latency)
        ],
        "latency_figure": len(waits)
        and _svg(
            lambda axes: figures.draw_latency(waits, axes),
            3.2,
            "Share of requests that had ended by a time, as a band between both bounds; the table below "
            "gives its quantiles.",
            f"{prefix}-latency",
        ),
        "shutdowns": [
            {
                "guest": judged.guest_of(row, guests).name,
                "vcpu": row["vcpu"],
                "time": clock.when(row["time_ns"]),
            }
            for row in records(own.head(MOST_ROWS))
        ],
        "more_shutdowns": max(len(own) - MOST_ROWS, 0),
        "exposure": [(guest, survives(guest)) for guest in exposure[:_MOST_GUESTS]],
        "more_exposure": max(len(exposure) - _MOST_GUESTS, 0),
        "exposure_figure": len(exposure)
        and _svg(
            lambda axes: figures.draw_exposure(exposure[:_MOST_BARS], axes),
            0.24 * min(len(exposure), _MOST_BARS) + 0.7,
            "vCPUs of each guest, by what a save would do to a pending shutdown; the table below says the same.",
            f"{prefix}-exposure",
        ),
        "losses": judged.losses(judgement),
        "loss_figure": any(counts.values())
        and _svg(
            lambda axes: figures.draw_losses(counts, axes),
            0.3 * sum(map(bool, counts.values())) + 0.7,
            "What the tracer could not record, by cause; the list below says the same.",
            f"{prefix}-loss",
        ),
        "plan": [
            {key: shown(str(entry[key])) if entry.get(key) else "" for key in ("fact", "hook", "unseen")}
            for entry in judgement.meta.get("plan") or ()
        ],
        "facts": judged.recording_facts(judgement),
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
def _svg(draw: Callable[[Axes], Axes], height: float, alternative: str, prefix: str) -> Markup:
    file = io.StringIO()
    with mpl.rc_context(figures.STYLE), warnings.catch_warnings():
        # The text stays text: the browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure = Figure(figsize=(10, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ET.fromstring(file.getvalue())
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
    root.attrib.update({"role": "img", "aria-label": alternative})
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
