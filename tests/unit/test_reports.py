"""Reports on tables written out here: what they say, that it fits, and that no guest's name can break out."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.judge import Judgement
from analysis.latency import bounds
from analysis.ordering import Ordered, Ordering
from analysis.promises import RULES
from analysis.saves import SAVES, Saves
from analysis.words import PLACES, SOURCES
from command.main import main
from probes.schema import EVENT, SCHEMA_VERSION, Kind
from reports import advice, document, figures, html, judged, pictures, table, text, words
from reports.source import Source, Timeline
from tests.examples import examples
from tracer.errors import BadRecording
from tracer.loss import Loss, VcpuLoss
from tracer.recording import Writer

START_NS = 5_000_000_000
HOSTILE = [
    "<script>alert(1)</script>",
    "$x^2$ & \"quotes'",
    "日本語のゲスト",
    "new\nline\x1b[31m",
    "\u202egnp.exe",
    "a" * 300,
    "$",
]


# --- tables to report on ------------------------------------------------------------------------------------

LIFECYCLE = {
    "vm": "int64",
    "pid": "int64",
    "vcpu": "int64",
    "vcpu_number": "int64",
    "request": "str",
    "raised_by": "str",
    "raised_after_ns": "int64",
    "raised_ns": "int64",
    "end": "str",
    "ended_after_ns": "int64",
    "ended_ns": "int64",
    "userspace_exits": "int64",
    "saves": "int64",
    "blind_saves": "int64",
    "copies_without": "bool",
    "nested": "bool",
    "stale": "bool",
    "exposed": "bool",
    "why": "str",
    "raised_in": "str",
    "requester_tid": "int64",
    "requester_cpu": "int64",
    "kicked_ns": "int64",
    "left_guest_ns": "int64",
    "reentered_ns": "int64",
}
VM = {
    "vm": "int64",
    "pid": "int64",
    "name": "object",
    "vmm": "object",
    "triple_fault_cap": "boolean",
    "vcpus": "int64",
    "alive": "bool",
    "first_ns": "int64",
}
SHUTDOWN = {
    "vm": "int64",
    "pid": "int64",
    "vcpu": "int64",
    "vcpu_number": "int64",
    "time_ns": "int64",
    "source": "str",
    "nested": "bool",
}
META: Mapping[str, Any] = {
    "schema": 1,
    "host": "kvm-host-7",
    "boot_id": "11111111-2222-3333-4444-555555555555",
    "kernel": "6.12.107-amd64",
    "kvm_module": "kvm_amd",
    "kvm_parameters": {"npt": "1", "nested": "1"},
    "engine": "tracepoint",
    "engine_why": "this kernel forbids kprobes",
    "detail": "boundary",
    "requests": ["triple_fault"],
    "started_ns": START_NS,
    "ended_ns": START_NS + 62_300_000_000,
    "clock": {"monotonic_ns": START_NS, "utc_ns": 1_795_000_000_123_456_789},
    "plan": [
        {"fact": "KVM_RUN returned", "hook": "raw_tracepoint kvm_userspace_exit", "unseen": None},
        {"fact": "user space saved the events", "hook": "raw_tracepoint sys_exit", "unseen": None},
        {
            "fact": "raised by RSM",
            "hook": None,
            "unseen": "who raised a request inside KVM_RUN: it is called kvm_run",
        },
    ],
    "counters": {"boundaries": 1_234_567, "produced": 89},
}


def entered() -> Ordered:
    """Return what the rules of ordering say of a vCPU that entered the guest with a request pending."""
    rules = Ordering(
        {11: "mmu_sync"}, {}, [{"hook": "raw_tracepoint:kvm_entry"}, {"hook": "raw_tracepoint:kvm_exit"}], "full"
    )
    for seq, (kind, before, word) in enumerate(
        ((Kind.VCPU_NEW, 0, 0), (Kind.RUN_ENTER, 0, 1), (Kind.GUEST_ENTRY, 1, 1)), start=1
    ):
        rules.feed(
            {
                name: np.array([value], EVENT[name])
                for name, value in {
                    **dict.fromkeys(EVENT.names or (), 0), "time_ns": START_NS + seq, "since_ns": START_NS + seq - 1,
                    "requests": word << 11, "before": before << 11, "vcpu": 1, "seq": seq, "pid": 4711, "kind": kind,
                }.items()
            }
        )  # fmt: skip
    return rules.finish()


@dataclass
class Judged:
    """What analysis.judge.Judgement gives, written by hand."""

    lifecycles: pd.DataFrame
    vms: pd.DataFrame
    shutdowns: pd.DataFrame
    loss: Loss = field(default_factory=Loss)
    events: int = 89
    summary: Mapping[str, int] = field(default_factory=dict)
    exit_status: int = 0
    left_out: list[str] = field(default_factory=list)
    vouched: bool = True
    clean: bool = True
    until_ns: int = START_NS + 1_000_000_000
    unaccounted: int = 0
    meta: Mapping[str, Any] = field(default_factory=lambda: META)
    ordering: Ordered = field(default_factory=Ordering({}, {}, (), "boundary").finish)
    saves: pd.DataFrame = field(default_factory=lambda: Saves({}).tables()[0])
    restores: pd.DataFrame = field(default_factory=lambda: Saves({}).tables()[1])

    copies_without = Judgement.copies_without
    dropped = Judgement.dropped


def frame(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as a table of the given types, also when there are none."""
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in columns.items()})


def lifecycle(vm: int = 1, end: str = "delivered", **values: Any) -> dict[str, Any]:
    """Return a lifecycle of 8.1 to 8.4 ms, raised 1 s into the recording."""
    raised_ns = values.get("raised_ns", START_NS + 1_000_000_000)
    ended_ns = -1 if end == "open" else raised_ns + 8_300_000
    return {
        "vm": vm,
        "pid": 4_000 + vm,
        "vcpu": 0,
        "vcpu_number": vm,
        "request": "triple_fault",
        "raised_by": "set_mce",
        "raised_after_ns": raised_ns - 100_000,
        "raised_ns": raised_ns,
        "end": end,
        "ended_after_ns": raised_ns + 8_100_000,
        "ended_ns": ended_ns,
        "userspace_exits": 1,
        "saves": 0,
        "blind_saves": 0,
        "copies_without": values.get("blind_saves", 0) > 0,
        "nested": False,
        "stale": False,
        "exposed": False,
        "why": "",
        "raised_in": "user_space",
        "requester_tid": 4_700 + vm,
        "requester_cpu": 3,
        "kicked_ns": -1,
        "left_guest_ns": -1,
        "reentered_ns": -1,
        **values,
    }


def vm(
    number: int = 1,
    name: str | None = "web-1",
    vmm: str | None = "qemu",
    cap: bool | None = True,
    vcpus: int = 1,
) -> dict[str, Any]:
    """Return a guest."""
    return {
        "vm": number,
        "pid": 4_000 + number,
        "name": name,
        "vmm": vmm,
        "triple_fault_cap": cap,
        "vcpus": vcpus,
        "alive": True,
        "first_ns": START_NS,
    }


def judgement(
    lifecycles: Sequence[Mapping[str, Any]] = (),
    vms: Sequence[Mapping[str, Any]] | None = None,
    **values: Any,
) -> Any:
    """Return a judgement on some lifecycles, with the guests that they name."""
    guests = (
        [vm(number, f"web-{number}") for number in sorted({row["vm"] for row in lifecycles})] if vms is None else vms
    )
    ends = [row["end"] for row in lifecycles]
    hardware = values.pop("shutdowns", ())
    return Judged(
        frame(LIFECYCLE, lifecycles),
        frame(VM, guests),
        frame(SHUTDOWN, hardware),
        summary={end: ends.count(end) for end in dict.fromkeys(ends)},
        exit_status=3 if "lost" in ends else 4 if "undecided" in ends else 0,
        **values,
    )


