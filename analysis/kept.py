"""Compiles functions of the core by numba, and keeps their machine code for the next start.

Nothing here makes a command fail but numba itself: what cannot be kept is compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

from analysis.sources import SOURCES, digest, sources
from tracer.errors import CannotJudge

try:
    import llvmlite
    import numba
    import numpy as np
    from numba.core import compiler, config, errors, serialize
except Exception as error:  # a numba that does not fit its numpy or its LLVM raises all sorts
    raise CannotJudge(
        f"to judge a recording takes numba, which cannot be imported: {error}", hint="pip install numba"
    ) from error

# What numba has to say of the core is for those who write it: their tests turn warnings into errors.
warnings.filterwarnings("ignore", category=errors.NumbaWarning)
# For any x86-64, so that what one machine compiled runs on the next one that mounts or copies this checkout: numba
# keeps code by CPU model. Integer loops over records are no faster for knowing it.
if config.CPU_NAME is None and config.CPU_FEATURES is None:
    config.CPU_NAME, config.CPU_FEATURES = "generic", ""

_HERE = Path(__file__).resolve().parent
_SUFFIX = ".compiled"

#: In compiled code a loop over names of columns is unrolled: each column has a type of its own.
each_of = numba.literal_unroll


def dispatcher(function: Callable[..., Any]) -> Any:
    """Return what compiles a function when it is first called."""
    # Without reference counts: the core makes no arrays, and counting those that it hands on would cost more than all
    # that it does. And every rule becomes a part of the walk.
    made = numba.njit(nogil=True, _nrt=False, forceinline=True)(function)
    # Not numba's own cache: that looks at the one file that holds the function, so a caller would keep the rule that
    # another file has changed since; and its files are trusted as they are, and must be where they can be written.
    if SOURCES is not None and _is_ours(function) and hasattr(made, "_cache"):
        made._cache = _Kept(function)
    return made


def _is_ours(function: Callable[..., Any]) -> bool:
    return Path(function.__code__.co_filename).resolve().parent == _HERE and function.__closure__ is None


def _beside() -> Path:
    return Path(cache_from_source(str(_HERE / "kept.py"))).parent


def _users() -> Path | None:
    """Return the folder of this user for this checkout."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    trunk = given if given.is_absolute() else Path.home()
    # Code is loaded from there: a folder of somebody else's (sudo may keep HOME) is neither trusted nor written to. And
    # a home that does not exist is not made.
    if trunk.stat().st_uid != os.geteuid():
        return None
    folder = (trunk if given.is_absolute() else trunk / ".cache") / "kvmreq" / f"compiled-{digest(bytes(_HERE))}"
    if folder.exists() and (folder.stat().st_uid != os.geteuid() or folder.stat().st_mode & 0o022):
        return None
    return folder


def _folders(*, write: bool) -> Iterator[Path]:
    """Yield where code is kept, the best place first."""
    if config.CACHE_DIR:  # NUMBA_CACHE_DIR: whoever sets it means it
        yield Path(config.CACHE_DIR) / f"kvmreq-{digest(bytes(_HERE))}"
        return
    if not (write and sys.dont_write_bytecode):
        with contextlib.suppress(NotImplementedError):  # a Python that keeps no bytecode
            yield _beside()
    with contextlib.suppress(OSError, RuntimeError):  # no home
        if (folder := _users()) is not None:
            yield folder


class _Kept:
    """The machine code of one function, a file for each signature: what numba's dispatcher asks of a cache.

    A file begins with the digest of the rest, since LLVM would run what a bad disk makes of it. Its name says all that
    the code depends on, so that two processes that write the same name write the same thing.
    """

    cache_path = None

    def __init__(self, function: Callable[..., Any]) -> None:
        self._code = function.__code__
        self._name = f"{Path(self._code.co_filename).stem}.{function.__qualname__}"

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return what was kept, or None."""
        # Whatever goes wrong here, even in a numba that has become another, is mended by compiling.
        with contextlib.suppress(Exception):
            target.refresh()
            name = self._file(signature, target.codegen())
            for folder in _folders(write=False):
                with contextlib.suppress(OSError):
                    data = (folder / name).read_bytes()
                    if hashlib.sha256(data[32:]).digest() == data[:32]:
                        state = pickle.loads(data[32:])
                        return compiler.CompileResult._rebuild(target, *state)
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled, where that can be done."""
        with contextlib.suppress(Exception):
            # Pointers of this process, or source that is no longer what was compiled.
            if result.library.has_dynamic_globals or result.lifted or sources() != SOURCES:
                return
            data = serialize.dumps(result._reduce())
            name = self._file(signature, result.codegen)
            for folder in _folders(write=True):
                with contextlib.suppress(OSError):
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    _write(folder / name, hashlib.sha256(data).digest() + data)
                    _forget(folder)
                    return

    def flush(self) -> None:
        """Numba calls this before it compiles anew; what is then saved replaces what is there."""

    def enable(self) -> None:
        """Kept for numba, which may call it."""

    def disable(self) -> None:
        """Kept for numba, which may call it."""

    def _file(self, signature: Any, codegen: Any) -> str:
        switches = (config.OPT, config.BOUNDSCHECK, config.DEBUGINFO_DEFAULT)  # that change code; numba's own forgets
        versions = (numba.__version__, llvmlite.__version__, np.__version__, sys.implementation.cache_tag)
        code = (self._code.co_firstlineno, self._code.co_code)
        key = repr((signature, codegen.magic_tuple(), switches, versions, code))
        return f"{SOURCES}-{self._name}-{digest(key.encode())}{_SUFFIX}"


def _write(path: Path, data: bytes) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}{_SUFFIX}")
    try:
        new.write_bytes(data)
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def _forget(folder: Path) -> None:
    # What other source was compiled to: nothing will ask for it again.
    for file in folder.glob(f"*{_SUFFIX}"):
        if not file.name.startswith(f"{SOURCES}-"):
            with contextlib.suppress(OSError):
                file.unlink()
