"""The functions of the core are plain Python, and compiled once there is much to do.

``start`` puts compiled functions in the place of the plain ones, whatever they have done so far: both work on the same
records. So a small recording is judged before numba would be imported. `python -m analysis.compiled` compiles all of
it, as bootstrap does. With NUMBA_DISABLE_JIT=1, numba's own switch, everything stays plain.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import analysis.sources  # noqa: F401 - before the modules of the core: see there
from tracer.errors import CannotJudge

#: Does the core stay plain? Then numba need not even be there.
PLAIN = os.environ.get("NUMBA_DISABLE_JIT", "").strip() not in ("", "0")

_Function = TypeVar("_Function", bound=Callable[..., Any])
_functions: list[Callable[..., Any]] = []
_wanted = [False]  # somebody has said that plain functions will not do


def compiled(function: _Function) -> _Function:
    """Have a function of the core compiled by :func:`start`. What it calls must be, too."""
    _functions.append(function)
    return function


def each_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of columns, to go over them."""
    return names


def require() -> None:
    """Raise :class:`CannotJudge` where numba is missing: a whole recording is too much for plain functions."""
    _wanted[0] = True
    if not PLAIN and find_spec("numba") is None:
        raise CannotJudge("to judge a recording takes numba, which is not there", hint="pip install numba")


def start() -> None:
    """Put compiled functions in the place of the plain ones, in every module of the core.

    Without numba they stay plain, some hundred times slower: `record --follow` goes on. After :func:`require` that is
    :class:`CannotJudge`.
    """
    if PLAIN or not _functions:
        return
    try:
        from analysis import kept
    except CannotJudge:
        if _wanted[0]:
            raise
        _functions.clear()
        return

    made: dict[Any, Any] = {function: kept.dispatcher(function) for function in _functions}
    made[each_of] = kept.each_of
    _functions.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("analysis.") and name not in (__name__, kept.__name__):
            for known, value in list(vars(module).items()):
                if callable(value) and value in made:
                    setattr(module, known, made[value])


def warm() -> None:
    """Compile all of the core, or load it: by running it."""
    core = import_module("analysis.passes")
    start()
    core.warm()


if __name__ == "__main__":
    # As the module that the core knows, not as __main__.
    core = import_module("analysis.compiled")
    core.require()
    core.warm()
