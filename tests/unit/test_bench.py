"""What the benchmarks are made from: a stream whose truth is known, and the words of tools that do not work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.judge import judge
from analysis.lifecycle import Lifecycles
from bench import analysis, busy, pandas_way, tools
from bench.command import ROOT
from bench.table import Figure, Missing
from probes.requests import names
from probes.schema import EVENT, KVM_EXIT_SHUTDOWN, PAYLOAD_PENDING, VALID_TRIPLE_FAULT, Flag, Kind
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


def _same(batches: list[Any], names: dict[int, str], *, full: bool) -> pd.DataFrame:
    """Return what pandas tells of some events, after a look that the core tells the same."""
    core = Lifecycles(names, full=full)
    tables = [core.feed(batch).lifecycles for batch in batches] + [core.finish(Loss()).lifecycles]
    expected = pd.concat([table for table in tables if len(table)])[[*pandas_way.COLUMNS]]
    events = pd.DataFrame({column: np.concatenate(batches)[column] for column in EVENT.names or ()})
    found = pandas_way.lifecycles(events, names, full=full)
    key = ["vcpu_number", "request", "ended_after_ns", "ended_ns"]
    left, right = (
        table.sort_values(key, ignore_index=True).astype(dict.fromkeys(("request", *_WORDS), "object"))
        for table in (found, expected)
    )
    pd.testing.assert_frame_equal(left, right, check_dtype=False)
    return left


_WORDS = ("raised_by", "raised_in", "end")


@pytest.mark.parametrize("name", [*analysis.STREAMS, analysis.FULL])
def test_pandas_tells_the_lifecycles_that_the_core_tells(name: str) -> None:
    """What is compared in speed does the same."""
    _same(list(analysis._batches(name, EVENTS)), analysis._names(name), full=name == analysis.FULL)


_PENDING, _SET_MCE, _SET_REGS = 1 << 10, 0x4040AE9E, 0x4090AE82
_RAISED = (Kind.IOCTL_EXIT, _PENDING, {"arg": _SET_MCE})
_CARRYING = {"detail": VALID_TRIPLE_FAULT | PAYLOAD_PENDING}
_SAVED, _BLIND = {**_CARRYING, "flags": Flag.READ}, {"flags": Flag.READ}
_SHUTDOWN = (Kind.RUN_EXIT, 0, {"arg": KVM_EXIT_SHUTDOWN})


@pytest.mark.parametrize(
    ("end", "stale", "steps"),
    [
        (
            "lost",
            False,
            [_RAISED, (Kind.SAVE, _PENDING, _SAVED), (Kind.SAVE, _PENDING, _BLIND), (Kind.VCPU_END, _PENDING)],
        ),
        ("handed_over", False, [_RAISED, (Kind.SAVE, _PENDING, _SAVED), (Kind.VCPU_END, _PENDING)]),
        ("abandoned", False, [_RAISED, (Kind.SAVE, _PENDING), (Kind.VCPU_END, _PENDING)]),
        ("abandoned", False, [_RAISED, (Kind.SAVE, _PENDING, {"arg": 1 << 32, **_BLIND}), (Kind.VCPU_END, _PENDING)]),
        ("cleared", False, [(Kind.RESTORE, _PENDING, _CARRYING), (Kind.RESTORE, 0)]),
        ("reflected", False, [(Kind.SITE, _PENDING, {"flags": Flag.NESTED}), (Kind.RUN_EXIT, 0)]),
        ("undecided", False, [_RAISED, (Kind.RUN_EXIT, 0)]),
        (
            "undecided",
            False,
            [_RAISED, (Kind.RUN_EXIT, _PENDING, {"seq": 5}), (Kind.RUN_EXIT, 0, {"arg": 8, "seq": 6})],
        ),
        ("delivered", True, [_RAISED, (Kind.RESET, _PENDING, {"arg": _SET_REGS}), _SHUTDOWN]),
        ("delivered", False, [_RAISED, (Kind.RESET, _PENDING), (Kind.RESTORE, _PENDING, _CARRYING), _SHUTDOWN]),
        ("delivered", False, [(Kind.RESTORE, _PENDING, _CARRYING), (Kind.RESET, _PENDING), _SHUTDOWN]),
    ],
)
def test_pandas_knows_each_end(end: str, stale: bool, steps: list[tuple[Any, ...]]) -> None:
    """And what the core says of each, in every column."""
    events = np.zeros(len(steps) + 1, EVENT)
    events["vcpu"], events["pid"], events["tid"], events["seq"] = 3, 9, 17, np.arange(len(events)) + 1
    events["time_ns"], events["kind"][0], events["arg"][0] = 1000 + 10 * np.arange(len(events)), Kind.VCPU_NEW, 2
    events["since_ns"][1:] = events["time_ns"][:-1]
    for at, (kind, word, *values) in enumerate(steps, start=1):
        events["kind"][at], events["requests"][at] = kind, word
        for name, value in (values[0] if values else {}).items():
            events[name][at] = value
    events["before"][1:] = events["requests"][:-1]
    told = _same([events], {10: "triple_fault"}, full=False)
    assert (told["end"].tolist(), told["stale"].tolist()) == ([end], [stale])


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
