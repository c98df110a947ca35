"""A guest of two vCPUs that gets requests of which it is known how many and when; every wait is for what the guest did.

``python3 -m tests.matrix.busy`` runs it alone. Each part brings a vCPU into one state, in which a thread gives it a
prime number of requests: on its own thread, in user space, in guest mode, halted. It prints no more than that as JSON.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lab.kvm import MSI_NMI, CallFailed, Cap, Exit, Ioctl, Kvm, LabError, MpState, Pages, Vcpu

# How often each part does what it does: prime, so that a factor cannot hide.
NMIS, SMIS, INTERRUPTS, CLOCKS, SPIN_NMIS, HALT_NMIS, MEMSLOTS = 23, 13, 17, 19, 37, 31, 29
WAIT_S = 60.0
_CPUS = os.sched_getaffinity(0)

# The guest, in real mode with all segments at 0. Both vCPUs run the same code, each with counters and flags of its own
# at DI: the number of NMIs that it has taken at 0, whether it is to go on at 4, how often it has spun at 6.
_MEMORY, _CODE, _HANDLER = 0x10000, 0x1000, 0x1100
# What a vCPU sees in system management mode only: where it begins, and where KVM saves its state (SMBASE 0x30000).
_SMM, _SMM_CODE, _SMM_STATE, _PAGE = 1, 0x38000, 0x3F000, 0x1000
_STACKS, _MAILBOXES = (0x9000, 0xA000), (0x500, 0x600)
_FLAG, _SPUN = 4, 6
#   ff 05      incw (%di)
#   cf         iret
_COUNT = bytes.fromhex("ff05cf")
_RSM = bytes.fromhex("0faa")
_ASK, _SPIN, _HALT = _CODE, _CODE + 0x10, _CODE + 0x20
#   e4 10   1: in  $0x10, %al
#   eb fc      jmp 1b
_ASKS = bytes.fromhex("e410ebfc")
#   ff 45 06      1: incw 6(%di)
#   80 7d 04 00      cmpb $0, 4(%di)
#   74 f7            je 1b
#   e4 10            in $0x10, %al
_SPINS = bytes.fromhex("ff4506807d040074f7e410")
#   f4            1: hlt
#   80 7d 04 00      cmpb $0, 4(%di)
#   74 f9            je 1b
#   e4 10            in $0x10, %al
_HALTS = bytes.fromhex("f4807d040074f9e410")
_INTERRUPT_FLAG = 0x202
_VECTOR = 0x20
_OTHER_MEMORY_GPA = 0x10_0000


def _until(what: str, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > end:
            raise LabError(f"the guest did not come to it within {WAIT_S:.0f} s: {what}")
        time.sleep(0.001)


def _finish(vcpu: Vcpu) -> None:
    """Complete what the guest asked of user space: until then its registers are not its own (api.rst, KVM_EXIT_IO)."""
    vcpu.kvm_run.immediate_exit = 1
    try:
        vcpu.run()
    except CallFailed as error:
        if error.errno != errno.EINTR:
            raise
    finally:
        vcpu.kvm_run.immediate_exit = 0


class _Machine:
    """A VM whose vCPUs can be put to one of the three pieces of code."""

    def __init__(self, kvm: Kvm, vcpus: int, *, irqchip: bool, smm: bool = False) -> None:
        self.vm = kvm.create_vm()
        self.vm.set_tss_addr(0xFFFB_D000)
        if irqchip:
            self.vm.create_irqchip()
        self.memory = self.vm.add_memory(0, _MEMORY)
        for at, code in ((_ASK, _ASKS), (_SPIN, _SPINS), (_HALT, _HALTS), (_HANDLER, _COUNT)):
            self.memory.write(at, code)
        if smm:
            self.vm.add_memory(_SMM_CODE, _PAGE, address_space=_SMM).write(0, _RSM)
            self.vm.add_memory(_SMM_STATE, _PAGE, address_space=_SMM)
        for vector in (2, _VECTOR):
            self.memory.write(vector * 4, _HANDLER.to_bytes(4, "little"))
        self.vcpus = [self.vm.create_vcpu(number) for number in range(vcpus)]
        if irqchip:
            for vcpu in self.vcpus:
                vcpu.set_mp_state(MpState.KVM_MP_STATE_RUNNABLE)  # the second one waits for a SIPI otherwise
                vcpu.enable_lapic()

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()

    def put(self, number: int, code: int) -> None:
        """Have a vCPU begin there, as it is after a reset."""
        vcpu = self.vcpus[number]
        _finish(vcpu)
        sregs = vcpu.get_sregs()
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
            segment.base = segment.selector = 0
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rsp, regs.rdi, regs.rflags = code, _STACKS[number], _MAILBOXES[number], _INTERRUPT_FLAG
        vcpu.set_regs(regs)
        self.memory.write(_MAILBOXES[number], bytes(8))

    def counted(self, number: int) -> int:
        """Return how many NMIs and interrupts a vCPU has taken since it was put there."""
        return int.from_bytes(self.memory.read(_MAILBOXES[number], 2), "little")

    def go_on(self, number: int) -> None:
        """Let a vCPU that spins or halts go on, once it looks."""
        self.memory.write(_MAILBOXES[number] + _FLAG, b"\1")

    def ask(self, number: int) -> None:
        """Run a vCPU until it asks its port."""
        reason = self.vcpus[number].run(WAIT_S)
        if reason != Exit.KVM_EXIT_IO:
            raise LabError(f"vCPU {number} left with {reason}, not KVM_EXIT_IO")

    def spins(self, number: int) -> None:
        """Wait until a vCPU that spins is seen to do so: it is in guest mode."""
        at = _MAILBOXES[number] + _SPUN
        before = self.memory.read(at, 2)
        _until("it spun", lambda: self.memory.read(at, 2) != before)

    def nmi_from_outside(self, number: int) -> None:
        """Send a vCPU an NMI from a thread that is not its own, and wait until it has taken it."""
        before = self.counted(number)
        self.vm.signal_msi(number, MSI_NMI)
        _until("it took an NMI", lambda: self.counted(number) == before + 1)


def _on_its_own(machine: _Machine, smm: bool) -> None:
    # Between two KVM_RUNs of its own thread, each taken by the next one.
    machine.put(0, _ASK)
    for _ in range(NMIS):
        machine.vcpus[0].nmi()
        machine.ask(0)
    if machine.counted(0) != NMIS:
        raise LabError(f"the guest has taken {machine.counted(0)} of {NMIS} NMIs")
    for _ in range(SMIS if smm else 0):
        machine.vcpus[0].smi()
        machine.ask(0)


def _interrupts(machine: _Machine) -> None:
    machine.put(0, _ASK)
    for _ in range(INTERRUPTS):
        machine.vcpus[0].interrupt(_VECTOR)
        machine.ask(0)
    if machine.counted(0) != INTERRUPTS:
        raise LabError(f"the guest has taken {machine.counted(0)} of {INTERRUPTS} interrupts")


def _in_user_space(machine: _Machine) -> None:
    # Both vCPUs are outside KVM_RUN while every one of them gets a request.
    for number in range(2):
        machine.put(number, _ASK)
    for _ in range(CLOCKS):
        machine.vm.set_clock(time.monotonic_ns())
        for number in range(2):
            machine.ask(number)


def _running(machine: _Machine, code: int, numbers: Sequence[int], work: Callable[[int], None]) -> None:
    # These vCPUs are inside KVM_RUN, on threads of their own, while this one works on them from another CPU: else they
    # would be scheduled out whenever it runs.
    first, *others = sorted(_CPUS)
    errors: list[LabError] = []

    def run(number: int) -> None:
        os.sched_setaffinity(0, others or {first})
        try:
            machine.ask(number)
        except LabError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in numbers]
    os.sched_setaffinity(0, {first})
    for number, thread in zip(numbers, threads, strict=True):
        machine.put(number, code)
        thread.start()
    for number in numbers:
        machine.nmi_from_outside(number)  # from here on it is known to run
    for number in numbers:
        work(number)
    for number in numbers:
        machine.go_on(number)
        if code == _HALT:
            machine.vm.signal_msi(number, MSI_NMI)
    for thread in threads:
        thread.join(WAIT_S)
    os.sched_setaffinity(0, _CPUS)
    if errors:
        raise errors[0]


def _move_memory(machine: _Machine, number: int, pages: Pages) -> None:
    for times in range(MEMSLOTS):
        machine.spins(number)
        if times % 2 == 0:
            machine.vm.place_memory(pages, _OTHER_MEMORY_GPA)
        else:
            machine.vm.remove_memory(pages)


def _spinning(machine: _Machine, number: int) -> None:
    for _ in range(SPIN_NMIS):
        machine.spins(number)
        machine.nmi_from_outside(number)


def _halting(machine: _Machine, number: int) -> None:
    for _ in range(HALT_NMIS):
        machine.nmi_from_outside(number)


def known(*, smm: bool) -> list[tuple[int, str, int]]:
    """Return which request is pending after which ioctl of a vCPU, and how often that is done."""
    return [
        (Ioctl.KVM_NMI, "nmi", NMIS),
        (Ioctl.KVM_INTERRUPT, "event", INTERRUPTS),
        *([(Ioctl.KVM_SMI, "smi", SMIS)] if smm else []),
    ]


def work() -> dict[str, Any]:
    """Run every part, and return which process did it, and whether this KVM has SMM."""
    with Kvm() as kvm:
        smm = bool(kvm.check_extension(Cap.KVM_CAP_X86_SMM))
        smm &= kvm.check_extension(Cap.KVM_CAP_MULTI_ADDRESS_SPACE) > _SMM
        alone = _Machine(kvm, 1, irqchip=False)
        _interrupts(alone)
        alone.close()
        machine = _Machine(kvm, 2, irqchip=True, smm=smm)
        _on_its_own(machine, smm)
        _in_user_space(machine)
        for alone_in_guest_mode in range(2):
            _running(machine, _SPIN, [alone_in_guest_mode], lambda number: _spinning(machine, number))
        _running(machine, _HALT, range(2), lambda number: _halting(machine, number))
        pages = machine.vm.add_memory(_OTHER_MEMORY_GPA, 0x10000)
        _running(machine, _SPIN, range(2), lambda number: _move_memory(machine, number, pages))
        machine.close()
    return {"pid": os.getpid(), "smm": smm}


if __name__ == "__main__":
    print(json.dumps(work()))
    sys.exit(0)
