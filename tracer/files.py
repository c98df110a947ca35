"""Files that are written whole or not at all, on any file system; and what is no file, which is written into."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# How file systems say that they cannot do something: some of FUSE, of 9p and of vfat.
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


STANDARD_OUTPUT = "standard output"  # as errors name it


class Whole(io.RawIOBase):
    """A descriptor that takes everything it is given, though it may take no more than a part at a time.

    It is another's: closing this leaves it open. A pipe or terminal that does not block is waited for.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self.name = name

    def writable(self) -> bool:
        """It is only written to."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of it. Raises :class:`OSError`, with the name of what could not be written to."""
        rest = memoryview(data).cast("B")
        length = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                ready = select.poll()
                ready.register(self._descriptor, select.POLLOUT)
                ready.poll()
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.name) from None
        return length


def standard_output() -> BinaryIO:
    """Return this process's standard output, as bytes."""
    return io.BufferedWriter(Whole(1, STANDARD_OUTPUT))


def sync_directory(path: Path) -> None:
    """Have the names in a directory reach the disk, if its file system can do that. Raises :class:`OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Write a file in place of the one that may be there, whose mode and owner it keeps.

    Raises :class:`OSError`, and then leaves nothing behind. Where a link leads, the file is; a device, a FIFO or this
    process's own output is written into.
    """
    there = _there(path)
    if there is not None and stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if there is not None and (into := _into(path, there)) is not None:
        with into as out:
            out.write(content)
        return
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with temporary.open("xb") as file:
        try:
            file.write(content)
            file.flush()
            if there is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(there.st_mode))
                with contextlib.suppress(PermissionError):  # not ours to give away
                    os.fchown(file.fileno(), there.st_uid, there.st_gid)
            os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:  # Ctrl-C too leaves nothing behind
            temporary.unlink(missing_ok=True)
            raise
    sync_directory(target.parent)


@contextlib.contextmanager
def new(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that gets its name when the block has ended well, and vanishes otherwise.

    Raises :class:`FileExistsError` where there is a file of that name already, :class:`OSError` where it cannot be
    written. What is no file is written into, as by :func:`replace`.
    """
    import tempfile  # which every command would wait for

    there = _there(path)
    into = None if there is None else _into(path, there)
    if into is not None:
        with into as out:
            yield out
        return
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)  # mode 0600
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        _name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _name(temporary: Path, path: Path) -> None:
    # A link fails where a rename would replace a file that somebody has made meanwhile.
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without links
        if error.errno not in _CANNOT:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.rename(path)
    sync_directory(path.parent)


def _there(path: Path) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat()
    return None


def _into(path: Path, there: os.stat_result) -> contextlib.AbstractContextManager[BinaryIO] | None:
    """Return what is written into, if a path leads to no file: the standard output is one that somebody has opened."""
    with contextlib.suppress(OSError):
        if os.path.samestat(there, os.fstat(1)):
            sys.stdout.flush()
            return standard_output()
    if stat.S_ISREG(there.st_mode) or stat.S_ISDIR(there.st_mode):
        return None
    return path.open("wb")
