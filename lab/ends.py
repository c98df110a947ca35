"""Scenarios: what ends a vCPU and what does not, and whose it is.

KVM lets all use a vCPU that have the memory of the process that created its VM, by whatever descriptor; and it is there
as long as something refers to its file. A triple fault is pending all the while, and saved blindly: an end that is none
would be a request that is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lab import tasks
from lab.child import READY, child, fail, wait_for
from lab.kvm import CallFailed, Exit, Ioctl, Kvm, LabError, Vcpu
from lab.scratch import raise_by_mce
from lab.stage import (
    SIGN_OF_LIFE,
    Stage,
    bounce,
    check_exit,
    lifecycle,
    must_refuse,
    no_immediate_exit,
    no_mce,
    save_blindly,
    scenario,
    shut_down,
)
from lab.tasks import Sharer, in_thread

_GOES_ON = lifecycle("delivered", blind_saves=1)
_BAD_FLAGS = 1 << 20
_FAR = 1500  # descriptors, more than a common limit of 1,024


@contextlib.contextmanager
def _exposed(stage: Stage) -> Iterator[Vcpu]:
    """A guest with a pending triple fault that was saved without it."""
    with stage.guest() as vcpu:
        raise_by_mce(vcpu)
        save_blindly(vcpu)
        yield vcpu


def no_pidfd_getfd(kvm: Kvm) -> str | None:
    """Say why a process cannot take a descriptor out of another one's table."""
    del kvm
    try:
        tasks.call(tasks.SYS_PIDFD_GETFD, -1, 0, 0)
    except CallFailed as error:
        return None if error.errno == errno.EBADF else f"pidfd_getfd: {error}"
    return None


def no_io_uring(kvm: Kvm) -> str | None:
    """Say why no file can be registered with io_uring."""
    del kvm
    return tasks.no_io_uring()


def no_far_descriptors(kvm: Kvm) -> str | None:
    """Say why a process may not have descriptors that are far apart."""
    del kvm
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if most == resource.RLIM_INFINITY or most > 2 * _FAR else f"only {most} descriptors are allowed"


def _dup2_of_nothing(vcpu: Vcpu) -> None:
    nothing = os.dup(vcpu.fd)
    os.close(nothing)
    try:
        os.dup2(nothing, vcpu.fd)
    except OSError as error:
        raise CallFailed("dup2", error.errno or 0) from error


@scenario(_GOES_ON)
def close_fails(stage: Stage) -> None:
    """Calls that would close the vCPU's fd fail; it lives on."""
    with _exposed(stage) as vcpu:
        fd = vcpu.fd
        must_refuse(errno.EBADF, lambda: _dup2_of_nothing(vcpu))
        must_refuse(errno.EINVAL, lambda: tasks.call(tasks.SYS_DUP3, 0, fd, _BAD_FLAGS))
        must_refuse(errno.EINVAL, lambda: tasks.call(tasks.SYS_CLOSE_RANGE, fd, fd, _BAD_FLAGS))
        must_refuse(errno.EINVAL, lambda: tasks.call(tasks.SYS_CLOSE_RANGE, fd, 0, 0))
        shut_down(vcpu)


@scenario(_GOES_ON)
def table_unshared(stage: Stage) -> None:
    """A thread closes its fd in a table of its own; it lives on."""

    def close() -> None:
        tasks.unshare_files()
        os.close(vcpu.fd)

    with _exposed(stage) as vcpu:
        in_thread(close)
        shut_down(vcpu)


@scenario(_GOES_ON)
def range_unshared(stage: Stage) -> None:
    """close_range() closes it in a table of its own alone."""
    with _exposed(stage) as vcpu:
        in_thread(lambda: tasks.call(tasks.SYS_CLOSE_RANGE, vcpu.fd, vcpu.fd, tasks.CLOSE_RANGE_UNSHARE))
        shut_down(vcpu)


@scenario(lifecycle("lost", blind_saves=1))
def range_closed(stage: Stage) -> None:
    """close_range() closes the vCPU's last descriptor."""
    with _exposed(stage) as vcpu:
        fd = vcpu.fd
        tasks.call(tasks.SYS_CLOSE_RANGE, fd, fd, 0)
        os.dup2(vcpu.vm.fd, fd)  # for the lab, which closes it again


@scenario(_GOES_ON)
def in_flight(stage: Stage) -> None:
    """For a while a message in a socket is all that leads to it."""
    here, there = socket.socketpair()
    with here, there, _exposed(stage) as vcpu:
        socket.send_fds(here, [b"!"], [vcpu.fd])
        os.close(vcpu.fd)
        vcpu.fd = socket.recv_fds(there, 1, 1)[1][0]
        shut_down(vcpu)


@scenario(_GOES_ON, needs=[no_mce, no_pidfd_getfd])
def taken_by_pidfd(stage: Stage) -> None:
    """pidfd_getfd() makes another fd of it; the first is closed."""
    with _exposed(stage) as vcpu:
        process = os.pidfd_open(os.getpid())
        copy = tasks.call(tasks.SYS_PIDFD_GETFD, process, vcpu.fd, 0)
        os.close(process)
        os.close(vcpu.fd)
        vcpu.fd = copy
        shut_down(vcpu)


