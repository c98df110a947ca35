"""Protocol buffers that are written here, read back by a decoder written from the encoding's description."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports import protobuf as pb

U64 = st.integers(0, 2**64 - 1)


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield each field of a message: its number, and a number or bytes."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        value, at = varint(data, at)
        if tag & 7 == 2:
            assert at + value <= len(data)
            yield tag >> 3, data[at : at + value]
            at += value
        else:
            assert tag & 7 == 0
            yield tag >> 3, value


@given(st.integers(1, 2**29 - 1), U64, st.binary(max_size=300))
def test_single_fields(field: int, value: int, content: bytes) -> None:
    """A number and bytes come back."""
    assert list(fields(pb.number(field, value) + pb.data(field, content))) == [(field, value), (field, content)]


def test_a_string_that_is_no_unicode_is_spelled_out() -> None:
    """A guest's name can hold what was no UTF-8."""
    assert list(fields(pb.text(2, "a\udcff"))) == [(2, b"a\\udcff")]


@given(st.lists(st.tuples(U64, st.integers(0, 1000), st.booleans()), min_size=1, max_size=40))
def test_rows_are_messages(rows: list[tuple[int, int, bool]]) -> None:
    """Each row is a message of its own, with only the fields that it has."""
    big = np.array([row[0] for row in rows], "u8")
    small, known = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    inner = pb.messages(4, [pb.numbers(1, small).only(known)])
    parts = [pb.numbers(8, big), inner, pb.constant(pb.number(13, 2), len(rows))]
    read = [
        list(fields(content)) for field, content in fields(pb.messages(1, parts).join()) if isinstance(content, bytes)
    ]
    assert len(read) == len(rows)
    for (value, little, has), ((_, first), (_, message), (_, last)) in zip(rows, read, strict=True):
        assert (first, last) == (value, 2)
        assert isinstance(message, bytes)
        assert list(fields(message)) == ([(1, little)] if has else [])


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows(count: int) -> None:
    """No rows are no bytes."""
    content = pb.messages(1, [pb.numbers(2, np.full(count, 7))]).join()
    assert [list(fields(bytes(each))) for _, each in fields(content) if isinstance(each, bytes)] == [[(2, 7)]] * count


def test_perfettos_own_messages_read_what_the_benchmark_writes() -> None:
    """Three ways to write the same events; what is compared for speed must not differ in what it says."""
    pytest.importorskip("perfetto", reason="needs the package perfetto: make test")
    from bench import protobuf as bench

    batch = bench.events(23)
    mine, theirs, again = (bench.read(write(batch)) for write in (bench.ours, bench.theirs, bench.again))
    assert mine == theirs == again
    assert [packet.timestamp for packet in mine.packet] == batch["time_ns"].tolist()
    assert sum(len(packet.track_event.debug_annotations) for packet in mine.packet) == 24


def test_a_number_takes_no_more_room_than_the_largest_of_its_batch() -> None:
    """And never less."""
    for most in (0, 1, 127, 128, 2**14 - 1, 2**14, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1):
        row = pb.messages(1, [pb.numbers(2, np.array([0, most], "u8"))]).join()
        assert len(row) == 2 * (2 + 1 + len(pb.varint(most)))
        numbers = [list(fields(content)) for _, content in fields(row) if isinstance(content, bytes)]
        assert numbers == [[(2, 0)], [(2, most)]]
