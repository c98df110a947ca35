"""Pages of the trace ring buffer, written by an encoder that knows nothing of the parser."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.trace_pipe import first_time_ns, parse, record_format, take

PAGE = 4096
FORMAT = """\
name: vcpu_put
ID: 1789
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned long __probe_ip;\toffset:8;\tsize:8;\tsigned:0;
\tfield:u64 vcpu;\toffset:16;\tsize:8;\tsigned:0;
\tfield:s32 ret;\toffset:24;\tsize:4;\tsigned:1;

print fmt: "(%lx) vcpu=0x%Lx ret=%d", REC->__probe_ip, REC->vcpu, REC->ret
"""


class Step(NamedTuple):
    """A record of so many words, so long after the one before; how that is written is the encoder's choice."""

    words: int
    delta: int
    how: str  # plain, extend, absolute, discarded


def encode(start: int, steps: list[Step]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return a page, and (offset, time) of each record in it; steps that do not fit are left out."""
    body = b""
    records = []
    time = start
    for step in steps:
        now = time + step.delta
        head = b""
        delta = step.delta
        if step.how == "absolute":
            head = struct.pack("<II", 31 | (now & (1 << 27) - 1) << 5, now >> 27)
            delta = 0
        elif step.how == "extend" or delta >= 1 << 27:
            head = struct.pack("<II", 30 | (delta & (1 << 27) - 1) << 5, delta >> 27)
            delta = 0
        if step.how == "discarded":
            delta = max(delta, 1)
            now = time + step.delta if head else time + delta
            written = head + struct.pack("<II", 29 | (1 if head else delta) << 5, step.words * 4 + 4)
            now += 1 if head else 0
        elif step.words > 28:
            written = head + struct.pack("<II", delta << 5, step.words * 4 + 4)
        else:
            written = head + struct.pack("<I", step.words | delta << 5)
        if 16 + len(body) + len(written) + step.words * 4 > PAGE:
            break
        time = now
        body += written
        if step.how != "discarded":
            records.append((16 + len(body), time))
        body += bytes(step.words * 4)
    return (struct.pack("<QQ", start, len(body)) + body).ljust(PAGE, b"\xff"), records


STEPS = st.lists(
    st.builds(
        Step,
        st.integers(1, 60),
        st.one_of(st.integers(0, 1000), st.integers(0, 1 << 40)),
        st.sampled_from(["plain", "extend", "absolute", "discarded"]),
    ),
    max_size=120,
)


@given(st.lists(st.tuples(st.integers(0, 1 << 58), STEPS), max_size=4))
def test_every_record_is_found_with_its_time(pages: list[tuple[int, list[Step]]]) -> None:
    """However its time is written, and whatever lies between."""
    buffer, expected = b"", []
    for start, steps in pages:
        page, records = encode(start, steps)
        expected += [(len(buffer) + at, time) for at, time in records]
        assert first_time_ns(page) == start
        buffer += page
    found = parse(buffer, PAGE)
    assert list(zip(found.at.tolist(), found.time_ns.tolist(), strict=True)) == expected
    assert found.missed == 0


def test_padding_ends_a_page() -> None:
    """A padding without a time says that nothing more comes."""
    page = struct.pack("<QQIII", 7, 12, 1 | 5 << 5, 0, 29).ljust(PAGE, b"\xff")
    found = parse(page, PAGE)
    assert (found.at.tolist(), found.time_ns.tolist()) == ([20], [12])


@pytest.mark.parametrize(("flags", "count", "missed"), [(1 << 31, 0, 1), (1 << 31 | 1 << 30, 23, 23), (0, 99, 0)])
def test_what_the_kernel_lost_before_a_page_is_counted(flags: int, count: int, missed: int) -> None:
    """Its number, where there was room to store it; else that there was something."""
    page = struct.pack("<QQIIQ", 7, 8 | flags, 1 | 5 << 5, 0, count).ljust(PAGE, b"\0")
    found = parse(page, PAGE)
    assert (len(found.at), found.missed) == (1, missed)


def test_records_are_read_by_their_format() -> None:
    """Offsets, sizes and signs are the kernel's."""
    number, dtype = record_format(FORMAT)
    assert number == 1789
    assert dtype.itemsize == 28
    record = struct.pack("<HBBiQQi", 1789, 0, 0, 4242, 1, 0xFFFF888012345678, -22)
    buffer = np.frombuffer(b"\0" * 20 + record, np.uint8)
    (row,) = take(buffer, np.array([20]), dtype)
    assert (row["common_pid"], row["vcpu"], row["ret"]) == (4242, 0xFFFF888012345678, -22)
    assert len(take(buffer, np.empty(0, np.int64), dtype)) == 0


def test_what_is_no_format_is_refused() -> None:
    """An empty file, such as that of an event that has just gone."""
    with pytest.raises(ValueError, match="no format"):
        record_format("")
