"""A recording as a Perfetto trace: a track for each VM and vCPU, on which periods, requests and marks are drawn.

Times are CLOCK_MONOTONIC in ns; a clock snapshot pairs them with UTC. A period (KVM_RUN, ioctl, user space) is drawn
only where two events that follow each other prove it: in detail full that is nearly everywhere, in detail boundary
nearly nowhere. A request is drawn as long as it was certainly pending, from the first event that saw it to the last;
its arguments hold the bounds. What other threads do to a vCPU is an instant: no reading of the vCPU's own, it changes
no period. Messages and fields: protos/perfetto/trace/trace_packet.proto and what that includes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.lifecycle import lifecycle_table, shutdown_table
from analysis.passes import Pass, Table, in_order
from analysis.periods import IN_KERNEL, PERIODS, Edges, edges_of
from analysis.words import Copy
from probes.requests import TRIPLE_FAULT, bit_name
from probes.schema import PAYLOAD_FLAGS, PAYLOAD_PENDING, TELLS_READS, End, Flag, Kind, requested
from probes.uapi import ioctl
from reports import protobuf as pb
from reports.events import hardware_exits, mode, request_flags, targets
from reports.judged import requests_watched
from reports.words import guest, shown
from tracer.loss import Loss

if TYPE_CHECKING:
    from tracer.recording import Recording

Array = npt.NDArray[Any]

# builtin_clock.proto
_REALTIME, _MONOTONIC = 1, 3
# TracePacket.SequenceFlags; all packets are of one sequence.
_STATE_CLEARED, _NEEDS_STATE = 1, 2
_SEQUENCE = pb.number(10, 1)
# TrackEvent.Type
_BEGIN, _END, _INSTANT = 1, 2, 3
# TrackDescriptor: children in the order of sibling_order_rank; and guests of the same name are not one track.
_EXPLICIT, _NEVER_MERGED = 3, 2

#: What the track of a vCPU's marks is called, and that of a VM's requests to several vCPUs at once.
MARKS = "saves, resets and shutdowns"
TO_ALL = "requests to several vCPUs"

# The number of a track: what it is for, and of which request, above the number of the VM or vCPU.
_ROOT, _LOSSES, _VM, _LOST_VM, _VCPU, _MARKS, _REQUEST, _TO_ALL = range(1, 9)
# Strings that the reader is asked to remember; then it is told to forget them all.
_STRINGS = 1 << 16
# Events that are packets at one time.
_CHUNK = 1 << 16
# sibling_order_rank is an int32.
_RANK_MOST = (1 << 31) - 1


def trace(recording: Recording) -> Iterator[bytes]:
    """Yield a recording as a Perfetto trace, part by part. What is held is bounded by the vCPUs of the recording."""
    writer = _Trace(recording.meta)
    yield from writer.begin()
    for segment in recording.segments():
        if segment is None:
            yield from writer.missing(recording.left_out[-1])
        else:
            yield from writer.segment(segment.events, segment.loss, segment.until_ns)
    yield from writer.finish()


def _uuid(what: int, number: Any = 0, bit: int = 0) -> Any:
    return (what << 6 | bit) << 32 | number


# Fields of InternedData.
_INTERNED = {"category": 1, "event": 2, "key": 3, "value": 29}


class _Strings:
    """Strings that the trace says once and then calls by number."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew; the next packet tells the reader to do so, too."""
        self._known: dict[tuple[str, str], int] = {}
        self._new: list[bytes] = []
        self._forgotten = True

    def __len__(self) -> int:
        return len(self._known)

    def iid(self, kind: str, string: str) -> int:
        known = self._known.get((kind, string))
        if known is None:
            known = self._known[kind, string] = len(self._known) + 1
            self._new.append(pb.data(_INTERNED[kind], pb.number(1, known), pb.text(2, string)))
        return known

    def iids(self, kind: str, strings: Sequence[str]) -> Array:
        distinct = {string: self.iid(kind, string) for string in dict.fromkeys(strings)}
        return np.array([distinct[string] for string in strings], "u4")

    def packet(self) -> bytes:
        """Return what makes the reader know the new strings; it comes before the packets that use them."""
        if not self._new and not self._forgotten:
            return b""
        flags = _NEEDS_STATE
        defaults = b""
        if self._forgotten:
            flags |= _STATE_CLEARED
            defaults = pb.data(59, pb.number(58, _MONOTONIC))  # the clock of every timestamp
        made = _packet(pb.number(13, flags), defaults, pb.data(12, *self._new))
        self._new, self._forgotten = [], False
        return made


