"""A page whose first reader waits until the lab fills it in, also when that reader is KVM: userfaultfd(2).

Named as in uapi linux/userfaultfd.h; a test compares the numbers and offsets with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
from enum import IntEnum
from types import TracebackType

from lab.kvm import CallFailed, LabError, Pages


class UffdioApi(ctypes.Structure):
    """struct uffdio_api."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("api", "features", "ioctls")]


class UffdioRange(ctypes.Structure):
    """struct uffdio_range."""

    _fields_ = [("start", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class UffdioRegister(ctypes.Structure):
    """struct uffdio_register."""

    _fields_ = [("range", UffdioRange), ("mode", ctypes.c_uint64), ("ioctls", ctypes.c_uint64)]


class UffdioCopy(ctypes.Structure):
    """struct uffdio_copy."""

    _fields_ = [*((name, ctypes.c_uint64) for name in ("dst", "src", "len", "mode")), ("copy", ctypes.c_int64)]


class _Pagefault(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("address", ctypes.c_uint64), ("ptid", ctypes.c_uint32)]


class _Argument(ctypes.Union):
    _fields_ = [("pagefault", _Pagefault)]


class UffdMsg(ctypes.Structure):
    """struct uffd_msg: of its union, the member that is read here."""

    _fields_ = [
        *(("event", ctypes.c_uint8), ("reserved1", ctypes.c_uint8)),
        *(("reserved2", ctypes.c_uint16), ("reserved3", ctypes.c_uint32)),
        ("arg", _Argument),
    ]


def _iowr(number: int, struct: type[ctypes.Structure]) -> int:
    return 3 << 30 | ctypes.sizeof(struct) << 16 | 0xAA << 8 | number


class Ioctl(IntEnum):
    """The ioctls that the lab uses."""

    UFFDIO_REGISTER = _iowr(0x00, UffdioRegister)
    UFFDIO_COPY = _iowr(0x03, UffdioCopy)
    UFFDIO_API = _iowr(0x3F, UffdioApi)


UFFD_API = 0xAA
UFFD_EVENT_PAGEFAULT = 0x12
UFFDIO_REGISTER_MODE_MISSING = 1

_SYS_USERFAULTFD = 323  # x86-64
_libc = ctypes.CDLL(None, use_errno=True)


class UserFault:
    """Pages that nobody has touched: who does waits for fill(), or for close(), which leaves them empty."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._fd = _open()
        try:
            self._ioctl(Ioctl.UFFDIO_API, UffdioApi(api=UFFD_API))
            whole = UffdioRange(pages.address, pages.size)
            self._ioctl(Ioctl.UFFDIO_REGISTER, UffdioRegister(range=whole, mode=UFFDIO_REGISTER_MODE_MISSING))
        except CallFailed:
            self.close()
            raise

    def wait(self, timeout_s: float) -> None:
        """Wait until somebody has touched the pages."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise LabError(f"nobody has touched the pages within {timeout_s:g} s", hint="KVM was to read them")
        message = UffdMsg.from_buffer_copy(os.read(self._fd, ctypes.sizeof(UffdMsg)))
        if message.event != UFFD_EVENT_PAGEFAULT:
            raise LabError(f"userfaultfd told of event {message.event:#x}, not of a page fault")

    def fill(self, data: bytes) -> None:
        """Fill the pages in, and let who waits for them go on."""
        source = ctypes.create_string_buffer(data, self._pages.size)
        copy = UffdioCopy(dst=self._pages.address, src=ctypes.addressof(source), len=self._pages.size)
        self._ioctl(Ioctl.UFFDIO_COPY, copy)

    def close(self) -> None:
        """Give the pages back, once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> UserFault:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ioctl(self, request: Ioctl, argument: ctypes.Structure) -> None:
        try:
            fcntl.ioctl(self._fd, request, argument)
        except OSError as error:
            raise CallFailed(request.name, error.errno or 0) from error


def unmet() -> str | None:
    """Say why faults of the kernel cannot be handled here, if so."""
    try:
        os.close(_open())
    except CallFailed as error:
        return f"{error}: it takes root, or vm.unprivileged_userfaultfd=1"
    return None


# Without UFFD_USER_MODE_ONLY: the fault that is waited for is the kernel's.
def _open() -> int:
    fd: int = _libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise CallFailed("userfaultfd", ctypes.get_errno())
    return fd
