"""Do two engines that recorded the same guest at the same time tell the same of its requests? Judged outside of it.

The two read at slightly different instants: at one hook one program runs after the other, and some hooks are a few
instructions apart (the end of KVM_RUN is vcpu_put for one and kvm_userspace_exit for the other). What must be equal:

- Each story holds together: numbers without a gap, each reading's ``before`` what the one before it read; nothing lost.
- Every event that both have a hook for, one by one and in order: what happened, ioctl, exit reason, errno, thread.
- The requests at each such pair of readings. Only on the vCPU's own thread are requests taken, and at no such pair does
  that thread do anything between the two readings; what another thread raises between them the later one has and the
  earlier one has not. So a request that differs is excused only if it is the later reading that has it, and another
  thread is seen to raise it then: it kicks that vCPU with the request in its word, or makes it of that VM's vCPUs.
  Such windows are short and must be rare. With equal words at every hook the transitions are equal.
- Kicks, and requests of several vCPUs: who made them, and how often.
- Entries and exits of the guest: as many as tracefs has recorded, for every vCPU.
- What the guest is known to have got on its own threads, see busy.py.

One request is taken between two readings: KVM_REQ_UNHALT, which a vCPU that stops blocking raises for itself, is gone
where the ftrace engine reads it. Linux commit c59fb1275838 ("KVM: remove KVM_REQ_UNHALT") (in v6.1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.schema import REMOTE, Kind, requested
from tests.matrix import busy
from tracer.recording import Recording

# Every kind of which both engines read at the same place in KVM, or a few instructions apart. Not SITE: there the
# ftrace engine sees the vCPU only where the caller keeps it in a register.
PAIRED = (
    *(Kind.VCPU_NEW, Kind.VCPU_END, Kind.IOCTL_ENTER, Kind.IOCTL_EXIT, Kind.SAVE, Kind.RESTORE, Kind.RESET),
    *(Kind.RUN_ENTER, Kind.RUN_EXIT, Kind.GUEST_ENTRY, Kind.GUEST_EXIT, Kind.WAKEUP),
)
# ``detail`` of these is of the engine itself: a number that it gave, or bytes that one of them knows by a rule only.
_OWN_DETAIL = (Kind.VCPU_NEW, Kind.SAVE)
MOST_EXCUSED = 0.05  # of the requests that other threads raised
_WINDOW_NS = 50_000_000  # from a raise to the kick that follows it, where QEMU's CPUs share this machine's
_TOLD = 5  # differences of one sort that are told

Events = npt.NDArray[np.void]
Vcpu = tuple[int, int, int]  # process, vcpu_id, how many such vCPUs it had before


@dataclass(frozen=True)
class Story:
    """What one engine recorded of one process."""

    engine: str
    requests: Mapping[int, str]
    lost: int
    vcpus: Mapping[Vcpu, Events]  # own events in the order of their numbers, then what others did to it
    vms: Events  # requests of several vCPUs


def story(path: Path, pid: int) -> Story:
    """Read what a recording holds of a process."""
    recording = Recording.open(path)
    segments = [segment for segment in recording.segments() if segment is not None]
    events = np.concatenate([segment.events for segment in segments])
    events = events[events["pid"] == pid]
    new = events[events["kind"] == Kind.VCPU_NEW]
    new = new[np.argsort(new["time_ns"], kind="stable")]
    vcpus: dict[Vcpu, Events] = {}
    seen: Counter[int] = Counter()
    for number, vcpu_id in zip(new["vcpu"].tolist(), new["arg"].tolist(), strict=True):
        mine = events[events["vcpu"] == number]
        vcpus[pid, vcpu_id, seen[vcpu_id]] = mine[np.argsort(mine["seq"], kind="stable")]
        seen[vcpu_id] += 1
    names = {int(bit): name for bit, name in recording.meta["requests_by_bit"].items()}
    lost = segments[-1].loss.total - segments[-1].loss.kicks + len(recording.left_out)
    return Story(str(recording.meta["engine"]), names, lost, vcpus, events[events["vcpu"] == 0])


@dataclass
class Result:
    """What two stories have in common, and in what they differ."""

    entries: int = 0
    exits: int = 0
    transitions: int = 0  # of requests, at the hooks that both have
    raised_by_others: int = 0
    excused: int = 0
    differences: list[str] = field(default_factory=list)

    def differ(self, sort: str, each: Iterator[str] | list[str]) -> None:
        """Add differences of one sort: some in words, all in number."""
        every = list(each)
        self.differences += [f"{sort}: {one}" for one in every[:_TOLD]]
        if len(every) > _TOLD:
            self.differences.append(f"{sort}: {len(every)} such differences in all")


def compare(one: Story, other: Story, told: Mapping[str, Any]) -> Result:
    """Compare two stories of the same guest with each other, with tracefs, and with what the guest did."""
    result = Result()
    for each in (one, other):
        if each.lost:
            result.differences.append(f"{each.engine}: {each.lost} events, hooks or segments are missing")
        result.differ(f"{each.engine}: its own story does not hold together", _breaks(each))
        result.differ(f"{each.engine} and tracefs", _against_tracefs(each, told["tracefs"]))
        result.differ(f"{each.engine} and the guest", _against_guest(each, told["work"]))
    if one.vcpus.keys() != other.vcpus.keys() or not one.vcpus:
        result.differences.append(f"vCPUs: {sorted(one.vcpus)} and {sorted(other.vcpus)}")
        return result
    for vcpu in one.vcpus:
        _compare_vcpu(vcpu, one, other, result)
    result.differ("requests of several vCPUs", _counted(one, other))
    if result.excused > MOST_EXCUSED * result.raised_by_others:
        result.differences.append(
            f"{result.excused} requests are seen by one engine only, of {result.raised_by_others} that others raised"
        )
    result.entries, result.exits = (_number(one, kind) for kind in (Kind.GUEST_ENTRY, Kind.GUEST_EXIT))
    return result


def _number(told: Story, kind: Kind) -> int:
    return sum(int((events["kind"] == kind).sum()) for events in told.vcpus.values())


def _own(events: Events) -> Events:
    own: Events = events[~np.isin(events["kind"], REMOTE)]
    return own


def _breaks(told: Story) -> Iterator[str]:
    for vcpu, events in told.vcpus.items():
        own = _own(events)
        if own["seq"].tolist() != list(range(1, len(own) + 1)):
            yield f"{vcpu} has {len(own)} events and numbers up to {own['seq'].max()}"
        torn = np.flatnonzero(
            (own["before"][1:] != own["requests"][:-1]) | (own["since_ns"][1:] != own["time_ns"][:-1])
        )
        yield from (f"{vcpu} event {own['seq'][at + 1]} does not follow the one before it" for at in torn.tolist())


def _against_tracefs(told: Story, tracefs: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for kind, event in ((Kind.GUEST_ENTRY, "kvm_entry"), (Kind.GUEST_EXIT, "kvm_exit")):
        mine: Counter[str] = Counter()
        for (_, vcpu_id, _), events in told.vcpus.items():
            mine[str(vcpu_id)] += int((events["kind"] == kind).sum())
        if dict(mine) != dict(tracefs[event]) or not mine:
            yield f"{dict(mine)} {kind.name} by vCPU, and {dict(tracefs[event])} {event}"


def _against_guest(told: Story, work: Mapping[str, Any]) -> Iterator[str]:
    bits = {name: 1 << bit for bit, name in told.requests.items()}
    own = np.concatenate([_own(events) for events in told.vcpus.values()])
    cmd = own["arg"] & 0xFFFFFFFF
    for ioctl, request, times in busy.known(smm=work["smm"]):
        at = (own["kind"] == Kind.IOCTL_EXIT) & (cmd == ioctl)
        pending = int((own["requests"][at] & bits[request] != 0).sum())
        if pending != times or at.sum() != times:
            yield f"{request} is pending after {pending} of {int(at.sum())} ioctls {ioctl:#x}, not after {times}"
    for kind, what in ((Kind.GUEST_EXIT, "kicked out of the guest"), (Kind.WAKEUP, "woken")):
        if not (own["requests"][own["kind"] == kind] & bits["nmi"]).any():
            yield f"no vCPU was {what} by an NMI"


# --- one vCPU ---------------------------------------------------------------------------------------------------


def _comparable(events: Events, ends: frozenset[int]) -> Events:
    """Return the events that the other engine has, too; ``ends``: ioctls whose end both see."""
    made: Events = events[np.isin(events["kind"], PAIRED)]
    kind, cmd = made["kind"].copy(), made["arg"] & 0xFFFFFFFF
    # Registers written in real mode: one engine tells so instead of the ioctl's begin, the other before its end.
    written = (kind == Kind.RESET) & (made["arg"] != 0)
    begun = np.append(False, (kind[:-1] == Kind.IOCTL_ENTER) & (cmd[:-1] == cmd[1:]))
    made["kind"][written & ~begun] = Kind.IOCTL_ENTER
    kept: Events = made[~(written & begun) & ((kind != Kind.IOCTL_EXIT) | np.isin(cmd, list(ends)))]
    return kept


def _ends(events: Events) -> frozenset[int]:
    ended = events[events["kind"] == Kind.IOCTL_EXIT]
    return frozenset((ended["arg"] & 0xFFFFFFFF).tolist())


def _compare_vcpu(vcpu: Vcpu, one: Story, other: Story, result: Result) -> None:
    ends = _ends(one.vcpus[vcpu]) & _ends(other.vcpus[vcpu])
    mine, theirs = (_comparable(each.vcpus[vcpu], ends) for each in (one, other))
    kinds = (mine["kind"].tolist(), theirs["kind"].tolist())
    if kinds[0] != kinds[1]:
        at = next((n for n, pair in enumerate(zip(*kinds, strict=False)) if pair[0] != pair[1]), min(map(len, kinds)))
        said = [", ".join(Kind(kind).name for kind in each[max(0, at - 2) : at + 2]) for each in kinds]
        counts = [Counter(Kind(kind).name for kind in each) for each in kinds]
        more, fewer = counts[0] - counts[1], counts[1] - counts[0]
        result.differences.append(
            f"{vcpu}: event {at} is not the same: {one.engine} has {said[0]}, {other.engine} {said[1]}; "
            f"{dict(more)} more in {one.engine}, {dict(fewer)} more in {other.engine}"
        )
        return
    for name in ("arg", "detail", "tid"):
        unlike = mine[name] != theirs[name]
        if name == "detail":
            unlike &= ~np.isin(mine["kind"], _OWN_DETAIL)
        result.differ(
            f"{vcpu}: {name}",
            [
                f"{Kind(mine['kind'][at]).name} {at}: {mine[name][at]:#x} and {theirs[name][at]:#x}"
                for at in np.flatnonzero(unlike).tolist()
            ],
        )
    _compare_words(vcpu, mine, theirs, (one, other), result)


def _compare_words(vcpu: Vcpu, mine: Events, theirs: Events, stories: tuple[Story, Story], result: Result) -> None:
    words = mine["requests"].copy(), theirs["requests"].copy()
    unhalt = sum(1 << bit for bit, name in stories[0].requests.items() if name == "unhalt")
    for each in words:
        each[mine["kind"] == Kind.WAKEUP] &= ~np.uint64(unhalt)
    later = np.where(mine["time_ns"] < theirs["time_ns"], words[1], words[0])
    result.transitions += int(np.bitwise_count(words[0][1:] ^ words[0][:-1]).sum())
    raised = _raised_by_others(vcpu, stories)
    result.raised_by_others += len(raised)
    wrong = []
    for at in np.flatnonzero(words[0] != words[1]).tolist():
        begin, end = sorted((int(mine["time_ns"][at]), int(theirs["time_ns"][at])))
        for bit in _bits(int(words[0][at] ^ words[1][at])):
            if int(later[at]) >> bit & 1 and any(
                bits >> bit & 1 and begin <= until and since <= end + _WINDOW_NS for since, until, bits in raised
            ):
                result.excused += 1
                continue
            name = stories[0].requests.get(bit, f"bit_{bit}")
            has = stories[0] if int(words[0][at]) >> bit & 1 else stories[1]
            when = "later" if int(later[at]) >> bit & 1 else "earlier"
            wrong.append(
                f"{name} at {Kind(mine['kind'][at]).name} {at}: {has.engine} has it, whose reading is {end - begin} ns "
                f"{when}, and nobody raised it meanwhile"
            )
    result.differ(f"{vcpu}: requests", wrong)


def _bits(word: int) -> list[int]:
    return [bit for bit in range(64) if word >> bit & 1]


def _raised_by_others(vcpu: Vcpu, stories: tuple[Story, Story]) -> list[tuple[int, int, int]]:
    """Return when other threads raised requests of a vCPU, as far as either engine tells: since, until, bits."""
    found = []
    for each in stories:
        events = each.vcpus[vcpu]
        kicks = events[events["kind"] == Kind.KICK]
        found += [(time - _WINDOW_NS, time, word) for time, word in kicks[["time_ns", "requests"]].tolist()]
        vm = events["detail"][events["kind"] == Kind.VCPU_NEW][0]
        ends = each.vms[(each.vms["kind"] == Kind.REQUEST_ALL_END) & (each.vms["detail"] == vm)]
        found += [
            (since, time, 1 << int(requested(arg)))
            for since, time, arg in ends[["since_ns", "time_ns", "arg"]].tolist()
        ]
    return found


# --- kicks, and requests of several vCPUs -----------------------------------------------------------------------


def _made(told: Story) -> Counter[str]:
    made: Counter[str] = Counter()
    for vcpu, events in told.vcpus.items():
        kicks = events[events["kind"] == Kind.KICK]
        made.update(f"kicks of {vcpu} by thread {tid}" for tid in kicks["tid"].tolist())
    several = told.vms[np.isin(told.vms["kind"], (Kind.REQUEST_ALL, Kind.REQUEST_ALL_END))]
    made.update(
        f"{Kind(kind).name} {arg:#x} of {mask:#x} by thread {tid}"
        for kind, arg, mask, tid in several[["kind", "arg", "requests", "tid"]].tolist()
    )
    return made


def _counted(one: Story, other: Story) -> Iterator[str]:
    mine, theirs = _made(one), _made(other)
    if not mine:
        yield f"{one.engine} tells of none"
    for what in sorted(mine.keys() | theirs.keys()):
        if mine[what] != theirs[what]:
            yield f"{what}: {mine[what]} in {one.engine}, {theirs[what]} in {other.engine}"
