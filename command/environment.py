"""The environment of this process, and the one that it was given."""

from __future__ import annotations

import io
import os
import sys

#: As it was when the command started: a COMMAND gets it.
GIVEN = dict(os.environ)

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


def prepare() -> None:
    """Make this process what the verbs expect, whatever environment it was given.

    The threads of numpy's linear algebra spin, and nothing uses them. A character that the terminal's encoding does not
    have is spelled out.
    """
    os.environ.setdefault(_BLAS_THREADS, "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
