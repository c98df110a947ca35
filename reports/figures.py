"""Figures: each function takes a table and axes, and returns the axes.

Drawn for print and for every eye: colours are Okabe and Ito's, and nothing is told by colour alone (markers,
hatches and words say it too). Names come from guests, so no text is ever parsed as mathematics.
"""

from __future__ import annotations

import reports.unconfigured  # noqa: F401 - before matplotlib: see there

# isort: split
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from reports.advice import survives
from reports.document import records
from reports.judged import PLACES, Guest, guest_of, outcome, stories
from reports.words import clip, duration, interval, plural, short, shown, unit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from numpy.typing import NDArray

    from reports.source import Timeline

# M. Okabe and K. Ito, "Color Universal Design" (2008).
_ORANGE, _SKY, _GREEN = "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"
_INK, _DENSE, _FAINT, _PENDING = "#222222", "#5a5a5a", "#8a8a8a", "#dcdcdc"
_SOFT, _GRID = "#555555", "#ececec"
# Light to dark: what is more is darker, also in print without colours.
_RAMP = ("#eaf3fa", "#a9d4ee", _SKY, _BLUE, "#003f66", "#001c2e")

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
    "written": _Mark("registers written", "s", _PURPLE, filled=False, size=6),
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
# Where a legend stands: above the axes, so that it never covers what is drawn.
_ABOVE_AXES: Any = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 4,
    "frameon": False,
    "handletextpad": 0.5,
    "columnspacing": 1.4,
    "borderaxespad": 0.2,
}


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
    axes.legend(handles=_swimlane_legend(axes, lanes), **_ABOVE_AXES)
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
    # Without any time, requests were raised by the last events and are open.
    if not times.size or max(longest / float(ends.min()), longest / float(np.median(times))) <= _SPREAD:
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
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


# Round numbers of a unit, from the beginning to the end of an axis.
def _round_times(end: float, size: int, begin: float = 0.0) -> NDArray[np.float64]:
    ticks = np.asarray(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(begin / size, end / size)) * size
    return ticks[(ticks >= begin) & (ticks <= end)]


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
        color=_SOFT,
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


# --- latency ------------------------------------------------------------------------------------------------

_LINES = (
    ("-", _BLUE, "//"),
    ("--", _VERMILION, "\\\\"),
    ("-.", _GREEN, ".."),
    (":", _PURPLE, "xx"),
    ((0, (5, 1, 1, 1, 1, 1)), _ORANGE, "--"),
)
#: Requests that the figure of latencies has room for.
MOST_CURVES = 12
# Places at which a curve of many requests is drawn: as many as a line of print can show.
_STEPS_OF_CURVE = 300
# Height of a curve in its lane, which is one unit high.
_CURVE = 0.78


def draw_latency(waits: pd.DataFrame, axes: Axes) -> Axes:
    """Draw which share of requests had ended by what time, as a band between both bounds of each latency.

    Takes ``request``, ``end``, ``lower_ns`` and ``upper_ns``, a row for each request. Ends of one request share the
    axes; several requests have a lane each, the slowest one on top. What there is no room for is left to the table:
    the most frequent are drawn.
    """
    if waits.empty:
        return _nothing(axes, "no request ended while it was watched")
    if waits["request"].nunique() > 1:
        return _draw_curves_in_lanes(waits, axes)
    groups = sorted(waits.groupby("end", observed=True), key=lambda item: -len(item[1]))[: len(_LINES)]
    lowest, highest = _span(waits)
    logarithmic = highest / lowest > _SPREAD
    _latency_axis(axes, lowest, highest, logarithmic=logarithmic)
    for (line, colour, hatch), (end, part) in zip(_LINES, groups, strict=False):
        grid, early, late = _curves(part, lowest, highest, logarithmic=logarithmic)
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
        for shares in (early, late):
            axes.step(grid, shares, where="post", color=colour, linestyle=line, linewidth=1.4)
        axes.plot([], [], color=colour, linestyle=line, linewidth=1.8, label=f"{end} ({len(part):,})")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.set_ylabel("requests that had ended")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for text in axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False).get_texts():
        _plain(text)
    return axes


