"""Guests for the benchmarks, each a process of its own.

python -m bench.guest pending EXITS     a vCPU with a triple fault pending that returns to user space EXITS times
python -m bench.guest shutdowns         a vCPU that is shut down every few milliseconds, until it is killed
"""

from __future__ import annotations

import ctypes
import sys
import time

from lab.kvm import Ioctl, Kvm
from lab.scratch import raise_by_mce

READY = "ready"
_PAUSE_S = 0.002


def _pending(exits: int) -> None:
    libc = ctypes.CDLL(None)
    run = Ioctl.KVM_RUN.value
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        raise_by_mce(vcpu)
        vcpu.kvm_run.immediate_exit = 1
        ioctl, descriptor = libc.ioctl, vcpu.fd
        for _ in range(exits):
            ioctl(descriptor, run, 0)


def _shutdowns() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        print(READY, flush=True)
        while True:
            raise_by_mce(vcpu)
            vcpu.run()
            time.sleep(_PAUSE_S)


if __name__ == "__main__":
    if sys.argv[1] == "pending":
        _pending(int(sys.argv[2]))
    else:
        _shutdowns()
