"""The Perfetto trace of recordings written out here, as a reader of Perfetto's messages sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.schema import (
    EVENT,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    PAYLOAD_PENDING,
    SCHEMA_VERSION,
    VALID_TRIPLE_FAULT,
    End,
    Flag,
    Kind,
    SystemEvent,
)
from reports import perfetto
from tests.traces import MONOTONIC, REALTIME, Trace, needs_trace_processor, processor, read
from tracer.loss import Loss, VcpuLoss
from tracer.recording import Recording, Writer

UTC_NS = 1_795_000_000_000_000_000
META: dict[str, Any] = {
    "schema": SCHEMA_VERSION,
    "host": "host",
    "kernel": "6.12.0",
    "engine": "tracepoint",
    "detail": "full",
    "requests": ["triple_fault"],
    "requests_by_bit": {"10": "triple_fault"},
    "clock": {"monotonic_ns": 1_000, "utc_ns": UTC_NS},
    "started_ns": 500,
    "plan": [],
    "guests": {"7": {"pid": 4711, "name": "web\n$", "vmm": "qemu"}, "8": {"pid": 4711, "name": "web\n$", "vmm": None}},
    "ended_ns": None,
}
TF = 1 << 10
MCE, GET_EVENTS, SET_EVENTS, SET_SREGS, KVM_RUN = 0x4040AE9E, 0x8040AE9F, 0x4040AEA0, 0x4138AE84, 0xAE80
SET, EINTR = VALID_TRIPLE_FAULT | PAYLOAD_PENDING, (2**32 - 4) << 32
Step = tuple[Kind, dict[str, int]]

# A life in detail full, an event every 100 ns: the request is raised, waits, is saved blindly, and the vCPU ends.
LOST: list[Step] = [
    (Kind.VCPU_NEW, {"detail": 7}),
    (Kind.RUN_ENTER, {"arg": KVM_RUN}),
    (Kind.GUEST_ENTRY, {}),
    (Kind.GUEST_EXIT, {"arg": 5}),
    (Kind.GUEST_ENTRY, {}),
    (Kind.GUEST_EXIT, {"arg": 6}),
    (Kind.RUN_EXIT, {"arg": 2}),
    (Kind.IOCTL_ENTER, {"arg": MCE}),
    (Kind.IOCTL_EXIT, {"arg": MCE, "requests": TF}),
    (Kind.IOCTL_ENTER, {"arg": GET_EVENTS, "requests": TF}),
    (Kind.SAVE, {"arg": GET_EVENTS, "requests": TF, "flags": Flag.CREATED | Flag.READ}),
    (Kind.VCPU_END, {"arg": End.CLOSED, "requests": TF}),
]


def life(steps: list[Step], start_ns: int = 2_000, vcpu: int = 1, pid: int = 4711) -> Any:
    """Return the events of one vCPU, 100 ns apart, each the next reading after the one before it."""
    events = np.zeros(len(steps), EVENT)
    events["time_ns"] = start_ns + 100 * np.arange(len(steps))
    events["since_ns"][1:] = events["time_ns"][:-1]
    events["seq"] = np.arange(1, len(steps) + 1)
    events["vcpu"], events["pid"], events["flags"] = vcpu, pid, Flag.CREATED | Flag.CAP_EXISTS
    events["tid"], events["cpu"] = 4780, 2
    for place, (kind, values) in enumerate(steps):
        events["kind"][place] = kind
        for name, value in values.items():
            events[name][place] = value
    events["before"][1:] = events["requests"][:-1]
    return events


def recorded(path: Path, *segments: Any, losses: tuple[Loss, ...] = (), **meta: Any) -> Recording:
    """Return a recording of these segments."""
    writer = Writer(path / "r", META | meta)
    for number, events in enumerate(segments):
        writer.segment(events, losses[number] if losses else Loss(), int(events["time_ns"].max(initial=600)) + 50)
    writer.update(ended_ns=9_000, segments=len(segments))
    return Recording.open(path / "r")


def traced(recording: Recording) -> Trace:
    """Return the trace of a recording."""
    return read(b"".join(perfetto.trace(recording)))


def periods(trace: Trace, depth: int = 0) -> list[tuple[str, int, int]]:
    """Return what vCPUs did, in order."""
    return sorted(
        ((each.name, each.begin_ns, each.end_ns) for each in trace.slices
         if each.category == "period" and each.depth == depth),
        key=lambda each: each[1:],
    )  # fmt: skip


@pytest.mark.parametrize("cut", [12, 1, 3, 6, 9])
def test_what_a_vcpu_does_is_divided(tmp_path: Path, cut: int) -> None:
    """KVM_RUN into guest and kernel; wherever the recording is cut into segments."""
    events = life(LOST)
    trace = traced(recorded(tmp_path, events[:cut], events[cut:]))
    assert periods(trace) == [
        ("KVM_RUN", 2100, 2600),
        ("user space", 2600, 2700),
        ("ioctl", 2700, 2800),
        ("user space", 2800, 2900),
        ("ioctl", 2900, 3000),
    ]
    assert periods(trace, 1) == [
        ("kernel", 2100, 2200),
        ("guest", 2200, 2300),
        ("kernel", 2300, 2400),
        ("guest", 2400, 2500),
        ("kernel", 2500, 2600),
    ]


def test_a_request_is_a_slice_with_its_bounds(tmp_path: Path) -> None:
    """From the first event that saw it to the last; arguments tell the rest."""
    trace = traced(recorded(tmp_path, life(LOST)))
    (request,) = (each for each in trace.slices if each.category == "request")
    assert request.track == ("web\\n$ #7", "vCPU 0", "triple_fault")
    assert (request.name, request.begin_ns, request.end_ns) == ("triple_fault", 2800, 3000)
    assert request.arguments == {
        "raised_by": "set_mce", "raised_in": "ioctl", "raised_after_ns": 2700, "raised_ns": 2800,
        "end": "lost", "ended_after_ns": 3000, "ended_ns": 3100,
        "userspace_exits": 0, "saves": 0, "blind_saves": 1,
        "nested": False, "stale": False, "exposed": False,
        "vm": 7, "pid": 4711, "vcpu": 0, "requester_tid": 4780, "requester_cpu": 2,
    }  # fmt: skip
    marks = [(each.begin_ns, each.arguments) for each in trace.named("blind save")]
    assert marks == [(3000, {"request": "triple_fault"})]


def test_a_request_that_is_open_has_no_end(tmp_path: Path) -> None:
    """Its slice ends with the last event that saw it; `why` is there only where there is one."""
    (request,) = (each for each in traced(recorded(tmp_path, life(LOST[:10]))).slices if each.category == "request")
    assert (request.arguments["end"], request.begin_ns, request.end_ns) == ("open", 2800, 2900)
    assert not {"ended_ns", "why"} & set(request.arguments)


def test_boundary_events_prove_no_period(tmp_path: Path) -> None:
    """Readings that were not sent lie between events: then nobody knows what the vCPU did, and nothing is drawn."""
    events = life([(Kind.VCPU_NEW, {"detail": 7}), *[(Kind.RUN_EXIT, {"arg": 2, "requests": TF})] * 23])
    assert not periods(traced(recorded(tmp_path / "runs", events)))
    events = life(LOST)
    events["since_ns"][1:] += 50
    assert not periods(traced(recorded(tmp_path / "readings", events)))


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    """Make the folders of tests that record twice."""
    for name in ("runs", "readings"):
        (tmp_path / name).mkdir()


def test_hooks_that_tell_nothing_go_with_what_was_before(tmp_path: Path) -> None:
    """A reading at a site inside KVM_RUN does not cut it; after an entry of the guest it shows that it was left."""
    events = life(
        [
            (Kind.VCPU_NEW, {"detail": 7}),
            (Kind.RUN_ENTER, {"arg": KVM_RUN}),
            (Kind.SITE, {"arg": 1}),
            (Kind.RESET, {}),
            (Kind.GUEST_ENTRY, {}),
            (Kind.SITE, {"arg": 1}),
            (Kind.SITE, {"arg": 2}),
            (Kind.RUN_EXIT, {"arg": 2, "requests": TF}),
            (Kind.SAVE, {"arg": GET_EVENTS, "requests": TF, "flags": Flag.CREATED | Flag.SYNC}),
            (Kind.RESET, {"arg": SET_SREGS, "requests": TF}),
            (Kind.IOCTL_EXIT, {"arg": SET_SREGS, "requests": TF}),
        ]
    )
    trace = traced(recorded(tmp_path, events[:5], events[5:6], events[6:]))
    assert periods(trace) == [("KVM_RUN", 2100, 2700), ("user space", 2700, 2900), ("ioctl", 2900, 3000)]
    assert periods(trace, 1) == [("kernel", 2300, 2400)]


def remote(time_ns: int, kind: Kind, **values: int) -> Any:
    """Return an event that is no reading of a vCPU's own."""
    event = np.zeros(1, EVENT)
    event["time_ns"], event["kind"], event["vcpu"], event["pid"] = time_ns, kind, 1, 4711
    event["tid"], event["cpu"] = 4799, 3
    for name, value in values.items():
        event[name] = value
    return event