# Bands that lie on top of each other cannot be read: a lane for each request, over one axis of time.
def _draw_curves_in_lanes(waits: pd.DataFrame, axes: Axes) -> Axes:
    sizes = waits["request"].value_counts()
    frequent = list(sizes.index[:MOST_CURVES])
    parts = {request: waits[waits["request"] == request] for request in frequent}
    tail = {request: _at_most(part["upper_ns"], 0.99) for request, part in parts.items()}
    order = sorted(frequent, key=lambda request: -tail[request])
    lowest, highest = _span(waits)
    logarithmic = highest / lowest > _SPREAD
    _latency_axis(axes, lowest, highest, logarithmic=logarithmic)
    for place, request in enumerate(order):
        part, base = parts[request], place + _CURVE / 2
        grid, early, late = _curves(part, lowest, highest, logarithmic=logarithmic)
        for share, look in ((0.0, "-"), (0.5, ":"), (1.0, "-")):
            axes.axhline(base - share * _CURVE, color=_GRID, linestyle=look, linewidth=0.8, zorder=0)
        axes.fill_between(
            grid,
            base - late * _CURVE,
            base - early * _CURVE,
            step="post",
            facecolor=_SKY,
            alpha=0.45,
            linewidth=0,
            zorder=1,
        )
        for shares, line in ((early, "--"), (late, "-")):
            axes.step(grid, base - shares * _CURVE, where="post", color=_BLUE, linestyle=line, linewidth=1.2, zorder=2)
        axes.annotate(
            f"{len(part):,} ended\n99 % {interval(_at_most(part['lower_ns'], 0.99), tail[request])}",
            (1.01, place),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=7.5,
            color=_SOFT,
            parse_math=False,
        )
    names = [clip(shown(str(request)), _NAME) for request in order]
    axes.set_yticks(range(len(order)), names, parse_math=False)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(
        handles=[
            Line2D([], [], color=_BLUE, linestyle="--", label="had ended, at most"),
            Line2D([], [], color=_BLUE, linestyle="-", label="had ended, at least"),
            Patch(facecolor=_SKY, alpha=0.45, label="the true share is in here; a lane is 0 to 100 %"),
        ],
        **_ABOVE_AXES,
    )
    return axes


# Both shares at each place of a grid: by the lower bounds, and by the upper ones. A curve of few requests is exact.
def _curves(part: pd.DataFrame, lowest: float, highest: float, *, logarithmic: bool) -> tuple[Any, Any, Any]:
    low, high = (np.sort(part[name].to_numpy(dtype=float)) for name in ("lower_ns", "upper_ns"))
    start, stop = (lowest * 0.5 if logarithmic else 0.0), highest * 1.3
    grid = np.unique(np.concatenate([[start], low, high, [stop]]))
    if len(grid) > _STEPS_OF_CURVE:
        grid = np.geomspace(start, stop, _STEPS_OF_CURVE) if logarithmic else np.linspace(start, stop, _STEPS_OF_CURVE)
    early, late = (np.searchsorted(values, grid, side="right") / len(values) for values in (low, high))
    told = np.ones(len(grid), bool)
    told[1:-1] = (early[1:-1] != early[:-2]) | (late[1:-1] != late[:-2])
    return grid[told], early[told], late[told]


def _span(waits: pd.DataFrame) -> tuple[float, float]:
    lower, upper = waits["lower_ns"].to_numpy(dtype=float), waits["upper_ns"].to_numpy(dtype=float)
    least = lower[lower > 0] if (lower > 0).any() else upper[upper > 0]
    lowest = max(float(least.min()) if least.size else 1.0, 1.0)
    return lowest, max(float(upper.max()), lowest)


