"""What was recorded on a real KVM, as files for other tools."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lab.runner import runnable
from tests.traces import REALTIME, needs_trace_processor, processor, read
from tracer.recording import Recording, from_arrow

from .session import ADDRESS, COMMAND, report, run

REASONS = {scenario.name: reason for scenario, reason in runnable()}
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(REASONS["lost"]), reason=f"the lab cannot run: {REASONS['lost']}"),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recording of a lost request, with every boundary."""
    path = tmp_path_factory.mktemp("export") / "r"
    done = run("record", "--detail", "full", "-o", path, "--", *COMMAND, "lab", "run", "lost")
    assert done.returncode == 0, done.stderr
    return path


def test_a_trace_shows_what_the_report_says(recorded: Path, tmp_path: Path) -> None:
    """The same request with the same bounds, beneath its guest, with its blind save, among what it does."""
    file = tmp_path / "trace"
    done = run("export", recorded, "--to", "perfetto", "-o", file)
    assert done.returncode == 0, done.stderr
    trace = read(file.read_bytes())
    assert not ADDRESS.search(str([trace.slices, trace.instants]))
    document = report(recorded)
    drawn = sorted((each for each in trace.slices if each.category == "request"), key=lambda each: each.begin_ns)
    assert [
        {key: each.arguments[key] for key in ("vm", "pid", "vcpu", "raised_by", "end", "saves", "blind_saves")}
        for each in drawn
    ] == [
        {key: row[key] for key in ("vm", "pid", "vcpu", "raised_by", "end", "saves", "blind_saves")}
        for row in document["lifecycles"]
    ]
    (lost,) = (each for each in drawn if each.arguments["end"] == "lost")
    row = next(row for row in document["lifecycles"] if row["end"] == "lost")
    assert [lost.begin_ns, lost.end_ns] == [row["raised_ns"][1], row["ended_ns"][0]]
    assert lost.track[1] == f"vCPU {row['vcpu']}"
    blind = [each for each in trace.named("blind save") if each.track[:2] == lost.track[:2]]
    assert len(blind) == 1 and lost.begin_ns < blind[0].begin_ns <= lost.end_ns
    names = {each.name for each in trace.slices if each.category == "period"}
    assert {"user space", "ioctl", "KVM_RUN"} <= names
    assert trace.clocks[REALTIME] == document["recording"]["clock"]["utc_ns"]


def test_every_event_is_in_every_format(recorded: Path, tmp_path: Path) -> None:
    """Parquet, CSV and JSON hold all of them, and nothing holds an address of the kernel."""
    events = [event for segment in Recording.open(recorded).segments() if segment for event in segment.events]
    file = tmp_path / "events.parquet"
    done = run("export", recorded, "--to", "parquet", "-o", file)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(file)
    assert from_arrow(table).tolist() == [event.tolist() for event in events]
    as_json, as_csv = (run("export", recorded, "--to", style) for style in ("json", "csv"))
    assert (as_json.returncode, as_csv.returncode) == (0, 0)
    rows = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [(row["time_ns"], row["vcpu"], row["seq"]) for row in rows] == [
        (event["time_ns"], event["vcpu"], event["seq"]) for event in events
    ]
    assert len(as_csv.stdout.splitlines()) == 1 + len(events)
    saves = [row for row in rows if row["kind"] == "save" and "triple_fault" in row["requests"]]
    assert [(row["ioctl"], row["errno"], row["payload_pending"]) for row in saves] == [("GET_VCPU_EVENTS", 0, 0)]
    assert not ADDRESS.search(as_json.stdout + as_csv.stdout)


@needs_trace_processor
def test_the_trace_processor_finds_every_request_of_a_busy_guest(tmp_path: Path) -> None:
    """Of a recording in detail full it tells as many requests, by name, as the report, and finds no fault with it."""
    path, file = tmp_path / "r", tmp_path / "trace"
    done = run("record", "--detail", "full", "--requests", "all", "-o", path, "--", *COMMAND, "lab", "run", "busy")
    assert done.returncode == 0, done.stderr
    done = run("export", path, "--to", "perfetto", "-o", file)
    assert done.returncode == 0, done.stderr
    with processor(file) as asked:
        bad = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
        assert [row.__dict__ for row in asked.query(bad)] == []
        of_each = "select name, count(*) as n from slice where category = 'request' group by name"
        told = {row.name: row.n for row in asked.query(of_each)}
    assert told == Counter(row["request"] for row in report(path)["lifecycles"])
    assert len(told) > 3