HALTED: list[Step] = [
    (Kind.VCPU_NEW, {"detail": 7}),
    (Kind.RUN_ENTER, {"arg": KVM_RUN}),
    (Kind.GUEST_ENTRY, {}),
    (Kind.GUEST_EXIT, {"arg": 12, "detail": 1}),
    (Kind.WAKEUP, {"arg": 60, "detail": 1}),
    (Kind.GUEST_ENTRY, {}),
    (Kind.GUEST_EXIT, {"arg": 48, "detail": 1}),
    (Kind.WAKEUP, {"arg": 60, "detail": 0}),
    (Kind.WAKEUP, {"arg": 1_000_000, "detail": 1}),
    (Kind.RUN_EXIT, {"arg": 2}),
]


@pytest.mark.parametrize("cut", [10, 3, 4, 5, 8, 9])
def test_a_vcpu_that_sleeps_is_halted(tmp_path: Path, cut: int) -> None:
    """For as long as its wake-up says, and never before its last reading; one that polled is in the kernel."""
    events = life(HALTED)
    trace = traced(recorded(tmp_path, events[:cut], events[cut:]))
    assert periods(trace) == [("KVM_RUN", 2100, 2900)]
    assert periods(trace, 1) == [
        ("kernel", 2100, 2200),
        ("guest", 2200, 2300),
        ("kernel", 2300, 2340),
        ("halted", 2340, 2400),
        ("kernel", 2400, 2500),
        ("guest", 2500, 2600),
        ("kernel", 2600, 2700),
        ("halted", 2700, 2800),
    ]


