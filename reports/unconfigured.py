"""matplotlib as nobody has configured it: imported before the modules that draw.

Else a matplotlibrc of the user, or one in the working directory, decides how figures look or whether there are any
(text.usetex runs LaTeX), and so does MPLBACKEND, which notebooks set to what this Python does not have.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """Work where no matplotlibrc is, and no module: of the working directory both come before all others."""
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chdir("/")
        yield
    finally:
        os.fchdir(before)
        os.close(before)


@contextlib.contextmanager
def _unset(**given: str | None) -> Iterator[None]:
    """Have variables of the environment be something else, or not there."""
    before = {name: os.environ.pop(name, None) for name in given}
    os.environ.update({name: value for name, value in given.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# Without a home to write to it makes its cache elsewhere, and says so.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
# An empty file of settings leaves matplotlib's own.
with _here(), _unset(MPLBACKEND=None, MATPLOTLIBRC=os.devnull):
    import matplotlib  # noqa: F401
