"""Pages of the kernel's trace ring buffer, as trace_pipe_raw gives them: where each record is, and when it was made.

Pure: bytes in, arrays out. A page holds the time of its first record; every later one only says how much later it was,
so a page can be read alone, and what was lost between two pages shows in the second one's header.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# struct buffer_data_page (events/header_page): u64 time stamp, then local_t commit: how many bytes follow.
_HEADER = 16
_COMMIT_MASK = (1 << 27) - 1
# Bits of the commit word, include/linux/ring_buffer.h has none of them: they are what libtraceevent's kbuffer reads.
# Linux commit 66a8cb95ed04 ("ring-buffer: Add place holder recording of dropped events") (in v2.6.35).
_MISSED = 1 << 31
_MISSED_STORED = 1 << 30

# enum ring_buffer_type (events/header_event): type_len of what is no record of up to 28 words.
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_DELTA_BITS = 27
# An absolute time has 59 bits; the rest is that of the time before. Linux commit 6695da58f944
# ("ring-buffer: Have absolute time stamps handle large numbers") (in v5.19).
_ABSOLUTE_BITS = 59

Array = npt.NDArray[np.int64]


class Records(NamedTuple):
    """The records of some pages that lie one after the other in one buffer."""

    at: Array  # offset of each record in the buffer
    time_ns: Array
    missed: int  # records that the kernel says it lost before one of these pages; where it does not know, 1


def parse(buffer: bytes | bytearray | memoryview, page_size: int) -> Records:
    """Return where the records of these pages are, in the order in which they lie."""
    ats: list[int] = []
    times: list[int] = []
    missed = 0
    for start in range(0, len(buffer), page_size):
        missed += _page(memoryview(buffer)[start : start + page_size], start, ats, times)
    return Records(np.array(ats, np.int64), np.array(times, np.int64), missed)


def first_time_ns(page: bytes | bytearray | memoryview) -> int:
    """Return the time from which a page's records count."""
    return int.from_bytes(page[:8], sys.byteorder)


def _page(page: memoryview, start: int, ats: list[int], times: list[int]) -> int:
    # The hot path of every record: local names, and whole words as Python integers.
    time = first_time_ns(page)
    commit = int.from_bytes(page[8:16], sys.byteorder)
    size = commit & _COMMIT_MASK & ~_MISSED_STORED
    end = (_HEADER + min(size, len(page) - _HEADER)) // 4
    words = np.frombuffer(page[: end * 4], np.uint32).tolist()
    place = _HEADER // 4
    add_at, add_time = ats.append, times.append
    while place < end:
        head = words[place]
        kind, delta = head & 31, head >> 5
        if kind < _PADDING:
            time += delta
            if kind:
                add_at(start + (place + 1) * 4)
                place += 1 + kind
            else:
                add_at(start + (place + 2) * 4)
                place += 1 + (words[place + 1] + 3) // 4
            add_time(time)
        elif kind == _TIME_EXTEND:
            time += delta + (words[place + 1] << _DELTA_BITS)
            place += 2
        elif kind == _TIME_STAMP:
            time = (time >> _ABSOLUTE_BITS << _ABSOLUTE_BITS) | (delta + (words[place + 1] << _DELTA_BITS))
            place += 2
        elif delta == 0:
            break  # nothing more in this page
        else:
            time += delta
            place += 1 + (words[place + 1] + 3) // 4  # a record that was given up
    if not commit & _MISSED:
        return 0
    if commit & _MISSED_STORED:
        stored = _HEADER + size
        return max(1, int.from_bytes(page[stored : stored + 8], sys.byteorder))
    return 1


class Format(NamedTuple):
    """A tracepoint's record: its number, and its fields as numpy sees them."""

    number: int
    dtype: np.dtype[np.void]


_ID = re.compile(r"^ID: (\d+)$", re.MULTILINE)
_FIELD = re.compile(r"^\tfield:(.+?)(\w+)(\[[^\]]*\])?;\toffset:(\d+);\tsize:(\d+);\tsigned:([01]);$", re.MULTILINE)


def record_format(text: str, names: Iterable[str] | None = None) -> Format:
    """Return what an event's ``format`` file says of its record; with ``names`` of only these fields."""
    number = _ID.search(text)
    fields = [
        (name, f"{'i' if signed == '1' else 'u'}{size}", int(offset))
        for _, name, array, offset, size, signed in _FIELD.findall(text)
        if not array and size in ("1", "2", "4", "8") and (names is None or name in names)
    ]
    if number is None or not fields:
        raise ValueError("this is no format of a trace event")
    sizes = [int(offset) + int(size) for *_, offset, size, _ in _FIELD.findall(text)]
    return Format(
        int(number[1]),
        np.dtype(
            {
                "names": [name for name, _, _ in fields],
                "formats": [kind for _, kind, _ in fields],
                "offsets": [offset for _, _, offset in fields],
                "itemsize": max(sizes),
            }
        ),
    )


def take(buffer: npt.NDArray[np.uint8], at: Array, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
    """Return the records of one kind that begin at these offsets."""
    rows: npt.NDArray[np.uint8] = buffer[at[:, None] + np.arange(dtype.itemsize)]
    return np.ascontiguousarray(rows).view(dtype)[:, 0] if len(at) else np.empty(0, dtype)