def test_kernel_time_says_why_the_guest_was_left(tmp_path: Path) -> None:
    """By the names of the kernel that was recorded, else by number."""
    table = 'isa, (REC->isa == 1) ? __print_symbolic(REC->exit_reason, { 12, "HLT" }, { 5, "X" })'
    for formats, names in (({"kvm_exit": table}, ["HLT", "0x30"]), ({}, ["0xc", "0x30"])):
        (tmp_path / str(len(formats))).mkdir()
        trace = traced(recorded(tmp_path / str(len(formats)), life(HALTED), formats=formats))
        said = [each.arguments.get("exit_reason") for each in trace.named("kernel")]
        assert said == [None, names[0], None, names[1]]


def test_what_other_threads_do_is_an_instant(tmp_path: Path) -> None:
    """With the requester's thread; and the vCPU's own periods are as if nothing had been seen."""
    events = life(LOST)
    others = [
        remote(2_050, Kind.KICK, requests=TF, before=TF, detail=1),
        remote(2_250, Kind.REQUEST_ALL, vcpu=0, arg=10 | 1 << 9, detail=7, requests=2**64 - 1),
        remote(2_260, Kind.KICK, detail=0),
        remote(2_270, Kind.REQUEST_ALL_END, vcpu=0, arg=10 | 1 << 9, detail=7, requests=5, since_ns=2_250),
        remote(2_280, Kind.IN_GUEST_STILL, arg=10 | 1 << 9, detail=2, requests=TF | 1 << 9, since_ns=2_250),
    ]
    mixed = np.concatenate([events[:1], others[0], events[1:3], *others[1:], events[3:]])
    trace = traced(recorded(tmp_path, mixed))
    (tmp_path / "own").mkdir()
    own = traced(recorded(tmp_path / "own", events))
    assert periods(trace) == periods(own) and periods(trace, 1) == periods(own, 1)
    by = {"tid": 4799, "cpu": 3}
    kicks = trace.named("kick")
    assert [each.track for each in kicks] == [("web\\n$ #7", "vCPU 0")] * 2
    assert [each.arguments for each in kicks] == [
        {"mode": "in_guest_mode", "requests": "triple_fault", **by},
        {"mode": "outside_guest_mode", "requests": "none", **by},
    ]
    told = {"request": "triple_fault", "flags": "wait", **by}
    (begin,), (end,) = trace.named("request to several vCPUs"), trace.named("it returned")
    assert begin.track == end.track == ("web\\n$ #7", perfetto.TO_ALL)
    assert begin.arguments == {**told, "vcpus": "all"}
    assert end.arguments == {**told, "vcpus": "0, 2", "since_ns": 2_250, "took_ns": 20}
    (still,) = trace.named("in guest mode still")
    assert still.arguments == {
        "request": "triple_fault", "mode": "exiting_guest_mode", "requests": "bit_9, triple_fault",
        "since_ns": 2_250, "took_ns": 30, **by,
    }  # fmt: skip