def _at_most(values: pd.Series[Any], share: float) -> int:
    return int(np.quantile(values.to_numpy(), share, method="higher"))


def _latency_axis(axes: Axes, lowest: float, highest: float, *, logarithmic: bool) -> None:
    label = "time from raise to end"
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(lowest * 0.5, highest * 1.3)
        axes.set_xticks(_powers(lowest * 0.5, highest * 1.3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: _round_time(ns)))
        axes.set_xlabel(f"{label} (logarithmic)")
    else:
        name, size = unit(highest)
        axes.set_xlim(0, highest * 1.08)
        axes.set_xticks(_round_times(highest * 1.08, size))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: f"{ns / size:g}"))
        axes.set_xlabel(f"{label} ({name})")
    axes.xaxis.set_minor_locator(NullLocator())


# Times beyond which seconds are no longer what people count in.
_LONG = ((60_000_000_000, "min"), (3_600_000_000_000, "h"), (86_400_000_000_000, "d"))


# Round times within a logarithmic axis, at most 9 of them: powers of ten of a unit; where these are too few, halves and
# fifths as well.
def _powers(low: float, high: float) -> list[float]:
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [step * 10.0**power for power in range(first, min(last, 10) + 1) for step in steps]
        ticks = [tick for tick in ticks if tick < _LONG[0][0]]
        for (size, _), (end, _) in pairwise((*_LONG, (_LONG[-1][0] * 10**6, ""))):
            ticks += [step * size * 10.0**power for power in range(6) for step in steps]
            ticks = [tick for tick in ticks if tick < end]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 2:
            break
    return ticks[:: len(ticks) // 9 + 1]


def _round_time(ns: float) -> str:
    name, size = next(((name, size) for size, name in reversed(_LONG) if ns >= size), unit(ns))
    return f"{ns / size:g} {name}"


# --- latency over time, and by state ------------------------------------------------------------------------


# Steps of the colours of counts: a legend can name so many, and an eye tell them apart.
_HEAT_STEPS = 6


def draw_heat(heat: pd.DataFrame, axes: Axes, *, start_ns: int) -> Axes:
    """Draw how many requests waited how long, and when: a map of time and latency, darker where there are more.

    Takes ``request``, ``begin_ns``, ``end_ns``, ``low_ns``, ``high_ns`` and ``count``, a row for each cell that is not
    empty; cells of several requests are added up. The latencies are upper bounds. ``start_ns``: the 0 of the time axis.
    """
    if heat.empty:
        return _nothing(axes, "no request ended while it was watched")
    cells = heat.groupby(["begin_ns", "end_ns", "low_ns", "high_ns"], sort=False)["count"].sum().reset_index()
    left, right, low, high = (cells[name].to_numpy(dtype=float) for name in ("begin_ns", "end_ns", "low_ns", "high_ns"))
    left, right, count = left - start_ns, right - start_ns, cells["count"].to_numpy(dtype=np.int64)
    low, high = np.maximum(low, 1.0), np.minimum(np.maximum(high, 2.0), np.maximum(low, 1.0) * 2)
    edges = _count_steps(int(count.max()))
    shades = LinearSegmentedColormap.from_list("counts", _RAMP)(np.linspace(0.08, 1.0, len(edges) - 1))
    # One path for each shade: a figure of thousands of cells stays a small file.
    for step, shade in enumerate(shades):
        chosen = (count >= edges[step]) & (count < edges[step + 1])
        if chosen.any():
            corners = [left, low, right, low, right, high, left, high]
            path = np.stack([each[chosen] for each in corners], axis=1).reshape(-1, 4, 2)
            axes.add_patch(PathPatch(_boxes(path), facecolor=shade, edgecolor=shade, linewidth=0.2))
    name, size = unit(float(right.max()))
    axes.set_xlim(left.min(), right.max())
    axes.xaxis.set_major_locator(FixedLocator(_round_times(float(right.max()), size, float(left.min())).tolist()))
    axes.set_xlim(left.min(), right.max())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: f"{ns / size:g}"))
    axes.set_xlabel(f"time of the raise since the recording began ({name})")
    axes.set_yscale("log")
    # At least a power of ten, so that a step is never as high as the figure.
    spread = max(1.2, float(np.sqrt(10 * low.min() / high.max())))
    lowest, highest = float(low.min()) / spread, float(high.max()) * spread
    axes.set_ylim(lowest, highest)
    axes.set_yticks(_powers(lowest, highest))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ns, _: _round_time(ns)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("from raise to end, at most")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    requests = heat["request"].unique()
    if len(requests) == 1:
        axes.set_title(shown(str(requests[0])), loc="left", fontsize=9, fontweight="bold", parse_math=False)
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(
        ScalarMappable(BoundaryNorm(np.arange(len(edges)), len(shades)), ListedColormap(shades)),
        ax=axes,
        ticks=np.arange(len(edges) - 1) + 0.5,
        pad=0.02,
        aspect=14,
    )
    bar.ax.set_yticklabels([_from_to(edges[step], edges[step + 1] - 1) for step in range(len(edges) - 1)])
    bar.ax.tick_params(length=0)
    bar.set_label("requests in a cell")
    return axes


