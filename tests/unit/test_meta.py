"""A meta.json that somebody has edited: each command ends in one line, or in a result that is whole."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command.main import main
from probes.schema import EVENT, Flag, Kind
from tracer import meta
from tracer.loss import Loss
from tracer.recording import Recording, Writer

TRIPLE_FAULT = 1 << 10
SAVE = 0x8040AE9F
META: dict[str, Any] = {
    "schema": 3,
    "host": "host",
    "boot_id": "50e95f40-9dfb-4f15-a82e-43cea2e26539",
    "kernel": "6.12.0",
    "kvm_module": "kvm_amd (AMD SVM)",
    "kvm_parameters": {"kvm.halt_poll_ns": "200000"},
    "engine": "tracepoint",
    "engine_why": "asked for",
    "detail": "full",
    "requests": ["triple_fault", "nmi"],
    "requests_by_bit": {"10": "triple_fault", "17": "nmi"},
    "requests_flags": {"triple_fault": [], "nmi": ["NO_WAKEUP"]},
    "requests_table": "6.12",
    "requests_table_exact": False,
    "pids": [4711],
    "started_ns": 1_000,
    "ended_ns": 9_000,
    "clock": {"monotonic_ns": 1_000, "utc_ns": 1_800_000_000_000_000_000},
    "clocks": [{"monotonic_ns": 5_000, "utc_ns": 1_900_000_000_000_000_000}],
    "plan": [{"fact": "it is seen", "hook": "kprobe:kvm_x", "unseen": None}],
    "untried": None,
    "formats": {"kvm_exit": '"reason %s", __print_symbolic(REC->r, { 0x41, "excp_base" })'},
    "guests": {"1": {"pid": 4711, "name": "web", "vmm": "qemu", "uuid": None}},
    "counters": {"produced": 5, "boundaries": 5},
}
#: In the order of how long each takes; the first ones are run for every change.
COMMANDS: tuple[Callable[[Path], list[str]], ...] = (
    lambda path: ["report", str(path)],
    lambda path: ["report", str(path), "--format", "json"],
    lambda path: ["report", str(path), "--format", "csv"],
    lambda path: ["stat", str(path)],
    lambda path: ["stat", str(path), "--format", "json"],
    lambda path: ["export", str(path), "--to", "csv"],
    lambda path: ["export", str(path), "--to", "json"],
    lambda path: ["export", str(path), "--to", "perfetto", "-o", f"{path}.pftrace"],
    lambda path: ["export", str(path), "--to", "parquet", "-o", f"{path}.parquet"],
    lambda path: ["report", str(path), "--html", f"{path}.html"],
)
CHEAP = 8
#: What no terminal should get, and no line hold.
BAD = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recording of a vCPU that ended with a triple fault that a save had left out."""
    events = np.zeros(5, EVENT)
    events["vcpu"], events["pid"], events["tid"], events["seq"] = 1, 4711, 4712, np.arange(5) + 1
    events["time_ns"] = np.arange(5) * 1_000 + 2_000
    events["since_ns"][1:] = events["time_ns"][:-1]
    events["kind"] = [Kind.VCPU_NEW, Kind.GUEST_EXIT, Kind.RUN_EXIT, Kind.SAVE, Kind.VCPU_END]
    events["arg"], events["detail"] = [0, 0x41, 5, SAVE, 1], [1, 1, 0, 0, 0]
    events["requests"], events["before"] = np.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]], "u8") * np.uint64(TRIPLE_FAULT)
    events["flags"] = [Flag.CREATED, 0, 0, Flag.READ, 0]
    path = tmp_path_factory.mktemp("recorded") / "r"
    writer = Writer(path, META)
    writer.segment(events, Loss(), 8_000)
    writer.update(segments=1)
    return path


@pytest.fixture
def edited(recorded: Path, tmp_path: Path) -> Callable[[Any], Path]:
    """Return what copies that recording with another meta.json."""

    def edit(changed: Any) -> Path:
        path = Path(shutil.copytree(recorded, tmp_path / "edited", dirs_exist_ok=True))
        (path / "meta.json").write_text(json.dumps(changed))
        for file in tmp_path.glob("edited.*"):
            file.unlink()
        return path

    return edit


