"""What the benchmarks are made from: a stream whose truth is known, and the words of tools that do not work."""

from __future__ import annotations

import numpy as np

from analysis.lifecycle import Lifecycles
from bench import busy, tools
from bench.table import Figure, Missing
from probes.requests import names
from probes.schema import Kind

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