def _boxes(corners: NDArray[np.float64]) -> Path:
    count = len(corners)
    points = np.concatenate([corners, corners[:, :1]], axis=1).reshape(-1, 2)
    codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], count)
    return Path(points, codes)


# Bounds of classes of counts from 1 to the largest one: powers, each class [bound, next bound).
def _count_steps(most: int) -> list[int]:
    steps = min(_HEAT_STEPS, most)
    bounds = {1, most + 1, *(round((most + 1) ** (step / steps)) for step in range(1, steps))}
    return sorted(bounds)


def _from_to(least: int, most: int) -> str:
    return f"{short(least)}" if least == most else f"{short(least)} to {short(most)}"


def draw_states(states: pd.DataFrame, axes: Axes) -> Axes:
    """Draw a table of requests and of where the vCPU was when they were raised, shaded by the tail of the latency.

    Takes ``request``, ``raised_in``, ``count``, ``p99_lower_ns`` and ``p99_upper_ns``. A cell says how many there were
    and which time 99 % of them did not exceed; the darker, the longer.
    """
    if states.empty:
        return _nothing(axes, "no request was raised")
    present = set(states["raised_in"])
    columns = [*(state for state in PLACES if state in present), *sorted(present - set(PLACES))]
    order = states.groupby("request", sort=False)["count"].sum().sort_values(ascending=False, kind="stable")
    rows = list(order.index)
    cells = {(row["request"], row["raised_in"]): row for row in records(states)}
    tails = [float(row["p99_upper_ns"]) for row in cells.values() if row["p99_upper_ns"]]
    lowest, highest = (np.log10(min(tails)), np.log10(max(tails))) if tails else (0.0, 1.0)
    shade = LinearSegmentedColormap.from_list("tails", _RAMP)
    for place, request in enumerate(rows):
        for at, state in enumerate(columns):
            cell = cells.get((request, state))
            if cell is None:
                axes.annotate("none", (at, place), ha="center", va="center", fontsize=8, color=_FAINT)
                continue
            tail = cell["p99_upper_ns"]
            # Where all are alike none is dark; the darkest shades leave no room for words.
            level = 0.85 * (np.log10(tail) - lowest) / max(highest - lowest, 1.0) if tail else 0.0
            colour = shade(level) if tail else "white"
            axes.add_patch(Rectangle((at - 0.5, place - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
            told = "time not known" if tail is None else f"99 % {interval(int(cell['p99_lower_ns']), int(tail))}"
            axes.annotate(
                f"{short(cell['count'])}\n{told}",
                (at, place),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if level > 0.55 else _INK,
                parse_math=False,
            )
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [PLACES.get(state, shown(str(state))) for state in columns], parse_math=False)
    axes.set_yticks(range(len(rows)), [clip(shown(str(request)), _NAME) for request in rows], parse_math=False)
    axes.set_xlabel(
        "how many were raised there, and what 99 % of them did not exceed: the darker, the longer", fontsize=8
    )
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


# --- timeline of a vCPU -------------------------------------------------------------------------------------


# What a vCPU does, from the top, with its look.
_DOING: Mapping[str, tuple[str, str]] = {
    "guest": (_SKY, ""),
    "kernel": (_PENDING, "////"),
    "halted": ("white", ".."),
    "user space": (_ORANGE, "\\\\\\\\"),
}
_KICK = "kick"
# Kicks whose requester is written beside the mark; of more there is no room for words.
_TOLD_KICKS = 24
# The part of the axis that the words beside a kick take, and their letters.
_KICK_WORDS, _KICK_LETTERS = 0.22, 32


def draw_timeline(timeline: Timeline, axes: Axes) -> Axes:
    """Draw what one vCPU did and which requests were pending meanwhile, each in a lane of its own, and its kicks.

    A break of a rule is marked where it was seen, in the lane of its request.
    """
    rows, breaks = timeline.rows, timeline.breaks
    rows = rows[(rows["end_ns"] >= timeline.begin_ns) & (rows["begin_ns"] <= timeline.end_ns)]
    if rows.empty:
        return _nothing(axes, "nothing was recorded of it")
    present = list(dict.fromkeys(rows["track"]))
    requests = [track for track in present if track not in _DOING and track != _KICK]
    requests += [each for each in dict.fromkeys(breaks["request"]) if each and each not in requests]
    lanes = [*(track for track in _DOING if track in present), *requests, *([_KICK] if _KICK in present else [])]
    place = {track: at for at, track in enumerate(lanes)}
    begin, end = timeline.begin_ns, max(timeline.end_ns, timeline.begin_ns + 1)
    name, size = unit(float(end - begin))
    left = np.clip(rows["begin_ns"].to_numpy(dtype=np.int64), begin, end) - begin
    right = np.clip(rows["end_ns"].to_numpy(dtype=np.int64), begin, end) - begin
    axes.set_xlim(0, end - begin)
    for track in lanes:
        own = (rows["track"] == track).to_numpy(dtype=bool)
        # What only touches the edge is not in here.
        own = own & ((left < right) | ((left > 0) & (right < end - begin)))
        if track == _KICK:
            _draw_kicks(axes, place[track], left[own].astype(float), rows["name"][own].tolist())
            continue
        _draw_bars(axes, place[track], left[own], right[own], _DOING.get(track))
    at = [place.get(each, len(lanes) - 1) for each in breaks["request"]]
    when = np.clip(breaks["time_ns"].to_numpy(dtype=np.int64), begin, end) - begin
    for time, lane, rule in zip(when.tolist(), at, breaks["rule"].tolist(), strict=True):
        axes.axvline(time, color=_VERMILION, linestyle=":", linewidth=1.2, zorder=1)
        axes.plot([time], [lane], zorder=5, clip_on=False, **_style(_BREAK))
        after = time < (end - begin) * 0.6
        axes.annotate(
            shown(str(rule)).replace("_", " "),
            (time, lane - 0.3),
            (7 if after else -7, 0),
            textcoords="offset points",
            ha="left" if after else "right",
            va="center",
            fontsize=8,
            fontweight="bold",
            color=_VERMILION,
            parse_math=False,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.8},
            zorder=6,
        )
    axes.set_yticks(range(len(lanes)), [clip(shown(str(track)), _NAME) for track in lanes], parse_math=False)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xticks(_round_times(float(end - begin), size))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: f"{ns / size:g}"))
    axes.set_xlabel(f"time since {timeline.since} ({name})", parse_math=False)
    axes.set_title(clip(timeline.title, 2 * _NAME), loc="right", fontsize=9, fontweight="bold", parse_math=False)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if requests and len(lanes) > len(requests):
        first = place[requests[0]]
        axes.axhline(first - 0.5, color=_FAINT, linewidth=0.8)
    handles: list[Any] = []
    if requests:
        handles.append(Patch(facecolor=_BLUE, edgecolor=_INK, label="request pending"))
    if _KICK in place:
        handles.append(Line2D([], [], label="kick, with its requester", **_style(_MARK_KICK)))
    if len(breaks):
        handles.append(Line2D([], [], label="rule broken", **_style(_BREAK)))
    if handles:
        axes.legend(handles=handles, **_ABOVE_AXES)
    return axes


