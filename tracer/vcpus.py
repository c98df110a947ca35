"""The state of every vCPU, kept in user space: records of the ftrace engine's probes in, events out.

Pure. It is what probes/programs/vcpu.c keeps in maps inside the kernel, for an engine that has no programs there.
Records must come in the order of their times; those of one thread, and those of one vCPU, then tell its story.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from probes.fetch import EXCEPTING, MASKED, PRESERVED, called
from probes.requests import TRIPLE_FAULT
from probes.schema import (
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    NO_IOCTL,
    PAYLOAD_FLAGS,
    PAYLOAD_PENDING,
    RAN,
    RESTORED_STATE,
    SAVED_STATE,
    SEQUENCE,
    STATE_BITS,
    STATES,
    VALID_TRIPLE_FAULT,
    End,
    Flag,
    Kind,
    Site,
)
from tracer.loss import VcpuLoss

# ioctls of a vCPU (uapi linux/kvm.h).
KVM_RUN = 0xAE80
KVM_GET_VCPU_EVENTS = 0x8040AE9F
KVM_SET_VCPU_EVENTS = 0x4040AEA0
_KVM_SET_REGS, _KVM_SET_SREGS, _KVM_SET_SREGS2 = 0x4090AE82, 0x4138AE84, 0x4140AECD
_WRITE_REGISTERS = (_KVM_SET_REGS, _KVM_SET_SREGS, _KVM_SET_SREGS2)
# Those that kvm_vcpu_ioctl() handles itself: kvm_arch_vcpu_ioctl(), where the others end, does not see them.
_GENERIC = frozenset(
    (
        _KVM_SET_REGS,
        _KVM_SET_SREGS,
        0x8090AE81,  # KVM_GET_REGS
        0x8138AE83,  # KVM_GET_SREGS
        0xC018AE85,  # KVM_TRANSLATE
        0x8004AE98,  # KVM_GET_MP_STATE
        0x4004AE99,  # KVM_SET_MP_STATE
        0x4048AE9B,  # KVM_SET_GUEST_DEBUG
        0x81A0AE8C,  # KVM_GET_FPU
        0x41A0AE8D,  # KVM_SET_FPU
    )
)
KVM_CAP_X86_TRIPLE_FAULT_EVENT = 218
_KVM_SYNC_X86_EVENTS = 4
_X86_CR0_PE = 1
_READS = {number: 1 << bit for bit, state in enumerate(STATES) for number in state.reads}
_WRITES = {number: 1 << bit for bit, state in enumerate(STATES) for number in state.writes}
_ALWAYS = _ALL = (1 << 64) - 1
_BIT = 1 << TRIPLE_FAULT
_MASK_BITS = 64
# Functions that raise a request of several vCPUs: each may call those after it, never itself or one before it.
_REQUESTERS = ("kvm_make_all_cpus_request", EXCEPTING, MASKED)


def _errno(value: int) -> int:
    return (value & 0xFFFFFFFF) << 32


def _payload(flags: int, pending: int) -> int:
    return (flags & PAYLOAD_FLAGS) | (PAYLOAD_PENDING if pending else 0)


@dataclass(slots=True)
class _Vcpu:
    number: int
    vm: int
    vcpu_id: int
    pid: int
    flags: int  # Flag.CREATED, Flag.CAP_EXISTS
    seen: int = 0  # the flags of its last event
    last_ns: int = 0
    word: int = 0
    seq: int = 0
    exits: int | None = None  # how often it had left the guest, as it was last read
    still: bool = False  # Flag.STILL
    restored: bool = False  # its registers were written, or a restore of it failed, and it has not run since
    read: int = 0  # what user space has read of it, and
    written: int = 0  # written, since it last ran

    @property
    def saved(self) -> bool:
        """Whether that is what makes a save."""
        return self.read & SAVED_STATE == SAVED_STATE

    def counted(self, exits: int) -> bool:
        """Take how often it has left the guest; return whether it has run since it was last asked."""
        ran = self.exits is not None and exits != self.exits
        self.exits = exits
        if ran:
            self.read = self.written = 0
            self.still = False
        return ran

    def ran_restored(self, ran: bool) -> int:
        """Return RAN where it has run that was restored, or refused to be: told once."""
        told = RAN if self.restored and ran else 0
        self.restored &= not told
        return told


@dataclass(slots=True)
class _Reading:
    """The word of a vCPU, as one record tells it, and what held then."""

    time_ns: int
    word: int
    cap: int
    nested: int
    dead: int = 0


@dataclass(slots=True)
class _Inside:
    """The ioctl that a thread is inside."""

    vcpu: int
    cmd: int
    reading: _Reading | None = None  # where it was about to return
    begun: _Reading | None = None  # where KVM_{GET,SET}_VCPU_EVENTS began
    payload: int | None = None  # what KVM_SET_VCPU_EVENTS was given, or KVM_GET_VCPU_EVENTS gave
    ran: bool = False  # the guest was entered
    sync: tuple[int, int] = (0, 0)  # kvm_run's valid registers, and the events that it holds
    system_event: int = 0  # what kvm_run holds as the type of one


@dataclass(slots=True)
class _Guest:
    """The guest that a thread runs, in detail full: what trace events tell waits here for its reading."""

    vcpu: int
    entering: _Reading | None = None  # with which the guest is about to be entered
    entered: bool = False  # an entry was told before its reading
    left: _Reading | None = None  # with which it was left
    waiting: list[tuple[int, int, int]] = field(default_factory=list)  # told, and not yet read


class _Request(NamedTuple):
    """A request of several vCPUs that a thread is making."""

    function: str
    begin_ns: int
    what: tuple[int, int, int]  # request with its flags, mask, VM
    pid: int


@dataclass
class Vcpus:
    """The machine. ``owner_of`` tells the process of a thread, where the kernel does not."""

    watched: int
    cap_exists: bool
    full: bool = False
    pids: Collection[int] = ()
    owner_of: Callable[[int], int] = lambda thread: thread
    sites: Mapping[str, Site] = field(default_factory=dict)  # by program
    calls: Collection[str] = ()  # programs of functions that are hooked in detail full
    events: list[tuple[int, ...]] = field(default_factory=list)  # made and not yet taken; fields of schema.EVENT
    boundaries: int = 0
    asker: int = 0  # the thread that asks vCPUs meanwhile,
    answered: int = 0  # and how many were seen for it
    lost: dict[int, VcpuLoss] = field(default_factory=dict)  # by vCPU: what was told and could not be read

    def __post_init__(self) -> None:
        self._vcpus: dict[int, _Vcpu] = {}
        self._threads: dict[int, _Inside] = {}
        self._vms: dict[int, tuple[int, int]] = {}
        self._enabling: dict[int, tuple[int, int, int]] = {}
        self._guests: dict[int, _Guest] = {}
        self._requests: dict[int, _Request] = {}
        self._numbers = 0
        #: What takes the records of each probe: (record, time, CPU).
        self.takes: dict[str, Callable[[Any, int, int], None]] = {
            "vcpu_ioctl": self._ioctl,
            "vcpu_put": self._put,
            "kvm_userspace_exit": self._userspace_exit,
            "ioctl_end": self._ioctl_end,
            "get_events": self._get_events,
            "get_events_end": self._get_events_end,
            "set_events": self._set_events,
            "set_events_end": self._set_events_end,
            "vcpu_create": self._create,
            "vcpu_destroy": self._destroy,
            "vm_destroy": self._vm_destroy,
            "vcpu_reset": self._reset,
            "enable_cap": self._enable_cap,
            "enable_cap_end": self._enable_cap_end,
            "sched_process_exit": self._thread_exit,
            **{program: partial(self._site, site) for program, site in self.sites.items()},
            "kvm_entry": self._entry,
            "kvm_exit": self._exit,
            "kvm_vcpu_wakeup": self._wakeup,
            **{program: self._takes_call(*called(program)) for program in self.calls},
        }

    def _takes_call(self, role: str, function: str) -> Callable[[Any, int, int], None]:
        if role in ("request", "request_end"):
            return partial(self._request if role == "request" else self._request_end, function)
        return {"entering": self._entering, "left": self._left, "awake": self._awake, "kick": self._kick}[role]

    # --- events ---------------------------------------------------------------------------------------------

    def _put_event(
        self, state: _Vcpu, reading: _Reading, before: tuple[int, int], what: tuple[int, int, int], who: tuple[int, int]
    ) -> None:
        # before: time and word; what: kind, arg, detail; who: thread, CPU
        state.seq = state.seq % SEQUENCE + 1
        kind, arg, detail = what
        tid, cpu = who
        since_ns, word = before
        self.events.append(
            (
                *(reading.time_ns, since_ns, reading.word, word, arg, state.number, state.seq, state.pid),
                *(tid, detail, cpu, kind, state.seen),
            )
        )

    def _boundary(
        self,
        state: _Vcpu,
        reading: _Reading,
        what: tuple[int, int, int],
        who: tuple[int, int],
        send_if: int = 0,
        flags: int = 0,
    ) -> None:
        """Read the word. An event is made if a watched bit changed, or ``send_if`` wants it."""
        before = state.last_ns, state.word
        state.last_ns, state.word = reading.time_ns, reading.word
        self.boundaries += 1
        if reading.dead:
            state.flags |= Flag.DEAD
        changed = (reading.word ^ before[1]) & self.watched
        if changed or send_if == _ALWAYS or reading.word & send_if or self.full:
            state.seen = self._live(state, reading) | flags
            self._put_event(state, reading, before, what, who)

    @staticmethod
    def _live(state: _Vcpu, reading: _Reading) -> int:
        flags = state.flags | (Flag.CAP if reading.cap else 0) | (Flag.NESTED if reading.nested else 0)
        return flags | (Flag.READ if state.saved else 0) | (Flag.STILL if state.still else 0)

    def _whole_vm(self, time_ns: int, pid: int, what: tuple[int, int, int], who: tuple[int, int]) -> None:
        self.events.append((time_ns, 0, 0, 0, what[1], 0, 0, pid, who[0], what[2], who[1], what[0], 0))

    # --- vCPUs and VMs --------------------------------------------------------------------------------------

    def _reading(self, record: Any, time_ns: int) -> _Reading:
        # A kernel without the capability, or without the statistic, has no such fetch argument.
        held = (getattr(record, name, 0) for name in ("cap", "nested", "dead"))
        return _Reading(time_ns, record.requests, *held)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _pid(self, record: Any) -> int:
        if hasattr(record, "creator"):
            return self.owner_of(record.creator)
        return int(record.tgid) if record.owner else self.owner_of(record.common_pid)

    def _vm(self, kvm: int, pid: int) -> int:
        known = self._vms.get(kvm)
        if known is None or known[1] != pid:
            known = self._vms[kvm] = self._number(), pid
        return known[0]

    def _begin(self, record: Any, time_ns: int, cpu: int, flags: int = 0) -> _Vcpu | None:
        pid = self._pid(record)
        if self.pids and pid not in self.pids:
            return None
        flags |= Flag.CAP_EXISTS if self.cap_exists else 0
        number = self._number()
        state = _Vcpu(number, self._vm(record.kvm, pid), record.vcpu_id, pid, flags)
        state.exits, state.still = getattr(record, "exits", None), not flags & Flag.CREATED
        self._vcpus[record.vcpu] = state
        what = Kind.VCPU_NEW, state.vcpu_id, state.vm
        self._boundary(state, self._reading(record, time_ns), what, (record.common_pid, cpu), _ALWAYS)
        return state

    def _create(self, record: Any, time_ns: int, cpu: int) -> None:
        stale = self._vcpus.pop(record.vcpu, None)
        if stale is not None:
            # Its memory is another vCPU's by now, so the word is the last one that was read.
            reading = _Reading(time_ns, stale.word, 0, 0)
            what = Kind.VCPU_END, End.REUSED, 0
            self._put_event(stale, reading, (stale.last_ns, stale.word), what, (record.common_pid, cpu))
        self._begin(record, time_ns, cpu, Flag.CREATED)

    def _destroy(self, record: Any, time_ns: int, cpu: int) -> None:
        state = self._vcpus.get(record.vcpu) or self._begin(record, time_ns, cpu)
        if state is not None:
            what = Kind.VCPU_END, End.DESTROYED, state.ran_restored(state.counted(record.exits))
            self._boundary(state, self._reading(record, time_ns), what, (record.common_pid, cpu), _ALWAYS)
            del self._vcpus[record.vcpu]

    def _vm_destroy(self, record: Any, _time_ns: int, _cpu: int) -> None:
        self._vms.pop(record.kvm, None)

    def _reset(self, record: Any, time_ns: int, cpu: int) -> None:
        state = self._vcpus.get(record.vcpu)
        if state is not None:
            what = Kind.RESET, 0, 0
            self._boundary(state, self._reading(record, time_ns), what, (record.common_pid, cpu), self.watched)

    def _enable_cap(self, record: Any, _time_ns: int, _cpu: int) -> None:
        if record.cap == KVM_CAP_X86_TRIPLE_FAULT_EVENT:
            self._enabling[record.common_pid] = record.kvm, self._pid(record), int(record.value != 0)

    def _enable_cap_end(self, record: Any, time_ns: int, cpu: int) -> None:
        enabling = self._enabling.pop(record.common_pid, None)
        if enabling is None or record.ret:
            return
        kvm, pid, value = enabling
        if not self.pids or pid in self.pids:
            what = Kind.VM_CAP, value, self._vm(kvm, pid)
            self._whole_vm(time_ns, pid, what, (record.common_pid, cpu))

    def _thread_exit(self, record: Any, _time_ns: int, _cpu: int) -> None:
        self._threads.pop(record.common_pid, None)
        self._enabling.pop(record.common_pid, None)
        self._guests.pop(record.common_pid, None)
        self._requests.pop(record.common_pid, None)

    # --- ioctls ---------------------------------------------------------------------------------------------

    def _ioctl(self, record: Any, time_ns: int, cpu: int) -> None:
        if not record.vcpu:
            return
        state = self._vcpus.get(record.vcpu) or self._begin(record, time_ns, cpu)
        if state is None:
            return
        cmd = record.cmd
        self.answered += cmd == NO_IOCTL and record.common_pid == self.asker
        self._threads[record.common_pid] = _Inside(record.vcpu, cmd)
        what = Kind.RUN_ENTER if cmd == KVM_RUN else Kind.IOCTL_ENTER, cmd, 0
        # What was raised since it was saved is not left out by that once it runs.
        send_if = self.watched if cmd == KVM_RUN and state.saved else 0
        self._boundary(state, self._reading(record, time_ns), what, (record.common_pid, cpu), send_if)

    def _put(self, record: Any, time_ns: int, cpu: int) -> None:
        """An ioctl of a vCPU is about to return: what it returns with is told where that is known."""
        if record.common_pid in self._guests:
            self._look(record, time_ns, cpu)
        inside, state = self._threads.get(record.common_pid), self._vcpus.get(record.vcpu)
        ran = state is not None and state.counted(record.exits)
        if inside is None or inside.vcpu != record.vcpu:
            return  # inside when tracing began, or KVM's own use of a vCPU, such as its creation
        inside.reading = self._reading(record, time_ns)
        if inside.cmd == KVM_RUN:
            inside.ran = ran
            valid = 0 if getattr(record, "protected", 0) else record.valid_regs  # KVM then writes none (store_regs)
            inside.sync = valid, _payload(record.flags, record.pending)
            inside.system_event = getattr(record, "system_event", 0)
            return
        if state is None:
            return
        who = record.common_pid, cpu
        if inside.cmd in _WRITE_REGISTERS and state.word & self.watched and not record.cr0 & _X86_CR0_PE:
            # As it was where the ioctl began: what that has raised since is told where it ends.
            begun = replace(inside.reading, time_ns=state.last_ns, word=state.word)
            self._boundary(state, begun, (Kind.RESET, inside.cmd, 0), who, _ALWAYS)
        if inside.cmd in _GENERIC:
            del self._threads[record.common_pid]
            self._boundary(state, inside.reading, (Kind.IOCTL_EXIT, inside.cmd, 0), who, self.watched)
            self._passed(state, inside, 0, who)

    def _passed(self, state: _Vcpu, inside: _Inside, result: int, who: tuple[int, int]) -> None:
        """User space has read or written a part of a vCPU's state. Registers have no fingerprint here.

        So whether those that were read are put back, or others written, is not told: it is taken for the former.
        """
        number, reading = inside.cmd & 0xFF, inside.reading or inside.begun
        if inside.cmd == KVM_SET_VCPU_EVENTS and result < 0:
            state.restored = True
        read, written = _READS.get(number, 0), _WRITES.get(number, 0)
        if reading is None or result < 0 or ((read | written) == STATE_BITS["msrs"] and not result):
            return
        known, state.read, state.written = state.read, state.read | read, state.written | written
        if read and state.read != known and state.saved:
            self._boundary(state, reading, (Kind.READ, 0, state.read), who, _ALWAYS)
        if written & SAVED_STATE and state.written & RESTORED_STATE == RESTORED_STATE and not state.saved:
            state.read, state.restored = 0, True
            self._boundary(state, reading, (Kind.WRITTEN, 0, state.written), who, _ALWAYS)

    def _ioctl_end(self, record: Any, time_ns: int, cpu: int) -> None:
        inside = self._threads.get(record.common_pid)
        if inside is None or inside.cmd == KVM_RUN:
            return
        del self._threads[record.common_pid]
        state = self._vcpus.get(inside.vcpu)
        reading = inside.reading or inside.begun
        if state is None or reading is None:
            return  # its end was not seen: the kernel counts the hooks that it missed
        kind, detail, send_if = Kind.IOCTL_EXIT, 0, self.watched
        if inside.cmd == KVM_GET_VCPU_EVENTS:
            kind, send_if = Kind.SAVE, _ALWAYS
            detail = inside.payload if inside.payload is not None else self._by_rule(inside.begun or reading)
        elif inside.cmd == KVM_SET_VCPU_EVENTS and inside.payload is not None:
            kind, send_if, detail = Kind.RESTORE, _ALWAYS, inside.payload
        what, who = (kind, inside.cmd | _errno(min(record.ret, 0)), detail), (record.common_pid, cpu)
        self._boundary(state, reading, what, who, send_if)
        self._passed(state, inside, record.ret, who)

    @staticmethod
    def _by_rule(reading: _Reading) -> int:
        # What KVM_GET_VCPU_EVENTS gave, where it cannot be read: the flag exactly if the capability is enabled.
        # Linux commit ed2351174e38 ("KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault")
        # (in v6.0).
        return _payload(VALID_TRIPLE_FAULT, reading.word & _BIT) if reading.cap else 0

    def _get_events(self, record: Any, time_ns: int, _cpu: int) -> None:
        inside = self._threads.get(record.common_pid)
        if inside is not None and inside.vcpu == record.vcpu:
            inside.begun, inside.payload = self._reading(record, time_ns), None

    def _get_events_end(self, record: Any, _time_ns: int, _cpu: int) -> None:
        inside = self._threads.get(record.common_pid)
        if inside is not None:
            inside.payload = _payload(record.flags, record.pending)

    def _set_events(self, record: Any, time_ns: int, _cpu: int) -> None:
        inside = self._threads.get(record.common_pid)
        if inside is not None and inside.vcpu == record.vcpu:
            inside.begun = self._reading(record, time_ns)
            inside.payload = _payload(record.flags, record.pending)

    def _set_events_end(self, record: Any, time_ns: int, cpu: int) -> None:
        """Events were set through kvm_run; those of the ioctl are told where that ends."""
        inside = self._threads.get(record.common_pid)
        if inside is None or inside.cmd != KVM_RUN or inside.begun is None or inside.payload is None:
            return
        state = self._vcpus.get(inside.vcpu)
        if state is None:
            return
        begun, detail = inside.begun, inside.payload
        inside.begun = inside.payload = None
        reading = self._preserved(record, time_ns, inside.vcpu)
        if reading is None:
            # By KVM's rule, as for a save: it sets or clears the request exactly as the flag says.
            word = begun.word
            if not record.ret and detail & VALID_TRIPLE_FAULT:
                word = word | _BIT if detail & PAYLOAD_PENDING else word & ~_BIT
            reading = _Reading(time_ns, word, begun.cap, begun.nested)
        reading.cap = begun.cap
        what = Kind.RESTORE, KVM_SET_VCPU_EVENTS | _errno(record.ret), detail
        self._boundary(state, reading, what, (record.common_pid, cpu), _ALWAYS, Flag.SYNC)

    def _userspace_exit(self, record: Any, _time_ns: int, cpu: int) -> None:
        inside = self._threads.pop(record.common_pid, None)
        if inside is None or inside.reading is None:
            return  # attached while this thread was inside
        state = self._vcpus.get(inside.vcpu)
        if state is None:
            return
        error = record.errno
        event = inside.system_event if record.reason == KVM_EXIT_SYSTEM_EVENT and not error else 0
        shutdown = record.reason == KVM_EXIT_SHUTDOWN and not error
        given_up = inside.reading.dead and error == -errno.EIO  # vcpu_enter_guest took the request for that
        send_if = _ALWAYS if shutdown or event or given_up else self.watched
        who = record.common_pid, cpu
        restored = state.ran_restored(inside.ran)
        send_if = _ALWAYS if restored else send_if
        what = Kind.RUN_EXIT, record.reason | _errno(error), event | restored
        self._boundary(state, inside.reading, what, who, send_if)
        valid, events = inside.sync
        if state.word & self.watched and valid & _KVM_SYNC_X86_EVENTS:
            # A VMM that has its registers in kvm_run gets the events with them: that is a save, too.
            self._boundary(state, inside.reading, (Kind.SAVE, KVM_GET_VCPU_EVENTS, events), who, _ALWAYS, Flag.SYNC)

    # --- inside KVM -----------------------------------------------------------------------------------------

    @staticmethod
    def _preserved(record: Any, time_ns: int, vcpu: int) -> _Reading | None:
        for register in PRESERVED:
            if getattr(record, register, None) == vcpu:  # a kernel may have them not read
                word = getattr(record, f"{register}_requests")
                return _Reading(time_ns, word, 0, getattr(record, f"{register}_nested", 0))
        return None

    def _site(self, site: Site, record: Any, time_ns: int, cpu: int) -> None:
        inside = self._threads.get(record.common_pid)
        if inside is None:
            return
        state = self._vcpus.get(inside.vcpu)
        reading = self._preserved(record, time_ns, inside.vcpu)
        if state is None:
            return
        if reading is None and site is Site.RSM:
            # emulator_triple_fault() does nothing but raise it, so the word need not be read there.
            reading = _Reading(time_ns, state.word | 1 << TRIPLE_FAULT, 0, state.seen & Flag.NESTED)
        if reading is not None:
            reading.cap = state.seen & Flag.CAP
            self._boundary(state, reading, (Kind.SITE, site, 0), (record.common_pid, cpu))

    # --- detail full: the guest, and what others do to it -----------------------------------------------------

    def _look(self, record: Any, time_ns: int, cpu: int) -> _Guest | None:
        """A function begins that is given the vCPU of its own thread: that is read for what waits to be."""
        state = self._vcpus.get(record.vcpu)
        if state is None:
            return None
        guest = self._guests.get(record.common_pid)
        if guest is None or guest.vcpu != record.vcpu:
            guest = self._guests[record.common_pid] = _Guest(record.vcpu)
        for what in guest.waiting:
            self._boundary(state, self._reading(record, time_ns), what, (record.common_pid, cpu))
        guest.waiting.clear()
        return guest

    def _awake(self, record: Any, time_ns: int, cpu: int) -> None:
        self._look(record, time_ns, cpu)

    # Where the guest is entered KVM's run function begins, and then tells so; on 5.10 its caller has told so before.

    def _entering(self, record: Any, time_ns: int, cpu: int) -> None:
        guest = self._look(record, time_ns, cpu)
        if guest is None:
            return
        reading = self._reading(record, time_ns)
        if guest.entered:
            guest.entered = False
            self._boundary(self._vcpus[guest.vcpu], reading, (Kind.GUEST_ENTRY, 0, 0), (record.common_pid, cpu))
        else:
            guest.entering = reading

    def _left(self, record: Any, time_ns: int, cpu: int) -> None:
        """The trace event kvm_exit asks why the guest was left, before or after it has its place in the buffer."""
        known = self._guests.get(record.common_pid)
        waited = known is not None and known.waiting
        guest = self._look(record, time_ns, cpu)
        if guest is not None and not waited:
            guest.left = self._reading(record, time_ns)

    def _told(self, record: Any) -> tuple[_Guest, _Vcpu] | None:
        # None: of a thread of which nothing is known, such as that of a process nobody asked for.
        guest, inside = self._guests.get(record.common_pid), self._threads.get(record.common_pid)
        if inside is not None and inside.cmd == KVM_RUN and (guest is None or guest.vcpu != inside.vcpu):
            guest = self._guests[record.common_pid] = _Guest(inside.vcpu)
        state = self._vcpus.get(guest.vcpu) if guest is not None else None
        return (guest, state) if guest is not None and state is not None else None

    def _entry(self, record: Any, time_ns: int, cpu: int) -> None:
        told = self._told(record)
        if told is None:
            return
        guest, state = told
        reading, guest.entering, guest.left = guest.entering, None, None
        if reading is not None:
            self._boundary(state, reading, (Kind.GUEST_ENTRY, 0, 0), (record.common_pid, cpu))
            return
        if guest.entered:
            self._lose(state, time_ns)
        guest.entered = True

    def _lose(self, state: _Vcpu, time_ns: int) -> None:
        state.seq = state.seq % SEQUENCE + 1
        before = self.lost.get(state.number, VcpuLoss(0, time_ns, time_ns))
        self.lost[state.number] = VcpuLoss(before.count + 1, before.first_ns, time_ns)

    def _exit(self, record: Any, time_ns: int, cpu: int) -> None:
        told = self._told(record)
        if told is None:
            return
        guest, state = told
        if guest.entered:
            self._lose(state, time_ns)  # a later reading is of what the guest has seen since
            guest.entered = False
        guest.entering = None
        what = Kind.GUEST_EXIT, record.exit_reason & 0xFFFFFFFF, record.isa
        if guest.left is None:
            guest.waiting.append(what)
            return
        reading, guest.left = guest.left, None
        self._boundary(state, reading, what, (record.common_pid, cpu))

    def _wakeup(self, record: Any, _time_ns: int, _cpu: int) -> None:
        told = self._told(record)
        if told is not None:
            told[0].waiting.append((Kind.WAKEUP, record.ns, int(record.waited)))

    def _kick(self, record: Any, time_ns: int, cpu: int) -> None:
        state = self._vcpus.get(record.vcpu)
        if state is None:
            return
        flags = self._live(state, self._reading(record, time_ns))
        self.events.append(
            (
                *(time_ns, 0, record.requests, record.requests, 0, state.number, 0, state.pid),
                *(record.common_pid, record.mode & 0xFFFFFFFF, cpu, Kind.KICK, flags),
            )
        )

    def _request(self, function: str, record: Any, time_ns: int, cpu: int) -> None:
        vm = self._vms.get(record.kvm)
        if vm is None:
            return  # it has no vCPU, or nobody asked for it
        outer = self._requests.get(record.common_pid)
        inner = outer is not None and _REQUESTERS.index(function) > _REQUESTERS.index(outer.function)
        if outer is not None and inner and (outer.what[0], outer.what[2]) == (record.request, vm[0]):
            return  # its own work: told once
        mask = _ALL
        if function == MASKED:
            mask = record.third_mask if record.third else record.fourth_mask
        elif getattr(record, "spared", 0) and record.index < _MASK_BITS:
            mask &= ~(1 << record.index)
        made = _Request(function, time_ns, (record.request, mask, vm[0]), vm[1])
        self._requests[record.common_pid] = made
        self._requested(Kind.REQUEST_ALL, made, time_ns, 0, (record.common_pid, cpu))

    def _request_end(self, function: str, record: Any, time_ns: int, cpu: int) -> None:
        made = self._requests.get(record.common_pid)
        if made is not None and made.function == function:
            del self._requests[record.common_pid]
            self._requested(Kind.REQUEST_ALL_END, made, time_ns, made.begin_ns, (record.common_pid, cpu))

    def _requested(self, kind: Kind, made: _Request, time_ns: int, since_ns: int, who: tuple[int, int]) -> None:
        request, mask, vm = made.what
        self.events.append((time_ns, since_ns, mask, 0, request, 0, 0, made.pid, who[0], vm, who[1], kind, 0))