def ran(words: list[str]) -> tuple[int, str, str]:
    """Run the command in this process; return its status, and what it printed."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline=""), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    out.flush()
    return status, out.buffer.getvalue().decode(), err.getvalue()


def holds(words: list[str], changed: Any) -> int:
    """Run a command, which must end in one line or in a result that can be read. Return its status."""
    status, out, err = ran(words)
    about = (words, changed, err)
    assert status in (0, 1, 3, 4), about
    assert not BAD.search(err), about
    if status == 1:
        assert err.splitlines()[-1].startswith("kvmreq: "), about
        return status
    assert out.isprintable() or not BAD.search(out), about
    if "json" in words:
        for text in [out] if words[0] == "report" else out.splitlines():
            json.loads(text, parse_constant=lambda word: pytest.fail(f"{word}: {about}"))
    return status


def spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where something stands in a JSON value, at every level."""
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in pairs:
        yield (*path, key)
        yield from spots(one, (*path, key))


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1.5, 10**30, -(10**30), 2**63, 2**63 - 1, 2**64, "", "x", "\x1b[31m", "\ud800", "a\nb",
    "\u202eb", "́" * 5000, "x" * 5000, "<b>", "$\\frac{1$", [], [None], [[]], {}, {"": None}, {"x": {}}, {"64": "nmi"},
)  # fmt: skip


def mutated(value: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Return a JSON object with something in it changed, left out, moved or renamed."""
    made = copy.deepcopy(value)
    path = chance.choice(list(spots(made)))
    parent: Any = made
    for key in path[:-1]:
        parent = parent[key]
    how = chance.randrange(5)
    if how == 0:
        del parent[path[-1]]
    elif how == 1 and isinstance(parent, dict):
        parent[str(chance.choice(ODD))] = parent.pop(path[-1])
    elif how == 2 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[path[-1]]))
    else:
        parent[path[-1]] = copy.deepcopy(chance.choice(ODD))
    return made


def test_what_record_writes_is_a_meta(recorded: Path) -> None:
    """And without what came with later schemas."""
    assert Recording.open(recorded).meta["requests_by_bit"] == META["requests_by_bit"]
    first = ("schema", "host", "kernel", "engine", "detail", "requests", "requests_by_bit", "clock", "plan")
    old = {name: META[name] for name in (*first, "started_ns")}
    assert meta.checked(old) == old


@pytest.mark.parametrize("name", sorted(META))
@pytest.mark.parametrize("value", [None, -1, "\ud800\x1b", [None], {"x": 1}, 10**30])
def test_another_type_at_the_first_level(edited: Callable[[Any], Path], name: str, value: Any) -> None:
    """What may be none is told as not known; all else is a line that names the place."""
    changed = {**META, name: value}
    path = edited(changed)
    for command in COMMANDS[:CHEAP]:
        holds(command(path), changed)


@pytest.mark.parametrize("seed", range(53))
def test_a_change_at_any_level(edited: Callable[[Any], Path], seed: int) -> None:
    """No traceback, no invalid JSON, no escape sequence: whatever was changed."""
    chance = random.Random(seed)
    changed: Any = META
    for _ in range(chance.choice((1, 1, 2, 5))):
        changed = mutated(changed, chance)
    path = edited(changed)
    for command in COMMANDS[: len(COMMANDS) if seed % 13 == 0 else CHEAP]:
        holds(command(path), changed)


def test_a_segment_of_another_recording_is_not_this_ones(recorded: Path, tmp_path: Path) -> None:
    """Its guests have other names, its vCPUs other numbers: it is left out, and what it held is not known."""
    path = Path(shutil.copytree(recorded, tmp_path / "r"))
    assert holds(COMMANDS[0](path), META) == 3
    other = Writer(tmp_path / "other", META)
    other.segment(next(one.events for one in Recording.open(path).segments() if one), Loss(), 8_000)
    shutil.copy(other.path / "segment-000001.parquet", path)
    status, out, err = ran(COMMANDS[0](path))
    assert status == 1
    assert "segment-000001.parquet: it is of another recording" in out
    assert "segment-000001.parquet: it is of another recording (left out" in err


def test_times_after_a_step_of_the_clock_are_told_by_the_new_one(recorded: Path) -> None:
    """Of two pairs the last one before a moment holds; the first one holds before it, too."""
    from reports.words import Clock

    clock = Clock.of(Recording.open(recorded).meta)
    assert clock.when(1_000) == "2027-01-15 08:00:00.000000"
    assert clock.when(4_999) == "2027-01-15 08:00:00.000003"
    assert clock.when(6_000) == "2030-03-17 17:46:40.000001"
    assert clock.offset_ns(np.array([0, 4_999, 5_000])).tolist() == [
        1_800_000_000_000_000_000 - 1_000,
        1_800_000_000_000_000_000 - 1_000,
        1_900_000_000_000_000_000 - 5_000,
    ]
