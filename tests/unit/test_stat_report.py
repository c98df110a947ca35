"""What kvmreq stat prints: under 80 columns, without control codes, and never an empty table without a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.exits import EVENTS, UNREADABLE, Kind, parse, reason
from probes.schema import EVENT, SCHEMA_VERSION
from probes.schema import Kind as EventKind
from probes.stat import KEY, VALUE, WORDS, Counts
from reports import stat as words
from reports.words import Clock
from tracer.errors import BadRecording
from tracer.loss import Loss
from tracer.recording import Recording, Writer

FORMATS = {
    "kvm_exit": '(REC->isa == 1) ? __print_symbolic(REC->exit_reason & 0xffff, { 12, "HLT" }) : '
    '__print_symbolic(REC->exit_reason, { 0x78, "hlt" }, { 1, "%s" })' % ("long" * 30),
    "kvm_userspace_exit": '__print_symbolic(REC->reason, { 2, "KVM_EXIT_" "IO" })',
}
SOURCE = words.Source(
    "host",
    "6.1.0",
    "tracepoint",
    Clock({"utc_ns": 10**18, "monotonic_ns": 0}),
    lambda *exit_: reason({event: parse(FORMATS[event]) for event in EVENTS}, *exit_),
    {10: "triple_fault"},
)
VM = {"vm": 1, "pid": 4711, "name": "web\n\x1b[2J" * 20, "vmm": "qemu", "vcpus": [0, 1]}


def counts(*rows: tuple[int, int, int, int]) -> Counts:
    """Return counts: kind, reason, variant and count, each exit of 1000 ns."""
    keys, values = np.zeros(len(rows), KEY), np.zeros(len(rows), VALUE)
    for place, (kind, number, variant, count) in enumerate(rows):
        keys[place] = (1, kind, number, variant)
        values[place]["count"], values[place]["sum_ns"], values[place]["max_ns"] = count, count * 1000, 1000
        values[place]["buckets"][8 * 7 + 7] = count  # 960 to 1023 ns
    bits = np.zeros(1, WORDS)
    bits["raised"][0][10] = 23
    return Counts(keys, values, np.ones(1, "u4"), bits)


BOTH = counts((Kind.USER, 2, 0, 23), (Kind.USER, 2, -4, 2), (Kind.GUEST, 12, 1, 29), (Kind.GUEST, 1, 2, 1 << 50))


def told(what: Counts = BOTH, loss: Loss | None = None, lines: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return an interval of a second."""
    return SOURCE.told(what, (0, 10**9), [VM] * 6, loss or Loss(), lines)


def test_text_fits_a_terminal_whatever_guests_and_reasons_are_called() -> None:
    """And neither can move the cursor."""
    text = words.text(told(loss=Loss(map_full=5, missed=10**15), lines=("a reason " * 30,)))
    assert all(len(line) < 80 for line in text.splitlines())
    assert all(each.isprintable() or each == "\n" for each in text)
    assert "LOST: 5 map_full" in text
    assert "not seen: a reason" in text
    assert "2 VMs more" in text


def test_every_number_is_in_json() -> None:
    """Under the keys that --help names; KVM_RUN's errors apart from its reasons."""
    one = json.loads(json.dumps(told()))
    assert one["schema"] == "kvmreq.stat/1"
    assert one["seconds"] == 1.0
    assert [(row["reason"], row["errno"], row["count"]) for row in one["user_exits"]] == [
        ("KVM_EXIT_IO", 0, 23),
        ("EINTR", 4, 2),
    ]
    assert ("HLT", 1, 29) in [(row["reason"], row["isa"], row["count"]) for row in one["guest_exits"]]
    assert one["user_exits"][0]["p50_ns"] == 991
    assert one["user_exits"][0]["share"] == pytest.approx(23 / 25)
    assert one["requests"] == [{"request": "triple_fault", "bit": 10, "raised": 23, "serviced": 0}]
    assert one["loss"] == {"ring_full": 0, "map_full": 0, "missed": 0}


@pytest.mark.parametrize(
    ("rows", "hooks", "said"),
    [
        ([(Kind.USER, 2, 0, 23)], (), "kvm_exit never fired"),
        ([(Kind.USER, 2, 0, 23)], ("exits from the guest (this kernel has no such tracepoint)",), "no such tracepoint"),
        ([(Kind.USER, 2, 0, 23), (Kind.GUEST, UNREADABLE, 2, 29)], (), "no BTF of KVM's flavour"),
    ],
)
def test_a_table_that_is_missing_says_why(rows: list[Any], hooks: tuple[str, ...], said: str) -> None:
    """Once, and the hook's own reason goes first."""
    lines = told(counts(*rows), lines=hooks)["unseen"]
    assert len([line for line in lines if said in line]) == 1
    assert len(lines) == 1
    assert said in " ".join(words.text(told(counts(*rows), lines=hooks)).split())


def test_nothing_is_not_seen_where_nothing_ran() -> None:
    """No guest, no exits: nobody knows whether kvm_exit fires."""
    empty = told(Counts())
    assert empty["unseen"] == []
    assert "no exits" in words.text(empty)