def tell(lifecycles: pd.DataFrame) -> pd.DataFrame:
    """Return a story for each lifecycle, with as many returns and saves as it counts."""
    rows: list[dict[str, Any]] = []
    for row in lifecycles.to_dict("records"):
        key = {"vcpu_number": row["vcpu_number"], "request": row["request"], "raised_ns": row["raised_ns"]}
        stop = row["ended_after_ns"]
        span = stop - row["raised_ns"]
        steps = [("raised", row["raised_ns"])]
        steps += [
            ("userspace_exit", row["raised_ns"] + int(span * (n + 1) / (row["userspace_exits"] + 1)))
            for n in range(row["userspace_exits"])
        ]
        steps += [("save", row["raised_ns"] + int(span * (0.3 + 0.1 * n))) for n in range(row["saves"])]
        steps += [("blind_save", row["raised_ns"] + int(span * (0.7 + 0.1 * n))) for n in range(row["blind_saves"])]
        steps += [("reset", row["raised_ns"] + span // 2)] if row["stale"] else []
        steps += [("restore", row["raised_ns"] + span * 9 // 10)] if row["end"] == "cleared" else []
        steps += [(row["end"], row["ended_ns"])] if row["ended_ns"] >= 0 else []
        rows += [{**key, "time_ns": time_ns, "what": what} for what, time_ns in sorted(steps, key=lambda step: step[1])]
    return pd.DataFrame(rows, columns=["vcpu_number", "request", "raised_ns", "time_ns", "what"])


def everything() -> Any:
    """Return a judgement with every end, every finding and a loss."""
    ends = ["delivered", "reflected", "cleared", "handed_over", "abandoned", "open", "undecided", "lost"]
    rows = [
        lifecycle(number, end, raised_ns=START_NS + number * 1_000_000_000) for number, end in enumerate(ends, start=1)
    ]
    rows[0] |= {"userspace_exits": 500}
    rows[1] |= {"nested": True, "raised_by": "nested_vmexit"}
    rows[3] |= {"saves": 2, "raised_by": "set_vcpu_events"}
    rows[5] |= {"blind_saves": 1, "exposed": True, "raised_by": "realmode_interrupt"}
    rows[6] |= {"why": "3 events of this vCPU were lost between two of its saves"}
    rows[7] |= {"saves": 1, "blind_saves": 1, "userspace_exits": 23}
    rows.append(lifecycle(1, stale=True, vcpu=1, vcpu_number=11, raised_by="unknown", raised_after_ns=0))
    names = [
        "web-1",
        "mail",
        "db-primary",
        "build-worker-3",
        None,
        "cache",
        "日本語のゲスト",
        "payments-production-eu-central-1",
    ]
    vmms = ["qemu", "qemu", "crosvm", "qemu", None, "cloud-hypervisor", "firecracker", "firecracker"]
    caps = [True, True, False, True, None, False, False, False]
    vms = [
        vm(number, *guest, vcpus=number) for number, guest in enumerate(zip(names, vmms, caps, strict=True), start=1)
    ]
    hardware = {
        "vm": 2,
        "pid": 4_002,
        "vcpu": 0,
        "vcpu_number": 2,
        "time_ns": START_NS + 7,
        "source": "hardware",
        "nested": False,
    }
    return judgement(
        rows,
        vms,
        shutdowns=[hardware, {**hardware, "source": "request"}, {**hardware, "source": "vm_dead"}],
        loss=Loss(ring_full=31, missed=2, vcpus={7: VcpuLoss(31, START_NS, START_NS + 5)}),
        left_out=["segment-000007.parquet: its checksum is wrong"],
        clean=False,
        meta={**META, "ended_ns": None},
        ordering=entered(),
    )


# Rules as a report gets them: how often each was checked, broken and undecided, and why not.
CHECKED = [
    ("entered_with_request", 23, 2, 0, ""),
    ("wait_returned_early", 19, 0, 1, ""),
    ("raise_without_kick", 0, 0, 0, "this engine sees no kick"),
]


def ordered(*breaks: Mapping[str, Any]) -> Ordered:
    """Return the rules of CHECKED and some of their breaks."""
    rules = [
        {"rule": rule, "title": f"the title of {rule}", "source": "<vcpu-requests.rst>", "checked": checked,
         "broken": broken, "undecided": undecided, "unchecked": unchecked}
        for rule, checked, broken, undecided, unchecked in CHECKED
    ]  # fmt: skip
    told = {"vm": 1, "pid": 4_001, "vcpu": 0, "vcpu_number": 1, "story": "it was <entered> with nmi pending"}
    columns = ["rule", "vm", "pid", "vcpu", "vcpu_number", "request", "time_ns", "since_ns", "story"]
    return Ordered(pd.DataFrame(rules), pd.DataFrame([{**told, **each} for each in breaks], columns=columns))


def several(count: int = 230) -> Any:
    """Return a judgement on several requests in detail full, with every way in which one can end and a broken rule."""
    where = ["guest", "halted", "kernel", "user_space"]
    rows = [
        lifecycle(
            1 + number % 2,
            "serviced",
            request=["tlb_flush", "event", "nmi", "clock_update"][number % 4],
            raised_by="remote" if number % 3 else "kvm_run",
            raised_in=where[number % 3],
            raised_ns=START_NS + number * 10_000_000,
            ended_after_ns=START_NS + number * 10_000_000 + 5_000,
            ended_ns=START_NS + number * 10_000_000 + 8_000 + number * 100,
        )
        for number in range(count)
    ]
    rows += [
        lifecycle(1, "abandoned", request="tlb_flush", blind_saves=1),
        lifecycle(1, "abandoned", request="event"),
        lifecycle(1, "undecided", request="event", why="3 events were lost"),
        lifecycle(1, "abandoned", request="nmi"),
        lifecycle(2, "lost", request="hv_crash", blind_saves=1, raised_by="remote"),
        lifecycle(2, "lost", request="triple_fault", blind_saves=1),
    ]
    broken = {"rule": "entered_with_request", "request": "nmi"}
    first, second = START_NS + 7_000_000, START_NS + 9_000_000
    breaks = ({"time_ns": second, "since_ns": first}, {"time_ns": first + 5_000, "since_ns": first})
    requests = ["tlb_flush", "event", "nmi", "clock_update", "hv_crash", "triple_fault"]
    meta = {**META, "detail": "full", "requests": requests}
    return judgement(rows, ordering=ordered(*({**broken, **each} for each in breaks)), meta=meta)


def csv_of(lifecycles: pd.DataFrame) -> str:
    """Return what is written as CSV."""
    out = io.StringIO()
    table.write_lifecycles([("monday", lifecycles)], out)
    return out.getvalue()


def source(judgement: Any, name: str = "monday") -> Source:
    """Return a judgement as reports take it."""
    return Source(judgement, tell, lived, name)


def lived(number: int, begin_ns: int, end_ns: int) -> pd.DataFrame:
    """Return what a vCPU did: half the time in the guest, half in the kernel, with a request and a kick between."""
    half = (begin_ns + end_ns) // 2
    rows = [
        ("guest", "guest", begin_ns, half),
        ("kernel", "<HLT>", half, end_ns),
        ("triple_fault", "triple_fault", half, end_ns),
        ("kick", f"thread {4_700 + number} on CPU 3", half, half),
    ]
    return pd.DataFrame(rows, columns=["track", "name", "begin_ns", "end_ns"])


# --- the contract -------------------------------------------------------------------------------------------


def test_the_document_has_every_key_of_the_contract_and_json_types() -> None:
    """DESIGN.md, "The command": the JSON document."""
    whole = document.document(everything())
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert whole["schema"] == "kvmreq.report/1"
    assert {"host", "kernel", "engine", "detail", "events"} <= whole["recording"].keys()
    assert {"ring_full", "map_full", "missed"} <= whole["loss"].keys()
    for guest in whole["vms"]:
        assert {"vm", "pid", "name", "vmm", "triple_fault_cap", "vcpus"} <= guest.keys()
        assert guest["triple_fault_cap"] in (True, False, None)
        assert type(guest["vcpus"]) is int
    keys = {
        "vm",
        "pid",
        "vcpu",
        "request",
        "raised_by",
        "raised_ns",
        "end",
        "ended_ns",
        "userspace_exits",
        "saves",
        "blind_saves",
        "nested",
        "stale",
        "why",
    }
    for row in whole["lifecycles"]:
        assert keys <= row.keys()
        assert all(type(row[name]) is int for name in ("vm", "pid", "vcpu", "userspace_exits", "saves", "blind_saves"))
        assert all(type(row[name]) is bool for name in ("nested", "stale"))
        assert len(row["raised_ns"]) == len(row["ended_ns"]) == 2
        assert (row["ended_ns"][1] is None) == (row["end"] == "open")
    for row in whole["shutdowns"]:
        assert {"vm", "pid", "vcpu", "time_ns", "source"} <= row.keys()
    assert whole["summary"]["delivered"] == 2
    assert [row["rule"] for row in whole["ordering"]["rules"]] == list(RULES)
    for row in whole["ordering"]["rules"]:
        assert all(type(row[name]) is int for name in ("checked", "broken", "undecided"))
        assert type(row["unchecked"]) is str
    assert [(row["rule"], row["request"], row["pid"]) for row in whole["ordering"]["breaks"]] == [
        ("entered_with_request", "mmu_sync", 4711)
    ]


def test_one_lifecycle_is_the_same_in_the_document_and_in_the_stream() -> None:
    """A live stream gives one JSON object a line, equal to what the report will say."""
    found = everything()
    rows = [document.one_lifecycle(row) for _, row in found.lifecycles.iterrows()]
    assert rows == document.document(found)["lifecycles"]
    assert rows[0]["raised_ns"] == [START_NS + 1_000_000_000 - 100_000, START_NS + 1_000_000_000]


def test_what_is_not_known_of_a_lifecycle_is_null() -> None:
    """Where it was raised is a word; times and the requester are numbers, or nothing."""
    known: dict[str, Any] = {
        "requester_tid": 4711,
        "requester_cpu": 0,
        "kicked_ns": 7,
        "left_guest_ns": 8,
        "reentered_ns": 9,
    }
    unknown: dict[str, Any] = {
        "requester_tid": 0,
        "requester_cpu": -1,
        "kicked_ns": -1,
        "left_guest_ns": -1,
        "reentered_ns": -1,
    }
    found = judgement([lifecycle(1, raised_in="guest", **known), lifecycle(2, raised_in="unknown", **unknown)])
    rows = document.document(found)["lifecycles"]
    assert [{key: row[key] for key in known} for row in rows] == [known, dict.fromkeys(unknown)]
    assert [row["raised_in"] for row in rows] == ["guest", "unknown"]
    lines = list(csv.DictReader(io.StringIO(csv_of(found.lifecycles))))
    assert [{key: line[key] for key in known} for line in lines] == [
        {key: str(value) for key, value in known.items()}, dict.fromkeys(unknown, ""),
    ]  # fmt: skip


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_the_text_is_the_document(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """One judgement is a document, several are an array; a lifecycle has a line; chunks do not show."""
    monkeypatch.setattr(document, "_CHUNK", 3)
    found = everything()
    text = "".join(document.texts([found] * number))
    whole = document.document(found)
    assert json.loads(text) == (whole if number == 1 else [whole] * number)
    if number:
        line = next(line for line in text.splitlines() if '"raised_by"' in line)
        assert json.loads(line.removesuffix(",")) == whole["lifecycles"][0]


def test_missing_values_are_null() -> None:
    """NaN is no JSON, and pandas has four ways to say missing."""
    assert [words.native(value) for value in (np.nan, pd.NA, pd.NaT, None, np.int64(3), np.bool_(True))] == [
        None
    ] * 4 + [3, True]


def test_nothing_that_the_contract_does_not_name_gets_out() -> None:
    """A recording may hold what nobody but its reader should see, such as an address."""
    found = everything()
    found.meta = {**found.meta, "kvm_address": "ffff888100000000"}
    found.lifecycles["pointer"] = 0xFFFF888100000000
    assert "ffff8881" not in json.dumps(document.document(found))
    assert str(0xFFFF888100000000) not in json.dumps(document.document(found))


def test_csv_has_stable_columns_and_the_numbers_of_the_table() -> None:
    """One row for each lifecycle; what has not ended has no end."""
    found = everything()
    rows = list(csv.DictReader(io.StringIO(csv_of(found.lifecycles))))
    assert tuple(rows[0]) == (*table.COLUMNS, "recording")
    assert {row["recording"] for row in rows} == {"monday"}
    assert [row["end"] for row in rows] == list(found.lifecycles["end"])
    assert [row["ended_ns"] for row in rows if row["end"] == "open"] == [""]
    assert rows[0]["stale"] == "false"
    assert [int(row["userspace_exits"]) for row in rows] == list(found.lifecycles["userspace_exits"])
    assert csv_of(frame(LIFECYCLE, [])) == ",".join((*table.COLUMNS, "recording")) + "\n"


# --- the terminal -------------------------------------------------------------------------------------------


def rows_of(report: str, heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading."""
    lines = iter(report.splitlines())
    next(line for line in lines if line.startswith(heading))
    next(lines)
    found = []
    for line in lines:
        if not line.strip() or line.startswith("  In all"):
            break
        found.append(line.split())
    return found


def test_the_terminal_says_the_numbers_of_the_table() -> None:
    """Exact below a million."""
    rows = [
        lifecycle(1, "lost", userspace_exits=23, saves=2, blind_saves=1),
        lifecycle(2, userspace_exits=999_999),
    ]
    found = text.report(source(judgement(rows)))
    assert found.startswith("1 request was LOST\n")
    assert rows_of(found, "Verdicts on triple_fault") == [
        ["web-1", "0", "set_mce", "23", "2", "1", "lost"],
        ["web-2", "0", "set_mce", "999999", "0", "0", "delivered"],
    ]
    assert "8.1-8.4 ms" in found
    assert "Losses of the tracer: none" in found


def test_what_needs_an_operator_comes_first() -> None:
    """A table cut short never hides a loss."""
    found = everything()
    places = judged.ranked(found.lifecycles, judged.one_by_one(found.lifecycles))
    assert list(found.lifecycles["end"].iloc[places].head(4)) == ["lost", "undecided", "open", "delivered"]
    assert [finding.kind for finding in advice.findings(found)] == ["lost", "undecided", "exposed", "stale"]
    many = judgement(
        [lifecycle(number) for number in range(1, 5_000)] + [lifecycle(5_000, "lost", raised_ns=START_NS + 10**12)]
    )
    report = text.report(source(many))
    assert rows_of(report, "Verdicts")[0][-1] == "lost"
    assert "and 4,960 more" in report


@pytest.mark.parametrize("make", [everything, several])
@pytest.mark.parametrize("words_are", ["object", "category"])
def test_reports_are_the_same_whatever_the_columns_of_words_are_kept_as(make: Any, words_are: str) -> None:
    """Categories that do not occur are not listed, and the order is not that of the categories."""

    def told(found: Any) -> list[str]:
        of = source(found)
        return [text.report(of), "".join(document.texts([found])), csv_of(found.lifecycles), html.page([of])]

    expected, found = told(make()), make()
    for name in ("request", "raised_by", "end", "raised_in"):
        column = found.lifecycles[name].astype("object")
        if words_are == "category":
            categories = pd.Index(["zeroth", *sorted(set(column), reverse=True), "last"], dtype="object")
            column = column.astype(pd.CategoricalDtype(categories))
        found.lifecycles[name] = column
    assert told(found) == expected


def test_requests_raised_by_the_last_events_have_a_picture() -> None:
    """None of their times is known to be later than another."""
    rows = [lifecycle(1, "open", userspace_exits=0, ended_after_ns=START_NS + 1_000_000_000) for _ in range(2)]
    assert "<svg" in html.page([source(judgement(rows))])


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ([], "nothing lost: no request was raised"),
        (["delivered"], "nothing lost"),
        (["lost", "lost", "undecided"], "2 requests were LOST"),
        (["undecided", "delivered"], "1 request undecided, none seen lost"),
    ],
)
def test_the_headline_says_the_worst(ends: list[str], says: str) -> None:
    """One line, and lost before undecided."""
    found = judgement([lifecycle(number, end) for number, end in enumerate(ends, start=1)])
    assert text.report(source(found)).splitlines()[0] == says


def test_a_recording_without_an_end_says_until_when_it_reaches() -> None:
    """In its first line, whatever that says else: what came then, nobody knows."""
    broken_off: dict[str, Any] = {"clean": False, "meta": {**META, "ended_ns": None}}
    reach = f"{words.Clock.of(META).when(START_NS + 1_000_000_000)[:19]} UTC"
    for rows, says in (((), "nothing seen lost, but not everything was seen"), ([lifecycle(1, "lost")], "LOST")):
        made = judgement(rows, **broken_off)
        made.exit_status = made.exit_status or 4
        told = judged.headline(made)
        assert says in told.text
        assert told.text.endswith(f"breaks off at {reach}")
        assert told.tone != "good"


def test_events_that_are_nowhere_are_told() -> None:
    made = judgement((), unaccounted=8)
    assert any("8 events" in fact.text for fact in judged.losses(made))


def test_an_empty_recording_is_no_all_clear_where_nothing_shows_that_the_hooks_see() -> None:
    """What was not tried is a loss like any other; the headline is that of the exit status."""
    judged_so = judgement([], vouched=False)
    judged_so.exit_status = 4
    assert judged.headline(judged_so).text == "nothing seen lost, but not everything was seen"
    (lost,) = judged.losses(judged_so)
    assert lost.name == "not tried"


@pytest.mark.parametrize("exact", [True, False, None])
def test_names_that_are_another_release_s_are_never_silent(exact: bool | None) -> None:
    """Text, page and document say that the table of names is not the kernel's own; an old recording cannot."""
    told = {} if exact is None else {"requests_table": "7.77", "requests_table_exact": exact}
    rows = [lifecycle(1, "delivered"), lifecycle(2, "serviced", request="nmi")]
    found = judgement(rows, meta={**META, "requests": ["nmi", "triple_fault"], **told})
    for written in (text.report(source(found)), html.page([source(found)])):
        assert ("Linux 7.77" in written) == (exact is False)
    assert document.document(found)["recording"]["requests_table_exact"] is exact


def test_each_shutdown_that_no_request_made_says_what_of() -> None:
    """And what that means, once."""
    died = {
        "vm": 1, "pid": 4_001, "vcpu": 0, "vcpu_number": 1, "time_ns": START_NS, "source": "request", "nested": False,
    }  # fmt: skip
    others = [{**died, "source": source} for source in SOURCES if source != "request"]
    found = judgement([lifecycle(1, "delivered")], [vm(1)], shutdowns=[died, *others, *others])
    for written in (text.report(source(found)), html.page([source(found)])):
        plain = " ".join(unescape(re.sub(r"<[^>]*>", " ", written)).split())
        for name, meaning in SOURCES.items():
            assert plain.count(f"{name}: {' '.join(meaning.split()[:3])}") == (name != "request")
    assert [row["source"] for row in document.document(found)["shutdowns"]] == ["request", *[*SOURCES][1:] * 2]


def test_names_that_cannot_be_wrong_are_not_doubted() -> None:
    """A triple fault is bit 10 everywhere, and what is watched without being raised is in no table of the text."""
    told = {"requests_table": "7.77", "requests_table_exact": False}
    alone = judgement([lifecycle(1, "delivered")], meta={**META, **told})
    assert "Linux 7.77" not in text.report(source(alone)) + html.page([source(alone)])
    watched = judgement([lifecycle(1, "delivered")], meta={**META, "requests": ["nmi", "triple_fault"], **told})
    assert "Linux 7.77" not in text.report(source(watched))
    assert "Linux 7.77" in html.page([source(watched)])


def test_bits_without_a_name_are_counted_not_listed() -> None:
    """With all requests they are most of them."""
    assert (
        judged.requests_watched(["tlb_flush", "bit_5", "nmi", "bit_6", "bit_63"])
        == "tlb_flush, nmi, 3 bits without a name"
    )
    assert judged.requests_watched(["bit_5"]) == "bit_5"
    assert judged.requests_watched(["triple_fault"]) == "triple_fault"


def test_guests_of_one_name_are_told_apart() -> None:
    """By the number that the document gives them: a VMM may run several guests in one process."""
    found = judged.guests(frame(VM, [{**vm(1, None), "pid": 7}, {**vm(2, None), "pid": 7}, vm(3)]))
    assert [guest.name for guest in found.values()] == ["pid 7 #1", "pid 7 #2", "web-1"]


def test_advice_names_the_vmm_and_the_version_that_helps() -> None:
    """facts/VMMS.md, in the operator's words."""
    said = {
        vmm: " ".join(
            advice.findings(judgement([lifecycle(1, "lost", blind_saves=1)], [vm(1, "g", vmm, cap=cap)]))[0].steps
        )
        for vmm, cap in (("qemu", False), ("firecracker", False), (None, None), ("QEMU", True))
    }
    assert "from 7.2 on" in said["qemu"]
    assert "Firecracker never enables" in said["firecracker"]
    assert "Make the VMM enable" in said[None]
    assert "enabled too late" in said["QEMU"]
    assert all("218" in each for each in said.values())


# --- several requests ---------------------------------------------------------------------------------------


def test_ordinary_requests_are_counted_and_those_that_matter_are_told() -> None:
    """Those that need an operator one by one; a request without state is none of them, whatever became of it."""
    report = text.report(source(several()))
    assert report.startswith("2 requests were LOST: hv_crash, triple_fault\n")
    assert [(row[2], row[-1]) for row in rows_of(report, "Verdicts")] == [
        ("hv_crash", "lost"), ("triple_fault", "lost"), ("nmi", "abandoned"),
    ]  # fmt: skip
    assert rows_of(report, "The others, by how they ended") == [
        ["event", "58", "1", "1"], ["tlb_flush", "58", "1", "0"],
        ["clock_update", "57", "0", "0"], ["nmi", "57", "0", "0"],
    ]  # fmt: skip
    said = " ".join(report.split())
    assert "2 requests were dropped with the vCPU (tlb_flush 1, event 1). That is no loss" in said


def test_a_thousand_flushes_are_one_row() -> None:
    """A report of a busy guest stays a page."""
    found = judgement(
        [lifecycle(1, "serviced", request="tlb_flush", raised_ns=START_NS + 10**6 * n) for n in range(5_000)]
    )
    report = text.report(source(found))
    assert rows_of(report, "Requests, by how they ended") == [["tlb_flush", "5000"]]
    assert len(report.splitlines()) < 40


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("tlb_flush", "undecided")], "nothing seen lost; how 1 request that carries no state ended was not seen"),
        ([("tlb_flush", "undecided"), ("nmi", "undecided")], "1 request undecided, none seen lost"),
        ([("tlb_flush", "abandoned"), ("nmi", "serviced")], "nothing lost"),
        ([("hv_reset", "lost"), ("hv_reset", "lost")], "2 requests were LOST: hv_reset"),
    ],
)
def test_the_headline_of_several_requests(rows: Sequence[tuple[str, str]], says: str) -> None:
    """A request that carries no state is no loss, and no doubt about one."""
    found = judgement(
        [lifecycle(number, end, request=request) for number, (request, end) in enumerate(rows, start=1)],
        meta={**META, "requests": ["tlb_flush", "nmi", "hv_reset"]},
    )
    assert judged.headline(found).text == says
    assert (judged.headline(found).tone == "good") == (says == "nothing lost")


def test_latencies_of_several_requests_have_both_bounds() -> None:
    """A line for what they were at least and one for at most; the slowest first, each with its usual end."""
    report = text.report(source(several()))
    rows = rows_of(report, "Time from raise to end")
    assert rows[0][:4] == ["hv_crash", "1", "from", "8.1"] and rows[1][:4] == ["lost", "to", "8.4", "ms"]
    flush = next(number for number, row in enumerate(rows) if row[0] == "tlb_flush")
    assert rows[flush] == ["tlb_flush", "58", "from", *["5", "µs"] * 4]
    assert rows[flush + 1][0] == "serviced"


def test_latencies_of_weeks_still_fit() -> None:
    """What is too wide beside each other has two lines."""
    weeks = {"ended_after_ns": START_NS + 10**15, "ended_ns": START_NS + 10**15 + 10**14}
    report = text.report(source(judgement([lifecycle(1, "handed_over", raised_after_ns=START_NS, **weeks)])))
    assert rows_of(report, "Time from raise to end")[1] == ["handed_over", "to", *["12", "d", "18", "h"] * 4]


def test_states_and_rules_are_told_in_the_terminal() -> None:
    """Where the vCPU was, how rules were kept, which could not be checked and why, and the first breaks."""
    report = text.report(source(several()))
    assert ["tlb_flush", "in", "the", "guest", "20"] in [
        row[:5] for row in rows_of(report, "Where the vCPU was when they were raised")
    ]
    said = " ".join(report.split())
    assert "entered with request 23 2 0" in said
    assert "raise without kick not checked: this engine sees no kick" in said
    assert "entered with request, web-1 vCPU 0" in said and "it was <entered> with nmi pending" in said
    assert "Rules of ordering" not in text.report(source(judgement([lifecycle()])))


def test_advice_fits_the_request() -> None:
    """What a copy lacks, and what would have kept it; the capability is for triple faults alone."""
    found = {finding.title.partition(": ")[2]: finding for finding in advice.findings(several())}
    crash, fault = found["hv_crash"], found[""]
    assert "lacks the guest's report of its own crash" in crash.cases[0]
    assert "raised by thread 4702" in crash.cases[0]
    assert "No ioctl of KVM saves it" in crash.steps[1]
    assert "218" not in " ".join(crash.steps) and "218" in " ".join(fault.steps)
    nmi = advice.findings(judgement([lifecycle(1, "lost", request="nmi", blind_saves=1)]))[0]
    assert "KVM_GET_VCPU_EVENTS saves it" in nmi.steps[1]


def test_findings_count_what_they_do_not_tell() -> None:
    """The first ones of each guest stand for the rest."""
    rows = [lifecycle(1 + number % 3, "lost", blind_saves=1, raised_ns=START_NS + number) for number in range(1_000)]
    (finding,) = advice.findings(judgement(rows))
    assert (len(finding.cases), finding.more) == (10, 990)
    assert finding.title == "1,000 requests LOST under QEMU"


names = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=120), st.none())
numbers = st.integers(0, 2**63 - 1)
ends = st.lists(st.sampled_from(["lost", "undecided", "open", "handed_over", "serviced", "abandoned"]), max_size=6)


