"""The environment of this process, and the one that it was given."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from tracer.files import STANDARD_OUTPUT, Whole

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

#: As it was when the command started: a COMMAND gets it.
GIVEN = dict(os.environ)

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


class _Heedless(Whole):
    """Standard error: what cannot be said there is not said, and nothing fails for it."""

    def write(self, data: ReadableBuffer, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(memoryview(data))


def prepare() -> None:
    """Make this process what the verbs expect, whatever environment it was given.

    The threads of numpy's linear algebra spin, and nothing uses them. A character that the terminal's encoding does not
    have is spelled out. What is printed is written whole, or fails; what is said on stderr never fails.
    """
    os.environ.setdefault(_BLAS_THREADS, "1")
    _hold_places()
    sys.stdout = _stream(sys.stdout, 1, Whole(1, STANDARD_OUTPUT))
    sys.stderr = _stream(sys.stderr, 2, _Heedless(2, "standard error"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _hold_places() -> None:
    # A file that is opened later would get the number of a standard stream that is closed, and the output with it.
    for number, wrong in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, wrong)  # gets the lowest number that is free; a COMMAND does not inherit it


def _stream(there: TextIO | None, number: int, raw: Whole) -> TextIO:
    """Return a text stream over ``raw`` in place of the one that is there, if that is the process's own."""
    if there is not None:
        try:
            if there.fileno() != number:
                return there
            there.flush()
        except (OSError, ValueError):
            return there  # a test's
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(there, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or raw.isatty(),
    )
