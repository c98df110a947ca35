"""Files that are written whole or not at all: an older one stays until the new one is on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write a file in place of the one that may be there. Raises :class:`OSError`, and then leaves nothing behind."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # Ctrl-C too leaves nothing behind
            temporary.unlink(missing_ok=True)
            raise