def _snapshot(clock: Mapping[str, int]) -> bytes:
    pair = ((_MONOTONIC, clock["monotonic_ns"]), (_REALTIME, clock["utc_ns"]))
    clocks = [pb.data(1, pb.number(1, number), pb.number(2, time_ns)) for number, time_ns in pair]
    return _packet(pb.data(6, *clocks, pb.number(2, _MONOTONIC)))


def _packet(*fields: bytes) -> bytes:
    return pb.data(1, *fields, _SEQUENCE)


class _Trace:
    def __init__(self, meta: Mapping[str, Any]) -> None:
        self._meta = meta
        self._strings = _Strings()
        self._requests_by_bit = {int(bit): name for bit, name in meta["requests_by_bit"].items()}
        self._walk = Pass(
            self._requests_by_bit,
            full=meta["detail"] == "full",
            reads=meta["schema"] >= TELLS_READS,
            periods=True,
        )
        self._bits = {str(name): int(bit) for bit, name in meta["requests_by_bit"].items()}
        self._names = {bit: shown(str(name)) for name, bit in self._bits.items()}
        self._exits = hardware_exits(meta)
        self._loss = Loss()
        self._until_ns = int(meta["started_ns"])
        self._tracks: set[int] = set()

    # --- parts of the trace ---------------------------------------------------------------------------------

    def begin(self) -> Iterator[bytes]:
        meta = self._meta
        snapshots = b"".join(map(_snapshot, (meta["clock"], *meta.get("clocks", ()))))
        arguments = {key: shown(str(meta[key])) for key in ("host", "kernel", "engine", "detail")}
        arguments["requests"] = requests_watched(meta["requests"])
        event = self._events(_BEGIN, _uuid(_ROOT), "recording", "recording", [self._until_ns], arguments)
        tracks = self._track(_uuid(_ROOT), "kvmreq recording") + self._track(
            _uuid(_LOSSES), "losses", parent=_uuid(_ROOT)
        )
        yield self._strings.packet() + snapshots + tracks + event

    def missing(self, reason: str) -> Iterator[bytes]:
        """A segment is not there, or cannot be read."""
        self._walk.interrupt()
        event = self._events(
            _INSTANT, _uuid(_LOSSES), "segment left out", "loss", [self._until_ns], {"reason": shown(reason)}
        )
        yield self._strings.packet() + event

    def segment(self, events: Array, loss: Loss, until_ns: int) -> Iterator[bytes]:
        blind = loss.blind > self._loss.blind
        yield from self._vcpus(events)
        for start in range(0, max(len(events), 1), _CHUNK):  # hooks may be missed in a segment without events, too
            chunk = events[start : start + _CHUNK]
            self._walk.feed(chunk, blind=blind, loss=loss)
            periods = edges_of(self._walk.edges())
            if len(chunk):
                yield from self._emit([self._drawn(periods), *self._marks(chunk), *self._remote(chunk)])
        given = self._walk.given()
        yield from self._lifecycles(given.finished)
        yield from self._emit(
            [*self._shutdowns(given.shutdowns), *self._copies(given.copies), *self._losses(loss, until_ns)]
        )
        self._loss = loss
        self._until_ns = max(self._until_ns, until_ns)
        if len(self._strings) > _STRINGS:
            self._strings.forget()

    def finish(self) -> Iterator[bytes]:
        self._walk.finish(self._loss)
        yield from self._emit([self._drawn(edges_of(self._walk.edges()))])
        given = self._walk.given()
        yield from self._lifecycles(given.finished)
        yield from self._emit(self._copies(given.copies))
        ended_ns = max(self._until_ns, int(self._meta.get("ended_ns") or 0))
        yield from self._emit([self._events(_END, _uuid(_ROOT), None, None, [ended_ns])])

    def _emit(self, parts: Sequence[bytes]) -> Iterator[bytes]:
        yield self._strings.packet()
        yield from parts

    def _lifecycles(self, finished: Table) -> Iterator[bytes]:
        table = lifecycle_table(in_order(finished, "request", "vcpu_number"), self._requests_by_bit)
        for start in range(0, len(table), _CHUNK):
            yield from self._emit(self._requests(table.iloc[start : start + _CHUNK]))

    # --- tracks ---------------------------------------------------------------------------------------------

    def _track(self, uuid: int, name: str, *, parent: int = 0, rank: int = 0, description: str = "") -> bytes:
        if uuid in self._tracks:
            return b""
        self._tracks.add(uuid)
        fields = [pb.number(1, uuid), pb.text(2, name), pb.number(11, _EXPLICIT), pb.number(12, min(rank, _RANK_MOST))]
        fields += [pb.number(5, parent)] if parent else []
        fields += [pb.text(14, description)] if description else []
        return _packet(pb.data(60, *fields, pb.number(15, _NEVER_MERGED)))

    def _vm(self, vm: int, pid: int) -> bytes:
        known = (self._meta.get("guests") or {}).get(str(vm)) or {}
        name = guest(known.get("name"), pid)
        return self._track(
            _uuid(_VM, vm), f"{name} #{vm}", rank=vm, description=f"VM {vm} of the recording, process {pid}"
        )

    def _vcpu(self, number: int, vcpu_id: int, parent: int) -> bytes:
        uuid = _uuid(_VCPU, number)
        return self._track(uuid, f"vCPU {vcpu_id}", parent=parent, rank=vcpu_id) + self._track(
            _uuid(_MARKS, number), MARKS, parent=uuid, rank=99
        )

    # One row for each vCPU that this segment introduces: few, however many events.
    def _vcpus(self, events: Array) -> list[bytes]:
        new = events[events["kind"] == Kind.VCPU_NEW]
        parts = []
        for each in new:
            vm, pid = int(each["detail"]), int(each["pid"])
            parts += [self._vm(vm, pid), self._vcpu(int(each["vcpu"]), int(each["arg"]), _uuid(_VM, vm))]
        numbers, first = np.unique(events["vcpu"], return_index=True)
        for number, pid in zip(numbers.tolist(), events["pid"][first].tolist(), strict=True):
            if number and _uuid(_VCPU, number) not in self._tracks:
                # Its VCPU_NEW was lost: neither its VM nor KVM's number of it are known yet.
                parent = _uuid(_LOST_VM, pid)
                parts.append(self._track(parent, f"a guest of process {pid} whose beginning was lost"))
                uuid = _uuid(_VCPU, number)
                parts.append(self._track(uuid, f"vCPU (number {number} of the recording)", parent=parent))
                parts.append(self._track(_uuid(_MARKS, number), MARKS, parent=uuid, rank=99))
        return parts

    def _vms(self, events: Array) -> list[bytes]:
        vms, first = np.unique(events["detail"], return_index=True)
        parts = []
        for vm, pid in zip(vms.tolist(), events["pid"][first].tolist(), strict=True):
            parts.append(self._vm(vm, pid))
            parts.append(self._track(_uuid(_TO_ALL, vm), TO_ALL, parent=_uuid(_VM, vm), rank=_RANK_MOST))
        return parts

    # --- events ---------------------------------------------------------------------------------------------

    def _events(
        self,
        kind: Any,
        track: Any,
        name: Any,
        category: str | None,
        time_ns: Any,
        arguments: Mapping[str, Any] | None = None,
        *,
        named: Array | None = None,
    ) -> bytes:
        """Return one packet for each time. What is not an array holds for all of them.

        ``name``: a string, or the numbers of strings; None for ends, which have none. An argument is a string, a
        number, a truth value, an array of one of these, or a pair of such an array and of where it is known.
        """
        times = np.asarray(time_ns)
        count = len(times)
        if not count:
            return b""
        fields = [
            pb.numbers(9, np.broadcast_to(kind, count)),
            pb.numbers(11, np.broadcast_to(track, count)),
        ]
        if name is not None:
            iids = self._strings.iid("event", name) if isinstance(name, str) else name
            field = pb.numbers(10, np.broadcast_to(iids, count))
            fields.append(field if named is None else field.only(named))
        if category is not None:
            field = pb.constant(pb.number(3, self._strings.iid("category", category)), count)
            fields.append(field if named is None else field.only(named))
        for key, value in (arguments or {}).items():
            values, known = value if isinstance(value, tuple) else (value, None)
            argument = self._argument(key, np.broadcast_to(values, count))
            fields.append(argument if known is None else argument.only(known))
        packet = [
            pb.numbers(8, np.maximum(times.astype("i8"), 0)),
            pb.constant(_SEQUENCE + pb.number(13, _NEEDS_STATE), count),
            pb.messages(11, fields),
        ]
        return pb.messages(1, packet).join()

    def _argument(self, key: str, values: Array) -> pb.Rows:
        name = pb.constant(pb.number(1, self._strings.iid("key", key)), len(values))
        if values.dtype.kind == "b":
            value = pb.numbers(2, values)
        elif values.dtype.kind in "iu":
            value = pb.numbers(3, np.maximum(values, 0))
        else:
            value = pb.numbers(17, self._strings.iids("value", [str(each) for each in values.tolist()]))
        return pb.messages(4, [name, value])

    def _drawn(self, edges: Edges) -> bytes:
        iids = np.array([0, *(self._strings.iid("event", name) for name in PERIODS[1:])])
        track = _uuid(_VCPU, edges.vcpu.astype("i8"))
        kind = np.where(edges.begins, _BEGIN, _END)
        left = edges.begins & (edges.period == IN_KERNEL) & (edges.left >= 0)
        known = np.unique(edges.left[left])
        reasons = np.array([shown(self._exits.name(each & 0xFFFFFFFF, each >> 32)) for each in known.tolist()], object)
        arguments = {}
        if len(known):
            place = np.minimum(np.searchsorted(known, edges.left), len(known) - 1)
            arguments["exit_reason"] = (reasons[place], left)
        return self._events(kind, track, iids[edges.period], "period", edges.time_ns, arguments, named=edges.begins)

    def _requests(self, lifecycles: pd.DataFrame) -> list[bytes]:
        if lifecycles.empty:
            return []
        parts = []
        for request, rows in lifecycles.groupby("request", observed=True, sort=False):
            column = {name: rows[name].to_numpy() for name in rows.columns}
            bit = self._bits[str(request)]
            for number in np.unique(column["vcpu_number"]).tolist():
                parts.append(
                    self._track(
                        _uuid(_REQUEST, number, bit), shown(str(request)), parent=_uuid(_VCPU, number), rank=bit
                    )
                )
            track = _uuid(_REQUEST, column["vcpu_number"].astype("i8"), bit)
            numbers = ("raised_after_ns", "raised_ns", "ended_after_ns", "userspace_exits", "saves", "blind_saves")
            later = ("ended_ns", "requester_cpu", "kicked_ns", "left_guest_ns", "reentered_ns")
            arguments: dict[str, Any] = {
                **{name: column[name].astype(object) for name in ("raised_by", "raised_in", "end")},
                **{name: column[name] for name in numbers},
                **{name: (column[name], column[name] >= 0) for name in later},
                "requester_tid": (column["requester_tid"], column["requester_tid"] != 0),
                **{name: column[name].astype(bool) for name in ("nested", "stale", "exposed")},
                "why": (column["why"].astype(object), column["why"] != ""),
                **{name: column[name] for name in ("vm", "pid", "vcpu")},
            }
            raised = column["raised_ns"]
            last = np.maximum(column["ended_after_ns"], raised)
            # A begin and its end follow each other: of requests that touch, the first one ends first.
            count = len(rows)
            twice = np.repeat(np.arange(count), 2)
            begins = np.tile([True, False], count)
            both = {
                key: (value[0][twice], value[1][twice] & begins) if isinstance(value, tuple) else (value[twice], begins)
                for key, value in arguments.items()
            }
            parts.append(
                self._events(
                    np.where(begins, _BEGIN, _END),
                    track[twice],
                    shown(str(request)),
                    "request",
                    np.where(begins, raised[twice], last[twice]),
                    both,
                    named=begins,
                )
            )
        return parts

    def _marks(self, events: Array) -> list[bytes]:
        kinds = (Kind.SAVE, Kind.RESTORE, Kind.RESET, Kind.VCPU_END)
        telling = events[np.isin(events["kind"], kinds)]
        result = (telling["arg"] >> np.uint64(32)).astype("u4").view("i4")
        pending = (telling["requests"] & np.uint64(1 << TRIPLE_FAULT)) != 0
        registers = (telling["flags"] & Flag.READ) != 0  # else that is no save yet, and maybe never one
        save, restore, reset, end = (telling["kind"] == kind for kind in kinds)
        failed = result < 0
        parts = []
        for which, name in (
            (save & ~failed & registers, "save"),
            (save & ~failed & ~registers, "events read"),
            (save & failed, "failed save"),
            (restore & ~failed, "restore"),
            (restore & failed, "failed restore"),
        ):
            rows = telling[which]
            parts.append(
                self._mark(
                    name,
                    rows,
                    {
                        "errno": np.maximum(-result[which].astype("i8"), 0),
                        "payload_flags": rows["detail"] & np.uint32(PAYLOAD_FLAGS),
                        "payload_pending": (rows["detail"] & np.uint32(PAYLOAD_PENDING)) != 0,
                        "triple_fault": pending[which],
                        "kvm_run": (rows["flags"] & Flag.SYNC) != 0,
                    },
                )
            )
        by = [ioctl(int(cmd) & 0xFFFFFFFF) if cmd else "KVM" for cmd in telling["arg"][reset].tolist()]
        parts.append(self._mark("reset", telling[reset], {"by": np.array(by, object)}))
        hows = {how.value: how.name.lower() for how in End}
        how = [hows.get(value, str(value)) for value in telling["arg"][end].tolist()]
        parts.append(self._mark("vCPU ends", telling[end], {"how": np.array(how, object)}))
        return parts

    def _remote(self, events: Array) -> list[bytes]:
        """Return what other threads did to vCPUs: instants on the vCPU's own track, or on one of its VM."""
        kick, still, begin, end = (
            events[events["kind"] == kind]
            for kind in (Kind.KICK, Kind.IN_GUEST_STILL, Kind.REQUEST_ALL, Kind.REQUEST_ALL_END)
        )

        def words(values: Array, word: Any) -> Array:
            distinct, place = np.unique(values, return_inverse=True)
            return np.array([word(int(value)) for value in distinct], object)[place]

        def pending(word: int) -> str:
            return ", ".join(self._request(bit) for bit in range(64) if word >> bit & 1) or "none"

        def request(rows: Array) -> Array:
            return words(requested(rows["arg"]), self._request)

        def by(rows: Array) -> dict[str, Any]:
            return {"tid": rows["tid"], "cpu": rows["cpu"]}

        def seen(rows: Array) -> dict[str, Any]:
            return {"mode": words(rows["detail"], mode), "requests": words(rows["requests"], pending), **by(rows)}

        def told(rows: Array) -> dict[str, Any]:
            flags = words(rows["arg"], lambda arg: ", ".join(request_flags(arg)) or "none")
            vcpus = words(rows["requests"], lambda mask: ", ".join(map(str, targets(mask))) or "none")
            return {"request": request(rows), "flags": flags, "vcpus": vcpus, **by(rows)}

        def began(rows: Array) -> dict[str, Any]:
            since_ns, time_ns = rows["since_ns"], rows["time_ns"]
            return {"since_ns": since_ns, "took_ns": time_ns - np.minimum(since_ns, time_ns)}

        parts = [*self._vms(begin), *self._vms(end)]
        for name, rows, track, arguments in (
            ("kick", kick, _uuid(_VCPU, kick["vcpu"].astype("i8")), seen(kick)),
            (
                "in guest mode still",
                still,
                _uuid(_VCPU, still["vcpu"].astype("i8")),
                {"request": request(still), **seen(still), **began(still)},
            ),
            ("request to several vCPUs", begin, _uuid(_TO_ALL, begin["detail"].astype("i8")), told(begin)),
            ("it returned", end, _uuid(_TO_ALL, end["detail"].astype("i8")), {**told(end), **began(end)}),
        ):
            parts.append(self._events(_INSTANT, track, name, "kick", rows["time_ns"], arguments))
        return parts

    def _request(self, bit: int) -> str:
        return self._names.get(bit, bit_name(bit))

    def _mark(self, name: str, rows: Array, arguments: Mapping[str, Any]) -> bytes:
        return self._events(
            _INSTANT, _uuid(_MARKS, rows["vcpu"].astype("i8")), name, "mark", rows["time_ns"], arguments
        )

    def _shutdowns(self, shutdowns: Table) -> list[bytes]:
        table = shutdown_table(in_order(shutdowns, "vcpu_number"))
        parts = []
        exits = table["source"].isin(("request", "hardware"))
        for name, rows in (("shutdown exit", table[exits]), ("guest died", table[~exits])):
            track = _uuid(_MARKS, rows["vcpu_number"].to_numpy().astype("i8"))
            arguments = {
                "source": rows["source"].to_numpy().astype(object),
                "nested": rows["nested"].to_numpy().astype(bool),
            }
            parts.append(self._events(_INSTANT, track, name, "mark", rows["time_ns"].to_numpy(), arguments))
        return parts

    def _copies(self, copies: Table) -> list[bytes]:
        """Mark the saves that left a request out."""
        blind = (copies["what"] == Copy.SAVED) & ~copies["carried"]
        requests = np.array([self._names.get(bit, bit_name(bit)) for bit in copies["request"][blind].tolist()], object)
        track = _uuid(_MARKS, copies["vcpu_number"][blind].astype("i8"))
        times = copies["time_ns"][blind]
        return [self._events(_INSTANT, track, "blind save", "mark", times, {"request": requests})] if len(times) else []

    def _losses(self, loss: Loss, until_ns: int) -> list[bytes]:
        if loss == self._loss:
            return []
        parts = []
        for number, lost in loss.vcpus.items():
            before = self._loss.vcpus[number].count if number in self._loss.vcpus else 0
            if lost.count > before:
                track = _uuid(_MARKS, number) if _uuid(_MARKS, number) in self._tracks else _uuid(_LOSSES)
                arguments = {"count": lost.count - before, "vcpu_number": number, "no_later_than_ns": lost.last_ns}
                parts.append(self._events(_INSTANT, track, "events lost", "loss", [lost.last_ns], arguments))
        grown = {
            cause: getattr(loss, cause) - getattr(self._loss, cause)
            for cause in ("ring_full", "map_full", "missed", "not_written", "unanswered", "kicks")
        }
        if any(count > 0 for count in grown.values()):
            parts.append(self._events(_INSTANT, _uuid(_LOSSES), "lost", "loss", [until_ns], grown))
        return parts
