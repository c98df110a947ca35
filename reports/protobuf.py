"""Protocol buffers, written: one message at a time, or many of one shape as rows of a numpy array.

A batch of messages is a table of bytes with one row for each. Numbers are varints of a fixed width there, padded with
continuation bytes as the encoding allows, so that a column is at the same place in every row; cells that a row does not
have are dropped when the rows are joined. No loop runs over messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_VARINT, _BYTES = 0, 2
_LENGTH = 3  # bytes of a length in a batch: up to 2 MiB


def varint(value: int) -> bytes:
    """Return a number below 2**64 as a varint.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """Return a field that holds a number (not a negative one), a truth value or a member of an enum."""
    return varint(field << 3 | _VARINT) + varint(value)


def data(field: int, *parts: bytes) -> bytes:
    """Return a field that holds bytes or a message, in parts."""
    whole = b"".join(parts)
    return varint(field << 3 | _BYTES) + varint(len(whole)) + whole


def text(field: int, value: str) -> bytes:
    """Return a field that holds a string."""
    return data(field, value.encode(errors="backslashreplace"))


class Rows:
    """A field, or several, of each message of a batch: bytes, and which of them each row has."""

    def __init__(self, cells: Array, kept: Array) -> None:
        self.cells = cells
        self.kept = kept

    def __len__(self) -> int:
        return len(self.cells)

    def only(self, where: Array) -> Rows:
        """Return these fields for the rows that have them, and nothing for the others."""
        return Rows(self.cells, self.kept & where[:, None])

    def join(self) -> bytes:
        """Return the messages one after the other."""
        return self.cells[self.kept].tobytes()


def numbers(field: int, values: Array, most: int = (1 << 63) - 1) -> Rows:
    """Return a field that holds a number from 0 to ``most`` in each row."""
    width = len(varint(most))
    shifts = np.arange(width, dtype="u8") * np.uint64(7)
    cells = ((values.astype("u8")[:, None] >> shifts) & np.uint64(0x7F)).astype("u1")
    cells[:, :-1] |= 0x80
    return together(constant(varint(field << 3 | _VARINT), len(values)), Rows(cells, np.ones(cells.shape, bool)))


def constant(content: bytes, count: int) -> Rows:
    """Return the same bytes for each of ``count`` rows."""
    cells = np.broadcast_to(np.frombuffer(content, "u1"), (count, len(content)))
    return Rows(cells, np.ones(cells.shape, bool))


def together(*parts: Rows) -> Rows:
    """Return the fields of several parts, side by side."""
    return Rows(np.hstack([part.cells for part in parts]), np.hstack([part.kept for part in parts]))


def messages(field: int, parts: Sequence[Rows]) -> Rows:
    """Return a field that holds a message in each row, made of these fields."""
    inside = together(*parts)
    tag = constant(varint(field << 3 | _BYTES), len(inside))
    length = numbers(0, inside.kept.sum(axis=1), (1 << 7 * _LENGTH) - 1)
    return together(tag, Rows(length.cells[:, 1:], length.kept[:, 1:]), inside)