def recording(path: Path, detail: str, *, word: int = 0, **more: Any) -> Recording:
    """Return a recording of one vCPU: two exits to user space, one of which came back after 500 ns.

    ``word``: what it has pending from the second one on.
    """
    kinds = (EventKind.VCPU_NEW, EventKind.RUN_ENTER, EventKind.RUN_EXIT, EventKind.RUN_ENTER, EventKind.RUN_EXIT)
    events = np.zeros(len(kinds), EVENT)
    events["kind"], events["seq"], events["vcpu"], events["pid"] = kinds, range(1, 6), 1, 4711
    events["time_ns"] = [1000, 1100, 2000, 2500, 3000]
    events["since_ns"] = [0, *events["time_ns"][:-1]]
    events["arg"], events["detail"] = [0, 0, 2, 0, 2], [1, 0, 0, 0, 0]
    events["requests"][-1] = word
    meta = {
        "schema": SCHEMA_VERSION, "host": "host", "kernel": "6.1.0", "engine": "kprobe", "detail": detail,
        "kvm_module": "kvm_amd (AMD SVM)", "requests": ["triple_fault"], "requests_by_bit": {"10": "triple_fault"},
        "clock": {"utc_ns": 10**18, "monotonic_ns": 0}, "plan": [], "started_ns": 900, "formats": FORMATS,
        "guests": {"1": {"pid": 4711, "name": "web", "vmm": "qemu", "uuid": None}}, **more,
    }  # fmt: skip
    writer = Writer(path, meta)
    writer.segment(events[:3], Loss(), 2100)
    writer.segment(events[3:], Loss(), 3100)
    writer.update(ended_ns=3200, segments=2)
    return Recording.open(path)


def test_a_recording_of_detail_full_gives_the_same_table(tmp_path: Path) -> None:
    """Across its segments, as far as it tells, and it says what it does not tell."""
    one = words.of_recording(recording(tmp_path / "r", "full"), [], [], [])
    (row,) = one["user_exits"]
    assert (row["reason"], row["count"], row["timed"], row["time_ns"]) == ("KVM_EXIT_IO", 2, 1, 500)
    assert one["vms"] == [{"vm": 1, "pid": 4711, "name": "web", "vmm": "qemu", "vcpus": [0]}]
    assert any("no kvm_exit" in line for line in one["unseen"])
    assert len(one["unseen"]) == len(set(one["unseen"]))
    assert "never fired" not in str(one["unseen"])


def test_names_of_another_release_are_doubted_where_they_are_shown() -> None:
    """The counts are of bits: what these are called is all that is in doubt."""
    shown = counts()
    shown.words["raised"][0][37] = 2
    own = replace(SOURCE, requests={10: "triple_fault", 37: "recalc_intercepts"})
    for source, what, is_said in ((own, shown, False), (replace(own, names_of="6.18"), shown, True),
                                  (replace(own, names_of="6.18"), BOTH, False)):  # fmt: skip
        lines = source.told(what, (0, 10**9), [VM], Loss(), ())["unseen"]
        assert any("Linux 6.18" in line and "recalc_intercepts" in line for line in lines) == is_said


@pytest.mark.parametrize("exact", [True, False])
def test_a_recording_says_if_its_names_are_another_release_s(tmp_path: Path, exact: bool) -> None:
    """As a live table does."""
    names = {"requests": ["vm_dead"], "requests_by_bit": {"1": "vm_dead"}}
    found = recording(tmp_path / "r", "full", word=2, requests_table="6.8", requests_table_exact=exact, **names)
    assert any("Linux 6.8" in line for line in words.of_recording(found, [], [], [])["unseen"]) != exact


@pytest.mark.parametrize("wanted", [([4712], [], []), ([], [2], []), ([], [], [1]), ([4711], [1], [1])])
def test_a_filter_that_matches_nothing_is_said(tmp_path: Path, wanted: tuple[list[int], list[int], list[int]]) -> None:
    """By process, VM and vCPU: an empty table would look like a guest that does nothing."""
    found = recording(tmp_path / "r", "full")
    with pytest.raises(BadRecording, match="is what was asked for"):
        words.of_recording(found, *wanted)


@pytest.mark.parametrize("wanted", [([4711], [], []), ([], [1], []), ([], [], [0]), ([4711], [1], [0])])
def test_a_recording_can_be_narrowed(tmp_path: Path, wanted: tuple[list[int], list[int], list[int]]) -> None:
    """To what there is."""
    found = recording(tmp_path / "r", "full")
    assert words.of_recording(found, *wanted) == words.of_recording(found, [], [], [])


def test_a_recording_of_another_detail_is_refused(tmp_path: Path) -> None:
    """It has an event only where something changed: counts of it would be wrong."""
    with pytest.raises(BadRecording, match="--detail full"):
        words.of_recording(recording(tmp_path / "r", "boundary"), [], [], [])


def test_a_terminal_gets_the_same_words() -> None:
    """Rich draws them; it is imported for a terminal only."""
    console = pytest.importorskip("rich.console", reason="rich is missing: make test installs it")
    screen = console.Console(width=79, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    screen.print(words._renderable(told(loss=Loss(map_full=5), lines=("one thing",))))
    text = screen.export_text()
    screen.file.close()
    for word in ("KVM_EXIT_IO", "EINTR", "HLT", "triple_fault", "LOST: 5 map_full", "not seen: one thing", "4711"):
        assert word in text
    assert all(len(line) < 80 for line in text.splitlines())
