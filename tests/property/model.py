"""A small KVM and its tracer: event streams that a host can produce, with what the ring had no room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from probes.schema import (
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    PAYLOAD_PENDING,
    REQUEST_FLAGS,
    RESTORED_STATE,
    SAVED_STATE,
    STATE_BITS,
    VALID_TRIPLE_FAULT,
    End,
    Flag,
    Kind,
    Site,
)
from tests.property.oracle import Event
from tracer.loss import Loss, VcpuLoss

# Of each sort: what a save carries by a flag, or always, or never, what needs no saving, and what nobody knows.
NAMES = {10: "triple_fault", 17: "nmi", 26: "hv_crash", 0: "tlb_flush", 40: "bit_40", 43: "bit_43"}
TRIPLE_FAULT, NMI, HV_CRASH, TLB_FLUSH, UNKNOWN, OTHER = 1 << 10, 1 << 17, 1 << 26, 1 << 0, 1 << 43, 1 << 3
UNNAMED = 1 << 40  # on this kernel, that is: on others it has one
WATCHED = TRIPLE_FAULT | NMI | HV_CRASH | TLB_FLUSH | UNNAMED | UNKNOWN
SET_MCE, GET_EVENTS, SET_EVENTS, SET_REGS, NMI_IOCTL = 0x4040AE9E, 0x8040AE9F, 0x4040AEA0, 0x4090AE82, 0xAE9A
KVM_RUN = 0xAE80
EIO = (2**32 - 5) << 32
RAISERS = (Site.EXCEPTION, Site.RSM, Site.REALMODE_INTERRUPT, Site.EMULATION, Site.NESTED_ABORT, Site.SET_EFER)


@dataclass
class Guest:
    """A vCPU, as KVM and as the tracer see it."""

    number: int
    vm: int
    pid: int
    created: bool
    word: int = 0  # vcpu->requests
    read: int = 0  # as it was last read
    read_ns: int = 0
    seq: int = 0
    announced: bool = False
    received: bool = False
    cap: bool = False
    nested: bool = False
    exited: bool = False
    state: int = 0  # what user space has read of it since it ran
    still: bool = False
    dead: bool = False

    @property
    def flags(self) -> int:
        saved = Flag.READ * (self.state & SAVED_STATE == SAVED_STATE)
        return (
            Flag.CREATED * self.created
            | Flag.CAP * self.cap
            | Flag.NESTED * self.nested
            | saved
            | Flag.STILL * self.still
            | Flag.DEAD * self.dead
        )


@dataclass
class Machine:
    """The host. ``full`` says which events the ring has no room for.

    With ``chatty`` every reading is an event; with ``deep`` there are those of guest mode and of other threads, too.
    """

    full: Collection[int] = ()
    chatty: bool = False
    deep: bool = False
    now: int = 1000
    numbers: int = 0
    produced: int = 0
    guests: list[Guest] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    lost: Counter[int] = field(default_factory=Counter)

    def put(self, event: Event) -> bool:
        self.produced += 1
        if self.produced in self.full:
            self.lost[event.vcpu] += 1
            return False
        self.events.append(event)
        return True

    def send(self, guest: Guest, kind: int, time: int, since: int, word: int, before: int, arg: int, detail: int,
             flags: int) -> None:  # fmt: skip
        if not guest.announced and kind != Kind.VCPU_NEW:
            self.announce(guest, since, before, flags)
        guest.seq += 1
        sent = self.put(
            Event(
                time, since, word, before, arg, guest.number, guest.seq, guest.pid, 1, detail, 0, kind, flags
            )
        )  # fmt: skip
        guest.received |= sent
        if kind == Kind.VCPU_NEW:
            guest.announced = sent

    def announce(self, guest: Guest, time: int, word: int, flags: int) -> None:
        self.send(guest, Kind.VCPU_NEW, time, 0, word, 0, guest.number % 3, guest.vm, flags & ~Flag.SYNC)

    def boundary(self, guest: Guest, kind: int, arg: int = 0, detail: int = 0, *, always: bool = True,
                 pending: bool = False, flags: int = 0) -> None:  # fmt: skip
        self.now += 1
        since, before = guest.read_ns, guest.read
        guest.read_ns, guest.read = self.now, guest.word
        changed = (before ^ guest.word) & WATCHED or (pending and guest.word & WATCHED)
        if always or self.chatty or changed:
            self.send(guest, kind, self.now, since, guest.word, before, arg, detail, guest.flags | flags)

    def begin(self, choice: int, *, created: bool) -> None:
        self.now += 1
        self.numbers += 1
        vm = 1 + choice % 3
        guest = Guest(self.numbers, vm, 100 + vm % 2, created, cap=bool(choice & 4), still=not created)
        if not created:
            guest.word = (TRIPLE_FAULT if choice & 8 else 0) | (NMI if choice & 16 else 0) | OTHER
            guest.word |= HV_CRASH if choice & 64 else 0
        self.guests.append(guest)
        guest.read, guest.read_ns = guest.word, self.now
        self.announce(guest, self.now, guest.word, guest.flags)

    def step(self, what: int, who: int, choice: int) -> None:
        """Let one thing happen: ``what`` it is, to ``whom``, and how."""
        self.now += choice % 5
        alive = [guest for guest in self.guests if not guest.exited]
        if what == 0 or not alive:
            self.begin(choice, created=bool(choice & 32))
        elif what == 1:
            self.reuse(who)
        else:
            (
                self.run, self.run, self.run, self.ioctl, self.ioctl, self.restore, self.save, self.save, self.reset,
                self.end, self.exit, self.quiet, self.kick, self.kick, self.request_all, self.look, self.look,
                self.write,
            )[(what - 2) % 18](alive[who % len(alive)], choice)  # fmt: skip

    def run(self, guest: Guest, choice: int) -> None:
        self.boundary(guest, Kind.RUN_ENTER, KVM_RUN, always=False, pending=bool(guest.flags & Flag.READ))
        if choice & 17:
            guest.state, guest.still = 0, False
        if choice & 1 and not guest.word & TRIPLE_FAULT:
            guest.word |= TRIPLE_FAULT
            if choice & 2:
                self.boundary(guest, Kind.SITE, RAISERS[choice % len(RAISERS)], always=False)
        guest.word ^= (NMI | HV_CRASH | TLB_FLUSH | UNNAMED | UNKNOWN | OTHER) & (
            choice << 39 | choice << 13 | choice << 20 | choice
        )
        if self.deep:
            self.guest_mode(guest, choice)
        reason = 5
        if guest.word & TRIPLE_FAULT and choice & 4:
            guest.word &= ~TRIPLE_FAULT
            if choice & 8 and guest.nested:
                self.boundary(guest, Kind.SITE, Site.REFLECT, always=False)
            elif choice & 128 and choice & 64:
                reason = 17  # an older KVM, or a hook that this engine does not have
            else:
                reason = KVM_EXIT_SHUTDOWN
        elif choice & 240 == 240:
            reason = KVM_EXIT_SHUTDOWN  # the hardware's
        elif choice & 240 == 80:
            reason = KVM_EXIT_SYSTEM_EVENT
        guest.dead |= choice & 255 == 49
        error = EIO if choice & 112 == 112 and reason != KVM_EXIT_SHUTDOWN else 0
        told = reason in (KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT) and not error
        self.boundary(
            guest, Kind.RUN_EXIT, reason | error, choice & 7 if reason == KVM_EXIT_SYSTEM_EVENT else 0,
            always=told or guest.dead, pending=True, flags=Flag.SYNC * (choice & 9 == 9),
        )  # fmt: skip
        if choice & 96 == 96 and guest.word & WATCHED:
            self.boundary(guest, Kind.SAVE, GET_EVENTS, self.payload(guest), flags=Flag.SYNC)

    def guest_mode(self, guest: Guest, choice: int) -> None:
        if choice & 16:
            self.boundary(guest, Kind.WAKEUP, 5, choice >> 5 & 1)
            guest.word ^= (NMI | HV_CRASH | TLB_FLUSH) & (choice << 15 | choice << 22 | choice >> 2)
        self.boundary(guest, Kind.GUEST_ENTRY)
        if choice & 32:
            self.kick(guest, choice)
        if choice & 64:
            self.request_all(guest, choice)
        if choice & 3 != 3:
            self.boundary(guest, Kind.GUEST_EXIT, 0x60, 2)

    def kick(self, guest: Guest, choice: int) -> None:
        """Another thread raises something, or not, and kicks the vCPU."""
        guest.word |= (NMI | HV_CRASH) & (choice << 14 | choice << 21)
        self.now += 1
        if self.deep:
            self.apart(Event(
                self.now, 0, guest.word, guest.word, 0, guest.number, 0, guest.pid, 70 + choice % 3, 1, choice % 2,
                Kind.KICK, guest.flags,
            ))  # fmt: skip

    def request_all(self, guest: Guest, choice: int) -> None:
        """Another thread flushes the TLBs of the VM, of all its vCPUs or of some; or only has them leave the guest."""
        self.now += 1
        mask = 2**64 - 1 if choice & 1 else choice >> 1
        no_action = REQUEST_FLAGS["NO_ACTION"] * (choice & 0x30 == 0x30)
        request = 0x300 | no_action
        if self.deep:
            self.apart(Event(
                self.now, 0, mask, 0, request, 0, 0, guest.pid, 80 + choice % 3, guest.vm, choice % 2, Kind.REQUEST_ALL
            ))  # fmt: skip
        for other in self.guests:
            if other.vm == guest.vm and not other.exited and not no_action and mask >> (other.number % 3) & 1:
                other.word |= TLB_FLUSH

    def apart(self, event: Event) -> None:
        """Put an event that no vCPU numbers; for what is lost of those no verdict changes."""
        self.produced += 1
        if self.produced not in self.full:
            self.events.append(event)

    def payload(self, guest: Guest) -> int:
        if not guest.cap:
            return 0x5
        return VALID_TRIPLE_FAULT | (PAYLOAD_PENDING if guest.word & TRIPLE_FAULT else 0)

    def ioctl(self, guest: Guest, choice: int) -> None:
        cmd = (SET_MCE, NMI_IOCTL, SET_REGS, 0x1234)[choice % 4]
        self.boundary(guest, Kind.IOCTL_ENTER, cmd, always=False, pending=True)
        if choice & 8:
            guest.word |= NMI if cmd == NMI_IOCTL else TRIPLE_FAULT
        elif choice & 0xF0 == 0xF0:
            guest.word &= ~WATCHED
        self.boundary(guest, Kind.IOCTL_EXIT, cmd | (EIO if choice & 0x70 == 0x70 else 0), always=False, pending=True)

    def restore(self, guest: Guest, choice: int) -> None:
        flag, pending, failed = bool(choice & 1), bool(choice & 2), choice & 0xC == 0xC
        if flag and not failed:
            guest.word = guest.word | TRIPLE_FAULT if pending else guest.word & ~TRIPLE_FAULT
        detail = VALID_TRIPLE_FAULT * flag | PAYLOAD_PENDING * pending
        self.boundary(guest, Kind.RESTORE, SET_EVENTS | EIO * failed, detail)

    def save(self, guest: Guest, choice: int) -> None:
        if choice & 8:
            self.look(guest, choice)
        failed = choice & 7 == 7
        self.boundary(guest, Kind.SAVE, GET_EVENTS | EIO * failed, self.payload(guest))
        if not failed:
            self.has_read(guest, STATE_BITS["events"])
        if choice & 48 == 48:
            self.look(guest, choice)

    def look(self, guest: Guest, choice: int) -> None:
        """Read registers: some of them, or all that a copy takes."""
        self.has_read(guest, SAVED_STATE if choice & 3 else STATE_BITS[list(STATE_BITS)[choice % 5]])

    def has_read(self, guest: Guest, state: int) -> None:
        known, guest.state = guest.state, guest.state | state
        if guest.state != known and guest.state & SAVED_STATE == SAVED_STATE:
            self.boundary(guest, Kind.READ, 7, guest.state)

    def write(self, guest: Guest, choice: int) -> None:
        guest.state = 0
        self.boundary(guest, Kind.WRITTEN, choice, RESTORED_STATE)

    def reset(self, guest: Guest, choice: int) -> None:
        self.boundary(guest, Kind.RESET, SET_REGS * (choice & 1))

    def end(self, guest: Guest, choice: int) -> None:
        self.boundary(guest, Kind.VCPU_END, End.CLOSED if choice & 1 else End.DESTROYED)
        self.guests.remove(guest)

    def exit(self, guest: Guest, choice: int) -> None:
        self.now += 1
        for other in self.guests:
            other.exited |= other.pid == guest.pid
        self.put(Event(self.now, arg=End.EXITED, pid=guest.pid, tid=1, kind=Kind.VMM_EXIT))

    def reuse(self, who: int) -> None:
        exited = [guest for guest in self.guests if guest.exited]
        if not exited:
            return
        guest = exited[who % len(exited)]
        self.now += 1
        if not (guest.received and not guest.announced):
            self.send(guest, Kind.VCPU_END, self.now, guest.read_ns, guest.read, guest.read, End.REUSED, 0, guest.flags)
        self.guests.remove(guest)

    def quiet(self, guest: Guest, choice: int) -> None:
        if choice & 1:
            guest.nested = not guest.nested
        elif choice & 2:
            guest.cap = not guest.cap
            self.now += 1
            self.put(Event(self.now, arg=int(guest.cap), pid=guest.pid, tid=1, detail=guest.vm, kind=Kind.VM_CAP))
        else:
            guest.word ^= WATCHED & (choice << 8 | choice << 15 | choice << 20 | choice >> 4)

    def end_all(self) -> None:
        """Let every process exit."""
        for guest in list(self.guests):
            if not guest.exited:
                self.exit(guest, 0)

    @property
    def loss(self) -> Loss:
        return loss_of(self.lost)


def loss_of(lost: Counter[int]) -> Loss:
    """Return the loss of so many events of each vCPU."""
    return Loss(
        ring_full=lost.total(), vcpus={number: VcpuLoss(count, 1, 2) for number, count in lost.items() if count}
    )


def played(steps: Sequence[tuple[int, int, int]], full: Collection[int] = (), *, chatty: bool = False,
           deep: bool = False, end_all: bool = False) -> Machine:  # fmt: skip
    """Return the machine on which these things have happened."""
    machine = Machine(full, chatty or deep, deep)
    for what, who, choice in steps:
        machine.step(what, who, choice)
    if end_all:
        machine.end_all()
    return machine
