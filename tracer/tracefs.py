"""The kernel's tracefs: found where it is mounted, and mounted out of sight where it is not.

A tracer changes nothing that others see: on a host without tracefs a mount without a place in the file system is made,
which ends with the descriptor that holds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

PLACES = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))

# Numbers of system calls on x86-64, and flags of uapi linux/mount.h. Linux commit 24dcb3d90a1f
# ("vfs: syscall: Add fsopen() to prepare for superblock creation") (in v5.2).
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CMD_CREATE = 1, 6


@contextlib.contextmanager
def root() -> Iterator[Path | None]:
    """Yield the root of tracefs, or None where this process cannot have it."""
    for place in PLACES:
        if (place / "events").is_dir():
            yield place
            return
    mount = _mounted()
    if mount is None:
        yield None
        return
    try:
        yield Path(f"/proc/self/fd/{mount}")
    finally:
        os.close(mount)


def _mounted() -> int | None:
    libc = ctypes.CDLL(None, use_errno=True)
    context = libc.syscall(_FSOPEN, b"tracefs", _CLOEXEC)
    if context < 0:
        return None
    try:
        if libc.syscall(_FSCONFIG, context, _CMD_CREATE, None, None, 0) < 0:
            return None
        mount = int(libc.syscall(_FSMOUNT, context, _CLOEXEC, 0))
        return mount if mount >= 0 else None
    finally:
        os.close(context)


def command(root: Path, text: str) -> None:
    """Make or remove a probe event, as a line of kprobe_events says it."""
    # Python's own append mode seeks to the end first, which tracefs refuses; and to truncate would remove all probes.
    commands = os.open(root / "kprobe_events", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(commands, f"{text}\n".encode())
    finally:
        os.close(commands)


def formats(tracepoints: Iterable[str], system: str = "kvm") -> dict[str, str]:
    """Return the print format of those tracepoints that this kernel has and lets us read."""
    found = {}
    with root() as tracefs:
        for name in tracepoints if tracefs else ():
            assert tracefs is not None
            with contextlib.suppress(OSError):
                text = (tracefs / "events" / system / name / "format").read_text()
                found[name] = text.partition("print fmt: ")[2].strip()
    return found
