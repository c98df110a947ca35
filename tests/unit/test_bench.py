"""What the benchmarks are made from: a stream whose truth is known, and the words of tools that do not work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.judge import judge
from analysis.lifecycle import Lifecycles
from bench import analysis, busy, pandas_way, tools
from bench.command import ROOT
from bench.table import Figure, Missing
from probes.requests import names
from probes.schema import EVENT, Kind
from tracer.loss import Loss
from tracer.recording import Recording

EVENTS = 60_000


def test_the_busy_stream_is_one_that_hooks_could_have_told() -> None:
    events = np.concatenate(list(busy.busy(EVENTS)))
    assert len(events) == EVENTS
    assert (np.diff(events["time_ns"].astype(np.int64)) >= 0).all()
    own = events[events["seq"] != 0]
    for number in np.unique(own["vcpu"]):
        story = own[own["vcpu"] == number]
        assert (story["seq"] == np.arange(1, len(story) + 1)).all()
        assert (story["before"][1:] == story["requests"][:-1]).all()
        assert (story["since_ns"][1:] == story["time_ns"][:-1]).all()
    assert set(events["kind"].tolist()) > {Kind.GUEST_ENTRY, Kind.GUEST_EXIT, Kind.KICK, Kind.WAKEUP, Kind.REQUEST_ALL}


def test_every_request_of_the_busy_stream_is_serviced() -> None:
    core = Lifecycles(names(busy.RELEASE).by_bit)
    ends: dict[str, int] = {}
    raised = 0
    for batch in busy.busy(EVENTS):
        raised += int(np.bitwise_count(batch["requests"] & ~batch["before"])[batch["seq"] != 0].sum())
        for end, count in core.feed(batch).lifecycles["end"].value_counts().items():
            ends[str(end)] = ends.get(str(end), 0) + int(count)
    assert ends.keys() == {"serviced"}
    assert raised - core.carried <= ends["serviced"] <= raised


@pytest.mark.parametrize("name", [*analysis.STREAMS, analysis.FULL])
def test_pandas_tells_the_lifecycles_that_the_core_tells(name: str) -> None:
    """What is compared in speed does the same, as far as pandas is asked."""
    batches = list(analysis._batches(name, EVENTS))
    core = analysis._core(name)
    tables = [core.feed(batch).lifecycles for batch in batches] + [core.finish(Loss()).lifecycles]
    expected = pd.concat([table for table in tables if len(table)]).rename(columns={"vcpu_number": "number"})
    events = pd.DataFrame({column: np.concatenate(batches)[column] for column in EVENT.names or ()})
    found = pandas_way.lifecycles(events, analysis._names(name)).rename(columns={"vcpu": "number"})
    # Kicks, which pandas is not asked for, can tell that a request was raised earlier than the vCPU's own events do.
    compared = ["number", "request", "end", "ended_ns", "userspace_exits", "saves", "blind_saves"]
    tables = [
        table[compared].fillna({"ended_ns": -1}).astype({"request": "object", "end": "object", "number": "int64"})
        for table in (found, expected)
    ]
    left, right = (
        table.astype({"ended_ns": "int64"}).sort_values(["number", "request", "ended_ns"], ignore_index=True)
        for table in tables
    )
    pd.testing.assert_frame_equal(left, right)


def test_the_small_recording_has_one_request(tmp_path: Path) -> None:
    analysis.write(tmp_path / "small", analysis.pending(100), "boundary")
    recording = Recording.open(tmp_path / "small")
    judged = judge(recording)
    assert (judged.events, len(judged.lifecycles), judged.clean) == (100, 1, True)


def test_the_peak_of_a_process_is_its_own() -> None:
    """Whatever was in the memory of this one, and whatever it says."""
    held = np.ones(200 << 20, "u1")
    command = [sys.executable, "-c", "print(bytearray(32 << 20)[0]); raise SystemExit(7)"]
    own = [sys.executable, "-m", "bench.peak", *command]
    peak, status = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout.split()
    assert status == "7"
    assert 32 < float(peak) < 100 < held.nbytes >> 20


def test_a_tool_that_does_not_work_is_named_with_its_own_reason() -> None:
    said = "some warning\ntrace-cmd: Operation not permitted\n  Can't enable ftrace\n"
    assert tools._reason("trace-cmd", said) == "trace-cmd: Operation not permitted Can't enable ftrace"
    assert tools._reason("kvmexit-bpfcc", "Traceback\n  File x\nException: only Intel\n") == "Exception: only Intel"
    assert tools._reason("perf", "") == "it ended and said nothing"


def test_what_could_not_be_measured_is_a_line_of_the_table_and_no_bound_missed() -> None:
    missing = Missing("tools", "kvmexit", "not here: apt install bpfcc-tools")
    assert missing.kept is None
    where = Figure("tools", "kvmexit", 7, "x").line().index("7")
    assert missing.line().index("-") == where
