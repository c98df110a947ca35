"""What to do about each request that was lost, cannot be judged, is exposed or came too late.

Advice is for the operator of the host, not for a developer of KVM: which guest not to trust, how to get a
good one back, and how to keep it from happening again. What it says of a VMM was read in that VMM's source,
mid 2026.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from probes.requests import STATE
from reports.document import records
from reports.judged import TRIPLE_FAULT, Guest, guest_of, guests, left_out, needs_action, ranked, wait
from reports.words import Clock, clip, interval, plural, shown

if TYPE_CHECKING:
    from analysis.judge import Judgement

# Requests that have all of this in common share a remedy.
_ALIKE = ["vm", "pid", "end", "request", "copies_without", "exposed"]
# A guest's name in running text; a longer one is cut.
_NAME = 32
# KVM_CAP_X86_TRIPLE_FAULT_EVENT (uapi linux/kvm.h); Linux commit ed2351174e38 ("KVM: x86: Extend
# KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault") (in v6.0).
_CAP = "KVM_CAP_X86_TRIPLE_FAULT_EVENT (218)"
# VMMs that save events and never enable it, and what to add to that.
_NEVER = {"Firecracker": "", "Cloud Hypervisor": "", "OpenVMM": "", "crosvm": ", though it codes the flag"}


class Finding(NamedTuple):
    """Requests that share a fate and a remedy."""

    kind: str  # "lost", "copied", "undecided", "exposed", "stale" or "restored"
    title: str
    cases: Sequence[str]  # one sentence or two for each request
    more: int  # requests that `cases` has no room for
    steps: Sequence[str]


def findings(judgement: Judgement, *, most: int = 10) -> list[Finding]:
    """Return what an operator must know and do, the worst first.

    At most ``most`` requests of each finding are told one by one.
    """
    known = guests(judgement.vms)
    clock = Clock.of(judgement.meta)
    lifecycles = judgement.lifecycles
    places = ranked(lifecycles, needs_action(lifecycles))
    alike = lifecycles[_ALIKE].iloc[places].groupby(_ALIKE, sort=False, observed=True)
    first = places[alike.cumcount() < most]
    groups: dict[_Remedy, list[dict[str, Any]]] = {}
    counts: Counter[_Remedy] = Counter()
    # Of those of one guest that ended alike the first ones stand for all: there can be very many.
    for row in records(lifecycles.iloc[first]):
        group = groups.setdefault(_remedy(row, guest_of(row, known)), [])
        if len(group) < most:
            group.append(row)
    for row in records(alike.size().rename("count").reset_index()):
        counts[_remedy(row, guest_of(row, known))] += row["count"]
    return [*_restored(judgement, known, clock, most)] + [
        Finding(
            remedy.kind,
            _title(remedy, counts[remedy]),
            [_CASES[remedy.kind](row, guest_of(row, known), clock) for row in group],
            counts[remedy] - len(group),
            list(_STEPS[remedy.kind](remedy)),
        )
        for remedy, group in groups.items()
    ]


class _Remedy(NamedTuple):
    """What decides what to do; empty where that does not depend on it."""

    kind: str
    vmm: str = ""
    cap: bool | None = None
    request: str = TRIPLE_FAULT


def _remedy(row: Mapping[str, Any], guest: Guest) -> _Remedy:
    kind, request = _kind(row), str(row["request"])
    if kind == "undecided":
        return _Remedy(kind)
    # The capability is for triple faults alone.
    return _Remedy(kind, guest.vmm, guest.cap if request == TRIPLE_FAULT else None, request)


def survives(guest: Guest) -> str:
    """Return what a save would do to a pending shutdown of a guest."""
    return {True: "would survive a save", False: "would be LOST by a save", None: "not known"}[guest.cap]


def _kind(row: Mapping[str, Any]) -> str:
    if left_out(row):
        return "copied"
    if row["end"] in ("lost", "undecided"):
        return str(row["end"])
    return "exposed" if row["end"] == "open" else "stale"


def _title(remedy: _Remedy, count: int) -> str:
    where = f" under {remedy.vmm}" if remedy.vmm else ""
    which = f": {shown(remedy.request)}" if remedy.request != TRIPLE_FAULT else ""
    return {
        "lost": f"{plural(count, 'request')} LOST{where}{which}",
        "copied": f"{plural(count, 'request')} LOST from a copy{where}{which}",
        "undecided": f"{plural(count, 'request')} undecided",
        "exposed": f"{plural(count, 'request')} still pending, and missing from a save{where}{which}",
        "stale": f"{plural(count, 'request')} delivered after a reset{where}{which}",
    }[remedy.kind]


# --- what happened ------------------------------------------------------------------------------------------


def _lost(row: Mapping[str, Any], guest: Guest, clock: Clock) -> str:
    saves = row["saves"] + row["blind_saves"]
    without = f"the last of {saves:,} saves left it out" if saves > 1 else "the save left it out"
    runs = "runs on a state that asked to shut down" if row["request"] == TRIPLE_FAULT else f"lacks {_what(row)}"
    return (
        f"{_raised(row, guest, clock)}; {without}, and the vCPU ended with it pending {_later(row)}. "
        f"Any copy made from that save {runs}."
    )


_BECAME = {
    "delivered": "the guest itself shut down",
    "reflected": "the guest itself received it",
    "serviced": "the guest itself received it",
    "cleared": "the VMM cleared it",
    "handed_over": "a later save carried it",
    "abandoned": "the vCPU ended",
    "open": "it was still pending when the recording ended",
    "undecided": "what became of the original was not seen",
}


def _copied(row: Mapping[str, Any], guest: Guest, clock: Clock) -> str:
    runs = "lives on" if row["request"] == TRIPLE_FAULT else f"lacks {_what(row)}"
    return (
        f"{_raised(row, guest, clock)}; {plural(row['blind_saves'], 'save')} left it out, and {_BECAME[row['end']]}. "
        f"Any copy made from such a save {runs}."
    )


# What a request stands for.
def _what(row: Mapping[str, Any]) -> str:
    state = STATE.get(str(row["request"]))
    return state.what if state is not None else shown(str(row["request"]))


def _undecided(row: Mapping[str, Any], guest: Guest, clock: Clock) -> str:
    why = shown(str(row["why"] or "what decides it was not seen")).rstrip(".")
    return f"{_raised(row, guest, clock)}; not decided: {why}."


def _exposed(row: Mapping[str, Any], guest: Guest, clock: Clock) -> str:
    return (
        f"{_raised(row, guest, clock)} and still pending when the recording ended; "
        f"{plural(row['blind_saves'], 'save')} left it out. If the VMM ends now, it is lost."
    )


def _stale(row: Mapping[str, Any], guest: Guest, clock: Clock) -> str:
    return (
        f"{_raised(row, guest, clock)}, before a reset, and delivered {_later(row)}: "
        "it shut down the guest that had rebooted."
    )


_CASES = {"lost": _lost, "copied": _copied, "undecided": _undecided, "exposed": _exposed, "stale": _stale}


def _raised(row: Mapping[str, Any], guest: Guest, clock: Clock) -> str:
    name = clip(guest.name, _NAME)
    pid = f"pid {guest.pid}"
    who = f"guest {name}" if name.startswith(pid) else f"guest {name} ({pid})"
    request, by, when = shown(row["request"]), shown(row["raised_by"]), clock.when(row["raised_ns"])
    if by == "unknown":
        return f"{who} vCPU {row['vcpu']}: {request} was already pending when first seen at {when} UTC"
    if by == "remote":
        by = f"thread {row['requester_tid']}" if row["requester_tid"] else "another thread"
    return f"{who} vCPU {row['vcpu']}: {request} was raised by {by} at {when} UTC"


def _later(row: Mapping[str, Any]) -> str:
    return f"{interval(*wait(row))} later"


# --- what to do ---------------------------------------------------------------------------------------------


def _after_loss(remedy: _Remedy) -> Iterator[str]:
    if remedy.request != TRIPLE_FAULT:
        yield (
            "A copy made from these saves (a snapshot, or the far end of a migration) goes on without it. Where the "
            "guest waits for it, boot the copy afresh or restore a snapshot taken before the time given."
        )
        yield from _how_to_carry(remedy)
        return
    yield (
        "Do not trust the copies made from these saves (a snapshot, or the far end of a migration): the "
        "guest had failed and should have shut down. Stop them and boot afresh, or restore a snapshot taken "
        "before the time given."
    )
    yield from _prevention(remedy.vmm, remedy.cap)


def _after_exposure(remedy: _Remedy) -> Iterator[str]:
    if remedy.request != TRIPLE_FAULT:
        yield (
            "Let the guest run on this host: KVM then services it. Discard the snapshots made since the time given, "
            "and do not migrate the guest before."
        )
        yield from _how_to_carry(remedy)
        return
    yield (
        "Let the guest run on this host: KVM then delivers the shutdown. Discard the snapshots made since "
        "the time given, and do not migrate the guest before."
    )
    yield from _prevention(remedy.vmm, remedy.cap)


def _how_to_carry(remedy: _Remedy) -> Iterator[str]:
    vmm = remedy.vmm or "The VMM"
    state = STATE.get(remedy.request)
    if state is not None and state.carried_by == "vcpu_events":
        yield f"KVM_GET_VCPU_EVENTS saves it: {vmm} must call that last, when nothing can raise a request any more."
    else:
        yield f"No ioctl of KVM saves it: {vmm} keeps it only by letting the vCPU run until KVM has serviced it."


def _after_stale(remedy: _Remedy) -> Iterator[str]:
    yield ("Start the guest again: the shutdown was meant for its life before the reset, nothing is wrong with it now.")
    if remedy.vmm == "QEMU" and not remedy.cap:
        yield (
            "QEMU clears the request on a reset from 7.2 on, where the kernel has capability 218 (Linux "
            "6.0): update the older of the two."
        )
    else:
        yield (
            f"Neither KVM nor a reset by user space clears it. {remedy.vmm or 'The VMM'} must, by "
            f"KVM_SET_VCPU_EVENTS with KVM_VCPUEVENT_VALID_TRIPLE_FAULT and pending=0, which needs {_CAP}."
        )


def _after_doubt(_remedy: _Remedy) -> Iterator[str]:
    yield (
        "Treat a guest that was saved or migrated meanwhile as if the request were lost, until a recording "
        "without gaps says otherwise."
    )
    yield (
        "Record again with less to carry: only the guests in question (-p PID), detail boundary. "
        "kvmreq doctor says which engine sees most on this host."
    )


_STEPS = {
    "lost": _after_loss,
    "copied": _after_loss,
    "undecided": _after_doubt,
    "exposed": _after_exposure,
    "stale": _after_stale,
}


# How to keep it from happening again.
def _prevention(vmm: str, cap: bool | None) -> Iterator[str]:
    if cap:
        yield (
            f"{_CAP} is enabled for this guest, yet a save came without the request: it was enabled too "
            "late, or the VMM has a bug. Report it to its project, with this recording."
        )
    elif vmm == "QEMU":
        yield f"QEMU enables {_CAP} from 7.2 on, where the kernel has it (Linux 6.0): update the older one."
    elif vmm in _NEVER:
        yield (
            f"As of mid 2026 {vmm} never enables {_CAP}{_NEVER[vmm]}: each of its saves drops a pending "
            "shutdown. Ask its project to enable it, and record around every snapshot and migration until it "
            "does."
        )
    else:
        yield (
            f"Make {vmm or 'the VMM'} enable {_CAP} with KVM_ENABLE_CAP before it saves, and carry "
            "triple_fault.pending to the copy; QEMU does from 7.2 on. It needs Linux 6.0."
        )


# --- on arrival ---------------------------------------------------------------------------------------------


def _restored(judgement: Judgement, known: Mapping[int, Guest], clock: Clock, most: int) -> Iterator[Finding]:
    """Yield what to know and do about restores of this host that lost a triple fault."""
    rows = records(judgement.restores[judgement.restores["ran"]])
    if rows:
        yield Finding(
            "restored",
            f"{plural(len(rows), 'guest')} restored without a triple_fault",
            [_arrived(row, guest_of(row, known), clock) for row in rows[:most]],
            max(len(rows) - most, 0),
            (
                "Stop these guests and boot them afresh: what they were made from asked to shut down.",
                f"Restore only where {_CAP} is enabled before KVM_SET_VCPU_EVENTS; QEMU does from 7.2 on. "
                "It needs Linux 6.0.",
            ),
        )


def _arrived(row: Mapping[str, Any], guest: Guest, clock: Clock) -> str:
    who = f"guest {clip(guest.name, _NAME)} vCPU {row['vcpu']}"
    when = clock.when(row["time_ns"])
    if row["outcome"] == "refused":
        return f"{who}: KVM_SET_VCPU_EVENTS with the triple fault failed (errno {row['errno']}); it ran at {when} UTC."
    return f"{who}: its save had carried the triple fault, and it ran without it at {when} UTC."
