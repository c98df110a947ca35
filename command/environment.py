"""The environment of this process, and the one that it was given."""

from __future__ import annotations

import os

#: As it was when the command started: a COMMAND gets it.
GIVEN = dict(os.environ)

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


def prepare() -> None:
    """Set what must be set before numpy is imported: the threads of its linear algebra spin, and nothing uses them."""
    os.environ.setdefault(_BLAS_THREADS, "1")