@scenario(lifecycle("lost", blind_saves=1), needs=[no_mce, no_io_uring])
def registered(stage: Stage) -> None:
    """io_uring alone refers to it, then nothing does."""

    def refer() -> None:
        ring = tasks.IoUring()
        ring.register(vcpu.fd)
        vcpu.close()
        ring.close()

    with _exposed(stage) as vcpu:
        in_thread(refer)  # the end of a ring can interrupt what its thread does next


@scenario(_GOES_ON, needs=[no_mce, no_immediate_exit])
def memory_shared(stage: Stage) -> None:
    """A process that shares the VMM's memory runs its vCPU.

    Not for the first time: KVM gives the process that does a thread that stays with the VM, and keeps that process.
    Linux commit 931656b9e2ff ("kvm: defer huge page recovery vhost task to later") (in v6.14).
    """
    with stage.guest() as vcpu:
        bounce(vcpu)
        raise_by_mce(vcpu)
        save_blindly(vcpu)
        sharer = Sharer(vcpu.fd, Ioctl.KVM_RUN)
        os.close(vcpu.fd)
        result = sharer.go()
        vcpu.fd = os.dup(vcpu.vm.fd)  # for the lab, which closes it again
        if result:
            raise LabError(f"KVM_RUN in a process that shares the memory returned {result}")
        check_exit(vcpu, Exit.KVM_EXIT_SHUTDOWN)


@scenario(_GOES_ON)
def creator_gone(stage: Stage) -> None:
    """Its creator has gone; one with the same memory goes on."""
    with stage.vm() as vm:
        fd = Sharer(vm.fd, Ioctl.KVM_CREATE_VCPU, files=True).go()
        if fd < 0:
            raise LabError(f"KVM_CREATE_VCPU in a process that shares the memory returned {fd}")
        with Vcpu(vm, fd) as vcpu:
            raise_by_mce(vcpu)
            save_blindly(vcpu)
            shut_down(vcpu)


# Asks for KVM_RUN, which KVM refuses to every other process.
_BROKER = """
import errno, fcntl, sys
try:
    fcntl.ioctl(int(sys.argv[1]), 0xAE80)
except OSError as error:
    sys.exit(0 if error.errno == errno.EIO else f"KVM_RUN: {error}")
sys.exit("KVM let a process run the vCPU of another one")
"""


@scenario(_GOES_ON)
def broker(stage: Stage) -> None:
    """Another process has its fd too, asks in vain, and ends."""
    with _exposed(stage) as vcpu:
        done = subprocess.run(
            [sys.executable, "-c", _BROKER, str(vcpu.fd)],
            pass_fds=[vcpu.fd],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(done.stderr.strip())
        shut_down(vcpu)


@scenario(lifecycle("lost", vcpu=0, blind_saves=1), lifecycle("delivered", vcpu=1), needs=[no_mce, no_far_descriptors])
def far_apart(stage: Stage) -> None:
    """Two vCPUs have fds that are far apart; one ends."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2 * _FAR), limits[1]))
    with stage.vcpus(2) as (near, far):
        place = _FAR + far.fd
        os.dup2(far.fd, place)
        os.close(far.fd)
        far.fd = place
        raise_by_mce(near)
        raise_by_mce(far)
        save_blindly(near)
        near.close()
        shut_down(far)


def without_first_thread() -> None:
    """Be a VMM whose first thread exits: called there, in a process of its own."""
    kvm, first, failed = Kvm(), os.getpid(), threading.Event()

    def live() -> None:
        status = Path(f"/proc/self/task/{first}/stat")
        while status.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.001)
        try:
            with _exposed(Stage(kvm, SIGN_OF_LIFE, lambda: None)) as vcpu:
                shut_down(vcpu)
        except LabError as error:
            print(error, file=sys.stderr, flush=True)
            failed.set()
        os._exit(failed.is_set())

    threading.Thread(target=live).start()
    tasks.call(tasks.SYS_EXIT, 0)


@scenario(_GOES_ON)
def first_thread_gone(stage: Stage) -> None:
    """The first thread of a VMM has exited; another one goes on."""
    stage.vms += 1
    with child("-c", "from lab.ends import without_first_thread; without_first_thread()") as vmm:
        stage.pids.add(vmm.pid)
        if vmm.wait() != 0:
            fail(vmm)


_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
_NUMBER_TRIES = 50


def no_last_pid(kvm: Kvm) -> str | None:
    """Say why a process cannot be given a number."""
    del kvm
    return None if os.access(_LAST_PID, os.W_OK) else f"{_LAST_PID} cannot be written (CONFIG_CHECKPOINT_RESTORE)"


@scenario(lifecycle("lost", vm=0, blind_saves=1), lifecycle("delivered", vm=1), vms=2, needs=[no_mce, no_last_pid])
def number_reused(stage: Stage) -> None:
    """A VMM is killed, and the next one has its process number."""
    stage.killed("exposed")
    (number,) = stage.pids
    stage.vms += 1
    for _ in range(_NUMBER_TRIES):
        _LAST_PID.write_text(str(number - 1))
        with child("-m", "lab", "run", "delivered", "--wait") as vmm:
            if vmm.pid != number:
                continue  # another process was faster
            wait_for(vmm, READY)
            assert vmm.stdin
            vmm.stdin.close()
            if vmm.wait() != 0:
                fail(vmm)
            return
    raise LabError(f"no process could be given the number {number}", hint="this host makes too many of them")