def test_the_exit_of_a_process_ends_what_its_vcpus_do(tmp_path: Path) -> None:
    """And leaves those of others alone."""
    one, other = life(LOST[:3]), life(LOST[:3], vcpu=2, pid=4712)
    gone = np.zeros(1, EVENT)
    gone["time_ns"], gone["pid"], gone["kind"], gone["arg"] = 2_250, 4711, Kind.VMM_EXIT, End.EXITED
    other_later = life(LOST[:4], vcpu=2, pid=4712)[3:]
    trace = traced(recorded(tmp_path, np.concatenate((one, other, gone)), other_later))
    assert periods(trace, 1) == [("kernel", 2100, 2200), ("kernel", 2100, 2200), ("guest", 2200, 2300)]


def test_marks(tmp_path: Path) -> None:
    """Saves and restores by how they went, resets, shutdown exits by who made them."""
    events = life(
        [
            (Kind.VCPU_NEW, {"detail": 7, "arg": 3}),
            (Kind.SAVE, {"arg": GET_EVENTS, "detail": SET & ~PAYLOAD_PENDING}),
            (Kind.RESTORE, {"arg": SET_EVENTS, "detail": SET, "requests": TF}),
            (Kind.SAVE, {"arg": GET_EVENTS, "detail": SET, "requests": TF, "flags": Flag.READ}),
            (Kind.SAVE, {"arg": GET_EVENTS | EINTR, "requests": TF}),
            (Kind.RESTORE, {"arg": SET_EVENTS | EINTR, "requests": TF}),
            (Kind.RESET, {"arg": SET_SREGS, "requests": TF}),
            (Kind.RESET, {"requests": TF}),
            (Kind.RUN_EXIT, {"arg": KVM_EXIT_SHUTDOWN}),
            (Kind.RUN_EXIT, {"arg": KVM_EXIT_SHUTDOWN}),
            (Kind.RUN_EXIT, {"arg": KVM_EXIT_SYSTEM_EVENT, "detail": SystemEvent.SEV_TERM}),
            (Kind.VCPU_END, {"arg": End.DESTROYED}),
        ]
    )
    trace = traced(recorded(tmp_path, events))
    marks = [each for each in trace.instants if each.track == ("web\\n$ #7", "vCPU 3", perfetto.MARKS)]
    assert len(marks) == len(trace.instants) == 11
    assert [(each.begin_ns, each.name) for each in sorted(marks, key=lambda each: each.begin_ns)] == [
        (2100, "events read"), (2200, "restore"), (2300, "save"), (2400, "failed save"), (2500, "failed restore"),
        (2600, "reset"), (2700, "reset"), (2800, "shutdown exit"), (2900, "shutdown exit"), (3000, "guest died"),
        (3100, "vCPU ends"),
    ]  # fmt: skip
    assert [each.arguments["errno"] for each in trace.named("failed save")] == [4]
    assert [each.arguments["by"] for each in trace.named("reset")] == ["SET_SREGS", "KVM"]
    assert [each.arguments["source"] for each in trace.named("shutdown exit")] == ["request", "hardware"]
    assert [each.arguments["source"] for each in trace.named("guest died")] == ["sev_term"]
    assert trace.named("vCPU ends")[0].arguments == {"how": "destroyed"}
    assert trace.named("save")[0].arguments == {
        "errno": 0, "payload_flags": VALID_TRIPLE_FAULT, "payload_pending": True, "triple_fault": True,
        "kvm_run": False,
    }  # fmt: skip


def test_losses_are_marks(tmp_path: Path) -> None:
    """What grew, when it grew; on the vCPU's track where that is known."""
    first = Loss(ring_full=23, vcpus={1: VcpuLoss(19, 2_010, 2_020), 0: VcpuLoss(4, 2_010, 2_030)})
    second = Loss(ring_full=28, missed=3, vcpus={**first.vcpus, 1: VcpuLoss(24, 2_010, 2_950)})
    events = life(LOST)
    events["seq"][5:] += 19
    trace = traced(recorded(tmp_path, events[:6], events[6:], losses=(first, second)))
    lost = trace.named("events lost")
    assert [(each.begin_ns, each.track[-1], each.arguments["count"]) for each in lost] == [
        (2020, perfetto.MARKS, 19), (2030, "losses", 4), (2950, perfetto.MARKS, 5),
    ]  # fmt: skip
    assert [each.arguments for each in trace.named("lost")] == [
        {"ring_full": 23, "map_full": 0, "missed": 0, "not_written": 0, "unanswered": 0, "kicks": 0},
        {"ring_full": 5, "map_full": 0, "missed": 3, "not_written": 0, "unanswered": 0, "kicks": 0},
    ]
    (request,) = (each for each in trace.slices if each.category == "request")
    assert request.arguments["end"] == "undecided"
    assert "missed" in request.arguments["why"] or "lost" in request.arguments["why"]


