"""Figures: each function takes a table and axes, and returns the axes.

Drawn for print and for every eye: colours are Okabe and Ito's, and nothing is told by colour alone (markers,
hatches and words say it too). Names come from guests, so no text is ever parsed as mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from reports.advice import survives
from reports.document import records
from reports.judged import Guest, guest_of, outcome, stories
from reports.words import clip, duration, plural, short, shown, unit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from numpy.typing import NDArray

# M. Okabe and K. Ito, "Color Universal Design" (2008).
_ORANGE, _SKY, _GREEN = "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"
_INK, _DENSE, _FAINT, _PENDING = "#222222", "#5a5a5a", "#8a8a8a", "#dcdcdc"

#: Settings under which figures are drawn: text stays text, so that a browser shows every script and a reader
#: can search it.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvmreq",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "hatch.linewidth": 0.6,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class _Mark(NamedTuple):
    label: str
    marker: str
    colour: str
    filled: bool = True
    size: float = 7


# What a story tells between the raise and the end, other than returns to user space.
_MARKS: Mapping[str, _Mark] = {
    "save": _Mark("save that carried it", "^", _GREEN),
    "blind_save": _Mark("save that left it out", "v", _VERMILION, size=8),
    "reset": _Mark("reset", "s", _SKY, size=6),
    "restore": _Mark("restore", "D", _PURPLE, filled=False, size=6),
}
_ENDS: Mapping[str, _Mark] = {
    "lost": _Mark("lost", "X", _VERMILION, size=10),
    "undecided": _Mark("undecided", "h", _ORANGE, filled=False, size=9),
    "open": _Mark("open", ">", _INK, filled=False, size=8),
    "abandoned": _Mark("abandoned", "X", _INK, filled=False, size=8),
    "handed_over": _Mark("handed_over", "P", _GREEN, size=9),
}
_END = _Mark("", "o", _BLUE, size=8)

# Lanes are one unit high. Returns to user space hang from the middle of a lane; saves and resets
# stand on top.
_BAR, _ABOVE, _BELOW = 0.30, -0.27, 0.30
# Where the longest lane is this many times the shortest, or the typical step, the time axis is logarithmic.
_SPREAD = 30
# Pixels, at 100 to the inch, below which two strokes are not told apart.
_CLOSE = 2.5
_NAME = 26


# --- swimlanes ----------------------------------------------------------------------------------------------


def draw_swimlanes(lifecycles: pd.DataFrame, story: pd.DataFrame, guests: Mapping[int, Guest], axes: Axes) -> Axes:
    """Draw each lifecycle as a lane: its raise, returns to user space, saves, resets and end, by time.

    Takes the lifecycles in the order to draw, from the top, and ``story``: ``vcpu_number``, ``request``,
    ``raised_ns``, ``time_ns``, ``what``. Time is relative to the raise of each request.
    """
    rows = records(lifecycles)
    if not rows:
        return _nothing(axes, "no request was raised")
    told = stories(story)
    lanes = [_lane(row, told.get((row["vcpu_number"], row["request"], row["raised_ns"]))) for row in rows]

    axes.set_ylim(len(lanes) - 0.4, -0.6)
    _time_axis(axes, lanes)
    for place, (row, lane) in enumerate(zip(rows, lanes, strict=True)):
        _draw_lane(axes, place, row, lane)

    names = [f"{clip(guest_of(row, guests).name, _NAME)}  vCPU {row['vcpu']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=_FAINT, linewidth=0.8, zorder=0)
    axes.legend(
        handles=_swimlane_legend(axes, lanes),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        frameon=False,
        handletextpad=0.5,
        columnspacing=1.4,
        borderaxespad=0.2,
    )
    return axes


class _Lane(NamedTuple):
    before: float  # from the last reading without the request, at most 0
    ended: tuple[float, float]  # last seen with, first seen without; the same where it has not ended
    marks: Mapping[str, Any]  # by what happened: times

    def times(self) -> NDArray[np.float64]:
        return np.concatenate([np.array(self.ended), *self.marks.values()])


# The story of one request, in nanoseconds since its raise.
def _lane(row: Mapping[str, Any], story: pd.DataFrame | None) -> _Lane:
    raised = row["raised_ns"]
    after = row["raised_after_ns"] or 0
    last = max(row["ended_after_ns"] - raised, 0)
    ended = row["ended_ns"] - raised if row["ended_ns"] >= 0 else last
    marks = {}
    for what in ("userspace_exit", *_MARKS):
        times = story.loc[story["what"] == what, "time_ns"] if story is not None else ()
        marks[what] = np.asarray(times, dtype="int64").astype(float) - raised
    return _Lane(float(after - raised), (float(last), float(max(ended, last))), marks)


# One axis for lanes of microseconds and of minutes: linear where that shows every lane, else linear near zero
# and logarithmic beyond.
def _time_axis(axes: Axes, lanes: Sequence[_Lane]) -> None:
    times = np.concatenate([lane.times() for lane in lanes])
    times = times[times > 0]
    longest = float(times.max()) if times.size else 1_000.0
    ends = np.array([max(float(lane.times().max()), 1.0) for lane in lanes])
    before = min(max((-lane.before for lane in lanes), default=0.0), longest)
    if longest / float(ends.min()) <= _SPREAD and longest / float(np.median(times) if times.size else 1) <= _SPREAD:
        name, size = unit(longest)
        axes.set_xlim(-min(max(before * 1.1, longest * 0.03), longest * 0.12), longest * 1.03)
        axes.set_xticks(_round_times(axes.get_xlim()[1], size))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: f"{ns / size:g}"))
        axes.set_xlabel(f"time since the raise ({name})")
    else:
        least = int(np.floor(np.log10(max(float(np.percentile(times, 2)), 1.0))))
        most = int(np.ceil(np.log10(longest)))
        axes.set_xscale("symlog", linthresh=10.0**least, linscale=0.6)
        axes.set_xlim(-0.35 * 10.0**least, longest * 1.25)
        powers = range(least, most + 1, max(1, (most - least) // 8))
        axes.set_xticks([0, *(10.0**power for power in powers if 10.0**power <= longest * 1.25)])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: "0" if ns == 0 else duration(int(ns))))
        axes.set_xlabel("time since the raise (logarithmic)")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)


# Round numbers of a unit, from 0 to the end of an axis.
def _round_times(end: float, size: int) -> NDArray[np.float64]:
    ticks = np.asarray(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(0, end / size)) * size
    return ticks[ticks <= end]


def _draw_lane(axes: Axes, place: int, row: Mapping[str, Any], lane: _Lane) -> None:
    left = axes.get_xlim()[0]
    last, ended = lane.ended
    axes.barh(place, last, height=_BAR, color=_PENDING, edgecolor=_FAINT, linewidth=0.6, zorder=1)
    # Where a bound is known only as an interval, a hatch covers it.
    for start, stop in ((max(lane.before, left), 0.0), (last, ended)):
        if stop > start:
            axes.barh(
                place,
                stop - start,
                left=start,
                height=_BAR,
                facecolor="white",
                edgecolor=_FAINT,
                hatch="/////",
                linewidth=0.6,
                zorder=1,
            )
    for start, stop in _runs(axes, lane.marks["userspace_exit"]):
        height = _BAR / 2 + _BELOW
        if start == stop:
            axes.vlines(start, place - _BAR / 2, place + _BELOW, color=_INK, linewidth=1.1, zorder=2)
        else:
            axes.barh(
                place - _BAR / 2,
                stop - start,
                left=start,
                height=height,
                align="edge",
                color=_DENSE,
                edgecolor=_INK,
                linewidth=1.1,
                zorder=2,
            )
    for what, mark in _MARKS.items():
        times = _apart(axes, lane.marks[what])
        axes.plot(times, np.full(len(times), place + _ABOVE), zorder=3, **_style(mark))
    end = _ENDS.get(row["end"], _END)
    axes.plot([ended], [place], zorder=4, clip_on=False, **_style(end))
    axes.annotate(
        outcome(row),
        (1.01, place),
        xycoords=axes.get_yaxis_transform(),
        va="bottom",
        fontweight="bold",
        color=_VERMILION if row["end"] == "lost" else _INK,
        parse_math=False,
    )
    axes.annotate(
        _counts(row),
        (1.01, place),
        xycoords=axes.get_yaxis_transform(),
        va="top",
        fontsize=7.5,
        color="#555555",
        parse_math=False,
    )


# Marks that a figure cannot show apart are drawn once; the counts beside the lane are exact.
def _apart(axes: Axes, times: NDArray[np.float64]) -> NDArray[np.float64]:
    return times[np.unique(np.round(_pixels(axes, times)), return_index=True)[1]]


# Returns to user space that are too close to be told apart become one block, from the first to the last.
def _runs(axes: Axes, times: NDArray[np.float64]) -> list[tuple[float, float]]:
    times = np.sort(times)
    starts = np.flatnonzero(np.diff(_pixels(axes, times), prepend=-np.inf) > _CLOSE)
    return [(float(run[0]), float(run[-1])) for run in np.split(times, starts[1:]) if len(run)]


def _pixels(axes: Axes, times: NDArray[np.float64]) -> NDArray[np.float64]:
    points = np.column_stack([times, np.zeros_like(times)])
    return np.asarray(axes.transData.transform(points), dtype=float)[:, 0]


def _counts(row: Mapping[str, Any]) -> str:
    saves = row["saves"] + row["blind_saves"]
    parts = [f"{short(row['userspace_exits'])} returns" if row["userspace_exits"] != 1 else "1 return"]
    if saves:
        parts.append(
            plural(saves, "save")
            if not row["blind_saves"]
            else f"{short(row['blind_saves'])} of {plural(saves, 'save')} blind"
        )
    return f"raised by {shown(row['raised_by'])}\n{', '.join(parts)}"


def _swimlane_legend(axes: Axes, lanes: Sequence[_Lane]) -> list[Any]:
    handles: list[Any] = [
        Patch(facecolor=_PENDING, edgecolor=_FAINT, label="pending"),
        Patch(facecolor="white", edgecolor=_FAINT, hatch="/////", label="raised or ended in here"),
        Line2D([], [], color=_INK, marker="|", linestyle="none", markersize=9, label="return to user space"),
    ]
    if any(start < stop for lane in lanes for start, stop in _runs(axes, lane.marks["userspace_exit"])):
        handles.append(Patch(facecolor=_DENSE, edgecolor=_INK, label="returns too close to draw apart"))
    return handles + [
        Line2D([], [], label=mark.label, **_style(mark))
        for what, mark in _MARKS.items()
        if any(len(lane.marks[what]) for lane in lanes)
    ]


# --- the others ---------------------------------------------------------------------------------------------

_LINES = (
    ("-", _BLUE, "//"),
    ("--", _VERMILION, "\\\\"),
    ("-.", _GREEN, ".."),
    (":", _PURPLE, "xx"),
    ((0, (5, 1, 1, 1, 1, 1)), _ORANGE, "--"),
)


def draw_latency(waits: pd.DataFrame, axes: Axes) -> Axes:
    """Draw which share of requests had ended by what time, as a band between both bounds of each latency.

    Takes ``request``, ``end``, ``lower_ns`` and ``upper_ns``, a row for each request. More kinds of end than
    the eye can tell apart are left to the table: the most frequent are drawn.
    """
    if waits.empty:
        return _nothing(axes, "no request ended while it was watched")
    several = waits["request"].nunique() > 1
    groups = sorted(waits.groupby(["request", "end"], observed=True), key=lambda item: -len(item[1]))[: len(_LINES)]
    lowest = max(float(waits["lower_ns"][waits["lower_ns"] > 0].min()) if (waits["lower_ns"] > 0).any() else 1.0, 1.0)
    highest = max(float(waits["upper_ns"].max()), lowest)
    logarithmic = highest / lowest > _SPREAD
    for place, ((request, end), part) in enumerate(groups):
        line, colour, hatch = _LINES[place % len(_LINES)]
        count = len(part)
        shares = np.arange(count + 1) / count
        low, high = (np.sort(part[name].to_numpy(dtype=float)) for name in ("lower_ns", "upper_ns"))
        start = lowest * 0.5 if logarithmic else 0.0
        grid = np.unique(np.concatenate([[start], low, high, [highest * 1.3]]))
        early, late = (shares[np.searchsorted(values, grid, side="right")] for values in (low, high))
        axes.fill_between(
            grid,
            late,
            early,
            step="post",
            facecolor=colour,
            alpha=0.22,
            hatch=hatch,
            edgecolor=colour,
            linewidth=0,
        )
        name = f"{shown(str(request))} {end}" if several else str(end)
        for shares_drawn in (early, late):
            axes.step(grid, shares_drawn, where="post", color=colour, linestyle=line, linewidth=1.4)
        axes.plot([], [], color=colour, linestyle=line, linewidth=1.8, label=f"{name} ({count:,})")
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(lowest * 0.5, highest * 1.3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: duration(round(ns))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("time from raise to end (logarithmic)")
    else:
        name, size = unit(highest)
        axes.set_xlim(0, highest * 1.08)
        axes.set_xticks(_round_times(highest * 1.08, size))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: f"{ns / size:g}"))
        axes.set_xlabel(f"time from raise to end ({name})")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.set_ylabel("requests that had ended")
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    for text in axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False).get_texts():
        _plain(text)
    return axes


def draw_exposure(guests: Sequence[Guest], axes: Axes) -> Axes:
    """Draw the vCPUs of each guest, by whether a save would lose or keep a pending shutdown."""
    if not guests:
        return _nothing(axes, "no guest was seen")
    looks: Mapping[bool | None, tuple[str, str]] = {
        True: (_GREEN, ""),
        False: (_VERMILION, "////"),
        None: ("white", ".."),
    }
    for place, guest in enumerate(guests):
        colour, hatch = looks[guest.cap]
        axes.barh(
            place,
            max(guest.vcpus, 0),
            height=0.6,
            facecolor=colour,
            hatch=hatch,
            edgecolor=_INK,
            linewidth=0.6,
        )
        axes.annotate(
            survives(guest),
            (guest.vcpus, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            parse_math=False,
        )
    axes.set_yticks(range(len(guests)), [clip(guest.name, _NAME) for guest in guests], parse_math=False)
    axes.set_ylim(len(guests) - 0.4, -0.6)
    axes.set_xlim(0, max(4, *(guest.vcpus for guest in guests)) * 1.3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("vCPUs")
    return axes


def draw_losses(counts: Mapping[str, int], axes: Axes) -> Axes:
    """Draw what the tracer could not record, by cause."""
    present = {name: count for name, count in counts.items() if count}
    if not present:
        return _nothing(axes, "nothing was lost")
    axes.barh(
        list(present),
        list(present.values()),
        height=0.6,
        facecolor=_ORANGE,
        hatch="\\\\",
        edgecolor=_INK,
        linewidth=0.6,
    )
    for place, count in enumerate(present.values()):
        axes.annotate(f"{count:,}", (count, place), (5, 0), textcoords="offset points", va="center")
    axes.set_ylim(len(present) - 0.4, -0.6)
    axes.set_xlim(0, max(present.values()) * 1.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short(int(count))))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("events, vCPUs or hook runs not recorded")
    return axes


# --- tools --------------------------------------------------------------------------------------------------


def _nothing(axes: Axes, why: str) -> Axes:
    axes.set_axis_off()
    axes.annotate(why, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color="#555555")
    return axes


def _plain(text: Text) -> Text:
    text.set_parse_math(False)
    return text


def _style(mark: _Mark) -> dict[str, Any]:
    return {
        "marker": mark.marker,
        "markersize": mark.size,
        "markerfacecolor": mark.colour if mark.filled else "white",
        "markeredgecolor": mark.colour if not mark.filled else "white",
        "markeredgewidth": 1.3 if not mark.filled else 0.6,
        "linestyle": "none",
    }