# Bars of a lane: of what the vCPU does, or of a request. One that is too narrow for its outline is a stroke of its
# colour, so that many of them do not become a block of ink.
def _draw_bars(axes: Axes, place: int, left: NDArray[Any], right: NDArray[Any], look: tuple[str, str] | None) -> None:
    colour, hatch = look or (_BLUE, "")
    height = 0.4 if look is None else 0.56
    narrow = _pixels(axes, right.astype(float)) - _pixels(axes, left.astype(float)) < _CLOSE
    stroke = _FAINT if colour in ("white", _PENDING) else colour
    looks: tuple[tuple[Any, dict[str, Any]], ...] = (
        (narrow, {"facecolor": stroke, "edgecolor": stroke, "linewidth": 1.0}),
        (~narrow, {"facecolor": colour, "hatch": hatch, "edgecolor": _INK, "linewidth": 0.6}),
    )
    for chosen, style in looks:
        if chosen.any():
            many = np.full(int(chosen.sum()), place)
            widths = right[chosen] - left[chosen]
            axes.barh(many, widths, left=left[chosen], height=height, zorder=2, **style)


_BREAK = _Mark("", "X", _VERMILION, size=10)
_MARK_KICK = _Mark("", "v", _PURPLE, size=7)


def _draw_kicks(axes: Axes, place: int, times: NDArray[np.float64], names: Sequence[str]) -> None:
    apart = np.unique(np.round(_pixels(axes, times)), return_index=True)[1]
    axes.plot(times[apart], np.full(len(apart), place), zorder=3, clip_on=False, **_style(_MARK_KICK))
    if len(times) > _TOLD_KICKS:
        return
    # Marks that are close together share their words, behind the last one.
    right = axes.get_xlim()[1]
    groups: list[list[tuple[float, str]]] = []
    for kick in sorted(zip(times.tolist(), (shown(str(name)) for name in names), strict=True)):
        if groups and kick[0] - groups[-1][-1][0] < right * _KICK_WORDS:
            groups[-1].append(kick)
        else:
            groups.append([kick])
    free = -np.inf
    for group in groups:
        # Of several, the threads alone: a name can begin with what was requested of all vCPUs.
        who = list(dict.fromkeys(name.rpartition(", ")[2] for _, name in group))
        words = f"{len(group)} by {who[0]}{' and others' if len(who) > 1 else ''}" if len(group) > 1 else group[0][1]
        first, last = group[0][0], group[-1][0]
        before = last + right * _KICK_WORDS > right
        # Where there is no room on either side the table alone tells.
        if before and first - right * _KICK_WORDS < free:
            continue
        free = last + right * _KICK_WORDS
        axes.annotate(
            clip(words, _KICK_LETTERS),
            (first if before else last, place),
            (-6 if before else 6, 0),
            textcoords="offset points",
            ha="right" if before else "left",
            va="center",
            fontsize=7.5,
            parse_math=False,
        )


# --- the others ---------------------------------------------------------------------------------------------


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
    axes.annotate(why, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=_SOFT)
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
