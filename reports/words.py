"""Words for people: names, numbers, times and tables that fit a terminal.

A guest's name is written by the guest's owner: :func:`shown` takes away whatever could move a cursor, break a
line or turn the direction of text. Widths are in terminal cells, since a CJK character takes two.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tracer.meta import Clock as Pair
    from tracer.meta import Meta

#: Text reports stay strictly under 80 columns.
WIDTH = 79

_UNITS = (("s", 1_000_000_000), ("ms", 1_000_000), ("µs", 1_000), ("ns", 1))
_MINUTE_NS = 60_000_000_000
_EPOCH = datetime(1970, 1, 1)
# Combining marks on one character: scripts put up to four there, and more of them hide what is below and above.
_MOST_MARKS = 4
# Lines that a cell of a table is folded into.
_MOST_LINES = 4


# --- names --------------------------------------------------------------------------------------------------


def shown(name: str) -> str:
    r"""Return a name with everything unprintable spelled out.

    >>> shown("a\nb")
    'a\\nb'
    """
    told, marks = [], 0
    for each in name:
        marks = marks + 1 if _cell(each) == 0 else 0
        plain = each.isprintable() and marks <= _MOST_MARKS
        told.append(each if plain else each.encode("unicode_escape").decode("ascii"))
    return "".join(told)


def guest(name: object, pid: int) -> str:
    """Return what to call a guest: its name if it has one, else its VMM's process."""
    return shown(name) if isinstance(name, str) and name.strip() else f"pid {pid}"