@settings(max_examples=examples(50), deadline=None)
@given(data=st.data())
def test_every_line_is_under_80_columns_and_free_of_control_characters(data: st.DataObject) -> None:
    """Whatever guests are called and however large the numbers are."""
    rows = [
        lifecycle(
            number,
            end,
            vcpu=data.draw(st.integers(0, 2**32 - 1)),
            pid=data.draw(st.integers(1, 2**22)),
            request=data.draw(st.sampled_from(["triple_fault", "tlb_flush_current", "get_nested_state_pages", "nmi"])),
            raised_in=data.draw(st.sampled_from(["guest", "user_space", "unknown", "somewhere_else"])),
            ended_after_ns=data.draw(st.integers(START_NS, START_NS + 10**15)),
            raised_by=data.draw(st.sampled_from(["set_mce", "realmode_interrupt", "unknown"])),
            userspace_exits=data.draw(numbers),
            saves=data.draw(st.integers(0, 2**62)),
            blind_saves=data.draw(st.integers(0, 2**62)),
            stale=data.draw(st.booleans()),
            exposed=data.draw(st.booleans()),
            why=data.draw(st.text(max_size=200)),
        )
        for number, end in enumerate(data.draw(ends), start=1)
    ]
    vms = [
        vm(
            number,
            data.draw(names),
            data.draw(names),
            data.draw(st.sampled_from([True, False, None])),
            data.draw(st.integers(0, 10**9)),
        )
        for number in range(1, 6)
    ]
    shutdowns = [
        {
            "vm": 1,
            "pid": 1,
            "vcpu": 2**32 - 1,
            "vcpu_number": 1,
            "time_ns": 2**60,
            "source": "hardware",
            "nested": False,
        }
    ]
    loss = Loss(data.draw(numbers), data.draw(numbers), data.draw(numbers), data.draw(numbers))
    meta = {
        **META,
        "host": data.draw(st.text(max_size=100)),
        "kernel": data.draw(st.text(max_size=100)),
        "detail": data.draw(st.sampled_from(["full", "boundary"])),
    }
    broken = {"rule": "entered_with_request", "request": "nmi", "time_ns": START_NS, "since_ns": 0}
    rules = ordered({**broken, "vcpu": 2**32 - 1, "story": data.draw(st.text(max_size=200))})
    rules.rules["checked"] = data.draw(numbers)
    left_out = [data.draw(st.text(max_size=200))]
    found = judgement(rows, vms, shutdowns=shutdowns, loss=loss, meta=meta, left_out=left_out, ordering=rules)
    lines = text.report(source(found)).split("\n")
    clock = words.Clock(META["clock"])
    known = judged.guests(found.vms)
    lines += [text.live_heading(), *(text.live(row, judged.guest_of(row, known), clock) for row in rows)]
    for line in lines:
        assert words.cells(line) < 80, line
        assert line == "" or line.isprintable(), line


