"""What analysis.lifecycle must say, event by event: slow, obvious, and written apart from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, TypeAlias

from probes.requests import STATE, STATELESS
from probes.schema import (
    FIELDS,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    PAYLOAD_PENDING,
    REQUEST_FLAGS,
    STATE_BITS,
    VALID_TRIPLE_FAULT,
    Flag,
    Kind,
    Site,
)
from tracer.loss import Loss


def _rounds(difference: int) -> tuple[int, ...]:
    """Return what a difference of two sequence numbers may be: they begin again with 1 after 32 bits of them."""
    return tuple(difference + turn * (2**32 - 1) for turn in (-1, 0, 1))


Row: TypeAlias = dict[str, Any]

_RELEASES = [
    of for name, of in json.loads(files("probes").joinpath("kvm-requests.json").read_text()).items() if name[0] != "_"
]

_IOCTLS = {
    0x4040AE9E: "set_mce",
    0x4040AEA0: "set_vcpu_events",
    0x4090AE82: "set_regs",
    0x4138AE84: "set_sregs",
    0x4140AECD: "set_sregs2",
    0x4008AE89: "set_msrs",
    0x4080AEBF: "set_nested_state",
    0x4004AE99: "set_mp_state",
    0x4004AE86: "interrupt",
    0xAE9A: "nmi",
    0xAEB7: "smi",
}
_SYSTEM_EVENTS = {3: "crash", 6: "sev_term", 7: "tdx_fatal"}  # KVM_SYSTEM_EVENT_*
_SITES = {
    Site.EXCEPTION: "exception",
    Site.RSM: "rsm",
    Site.REALMODE_INTERRUPT: "realmode_interrupt",
    Site.EMULATION: "emulation",
    Site.NESTED_VMEXIT: "nested_vmexit",
    Site.NESTED_ABORT: "nested_abort",
    Site.SET_EFER: "set_efer",
    Site.MACHINE_CHECK: "machine_check",
    Site.SYNC_EVENTS: "set_vcpu_events",
}


@dataclass(frozen=True)
class Event:
    """One event, by the names of probes.schema.FIELDS."""

    time_ns: int
    since_ns: int = 0
    requests: int = 0
    before: int = 0
    arg: int = 0
    vcpu: int = 0
    seq: int = 0
    pid: int = 0
    tid: int = 0
    detail: int = 0
    cpu: int = 0
    kind: int = 0
    flags: int = 0

    def record(self) -> tuple[int, ...]:
        """Return the values in the order of the schema."""
        return tuple(getattr(self, item.name) for item in FIELDS)

    @property
    def low(self) -> int:
        """Return the ioctl, the exit reason or the site."""
        return self.arg & 0xFFFF_FFFF

    @property
    def succeeded(self) -> bool:
        """Return whether the ioctl returned 0."""
        return self.arg >> 32 == 0


@dataclass
class Pending:
    """A request that is pending."""

    raised_by: str
    raised_after_ns: int
    raised_ns: int
    proved: bool = True  # nothing that may decide it is missing
    exits: int = 0
    saves: int = 0
    blind_saves: int = 0
    last_save: str = ""
    born: int = 0  # the event of the pause with which it was raised
    unseen_run: bool = False  # raised before the vCPU ran for the first time since tracing began
    set_in_pause: bool = False
    nested: bool = False
    reset: bool = False
    set_since_reset: bool = False
    restored_without: bool = False
    raised_in: str = "unknown"
    tid: int = 0
    cpu: int = -1
    kicked_ns: int = -1
    left_guest_ns: int = -1


@dataclass(frozen=True)
class Kick:
    """What another thread did to a vCPU, and the request that it shows or makes."""

    bit: int
    time_ns: int
    tid: int
    cpu: int
    seen: bool


@dataclass
class Vcpu:
    """A vCPU that is alive."""

    number: int
    pid: int
    vm: int = 0
    vcpu: int = 0
    seq: int = 0
    gaps: int = 0
    word: int = 0
    last_ns: int = 0
    cut: bool = False
    kind: int = 0
    pending: dict[int, Pending] = field(default_factory=dict)
    log: list[Event] = field(default_factory=list)  # its events since user space last read it and it ran
    kicks: list[Kick] = field(default_factory=list)  # since its last own event
    asked: set[int] = field(default_factory=set)  # requests made of the whole VM since then


@dataclass
class Oracle:
    """The rules, one event at a time."""

    names: Mapping[int, str]
    loss: Loss = field(default_factory=Loss)
    blind: bool = False
    full: bool = False
    vcpus: dict[int, Vcpu] = field(default_factory=dict)
    lifecycles: list[Row] = field(default_factory=list)
    shutdowns: list[Row] = field(default_factory=list)
    interrupted: bool = False
    dead: set[tuple[str, int]] = field(default_factory=set)  # VMs that KVM has given up, and vCPUs of unknown ones

    def run(self, stream: Iterable[Event | None]) -> None:
        """Take a whole recording; None stands for a part of it that is missing."""
        for event in stream:
            if event is None:
                self.interrupt()
            elif event.kind == Kind.KICK:
                self.kick(event)
            elif event.kind == Kind.REQUEST_ALL:
                self.request_all(event)
            elif event.kind == Kind.IN_GUEST_STILL:
                pass
            elif event.vcpu:
                self.take(event)
            elif event.kind == Kind.VMM_EXIT:
                for vcpu in [vcpu for vcpu in self.vcpus.values() if vcpu.pid == event.pid]:
                    self.exit_of_vmm(vcpu, event)
        self.finish()

    def interrupt(self) -> None:
        self.interrupted = True
        for vcpu in self.vcpus.values():
            vcpu.cut = True
            for request in vcpu.pending.values():
                request.proved = False

    def kick(self, event: Event) -> None:
        if event.vcpu in self.vcpus:
            for bit in self.names:
                if event.requests >> bit & 1:
                    self.note(self.vcpus[event.vcpu], Kick(bit, event.time_ns, event.tid, event.cpu, True))

    def request_all(self, event: Event) -> None:
        if event.arg & REQUEST_FLAGS["NO_ACTION"]:
            return  # that sets no bit, whatever its number is
        bit = event.arg & 0xFF
        for vcpu in self.vcpus.values():
            asked = vcpu.vcpu >= 64 or event.requests >> vcpu.vcpu & 1
            if bit in self.names and vcpu.vm == event.detail and asked and bit not in vcpu.asked:
                vcpu.asked.add(bit)
                self.note(vcpu, Kick(bit, event.time_ns, event.tid, event.cpu, False))

    @staticmethod
    def note(vcpu: Vcpu, kick: Kick) -> None:
        if kick.bit in vcpu.pending:
            _kicked(vcpu.pending[kick.bit], [kick])
        else:
            vcpu.kicks.append(kick)

    def lost(self, number: int) -> int:
        return self.loss.vcpus[number].count if number in self.loss.vcpus else 0

    def exit_of_vmm(self, vcpu: Vcpu, event: Event) -> None:
        if self.lost(vcpu.number) > vcpu.gaps:
            for request in vcpu.pending.values():
                request.proved = False
        for bit in list(vcpu.pending):
            self.end_with_vcpu(vcpu, bit, vcpu.last_ns, event.time_ns, vcpu.kind != Kind.RUN_ENTER)
        del self.vcpus[vcpu.number]

    def take(self, event: Event) -> None:
        vcpu = self.vcpus.get(event.vcpu)
        first = vcpu is None
        if vcpu is None:
            if event.kind == Kind.VCPU_END and event.seq != 1:
                return  # it ended long ago
            vcpu = self.vcpus[event.vcpu] = Vcpu(event.vcpu, event.pid)
        if event.kind == Kind.VCPU_NEW:
            vcpu.vm, vcpu.vcpu, vcpu.pid = event.detail, event.arg, event.pid
        missing = min(_rounds(event.seq - vcpu.seq - 1), key=abs)
        if event.kind == Kind.VCPU_NEW and (missing or not first):
            # It comes late: what it says was so before it, and nobody saw since when.
            event = replace(event, before=event.requests, since_ns=event.time_ns)
        if _complete(vcpu.log) and not event.flags & Flag.READ:
            self.pause_ends(vcpu)
        vcpu.log.append(event)
        for bit in self.names:
            self.transition(vcpu, bit, event, missing != 0 or vcpu.cut)
        if event.kind == Kind.RUN_EXIT and event.arg == KVM_EXIT_SHUTDOWN:
            taken = event.before >> 10 & 1 and not event.requests >> 10 & 1
            self.died(vcpu, event, "request" if taken else "hardware")
        if event.kind == Kind.RUN_EXIT and event.arg == KVM_EXIT_SYSTEM_EVENT and event.detail in _SYSTEM_EVENTS:
            self.died(vcpu, event, _SYSTEM_EVENTS[event.detail])
        whose = ("vm", vcpu.vm) if vcpu.vm else ("vcpu", vcpu.number)
        if event.flags & Flag.DEAD and whose not in self.dead:
            self.dead.add(whose)
            self.died(vcpu, event, "vm_dead")
        if not (vcpu.cut or (first and self.interrupted)):
            vcpu.gaps += missing
        vcpu.seq, vcpu.word, vcpu.last_ns, vcpu.cut = event.seq, event.requests, event.time_ns, False
        vcpu.kind, vcpu.kicks, vcpu.asked = event.kind, [], set()
        if event.kind == Kind.VCPU_END:
            del self.vcpus[event.vcpu]

    def pause_ends(self, vcpu: Vcpu) -> None:
        """It has run since it was read, or was given another state."""
        for bit, request in vcpu.pending.items():
            self.saved(vcpu, bit, ended=False)
            request.born = 0
        vcpu.log = []

    def saved(self, vcpu: Vcpu, bit: int, *, ended: bool, over: bool = True, until: int | None = None) -> None:
        """Count the saves of this pause, if ``over``; ``ended``: with its vCPU, which was not about to run."""
        request, name = vcpu.pending[bit], self.names[bit]
        if _harmless(name):
            return
        carried_by = STATE[name].carried_by if name in STATE else "unknown"
        for outcome in _saves(carried_by, bit, vcpu.log[:until], request.born, ended, over):
            request.saves += outcome == "carried"
            request.blind_saves += outcome == "blind"
            request.last_save = outcome

    def died(self, vcpu: Vcpu, event: Event, source: str) -> None:
        self.shutdowns.append(
            {
                "vm": vcpu.vm,
                "pid": vcpu.pid,
                "vcpu": vcpu.vcpu,
                "vcpu_number": vcpu.number,
                "time_ns": event.time_ns,
                "source": source,
                "nested": bool(event.flags & Flag.NESTED),
            }
        )

    def transition(self, vcpu: Vcpu, bit: int, event: Event, hole: bool) -> None:
        known, before, now = (bool(word >> bit & 1) for word in (vcpu.word, event.before, event.requests))
        if known and hole:
            vcpu.pending[bit].proved = False
        if known and not before:
            self.saved(vcpu, bit, ended=False, over=event.kind != Kind.SAVE, until=-1)
            self.end(vcpu, bit, "undecided", vcpu.last_ns, event.since_ns, why=True)
        if not known and before:
            vcpu.pending[bit] = Pending("unknown", vcpu.last_ns, event.since_ns, proved=False, born=len(vcpu.log) - 1)
            vcpu.pending[bit].unseen_run = bool(event.flags & Flag.STILL)
        if not before and now:
            attached = event.kind == Kind.VCPU_NEW and not event.flags & Flag.CREATED
            vcpu.pending[bit] = Pending(
                "unknown" if attached else _raiser(bit, event), 0 if attached else event.since_ns, event.time_ns
            )
            vcpu.pending[bit].born = len(vcpu.log) - 1
            vcpu.pending[bit].unseen_run = bool(event.flags & Flag.STILL)
            if not attached:
                contiguous = not hole and event.since_ns == vcpu.last_ns
                self.raised(vcpu, bit, event, contiguous, known)
        if bit not in vcpu.pending:
            return
        request = vcpu.pending[bit]
        request.nested |= bool(event.flags & Flag.NESTED)
        if not now:
            self.saved(vcpu, bit, ended=False, over=event.kind != Kind.SAVE, until=-1)
            end, why = _end(bit, event, request.nested)
            self.end(vcpu, bit, end, event.since_ns, event.time_ns, why=why, entered=event.kind == Kind.GUEST_ENTRY)
            return
        if event.kind == Kind.RUN_EXIT:
            request.exits += 1
        request.unseen_run &= bool(event.flags & Flag.STILL)
        if bit == 10:
            _payloads(request, event, before)
        if event.kind == Kind.VCPU_END:
            self.end_with_vcpu(vcpu, bit, event.since_ns, event.time_ns, vcpu.kind != Kind.RUN_ENTER)

    def raised(self, vcpu: Vcpu, bit: int, event: Event, contiguous: bool, known: bool) -> None:
        request = vcpu.pending[bit]
        request.raised_in = _place(event, vcpu.kind if contiguous and self.full else None)
        if request.raised_in == "guest":
            request.left_guest_ns = event.time_ns
        by = request.raised_by
        if by != "remote" and (bit == 10 or by != "kvm_run"):
            request.tid, request.cpu = event.tid, event.cpu
        if not contiguous or event.kind == Kind.VCPU_NEW or known:
            return
        kicks = [kick for kick in vcpu.kicks if kick.bit == bit and kick.time_ns > request.raised_after_ns]
        if not kicks:
            return
        first = min(kicks, key=lambda kick: kick.time_ns)
        elsewhere = request.raised_in in ("guest", "halted") or not first.seen
        if by == "kvm_run" and elsewhere and first.tid != event.tid and bit != 10:
            request.raised_by = "remote"
        _kicked(request, kicks)

    def end_with_vcpu(self, vcpu: Vcpu, bit: int, after_ns: int, time_ns: int, idle: bool) -> None:
        request = vcpu.pending[bit]
        self.saved(vcpu, bit, ended=idle)
        end = {"": "abandoned", "carried": "handed_over", "blind": "lost", "meanwhile": "undecided"}[request.last_save]
        stateful = self.names[bit] in STATE
        older = stateful and end == "abandoned" and (request.raised_by == "unknown" or request.unseen_run)
        unknown = (self.blind and not _harmless(self.names[bit])) or older or end == "undecided"
        self.end(vcpu, bit, "undecided" if unknown else end, after_ns, time_ns, why=unknown)

    def end(
        self, vcpu: Vcpu, bit: int, end: str, after_ns: int, time_ns: int, *, why: bool, entered: bool = False
    ) -> None:
        request = vcpu.pending.pop(bit)
        if not request.proved:
            end, why = "undecided", True
        by_restore = request.raised_by == "set_vcpu_events" and not request.restored_without
        self.lifecycles.append(
            {
                "vm": vcpu.vm,
                "pid": vcpu.pid,
                "vcpu": vcpu.vcpu,
                "vcpu_number": vcpu.number,
                "request": self.names[bit],
                "raised_by": request.raised_by,
                "raised_after_ns": request.raised_after_ns,
                "raised_ns": request.raised_ns,
                "end": end,
                "ended_after_ns": after_ns,
                "ended_ns": time_ns,
                "userspace_exits": request.exits,
                "saves": request.saves,
                "blind_saves": request.blind_saves,
                "copies_without": request.blind_saves > 0,
                "nested": request.nested,
                "stale": end == "delivered" and request.reset and not request.set_since_reset and not by_restore,
                "exposed": end == "open" and request.last_save == "blind",
                "why": why,
                "raised_in": request.raised_in,
                "requester_tid": request.tid,
                "requester_cpu": request.cpu,
                "kicked_ns": min(request.kicked_ns, time_ns) if time_ns >= 0 else request.kicked_ns,
                "left_guest_ns": request.left_guest_ns,
                "reentered_ns": time_ns if entered else -1,
            }
        )

    def finish(self) -> None:
        for vcpu in self.vcpus.values():
            unsure = self.lost(vcpu.number) > vcpu.gaps or 0 in self.loss.vcpus or self.loss.blind > 0
            for bit in list(vcpu.pending):
                self.saved(vcpu, bit, ended=False, over=False)
                self.end(vcpu, bit, "undecided" if unsure else "open", vcpu.last_ns, -1, why=unsure)
        self.vcpus.clear()


def _kicked(request: Pending, kicks: list[Kick]) -> None:
    for kick in sorted(kicks, key=lambda kick: kick.time_ns):
        if kick.time_ns <= request.raised_after_ns:
            continue
        if request.kicked_ns < 0 or kick.time_ns < request.kicked_ns:
            request.kicked_ns = kick.time_ns
            if request.raised_by == "remote":
                request.tid, request.cpu = kick.tid, kick.cpu
        if kick.seen:
            request.raised_ns = min(request.raised_ns, kick.time_ns)


def _place(event: Event, last_kind: int | None) -> str:
    sync = bool(event.flags & Flag.SYNC)
    if event.kind in (Kind.RUN_ENTER, Kind.IOCTL_ENTER) or (event.kind == Kind.RESET and event.low):
        return "user_space"
    if event.kind in (Kind.IOCTL_EXIT, Kind.SAVE, Kind.RESTORE, Kind.VCPU_NEW) and not sync:
        return "ioctl"
    if event.kind == Kind.SITE and last_kind == Kind.IOCTL_ENTER:
        return "ioctl"
    if event.kind == Kind.WAKEUP:
        return "halted" if event.detail else "kernel"
    if event.kind in (Kind.RUN_EXIT, Kind.SITE, Kind.GUEST_ENTRY, Kind.GUEST_EXIT) or sync:
        if last_kind is None:
            return "kvm_run"
        if last_kind == Kind.GUEST_ENTRY:
            return "guest" if event.kind == Kind.GUEST_EXIT else "kvm_run"
        return "kernel"
    return "unknown"


def _complete(log: list[Event]) -> bool:
    return any(event.kind == Kind.READ or event.flags & Flag.READ for event in log)


def _harmless(name: str) -> bool:
    """Whether nothing can be lost with it; a bit without a name is what it is on the kernels that name it."""
    if not name.startswith("bit_"):
        return name in STATELESS
    others = {of[name[4:]]["name"][8:].lower() for of in _RELEASES if name[4:] in of}
    return bool(others) and all(other in STATELESS for other in others)


def _outcome(carried_by: str, bit: int, event: Event) -> str:
    """What KVM_GET_VCPU_EVENTS gave of a request that was pending by then; empty: that says nothing."""
    if event.kind != Kind.SAVE or not event.succeeded:
        return ""
    if event.flags & Flag.SYNC and carried_by in ("nothing", "unknown"):
        return ""
    if carried_by == "vcpu_events_flag":
        return "carried" if event.detail & VALID_TRIPLE_FAULT and event.detail & PAYLOAD_PENDING else "blind"
    if carried_by == "unknown" or not event.before >> bit & 1:
        return "meanwhile"
    return "carried" if carried_by == "vcpu_events" else "blind"


def _saves(carried_by: str, bit: int, log: list[Event], born: int, ended: bool, over: bool) -> list[str]:
    """What each save of a pause did to a request that was raised with event ``born`` of it."""
    own = log[born:]
    missing = "meanwhile" if carried_by == "unknown" else "blind"
    saves = [
        _outcome(carried_by, bit, event) for event in own if event.flags & Flag.READ and not event.flags & Flag.SYNC
    ]
    saves = [outcome for outcome in saves if outcome]
    first = next((place for place, event in enumerate(log) if _complete([event])), None)
    if first is None:
        return []
    if first < born or log[first].kind != Kind.READ or not log[first].requests >> bit & 1:
        late = first < born or (first == born and bool(log[first].flags & Flag.READ))
        return saves or [missing] * (ended and late)
    by_then = log[born:first]
    looks = [_outcome(carried_by, bit, event) for event in by_then if not event.flags & (Flag.SYNC | Flag.READ)]
    looks = [outcome for outcome in looks if outcome][-1:]
    run = max((place for place, event in enumerate(by_then) if event.kind == Kind.RUN_EXIT), default=-1)
    sync = [_outcome(carried_by, bit, event) for event in by_then[run + 1 :] if event.flags & Flag.SYNC]
    sync = [outcome for outcome in sync if outcome][-1:]
    if log[first].detail & STATE_BITS["events"]:
        return looks + saves if looks or saves else [missing] * ended
    return sync + saves if sync or saves else [missing] * over


def _payloads(request: Pending, event: Event, before: bool) -> None:
    valid = bool(event.detail & VALID_TRIPLE_FAULT)
    pending = bool(event.detail & PAYLOAD_PENDING)
    if event.kind == Kind.RESET and before:
        request.reset, request.set_since_reset = True, False
    if event.kind == Kind.WRITTEN and before:
        request.reset, request.set_since_reset = True, request.set_in_pause
    if event.kind == Kind.RUN_EXIT and before:
        request.set_in_pause = False
    if event.kind == Kind.RESTORE and event.succeeded and before:
        if not valid:
            request.restored_without = True
        elif pending:
            request.set_in_pause = True
            request.set_since_reset |= request.reset


def _raiser(bit: int, event: Event) -> str:
    if event.kind == Kind.RESTORE:
        return "set_vcpu_events"
    if event.kind == Kind.VCPU_NEW:
        return "ioctl"
    if event.kind == Kind.IOCTL_EXIT:
        return _IOCTLS.get(event.low, "ioctl")
    if event.kind == Kind.SITE:
        return _SITES.get(Site(event.low), "kvm_run") if bit == 10 else "kvm_run"
    return "kvm_run" if event.kind in (Kind.RUN_EXIT, Kind.GUEST_ENTRY, Kind.GUEST_EXIT) else "remote"


def _end(bit: int, event: Event, nested: bool) -> tuple[str, bool]:
    if bit != 10 and event.kind == Kind.SAVE:
        return "serviced", False
    if event.kind in (Kind.IOCTL_EXIT, Kind.SAVE, Kind.RESTORE):
        return "cleared", bit == 10 and event.kind != Kind.RESTORE
    if bit != 10:
        return "serviced", False
    if event.kind == Kind.RUN_EXIT and event.arg == KVM_EXIT_SHUTDOWN:
        return "delivered", False
    if event.kind == Kind.SITE and event.low == Site.REFLECT:
        return "reflected", False
    inside = event.kind in (Kind.RUN_EXIT, Kind.SITE, Kind.GUEST_ENTRY, Kind.GUEST_EXIT, Kind.WAKEUP)
    # What kvm_run held may have cleared it.
    return ("reflected", False) if inside and nested and not event.flags & Flag.SYNC else ("undecided", True)