def cells(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(_cell(each) for each in text)


# Combining marks ride on the character before them; wide and fullwidth characters take two cells.
def _cell(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clip(text: str, width: int) -> str:
    """Return a text of at most ``width`` cells; what was cut off shows as an ellipsis.

    >>> clip("frontend", 5)
    'fron…'
    """
    if cells(text) <= width:
        return text
    return _head(text, width - 1) + "…"


# The longest start of a text that fits; at least one character, so that a caller that loops makes progress.
def _head(text: str, width: int) -> str:
    used = 0
    for index, character in enumerate(text):
        used += _cell(character)
        if used > width:
            return text[: max(index, 1)]
    return text


def folded(text: str, width: int) -> list[str]:
    """Return a text as a few lines of at most ``width`` cells; of a longer one the last line holds its end.

    >>> folded("web-frontend #12", 8)
    ['web-fron', 'tend #12']
    """
    lines: list[str] = []
    while cells(text) > width:
        if len(lines) == _MOST_LINES - 1:
            return [*lines, "…" + _head(text[::-1], width - 1)[::-1]]
        head = _head(text, width)
        space = head.rfind(" ") if not text[len(head) :].startswith(" ") else len(head)
        head = head[:space] if space > 0 else head
        lines.append(head)
        text = text[len(head) :].lstrip(" ")
    return [*lines, text]


def wrap(text: str, *, first: str = "", rest: str | None = None, width: int = WIDTH) -> list[str]:
    """Return a paragraph as lines of at most ``width`` cells.

    ``first`` stands before the first line, ``rest`` (as many blanks, if left out) before the others.
    """
    rest = " " * cells(first) if rest is None else rest
    lines: list[str] = []
    line, empty = first, True
    for word in text.split():
        if not empty and cells(line) + 1 + cells(word) > width:
            lines, line, empty = [*lines, line], rest, True
        while cells(line) + cells(word) + (not empty) > width:  # a word longer than a line
            head = _head(word, width - cells(line))
            lines, line, word = [*lines, line + head], rest, word[len(head) :]  # noqa: PLW2901 - what is left of it
        line, empty = (line + word if empty else f"{line} {word}"), False
    return [*lines, line]


# --- numbers and times --------------------------------------------------------------------------------------


def plural(count: int, singular: str, many: str = "") -> str:
    """Return a count and its noun.

    >>> plural(1, "request"), plural(12000, "request")
    ('1 request', '12,000 requests')
    """
    return f"{count:,} {singular if count == 1 else many or singular + 's'}"


def short(count: int) -> str:
    """Return a count in at most 6 characters: exact below a million, else rounded down to a tenth.

    >>> short(999999), short(12345678)
    ('999999', '12.3M')
    """
    for suffix, size in (("E", 10**18), ("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count // (size // 10) / 10:g}{suffix}"
    return str(count)


def duration(ns: int) -> str:
    """Return a length of time with a sensible unit.

    >>> duration(8_149), duration(125_000_000_000)
    ('8.15 µs', '2 min 5 s')
    """
    return _long(ns) if abs(ns) >= 2 * _MINUTE_NS else "{} {}".format(*_scaled(ns, ns, "round"))


def interval(lower_ns: int, upper_ns: int | None) -> str:
    """Return a length of time known within bounds: the lower one rounded down, the upper one rounded up.

    >>> interval(8_100, 8_400), interval(0, 8_400), interval(8_100, None)
    ('8.1-8.4 µs', '< 8.4 µs', '> 8.1 µs')
    """
    if upper_ns is None:
        return f"> {duration(lower_ns)}"
    if lower_ns == upper_ns:
        return duration(lower_ns)
    if upper_ns >= 2 * _MINUTE_NS:
        return f"< {_long(upper_ns, up=True)}" if lower_ns <= 0 else f"{_long(lower_ns)} to {_long(upper_ns, up=True)}"
    high, name = _scaled(upper_ns, upper_ns, "up")
    if lower_ns <= 0:
        return f"< {high} {name}"
    low, _ = _scaled(lower_ns, upper_ns, "down")
    return f"{low}-{high} {name}"


def bound(ns: int, *, up: bool) -> str:
    """Return one bound of a length of time, rounded away from the other one.

    >>> bound(8_149, up=False), bound(8_149, up=True)
    ('8.14 µs', '8.15 µs')
    """
    if ns >= 2 * _MINUTE_NS:
        return _long(ns, up=up)
    return "{} {}".format(*_scaled(ns, ns, "up" if up else "down"))


def unit(ns: float) -> tuple[str, int]:
    """Return the unit to show a time of this size in, and its nanoseconds."""
    return next(((name, size) for name, size in _UNITS if abs(ns) >= size), _UNITS[-1])


# Three significant digits of a time, in the unit of `scale`. Integers throughout: a bound must not move by a
# float's error.
def _scaled(ns: int, scale: int, rounding: str) -> tuple[str, str]:
    excess = 10 ** max(len(str(abs(scale))) - 3, 0)
    scale = -(-abs(scale) // excess) * excess  # 999,999 ns are 1 ms, not 1000 µs
    name, size = unit(scale)
    digits = len(str(scale // size))
    decimals = max(0, 3 - digits) if size > 1 else 0
    step = size // 10**decimals
    steps = {"down": ns // step, "up": -(-ns // step), "round": (2 * ns + step) // (2 * step)}[rounding]
    whole, part = divmod(abs(steps), 10**decimals)
    text = f"{whole}.{part:0{decimals}d}".rstrip("0").rstrip(".") if decimals else str(whole)
    return ("-" if steps < 0 else "") + text, name


# A long time in its two largest units, rounded down or up.
def _long(ns: int, *, up: bool = False) -> str:
    seconds = -(-ns // 1_000_000_000) if up else ns // 1_000_000_000
    for large, small, step, size in (("d", "h", 3_600, 24), ("h", "min", 60, 60), ("min", "s", 1, 60)):
        if seconds >= step * size:
            count, rest = divmod(-(-seconds // step) if up else seconds // step, size)
            return f"{count} {large} {rest} {small}"
    return f"{seconds} s"


class Clock:
    """Turns CLOCK_MONOTONIC into UTC, by a pair of clocks, and by those that were read after a step of one of them."""

    def __init__(self, pair: Pair, later: Sequence[Pair] = ()) -> None:
        pairs = sorted((pair, *later), key=lambda each: each["monotonic_ns"])
        self._since_ns = np.array([each["monotonic_ns"] for each in pairs[1:]], "i8")  # the first one holds before, too
        self._offset_ns = np.array([each["utc_ns"] - each["monotonic_ns"] for each in pairs], "i8")

    @classmethod
    def of(cls, meta: Meta | Mapping[str, Any]) -> Clock:
        """Return the clock of a recording."""
        return cls(meta["clock"], meta.get("clocks", ()))

    def offset_ns(self, monotonic_ns: Any) -> Any:
        """Return what is added to a moment, or to each of an array of them."""
        return self._offset_ns[np.searchsorted(self._since_ns, monotonic_ns, side="right")]

    def when(self, monotonic_ns: int) -> str:
        """Return a moment as ``2026-11-23 09:41:14.123456``, in UTC."""
        moment = _EPOCH + timedelta(microseconds=(monotonic_ns + int(self.offset_ns(monotonic_ns))) // 1_000)
        return moment.isoformat(sep=" ", timespec="microseconds")

    def time(self, monotonic_ns: int) -> str:
        """Return only the time of day, as ``09:41:14.123456``, in UTC."""
        return self.when(monotonic_ns)[11:]


# --- tables -------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a text table: its heading, where numbers go (right), and how narrow it may become."""

    heading: str
    right: bool = False
    least: int | None = None  # None: never clipped


def columns(
    layout: Sequence[Column], rows: Sequence[Sequence[str]], *, indent: str = "  ", width: int = WIDTH
) -> list[str]:
    """Return rows as aligned lines of at most ``width`` cells; the widest column gives way first.

    What does not fit its column goes on below: to cut it off would make rows alike.
    """
    table = [[column.heading for column in layout], *rows]
    widths = [max(cells(row[index]) for row in table) for index in range(len(layout))]
    room = width - cells(indent) - 2 * (len(layout) - 1)
    while sum(widths) > room:
        slack = [
            size - column.least if column.least is not None else 0 for size, column in zip(widths, layout, strict=True)
        ]
        widest = max((index for index, left in enumerate(slack) if left > 0), key=widths.__getitem__, default=None)
        if widest is None:
            break
        widths[widest] -= 1
    lines = []
    for row in table:
        parts = [folded(text, size) for text, size in zip(row, widths, strict=True)]
        for texts in zip_longest(*parts, fillvalue=""):
            lines.append((indent + "  ".join(map(aligned, texts, widths, layout))).rstrip())
    return lines


def aligned(text: str, width: int, column: Column) -> str:
    """Return a text clipped or filled to exactly ``width`` cells."""
    text = clip(text, width)
    blanks = " " * (width - cells(text))
    return blanks + text if column.right else text + blanks


# --- values of tables ---------------------------------------------------------------------------------------


def native(value: Any) -> Any:
    """Return a cell of a table as JSON knows it: numpy's numbers as Python's, whatever is missing as None."""
    item: Callable[[], Any] | None = getattr(value, "item", None)
    plain = item() if item is not None else value
    # pandas.NA and NaT compare to nothing, NaN not even to itself; a truth value of NA would raise.
    if plain is None or type(plain).__name__ in ("NAType", "NaTType") or (isinstance(plain, float) and plain != plain):
        return None
    return plain
