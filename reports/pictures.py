"""The figures of a report: which there are, what each shows in words, and how they become files.

A figure that has nothing to show is not there. The page and the single files draw the same ones.
"""

from __future__ import annotations

import reports.unconfigured  # noqa: F401 - before matplotlib: see there

# isort: split
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from reports import figures
from reports.judged import exposure
from reports.words import plural, shown
from tracer.errors import BadRecording
from tracer.files import replace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from reports.source import Source

# Guests in the figure of exposure.
_MOST_BARS = 16
_LANE_INCHES, _MARGIN_INCHES = 0.46, 1.1
# Of a PNG: sharp on paper half a page wide.
_DOTS_PER_INCH = 150
_SVG_METADATA: Any = {"Date": None, "Creator": None, "Format": None, "Type": None}


class Picture(NamedTuple):
    """A figure: its name, which is a file's too; what draws it; its height in inches; what it shows, in words."""

    name: str
    draw: Callable[[Axes], Axes]
    height: float
    alternative: str


def pictures(source: Source) -> Iterator[Picture]:
    """Yield the figures of a recording, in the order in which a page shows them."""
    waits, states = source.waits, source.states
    if len(source.lanes):
        yield Picture(
            "requests",
            partial(figures.draw_swimlanes, source.lanes, source.story, source.guests),
            _lanes(len(source.lanes)),
            f"Swimlanes of {plural(len(source.lanes), 'request')}, from raise to end; the table below says the same.",
        )
    if len(waits):
        requests = waits["request"].nunique()
        yield Picture(
            "latency",
            partial(figures.draw_latency, waits),
            _lanes(min(requests, figures.MOST_CURVES)) if requests > 1 else 3.2,
            "Share of requests that had ended by a time, as a band between both bounds; the table below "
            "gives its quantiles.",
        )
    if len(states):
        yield Picture(
            "states",
            partial(figures.draw_states, states),
            _lanes(states["request"].nunique()) - 0.4,
            "Requests by where the vCPU was when they were raised, each cell with its count and the time that 99 % "
            "did not exceed; the table below says the same.",
        )
    for request, heat in source.heat.items():
        yield Picture(
            map_name(request),
            partial(figures.draw_heat, heat, start_ns=int(source.judgement.meta["started_ns"])),
            3.2,
            f"How many {shown(request)} requests waited how long, and when; the table below gives quantiles by time.",
        )
    if source.timeline is not None:
        lanes = source.timeline.rows["track"].nunique()
        yield Picture(
            "timeline",
            partial(figures.draw_timeline, source.timeline),
            0.38 * max(lanes, 3) + _MARGIN_INCHES,
            "What one vCPU did, which requests were pending meanwhile, and who kicked it; the table below says the "
            "same.",
        )
    guests = exposure(source.guests)
    if guests:
        yield Picture(
            "exposure",
            partial(figures.draw_exposure, guests[:_MOST_BARS]),
            0.24 * min(len(guests), _MOST_BARS) + 0.7,
            "vCPUs of each guest that runs, and of those that ended, by what a save would do to a pending shutdown; "
            "the table below says the same.",
        )
    counts = losses(source)
    if counts:
        yield Picture(
            "losses",
            partial(figures.draw_losses, counts),
            0.3 * len(counts) + 0.7,
            "What the tracer could not record, by cause; the list below says the same.",
        )


def losses(source: Source) -> dict[str, int]:
    """Return how much was lost by cause, where something was."""
    told = source.judgement.loss.as_json().items()
    return {name.replace("_", " "): count for name, count in told if isinstance(count, int) and count}


def _lanes(count: int) -> float:
    return _LANE_INCHES * count + _MARGIN_INCHES


def map_name(request: str) -> str:
    """Return the name of the heat map of a request."""
    return f"heat-{_file(request)}"


# Names of requests are words of KVM, but come from a file.
def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:40]


# --- as files -----------------------------------------------------------------------------------------------


def svg(picture: Picture) -> bytes:
    """Return a figure as SVG in which text is text, without anything that differs from run to run."""
    return _rendered(picture, "svg", metadata=_SVG_METADATA)


def png(picture: Picture) -> bytes:
    """Return a figure as PNG."""
    return _rendered(picture, "png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def _rendered(picture: Picture, style: str, **options: Any) -> bytes:
    file = io.BytesIO()
    with mpl.rc_context(figures.STYLE), _any_script():
        figure = Figure(figsize=(10, picture.height), layout="constrained")
        picture.draw(figure.add_subplot())
        figure.savefig(file, format=style, **options)
    return file.getvalue()


@contextmanager
def _any_script() -> Iterator[None]:
    with warnings.catch_warnings():
        # In SVG the text stays text: the reader has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def write(directory: Path, sources: Sequence[Source]) -> list[Path]:
    """Write every figure as NAME.png and NAME.svg and return what was written; several recordings have a prefix each.

    The directory is made if it is not there. A file that exists is replaced, whole or not at all.
    """
    written: list[Path] = []
    path = directory
    try:
        directory.mkdir(exist_ok=True)
        for prefix, source in zip(_prefixes(sources), sources, strict=True):
            for picture in pictures(source):
                for style, render in (("png", png), ("svg", svg)):
                    path = directory / f"{prefix}{picture.name}.{style}"
                    replace(path, render(picture))
                    written.append(path)
    except OSError as error:
        raise BadRecording(
            f"the figure {path} cannot be written: {error.strerror}",
            hint="name a directory that you can write to; what was written before is whole",
        ) from error
    return written


# The name of the recording, with its place among those of the same name.
def _prefixes(sources: Sequence[Source]) -> list[str]:
    if len(sources) == 1:
        return [""]
    names = [_file(source.name) or "recording" for source in sources]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name}-{place}-" if name in twice else f"{name}-" for place, name in enumerate(names, start=1)]