@given(st.integers(0, 2**50), st.integers(0, 2**50))
def test_an_interval_never_claims_more_than_is_known(lower: int, width: int) -> None:
    """Its lower bound is rounded down, its upper bound up."""
    said = words.interval(lower, lower + width)
    sizes = {
        "ns": 1,
        "µs": 10**3,
        "ms": 10**6,
        "s": 10**9,
        "min": 60 * 10**9,
        "h": 3_600 * 10**9,
        "d": 86_400 * 10**9,
    }

    def ns(text: str) -> Fraction:
        parts = text.split()
        return sum(
            (Fraction(count) * sizes[unit] for count, unit in zip(parts[::2], parts[1::2], strict=True)),
            Fraction(),
        )

    if width and not said.startswith("<"):
        low, high = (
            said.split(" to ")
            if " to " in said
            else (f"{each} {said.split()[1]}" for each in said.split()[0].split("-"))
        )
        assert ns(low) <= lower
        assert ns(high) >= lower + width


@given(st.integers(0, 2**60), st.booleans())
def test_a_bound_is_rounded_away_from_the_other_one(ns: int, up: bool) -> None:
    """At least is rounded down, at most is rounded up."""
    sizes = {"ns": 1, "µs": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3_600 * 10**9, "d": 86_400 * 10**9}
    parts = words.bound(ns, up=up).split()
    said = sum(Fraction(count) * sizes[unit] for count, unit in zip(parts[::2], parts[1::2], strict=True))
    assert said >= ns if up else said <= ns


