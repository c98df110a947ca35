"""How fast track events are written: by reports.protobuf, and by the messages of the package `perfetto`, in one run.

Both write the same events: a time, a track, a name and a category by number, and two arguments. What each has
written is read back by the package's own messages and compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.table import Figure
from reports import protobuf as pb

try:
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos
except ImportError as error:  # pragma: no cover
    raise SystemExit("bench: the part protobuf needs the package perfetto: make bench brings it") from error

Array = npt.NDArray[Any]

EVENTS = 1_000_000
TIMES = 3
#: Events at one time: as reports.perfetto writes them.
CHUNK = 1 << 16
_BEGIN, _END, _NEEDS_STATE = 1, 2, 2
_CATEGORY, _KEYS = 5, (6, 7)


def events(count: int) -> dict[str, Array]:
    """Return what is to be written: periods of a few thousand vCPUs."""
    index = np.arange(count)
    return {
        "time_ns": 1_700_000_000_000_000 + index * 731,
        "track": (5 << 38) + index % 4096,
        "begins": index % 2 == 0,
        "name": 1 + index % 4,
        "reason": 100 + index % 40,  # a string, by its number
        "number": index * 7 % 100_003,
    }


def ours(batch: dict[str, Array]) -> bytes:
    """Write them as columns."""
    count = len(batch["time_ns"])
    arguments = [
        pb.messages(4, [pb.constant(pb.number(1, _KEYS[0]), count), pb.numbers(17, batch["reason"])]),
        pb.messages(4, [pb.constant(pb.number(1, _KEYS[1]), count), pb.numbers(3, batch["number"])]),
    ]
    named = [
        pb.numbers(10, batch["name"]),
        pb.constant(pb.number(3, _CATEGORY), count),
        *arguments,
    ]
    fields = [
        pb.numbers(9, np.where(batch["begins"], _BEGIN, _END)),
        pb.numbers(11, batch["track"]),
        *(field.only(batch["begins"]) for field in named),
    ]
    packet = [
        pb.numbers(8, batch["time_ns"]),
        pb.constant(pb.number(10, 1) + pb.number(13, _NEEDS_STATE), count),
        pb.messages(11, fields),
    ]
    return pb.messages(1, packet).join()


def theirs(batch: dict[str, Array]) -> bytes:
    """Write them message by message, as the package is used."""
    trace = protos.Trace()
    add = trace.packet.add
    for time_ns, track, begins, name, reason, number in zip(*(batch[key].tolist() for key in batch), strict=True):
        packet = add(timestamp=time_ns, trusted_packet_sequence_id=1, sequence_flags=_NEEDS_STATE)
        event = packet.track_event
        event.track_uuid = track
        if begins:
            event.type = _BEGIN
            event.name_iid = name
            event.category_iids.append(_CATEGORY)
            event.debug_annotations.add(name_iid=_KEYS[0], string_value_iid=reason)
            event.debug_annotations.add(name_iid=_KEYS[1], uint_value=number)
        else:
            event.type = _END
    written: bytes = trace.SerializeToString()
    return written


def again(batch: dict[str, Array]) -> bytes:
    """Write them by two messages that are used again, which only events with the same fields allow."""
    begin, end = protos.Trace(), protos.Trace()
    first, last = (one.packet.add(trusted_packet_sequence_id=1, sequence_flags=_NEEDS_STATE) for one in (begin, end))
    event, ended = first.track_event, last.track_event
    event.type, ended.type = _BEGIN, _END
    event.category_iids.append(_CATEGORY)
    word, count = (event.debug_annotations.add(name_iid=key) for key in _KEYS)
    written = []
    for time_ns, track, begins, name, reason, number in zip(*(batch[key].tolist() for key in batch), strict=True):
        if begins:
            first.timestamp, event.track_uuid, event.name_iid = time_ns, track, name
            word.string_value_iid, count.uint_value = reason, number
            written.append(begin.SerializeToString())
        else:
            last.timestamp, ended.track_uuid = time_ns, track
            written.append(end.SerializeToString())
    return b"".join(written)


def read(content: bytes) -> Any:
    """Return a trace as the package's own messages."""
    trace = protos.Trace()
    trace.ParseFromString(content)
    return trace


def _took(write: Callable[[dict[str, Array]], bytes], batches: list[dict[str, Array]]) -> tuple[float, int]:
    began = time.process_time()
    size = sum(len(write(batch)) for batch in batches)
    return time.process_time() - began, size


def figures() -> Iterator[Figure]:
    """Yield how long each takes for an event, how often one is as fast as the other, and what the events come to."""
    whole = events(EVENTS)
    batches = [{key: whole[key][at : at + CHUNK] for key in whole} for at in range(0, EVENTS, CHUNK)]
    writers = {"ours": ours, "theirs": theirs, "again": again}
    told = [read(write(batches[0])) for write in writers.values()]
    if told[1:] != told[:-1]:
        raise RuntimeError("reports.protobuf and perfetto's messages do not write the same events")
    spent: dict[str, list[float]] = {name: [] for name in writers}
    size = {}
    for _ in range(TIMES):  # in turns: whatever else runs slows all
        for name, write in writers.items():
            took, size[name] = _took(write, batches)
            spent[name].append(took)
    mine, other, reused = (statistics.median(spent[name]) for name in writers)
    yield Figure("protobuf", f"reports.protobuf, {EVENTS:,} track events", mine / EVENTS * 1e9, "ns/event")
    yield Figure("protobuf", "perfetto's messages, the same events", other / EVENTS * 1e9, "ns/event")
    yield Figure("protobuf", "perfetto's messages / reports.protobuf", other / mine, "x", 5.0, at_least=True)
    yield Figure("protobuf", "  where all events have the same fields", reused / mine, "x")
    yield Figure("protobuf", "  size of reports.protobuf's / perfetto's messages", size["ours"] / size["theirs"], "x")
