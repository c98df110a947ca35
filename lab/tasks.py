"""Tasks that are made as scenarios need them and Python does not: threads that share less, processes that share more.

Numbers of system calls are those of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import threading
from collections.abc import Callable

from lab.kvm import CallFailed, LabError

SYS_CLONE, SYS_EXIT, SYS_DUP3, SYS_PIDFD_GETFD = 56, 60, 292, 438
SYS_IO_URING_SETUP, SYS_IO_URING_REGISTER, SYS_CLOSE_RANGE = 425, 427, 436
# uapi linux/sched.h, linux/close_range.h, linux/io_uring.h.
CLONE_VM, CLONE_FILES = 0x100, 0x400
CLOSE_RANGE_UNSHARE = 1 << 1
IORING_REGISTER_FILES = 2
_SIGCHLD = 17
_IO_URING_PARAMS = 120  # sizeof(struct io_uring_params)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def call(number: int, *arguments: int) -> int:
    """Return what a system call returns; a failure is a CallFailed."""
    result: int = _libc.syscall(*(ctypes.c_long(one) for one in (number, *arguments)))
    if result < 0:
        raise CallFailed(f"system call {number}", ctypes.get_errno())
    return result


def unshare_files() -> None:
    """Give the current thread a table of descriptors of its own."""
    if _libc.unshare(CLONE_FILES):
        raise CallFailed("unshare(CLONE_FILES)", ctypes.get_errno())


def in_thread(work: Callable[[], object]) -> None:
    """Do ``work`` in a thread of its own, and wait for the end of both."""
    failed: list[LabError] = []

    def perform() -> None:
        try:
            work()
        except LabError as error:
            failed.append(error)

    thread = threading.Thread(target=perform)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def no_io_uring() -> str | None:
    """Say why no file can be registered with io_uring.

    Asks for a ring without entries: the end of a real one can interrupt the system call that follows.
    """
    try:
        call(SYS_IO_URING_SETUP, 0, 0)
    except CallFailed as error:
        return None if error.errno in (errno.EINVAL, errno.EFAULT) else str(error)
    return None


class IoUring:
    """A ring, which can hold files."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(_IO_URING_PARAMS)
        self._fd = call(SYS_IO_URING_SETUP, 1, ctypes.addressof(parameters))

    def register(self, fd: int) -> None:
        """Have the ring refer to a file."""
        files = ctypes.c_int32(fd)
        call(SYS_IO_URING_REGISTER, self._fd, IORING_REGISTER_FILES, ctypes.addressof(files), 1)

    def close(self) -> None:
        """Let go of what it refers to, some time later."""
        os.close(self._fd)


# What a process does that has this one's memory and is none of its threads: waits, makes an ioctl, and ends.
#   31 c0                     xor    %eax, %eax           read(GATE, the bottom of its stack, 1)
#   bf GATE                   mov    $GATE, %edi
#   48 8d b4 24 00 f0 ff ff   lea    -0x1000(%rsp), %rsi
#   ba 01 00 00 00            mov    $1, %edx
#   0f 05                     syscall
#   b8 10 00 00 00            mov    $16, %eax            ioctl(FD, REQUEST, ARGUMENT)
#   bf FD                     mov    $FD, %edi
#   be REQUEST                mov    $REQUEST, %esi
#   ba ARGUMENT               mov    $ARGUMENT, %edx
#   0f 05                     syscall
#   89 05 RESULT              mov    %eax, RESULT(%rip)
#   31 ff                     xor    %edi, %edi           exit(0)
#   b8 3c 00 00 00            mov    $60, %eax
#   0f 05                     syscall
_WAIT = bytes.fromhex("31c0 bf")
_THEN = bytes.fromhex("488db42400f0ffff ba01000000 0f05 b810000000 bf")
_END = bytes.fromhex("31ff b83c000000 0f05")
_SIZE, _RESULT = 0x4000, 0x800


class Sharer:
    """A process that shares the memory of this one and is none of its threads.

    It makes one ioctl on ``fd``, when told to, and ends. It has a table of descriptors as this process has it now, or,
    with ``files``, the same one.
    """

    def __init__(self, fd: int, request: int, argument: int = 0, *, files: bool = False) -> None:
        self._memory = mmap.mmap(-1, _SIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        gate, self._gate = os.pipe()
        code = _WAIT + struct.pack("<I", gate) + _THEN + struct.pack("<IcIcI", fd, b"\xbe", request, b"\xba", argument)
        code += b"\x0f\x05\x89\x05"
        code += struct.pack("<i", _RESULT - len(code) - 4) + _END
        self._memory[: len(code)] = code
        # syscall() of the C library returns there to where its new stack says: to the code.
        stack = start + _SIZE - 64
        ctypes.c_uint64.from_address(stack).value = start
        self.pid = call(SYS_CLONE, CLONE_VM | CLONE_FILES * files | _SIGCHLD, stack, 0, 0, 0)
        self._close_gate = gate

    def go(self) -> int:
        """Let it do it, wait until it has gone, and return what its ioctl returned: an errno is negative."""
        os.write(self._gate, b"!")
        _, status = os.waitpid(self.pid, 0)
        os.close(self._gate)
        os.close(self._close_gate)
        if status:
            raise LabError(f"a process that shares memory ended with status {status:#x}")
        result: int = struct.unpack_from("<i", self._memory, _RESULT)[0]
        return result