@pytest.mark.parametrize(
    ("lower", "upper", "says"),
    [
        (8_100, 8_400, "8.1-8.4 µs"),
        (0, 8_400, "< 8.4 µs"),
        (8_100, None, "> 8.1 µs"),
        (950, 1_200, "0.95-1.2 µs"),
        (5, 5, "5 ns"),
        (999_999, 999_999, "1 ms"),
        (130 * 10**9, 200 * 10**9, "2 min 10 s to 3 min 20 s"),
        (1_234, 1_235, "1.23-1.24 µs"),
    ],
)
def test_intervals_have_sensible_units(lower: int, upper: int | None, says: str) -> None:
    """The unit is that of the upper bound."""
    assert words.interval(lower, upper) == says


# --- figures ------------------------------------------------------------------------------------------------


def axes() -> Axes:
    """Return axes of no file and no window."""
    return Figure().add_subplot()


def save(drawn: Axes) -> None:
    """Render, so that what is only checked then is checked."""
    figure = drawn.get_figure(root=True)
    assert figure is not None
    figure.savefig(io.BytesIO(), format="svg")


@pytest.mark.parametrize("count", [0, 1, 40])
def test_swimlanes_are_drawn_for_none_one_and_many(count: int) -> None:
    """A lane for each request, and its name beside it."""
    found = judgement(
        [lifecycle(number, blind_saves=number % 3, userspace_exits=number * 12) for number in range(1, count + 1)]
    )
    drawn = figures.draw_swimlanes(found.lifecycles, tell(found.lifecycles), judged.guests(found.vms), axes())
    assert len(drawn.get_yticklabels()) == count or count == 0
    save(drawn)