def test_a_segment_that_is_missing_is_a_mark(tmp_path: Path) -> None:
    """The trace says where nothing is known, and what was pending is undecided."""
    events = life(LOST)
    recording = recorded(tmp_path, events[:9], events[9:10], events[10:])
    (recording.path / "segment-000002.parquet").unlink()
    trace = traced(recording)
    (mark,) = trace.named("segment left out")
    assert (mark.track, mark.arguments) == (("kvmreq recording", "losses"), {"reason": "segment 2 is missing"})
    assert [each.arguments["end"] for each in trace.slices if each.category == "request"] == ["undecided"]
    assert max(end_ns for _, _, end_ns in periods(trace)) == 2800


def test_clocks_and_the_recording_itself(tmp_path: Path) -> None:
    """Times are monotonic, the snapshot pairs them with UTC; an empty recording is a trace, too."""
    trace = traced(recorded(tmp_path, np.zeros(0, EVENT)))
    assert trace.clocks == {MONOTONIC: 1_000, REALTIME: UTC_NS}
    (whole,) = trace.slices
    assert (whole.name, whole.begin_ns, whole.end_ns) == ("recording", 500, 9_000)
    assert whole.arguments == {
        "host": "host", "kernel": "6.12.0", "engine": "tracepoint", "detail": "full", "requests": "triple_fault",
    }  # fmt: skip


def test_guests_of_one_name_are_two_tracks(tmp_path: Path) -> None:
    """And a vCPU whose beginning was lost is shown under its process."""
    one, other = life(LOST), life(LOST, vcpu=2)
    other["detail"][0] = 8
    orphan = life(LOST, vcpu=3, pid=4713)[1:]
    trace = traced(recorded(tmp_path, np.concatenate((one, other, orphan))))
    tracks = set(trace.tracks.values())
    assert {("web\\n$ #7", "vCPU 0"), ("web\\n$ #8", "vCPU 0")} <= tracks
    assert ("a guest of process 4713 whose beginning was lost", "vCPU (number 3 of the recording)") in tracks


def test_strings_are_forgotten_before_they_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace reads the same when the reader is told to forget them after each segment."""
    events = life(LOST)
    recording = recorded(tmp_path, events[:4], events[4:8], events[8:])
    before = traced(recording)
    monkeypatch.setattr(perfetto, "_STRINGS", 1)
    monkeypatch.setattr(perfetto, "_CHUNK", 2)
    content = b"".join(perfetto.trace(recording))
    after = read(content)
    assert content.count(b"raised_by") == 1 and content.count(b"user space") > 1
    key = str
    assert sorted(after.slices, key=key) == sorted(before.slices, key=key)
    assert sorted(after.instants, key=key) == sorted(before.instants, key=key)


@needs_trace_processor
def test_the_trace_processor_answers_sql(tmp_path: Path) -> None:
    """Perfetto's own: slices, arguments, tracks and UTC are where its users look for them, and nothing is amiss."""
    path = tmp_path / "trace"
    path.write_bytes(b"".join(perfetto.trace(recorded(tmp_path, life(LOST)[:6], life(LOST)[6:]))))
    with processor(path) as asked:

        def ask(sql: str) -> list[dict[str, Any]]:
            return [row.__dict__ for row in asked.query(sql)]

        bad = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
        assert ask(bad) == []
        request = "select ts, dur, extract_arg(arg_set_id, 'debug.end') as how from slice where category = 'request'"
        assert ask(request) == [{"ts": 2800, "dur": 200, "how": "lost"}]
        spent = "select name, sum(dur) as ns from slice where category = 'period' group by name order by name"
        assert ask(spent) == [
            {"name": "KVM_RUN", "ns": 500},
            {"name": "guest", "ns": 200},
            {"name": "ioctl", "ns": 200},
            {"name": "kernel", "ns": 300},
            {"name": "user space", "ns": 200},
        ]
        parents = (
            "select v.name as vm, c.name as vcpu from slice s join track t on s.track_id = t.id"
            " join track c on t.parent_id = c.id join track v on c.parent_id = v.id where s.category = 'request'"
        )
        assert ask(parents) == [{"vm": "web\\n$ #7", "vcpu": "vCPU 0"}]
        utc = "select to_realtime(ts) as utc_ns from slice where category = 'request'"
        assert ask(utc) == [{"utc_ns": UTC_NS + 1_800}]
