"""What ``kvmreq stat`` prints: a JSON object for each interval, plain lines, or a table that refreshes on a terminal.

Text stays under 80 columns, and holds no control codes: those are rich's, which is imported for a terminal only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from analysis import stat as table
from probes.exits import EVENTS, UNREADABLE, Kind, parse, reason
from probes.requests import doubt
from reports.stat_help import SCHEMA
from reports.words import Clock, Column, columns, duration, plural, short, shown, wrap
from tracer.errors import BadRecording
from tracer.loss import Loss

if TYPE_CHECKING:
    from rich.console import RenderableType

    from analysis.stat import Exit, Namer
    from probes.stat import Counts
    from tracer.recording import Recording
    from tracer.stat import Vcpu

_TITLES = {
    Kind.GUEST: "exits from the guest",
    Kind.USER: "exits to user space",
}
_KEYS = {Kind.GUEST: "guest_exits", Kind.USER: "user_exits"}
_NO_EXITS = "exits from the guest: kvm_exit never fired, though KVM_RUN returned (KVM emulates these guests)"
_NO_REASONS = "why the guest was left: no BTF of KVM's flavour (kvm_intel, kvm_amd) tells where the reason is"


def unseen(told: Sequence[str], exits: Sequence[Exit]) -> list[str]:
    """Return what the tables cannot show: what the hooks ``told``, and what all exits until now give away."""
    lines = list(told)
    hooked = not any("kvm_exit" in line or "exits from the guest" in line for line in lines)
    if hooked and any(row.kind is Kind.USER for row in exits) and not any(row.kind is Kind.GUEST for row in exits):
        lines.append(_NO_EXITS)
    if any(row.number == UNREADABLE for row in exits):
        lines.append(_NO_REASONS)
    return lines


@dataclass(frozen=True)
class Source:
    """Where counts come from, and what their numbers are called."""

    host: str
    kernel: str
    engine: str
    clock: Clock
    name: Namer
    requests: Mapping[int, str]
    names_of: str = ""  # the release whose names those are, if that is not the kernel's own

    def told(
        self,
        counts: Counts,
        between: tuple[int, int],
        vms: Iterable[Mapping[str, Any]],
        loss: Loss,
        lines: Sequence[str],
        so_far: Counts | None = None,
    ) -> dict[str, Any]:
        """Return counts between two moments as JSON holds them; what stays unseen is judged by those ``so_far``."""
        begin_ns, end_ns = between
        exits = table.exits(counts, self.name)
        told: dict[str, Any] = {
            "schema": SCHEMA,
            "host": self.host,
            "kernel": self.kernel,
            "engine": self.engine,
            "begin_ns": begin_ns,
            "end_ns": end_ns,
            "end_utc": self.clock.when(end_ns),
            "seconds": (end_ns - begin_ns) / 1e9,
            "vms": list(vms),
        }
        for kind, key in _KEYS.items():
            told[key] = []
            for row in exits:
                if row.kind is kind:
                    one = asdict(row)
                    del one["kind"]
                    one["isa" if kind is Kind.GUEST else "errno"] = one.pop("variant")
                    told[key].append(one)
        told["requests"] = [asdict(row) for row in table.requests(counts, self.requests)]
        doubtful = doubt(self.names_of, (row["request"] for row in told["requests"])) if self.names_of else ""
        told["loss"] = {"ring_full": loss.ring_full, "map_full": loss.map_full, "missed": loss.missed}
        told["unseen"] = unseen(lines, exits if so_far is None else table.exits(so_far, self.name))
        told["unseen"] += [doubtful] if doubtful else []
        return told


def vms(vcpus: Iterable[Vcpu]) -> list[dict[str, Any]]:
    """Return the VMs of some vCPUs, in order."""
    found: dict[int, dict[str, Any]] = {}
    for one in sorted(vcpus, key=lambda vcpu: (vcpu.vm, vcpu.vcpu)):
        guest = {"vm": one.vm, "pid": one.guest.pid, "name": one.guest.name, "vmm": one.guest.vmm, "vcpus": []}
        found.setdefault(one.vm, guest)["vcpus"].append(one.vcpu)
    return list(found.values())


# Which instruction set names the reasons of a recording's exits from the guest: KVM_ISA_VMX and KVM_ISA_SVM.
_ISA = {"kvm_intel": 1, "kvm_amd": 2}


def of_recording(recording: Recording, pids: Sequence[int], only_vms: Sequence[int], vcpus: Sequence[int]) -> Any:
    """Return what a recording of detail full tells, as JSON holds it.

    Raises :class:`tracer.errors.BadRecording` for one of another detail: it has an event only where something changed.
    """
    meta = recording.meta
    if meta["detail"] != "full":
        raise BadRecording(
            f"{recording.path} has no exits: it is of detail {meta['detail']}", hint="record with --detail full"
        )
    formats = meta.get("formats", {})
    names = {event: parse(formats.get(event, "")) for event in EVENTS}
    isa = next((number for flavour, number in _ISA.items() if flavour in str(meta.get("kvm_module"))), 0)
    told, found, last = table.of_recording(recording, isa, pids=pids, vms=only_vms, vcpus=vcpus)
    if not found and (pids or only_vms or vcpus):
        raise BadRecording(
            f"nothing in {recording.path} is what was asked for: no vCPU of such a process, VM and id",
            hint="kvmreq stat DIR without a filter shows what there is",
        )
    lines = [] if formats else ["names of reasons: this recording does not hold them"]
    if not told.events[Kind.GUEST]:
        lines.append("exits from the guest: this recording has no kvm_exit and kvm_entry")
    if told.gaps:
        lines.append(f"times across {plural(told.gaps, 'lost event')}: their exits are counted, not timed")
    if set(meta["requests"]) != set(meta.get("requests_by_bit", {}).values()) or len(meta["requests"]) < 2:
        lines.append(f"other requests than {', '.join(meta['requests'])}, by name: they were not watched")
    source = Source(
        meta["host"],
        meta["kernel"],
        f"{meta['engine']}, recorded",
        Clock.of(meta),
        partial(reason, names),
        {int(bit): name for bit, name in meta["requests_by_bit"].items()},
        "" if meta.get("requests_table_exact", True) else str(meta["requests_table"]),
    )
    guests: dict[str, Any] = {**meta.get("guests", {})}
    seen = [
        {
            "vm": vm.vm,
            "pid": vm.pid,
            "name": guests.get(str(vm.vm), {}).get("name", f"pid {vm.pid}"),
            "vmm": guests.get(str(vm.vm), {}).get("vmm"),
            "vcpus": list(vm.vcpus),
        }
        for vm in found
    ]
    between = (meta["started_ns"], last.until_ns if last else meta["started_ns"])
    return source.told(told.counts, between, seen, last.loss if last else Loss(), lines)


# --- text ---------------------------------------------------------------------------------------------------

_EXIT_COLUMNS = (
    Column("reason", least=12),
    *(Column(heading, right=True) for heading in ("count", "share", "p50", "p99", "max")),
)
_REQUEST_COLUMNS = (Column("request", least=12), Column("raised", right=True), Column("serviced", right=True))
_MOST_VMS = 4


def _time(ns: int | None) -> str:
    return "-" if ns is None else duration(ns)


def _exit_cells(row: Mapping[str, Any]) -> list[str]:
    times = (_time(row[name]) for name in ("p50_ns", "p99_ns", "max_ns"))
    return [shown(row["reason"]), short(row["count"]), f"{row['share']:.1%}", *times]


def _request_cells(row: Mapping[str, Any]) -> list[str]:
    return [row["request"], short(row["raised"]), short(row["serviced"])]


def _headline(told: Mapping[str, Any]) -> str:
    vcpus = sum(len(vm["vcpus"]) for vm in told["vms"])
    return (
        f"{told['end_utc'][:19]} UTC, {told['seconds']:.1f} s: "
        f"{plural(len(told['vms']), 'VM')}, {plural(vcpus, 'vCPU')} ({told['engine']})"
    )


def _vm_lines(told: Mapping[str, Any]) -> Iterator[str]:
    for vm in told["vms"][:_MOST_VMS]:
        name = "" if vm["name"] == f"pid {vm['pid']}" else f" {shown(vm['name'])}"
        yield from wrap(f"VM {vm['vm']}: pid {vm['pid']}{name}, {plural(len(vm['vcpus']), 'vCPU')}")
    if len(told["vms"]) > _MOST_VMS:
        yield f"and {plural(len(told['vms']) - _MOST_VMS, 'VM')} more: --format json names them all"


def _remarks(told: Mapping[str, Any]) -> Iterator[str]:
    lost = {name: count for name, count in told["loss"].items() if count}
    if lost:
        words = ", ".join(f"{count} {name}" for name, count in lost.items())
        yield from wrap(f"{words} since the start: so much is not counted", first="LOST: ")
    for line in told["unseen"]:
        yield from wrap(shown(line), first="not seen: ")


def _tables(told: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Column], list[list[str]]]]:
    for kind, key in _KEYS.items():
        if told[key]:
            yield _TITLES[kind], _EXIT_COLUMNS, [_exit_cells(row) for row in told[key]]
    if told["requests"]:
        yield "requests", _REQUEST_COLUMNS, [_request_cells(row) for row in told["requests"]]


def text(told: Mapping[str, Any], title: str = "") -> str:
    """Return one interval as plain lines; a table without rows is left out."""
    lines = [f"{title}{_headline(told)}", *_vm_lines(told)]
    for heading, layout, rows in _tables(told):
        lines += [heading, *columns(layout, rows)]
    if not told["guest_exits"] and not told["user_exits"]:
        lines.append("no exits")
    return "\n".join([*lines, *_remarks(told)]) + "\n"


# --- a terminal ---------------------------------------------------------------------------------------------


def _renderable(told: Mapping[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(_headline(told), style="bold"), *map(Text, _vm_lines(told))]
    for heading, layout, rows in _tables(told):
        shown_as = Table(title=heading, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in layout:
            shown_as.add_column(
                column.heading,
                justify="right" if column.right else "left",
                no_wrap=True,
                overflow="ellipsis",
                min_width=column.least,
            )
        for row in rows:
            shown_as.add_row(*map(Text, row))
        parts.append(shown_as)
    if not told["guest_exits"] and not told["user_exits"]:
        parts.append(Text("no exits"))
    return Group(*parts, *(Text(line, style="yellow") for line in _remarks(told)))


@contextlib.contextmanager
def screen() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield what shows an interval in the place of the last one. Only for a terminal."""
    from rich.live import Live

    with Live(auto_refresh=False, vertical_overflow="ellipsis") as live:

        def show(told: Mapping[str, Any]) -> None:
            live.update(_renderable(told), refresh=True)

        yield show