@pytest.mark.parametrize("found", [judgement(), judgement([lifecycle()]), everything()], ids=["none", "one", "many"])
def test_every_figure_is_drawn(found: Any) -> None:
    """An empty table gives a figure that says so."""
    with mpl.rc_context(figures.STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for drawn in (
            figures.draw_latency(bounds(found.lifecycles), axes()),
            figures.draw_exposure(list(judged.guests(found.vms).values()), axes()),
            figures.draw_losses({"ring full": found.loss.ring_full, "missed": found.loss.missed}, axes()),
        ):
            save(drawn)


def test_latency_band_holds_the_bounds() -> None:
    """The early edge uses the lower bounds, the late edge the upper ones."""
    waits = pd.DataFrame({"request": "triple_fault", "end": "delivered", "lower_ns": [10, 30], "upper_ns": [20, 40]})
    edges = [np.asarray(line.get_xydata()) for line in figures.draw_latency(waits, axes()).get_lines()[:2]]
    early, late = ([share for at, share in edge if at in (10, 20, 30, 40)] for edge in edges)
    assert early == [0.5, 0.5, 1, 1]
    assert late == [0, 0.5, 0.5, 1]


@pytest.mark.parametrize("count", [2, 12, 30])
def test_several_requests_have_a_lane_each(count: int) -> None:
    """The slowest one on top, a band between its bounds; and no more than a figure has room for."""
    parts = [
        {
            "request": f"request_{number}",
            "end": "serviced",
            "lower_ns": number * 1_000 + step,
            "upper_ns": number * 1_500,
        }
        for number in range(1, count + 1)
        for step in range(number)
    ]
    drawn = figures.draw_latency(pd.DataFrame(parts), axes())
    names = [label.get_text() for label in drawn.get_yticklabels()]
    assert names == [f"request_{number}" for number in range(count, max(count - figures.MOST_CURVES, 0), -1)]
    for early, late in zip(*2 * [iter(curves(drawn))], strict=True):
        assert all(late[np.searchsorted(late[:, 0], at, side="right") - 1, 1] >= height for at, height in early)
    save(drawn)


def curves(drawn: Axes) -> list[Any]:
    """Return the points of the curves in lanes: of each lane the early one, then the late one."""
    return [np.asarray(line.get_xydata()) for line in drawn.get_lines() if len(np.asarray(line.get_xydata())) > 2]


def test_a_curve_of_very_many_requests_is_a_small_file() -> None:
    """As many points as a line of print can show, and the shares at them are exact."""
    many = np.arange(1_000, 1_001_000)
    waits = pd.DataFrame({"request": "event", "end": "serviced", "lower_ns": many, "upper_ns": many * 2})
    drawn = figures.draw_latency(waits, axes())
    early, late = (np.asarray(line.get_xydata()) for line in drawn.get_lines()[:2])
    assert len(early) == len(late) < 500
    for curve, name in ((early, "lower_ns"), (late, "upper_ns")):
        for at, share in curve[:: len(curve) // 23]:
            assert share == (waits[name] <= at).mean()


def heat(*cells: tuple[int, int, int]) -> pd.DataFrame:
    """Return the cells of a heat map: the part of the time, the power of two of the latency, how many."""
    return pd.DataFrame(
        [
            {"request": "event", "begin_ns": START_NS + part * 1_000_000, "end_ns": START_NS + (part + 1) * 1_000_000,
             "low_ns": 1 << power, "high_ns": 2 << power, "count": count}
            for part, power, count in cells
        ]
    )  # fmt: skip


def test_a_heat_map_is_darker_where_there_are_more() -> None:
    """Also without colours; and the bar names the counts of each shade."""
    counts = [1, 9, 40, 100, 300, 5_000]
    drawn = figures.draw_heat(
        heat(*((part, 12, count) for part, count in enumerate(counts))), axes(), start_ns=START_NS
    )
    patches = sorted(drawn.patches, key=lambda patch: patch.get_path().get_extents().x0)
    assert len(patches) == len(counts)
    light = [np.dot(patch.get_facecolor()[:3], (0.2126, 0.7152, 0.0722)) for patch in patches]
    assert light == sorted(light, reverse=True) and light[0] - light[-1] > 0.5
    assert all(before - after > 0.05 for before, after in pairwise(light))
    figure = drawn.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()
    said = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    for count, words_ in zip(counts, said, strict=True):
        least, _, most = words_.partition(" to ")
        assert int(least) <= count <= int(most or least)
    save(drawn)


@given(st.integers(1, 10**12))
def test_every_count_of_a_heat_map_has_a_shade(most: int) -> None:
    """The classes begin at 1, end at the largest count, and grow."""
    steps = figures._count_steps(most)
    assert steps[0] == 1 and steps[-1] == most + 1
    assert all(one < other for one, other in pairwise(steps))


def state(request: str, raised_in: str, count: int, p99: tuple[int, int] | None) -> dict[str, Any]:
    """Return a cell of the table of requests and states."""
    low, high = p99 or (None, None)
    return {"request": request, "raised_in": raised_in, "count": count, "p99_lower_ns": low, "p99_upper_ns": high}


def test_states_say_in_words_what_is_shaded() -> None:
    """A cell holds its count and its interval; where nothing was raised it says so."""
    table = pd.DataFrame(
        [
            state("event", "guest", 23, (8_100, 8_400)),
            state("event", "nowhere_known", 1, None),
            state("nmi", "user_space", 7, (5_000_000, 6_000_000)),
        ]
    ).astype({"count": "Int64", "p99_lower_ns": "Int64", "p99_upper_ns": "Int64"})
    drawn = figures.draw_states(table, axes())
    said = {(round(each.xy[0]), round(each.xy[1])): each.get_text() for each in drawn.texts if hasattr(each, "xy")}
    assert [label.get_text() for label in drawn.get_xticklabels()] == ["in the guest", "in user space", "nowhere_known"]
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["event", "nmi"]
    assert said == {
        (0, 0): "23\n99 % 8.1-8.4 µs", (1, 0): "none", (2, 0): "1\ntime not known",
        (0, 1): "none", (1, 1): "7\n99 % 5-6 ms", (2, 1): "none",
    }  # fmt: skip
    save(drawn)


def timeline(**values: Any) -> Timeline:
    """Return a stretch of a vCPU's life with two kicks, and a rule that is broken in it."""
    rows = [
        ("guest", "guest", 0, 40_000),
        ("kernel", "HLT", 40_000, 42_000),
        ("halted", "halted", 42_000, 60_000),
        ("nmi", "nmi", 10_000, 61_000),
        ("kick", "thread 4713 on CPU 3", 10_500, 10_500),
        ("kick", "thread 4713 on CPU 3", 58_000, 58_000),
    ]
    table = pd.DataFrame(rows, columns=["track", "name", "begin_ns", "end_ns"])
    broken = {"rule": "wait_returned_early", "request": "tlb_flush", "since_ns": START_NS, "time_ns": START_NS + 30_000}
    table[["begin_ns", "end_ns"]] += START_NS
    told: dict[str, Any] = {
        "rows": table,
        "breaks": pd.DataFrame([broken]),
        "begin_ns": START_NS,
        "end_ns": START_NS + 65_000,
    }
    return Timeline("$web$, vCPU 0", "10:00:00 UTC", **(told | values))


def test_a_timeline_has_lanes_kicks_and_breaks() -> None:
    """What the vCPU does comes first; a request that is only named by a break has a lane, too."""
    drawn = figures.draw_timeline(timeline(), axes())
    assert [label.get_text() for label in drawn.get_yticklabels()] == [
        "guest", "kernel", "halted", "nmi", "tlb_flush", "kick",
    ]  # fmt: skip
    said = [each.get_text() for each in drawn.texts]
    assert said.count("thread 4713 on CPU 3") == 2
    assert "wait returned early" in said
    assert drawn.get_title(loc="right") == "$web$, vCPU 0"
    save(drawn)
    none = timeline().breaks.iloc[:0]
    save(figures.draw_timeline(timeline(breaks=none), axes()))
    save(figures.draw_timeline(timeline(rows=timeline().rows.iloc[:0]), axes()))


def test_many_narrow_bars_are_strokes_of_their_colour() -> None:
    """Not a block of ink: outlines and hatches are for bars that have room for them."""
    rows = [("guest", "guest", START_NS + at * 1_000_000, START_NS + at * 1_000_000 + 9) for at in range(500)]
    rows.append(("guest", "guest", START_NS + 500_000_000, START_NS + 900_000_000))
    table = pd.DataFrame(rows, columns=["track", "name", "begin_ns", "end_ns"])
    drawn = figures.draw_timeline(timeline(rows=table, end_ns=START_NS + 900_000_000), axes())
    bars: list[Any] = [patch for patch in drawn.patches if isinstance(patch, Rectangle)]
    assert len(bars) == 501
    outlined = [bar for bar in bars if bar.get_edgecolor() != bar.get_facecolor()]
    assert [bar.get_width() for bar in outlined] == [400_000_000]
    save(drawn)


def test_a_clock_that_ran_backwards_bounds_no_latency() -> None:
    """Such a recording is counted among what is not known, and no interval ends before it begins."""
    wrong = lifecycle(1, "serviced", ended_ns=START_NS + 1_000_000_000 + 8_000_000)
    found = source(judgement([wrong, lifecycle(2)]))
    assert found.unknown_latencies == 1
    assert (found.waits["lower_ns"] <= found.waits["upper_ns"]).all()


def test_kicks_that_are_close_share_their_words() -> None:
    """Of very many there are marks alone."""
    kicks = pd.DataFrame(
        [("kick", f"nmi for all, thread {1 + number % 2}", START_NS + 9_000 + number, START_NS + 9_000 + number)
         for number in range(5)],
        columns=["track", "name", "begin_ns", "end_ns"],
    )  # fmt: skip
    none = timeline().breaks.iloc[:0]
    drawn = figures.draw_timeline(timeline(rows=kicks, breaks=none), axes())
    assert [each.get_text() for each in drawn.texts] == ["5 by thread 1 and others"]
    drawn = figures.draw_timeline(timeline(rows=pd.concat([kicks] * 7), breaks=none), axes())
    assert not drawn.texts
    save(drawn)


# --- the page -----------------------------------------------------------------------------------------------

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """The elements, attributes and text of a page; fails where tags do not match."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(content)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element without content."""
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Check that the element that ends is the last that began."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note text."""
        self.texts.append(data)


def pages() -> Iterator[Any]:
    """Return judgements that a page must survive."""
    yield several()
    hostile = [vm(number, name, name, cap=False) for number, name in enumerate(HOSTILE, start=1)]
    yield judgement()
    yield everything()
    yield judgement(
        [lifecycle(number, "lost", blind_saves=1, why="<b>&") for number in range(1, len(HOSTILE) + 1)],
        hostile,
    )


@pytest.mark.parametrize("found", list(pages()), ids=["several", "nothing", "everything", "hostile"])
def test_the_page_is_well_formed_and_needs_nothing_else(found: Any) -> None:
    """No script, no address, no id twice, and text where a picture is."""
    content = html.page([source(found), source(found)])
    page = Page(content)
    assert not {"script", "iframe", "object", "link", "img"} & {tag for tag, _ in page.elements}
    assert "http" not in content.replace("http-equiv", "")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = {
        value for _, attributes in page.elements for name, value in attributes.items() if name == "href" and value
    }
    assert references <= {f"#{each}" for each in ids}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg")
    for picture in content.split("<figure>")[1:]:
        ET.fromstring(picture.partition("</figure>")[0])


def test_a_hostile_name_stays_a_name() -> None:
    """In the tables and in the pictures: never an element, a formula or a line of its own."""
    texts = Page(html.page([source(list(pages())[3])])).texts
    for name in HOSTILE[:3]:
        assert any(name in each for each in texts), name
    assert any("new\\nline\\x1b" in each for each in texts)
    assert not any("\u202e" in each or "\x1b" in each for each in texts)


def test_a_save_that_left_a_request_out_names_the_copy_that_runs() -> None:
    """In the terminal and on the page; what nobody saw run has no name."""
    row = {"pid": 4_001, "vcpu": 3, "vcpu_number": 1, "request": "nmi", "after_ns": START_NS, "time_ns": START_NS + 1}
    row |= {"carried": False, "read": "regs,sregs,msrs", "ran_again": True, "arrived": ""}
    rows = [
        {**row, "vm": 1, "ran_as": ran_as, "carried": carried}
        for ran_as, carried in ((-1, False), (2, False), (2, True))
    ]
    saves = frame(SAVES, rows)
    told_of = source(judgement([lifecycle(1, blind_saves=2), lifecycle(2)], saves=saves))
    page, shown = html.page([told_of]), text.report(told_of)
    assert re.findall(r'<td>regs, sregs, msrs</td><td>ran on</td><td class="name">(.*?)</td>', page) == ["web-2", ""]
    table = shown.partition("Saves that left a request out")[2].splitlines()[2:4]
    told = ["web-1", "3", "nmi", words.Clock(META["clock"]).time(START_NS + 1), "ran", "on"]
    assert [line.split() for line in table] == [[*told, "web-2"], told]


def test_a_page_about_nothing_says_how_much_was_watched() -> None:
    """No request is a result, not a failure."""
    content = " ".join(" ".join(Page(html.page([source(judgement(vms=[vm()]))])).texts).split())
    assert "Nothing lost: no request was raised" in content
    assert "watched for 62.3 s over 1,234,567 user-space boundaries" in content


def test_sections_are_there_where_there_is_something_to_show() -> None:
    """Tables say what figures show; a recording of triple faults alone in detail boundary has none of the new ones."""
    content = html.page([source(several())])
    new = (
        "By where the vCPU was",
        "Over time",
        "Rules of ordering",
        "Where they were broken",
        "A vCPU and its requests",
    )
    for section in (*new, "The others, by how they ended"):
        assert section in content, section
    page = Page(content)
    said = " ".join(" ".join(page.texts).split())
    assert "it was <entered> with nmi pending" in said and "not checked: this engine sees no kick" in said
    assert "web-1, vCPU 0: where a rule was broken" in said
    assert len([tag for tag, _ in page.elements if tag == "figure"]) == 8
    many = judgement([lifecycle(number, raised_in="ioctl" if number % 2 else "kvm_run") for number in range(100)])
    content = html.page([source(many)])
    for section in new:
        assert section not in content, section


def test_the_timeline_is_of_the_vcpu_that_deserves_it() -> None:
    """Where a rule was broken first; else the longest latency; none where nobody saw what a vCPU did."""
    found = several()
    drawn = source(found).timeline
    assert drawn is not None
    assert drawn.begin_ns < START_NS + 7_000_000 < START_NS + 7_005_000 < drawn.end_ns < START_NS + 9_000_000
    assert len(drawn.breaks) == 1
    found.ordering = ordered()
    drawn = source(found).timeline
    assert drawn is not None
    longest = found.lifecycles.loc[(found.lifecycles["ended_ns"] - found.lifecycles["raised_after_ns"]).idxmax()]
    assert drawn.begin_ns < longest["raised_after_ns"] < longest["ended_ns"] < drawn.end_ns
    assert drawn.title == f"web-{longest['vm']}, vCPU 0: {longest['request']}"
    found.meta = {**found.meta, "detail": "boundary"}
    assert source(found).timeline is None


def test_the_longest_wait_is_found_whatever_the_index_is() -> None:
    """Tables that were put together from batches can have one label twice."""
    found = several()
    found.ordering = ordered()
    expected = source(found).timeline
    found.lifecycles.index = pd.Index([0] * len(found.lifecycles))
    drawn = source(found).timeline
    assert drawn is not None and expected is not None and drawn.title == expected.title


# --- single figures -----------------------------------------------------------------------------------------


def test_every_figure_is_written_as_png_and_svg(tmp_path: Path) -> None:
    """What the page shows, by name; text stays text, and nothing differs from run to run."""
    out = tmp_path / "figures"
    written = pictures.write(out, [source(several())])
    figures_ = ["requests", "latency", "states", "heat-event", "heat-tlb_flush", "heat-nmi", "timeline", "exposure"]
    assert [path.name for path in written] == [f"{name}.{style}" for name in figures_ for style in ("png", "svg")]
    assert sorted(written) == sorted(out.iterdir())
    for path in written:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
        else:
            assert ET.fromstring(content).tag.endswith("}svg")
    assert "clock_update" in (out / "latency.svg").read_text(encoding="utf-8")
    before = {path: path.read_bytes() for path in written}
    assert pictures.write(out, [source(several())]) == written
    assert {path: path.read_bytes() for path in written} == before


def test_the_command_writes_figures_and_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recording of detail full from end to end: its report, its page, its figures and its timeline."""
    steps = [
        (Kind.VCPU_NEW, 0),
        (Kind.RUN_ENTER, 0),
        (Kind.GUEST_ENTRY, 0),
        (Kind.GUEST_EXIT, 1),
        (Kind.GUEST_ENTRY, 0),
    ]
    events = np.zeros(len(steps), EVENT)
    events["kind"], events["requests"] = [kind for kind, _ in steps], [word << 17 for _, word in steps]
    events["before"][1:] = events["requests"][:-1]
    events["time_ns"] = START_NS + 1_000 * np.arange(1, len(steps) + 1)
    events["since_ns"][1:] = events["time_ns"][:-1]
    events["vcpu"], events["pid"], events["seq"], events["detail"] = 1, 4_001, np.arange(1, len(steps) + 1), 1
    meta = {**META, "schema": SCHEMA_VERSION, "detail": "full", "requests": ["nmi"], "requests_by_bit": {"17": "nmi"}}
    meta["counters"] = {"boundaries": len(steps), "produced": len(steps)}
    writer = Writer(tmp_path / "r", meta)
    writer.segment(events, Loss(), int(events["time_ns"][-1]))
    writer.update(segments=1)
    out = tmp_path / "figures"
    status = main(["report", str(writer.path), "--figures", str(out), "--html", str(tmp_path / "page")])
    said = capsys.readouterr()
    assert status == 0 and "nmi" in said.out
    names = ["latency.png", "latency.svg", "timeline.png", "timeline.svg", "exposure.png", "exposure.svg"]
    assert said.err.splitlines()[-1] == f"kvmreq: 6 files written to {out}: {', '.join(names)}"
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert "the longest wait of this recording" in (tmp_path / "page").read_text(encoding="utf-8")


def test_every_place_of_a_vcpu_has_words() -> None:
    """Those that the lifecycles tell."""
    assert set(judged.PLACES) == set(PLACES)


def test_several_recordings_have_a_prefix_each(tmp_path: Path) -> None:
    """The recording's name, with its place where that is not enough."""
    found = judgement([lifecycle()])
    written = pictures.write(tmp_path, [source(found, name) for name in ("a b", "monday", "monday")])
    assert [path.name for path in written if path.name.endswith("latency.png")] == [
        "a_b-latency.png", "monday-2-latency.png", "monday-3-latency.png",
    ]  # fmt: skip


def test_a_figure_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed, why, and what to do; an older figure stays whole."""
    with pytest.raises(
        BadRecording, match=r"missing.* cannot be written: No such file or directory \(name a directory"
    ):
        pictures.write(tmp_path / "missing" / "figures", [source(judgement())])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadRecording, match="cannot be written: File exists"):
        pictures.write(tmp_path / "file", [source(judgement())])
    found = source(judgement([lifecycle()]))
    written = pictures.write(tmp_path / "out", [found])
    before = {path: path.read_bytes() for path in written}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadRecording, match="No space left"):
        pictures.write(tmp_path / "out", [source(several())])
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_thousands_are_limited_and_it_says_so() -> None:
    """A page that a browser can open, with the lost first."""
    found = judgement([lifecycle(number) for number in range(1, 3_000)] + [lifecycle(3_000, "lost", blind_saves=1)])
    content = html.page([source(found)])
    assert "and 2,800 requests more" in content
    assert len(content) < 2_000_000
    assert content.index('<tr class="bad">') < content.index('<tr class="good">')


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what, why and what to do; the older report stays."""
    path = tmp_path / "report.html"
    html.write(path, [source(judgement())])
    written = path.read_text(encoding="utf-8")
    assert written.endswith("</html>")
    with pytest.raises(BadRecording, match=r"cannot be written: No such file or directory \(name a file"):
        html.write(tmp_path / "missing" / "report.html", [source(judgement())])
    for bad, why in {
        tmp_path: "Is a directory",
        Path("/"): "Is a directory",
        path / "report.html": "Not a directory",
        tmp_path / ("a" * 300): "File name too long",
    }.items():
        with pytest.raises(BadRecording, match=why):
            html.write(bad, [source(judgement())])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadRecording, match="No space left"):
        html.write(path, [source(everything())])
    assert path.read_text(encoding="utf-8") == written
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_ISREG(path.stat().st_mode)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 40])
def test_a_table_never_makes_rows_alike(width: int) -> None:
    """What does not fit goes on below; of names that are longer than that, both ends are there."""
    names = [f"pid {2_870 + number // 40} #{number}" for number in range(1, 101)]
    names += [f"{'long' * 500} {number}" for number in range(10)]
    layout = [words.Column("guest", least=width), words.Column("X", right=True)]
    rows = [[name, "X"] for name in names]
    lines = words.columns(layout, rows, width=width + 8)[1:]
    told = re.findall(r"^.+? +X$(?:\n.+(?<!X)$)*", "\n".join(lines), re.MULTILINE)
    assert len(told) == len(names)
    if width > 2:
        assert len({re.sub(r"\s+", "", one) for one in told}) == len(names)
    assert all(words.cells(line) <= width + 8 for line in lines)


def test_marks_that_combine_without_end_are_spelled_out() -> None:
    """Thousands of them on one character are one cell wide, and cover the page."""
    told = words.shown("e" + "\u0301" * 5_000)
    assert told.startswith("e" + "\u0301" * 4 + "\\u0301\\u0301")
    assert words.cells(told) > 5_000
    assert words.shown("e\u0302\u0301") == "e\u0302\u0301"
