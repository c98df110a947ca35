"""A recorder that is full, slow, killed, or told to end: nothing is claimed that was not seen."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.judge import judge
from lab import runner as lab_runner
from lab.runner import runnable
from lab.scenarios import SCENARIOS
from probes.program import Settings
from probes.requests import TRIPLE_FAULT
from probes.schema import EVENT, Kind
from tracer import host
from tracer.engines import choices, first, open_engine
from tracer.recorder import Recorder, Wish
from tracer.recording import Recording

from .session import ADDRESS, CHECKOUT, COMMAND, PATIENCE_S, Record, Vmm, ends, lab, recording, report, run, wait_until

REASONS = {scenario.name: reason for scenario, reason in runnable()}
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(REASONS["cleared"]), reason=f"the lab cannot run: {REASONS['cleared']}"),
]

# --- a full ring --------------------------------------------------------------------------------------------


def stalled(path: Path, names: list[str], repeat: int, chance: random.Random | None) -> tuple[Recorder, set[int]]:
    """Record lab runs with a ring of one page; the reader sleeps, or wakes up at random. Return it and the pids."""
    recorder = Recorder(path, Wish(ring_bytes=4096))
    recorder.start()
    pids = set()
    try:
        for name in names:
            with lab(name, "--repeat", str(repeat)) as process:
                while process.poll() is None:
                    time.sleep(0.002)
                    if chance and chance.random() < 0.3:
                        recorder.poll(0)
            assert process.returncode == 0
            pids.add(process.pid)
    finally:
        recorder.stop()
    return recorder, pids


def ends_of(path: Path, pids: set[int]) -> Counter[str]:
    """Return how the requests of these VMMs are judged to have ended."""
    lifecycles = judge(Recording.open(path)).lifecycles
    return Counter(lifecycles["end"][lifecycles["pid"].isin(list(pids))])


def received(path: Path) -> np.ndarray[Any, np.dtype[np.void]]:
    """Return every event of a recording."""
    segments = [segment.events for segment in Recording.open(path).segments() if segment]
    return np.concatenate(segments) if segments else np.empty(0, EVENT)


@pytest.fixture(scope="module", params=[None, 23, 101])
def harmless(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, set[int]]:
    """Such a recording of guests that lost nothing; the seed says when the reader wakes up, None: never."""
    chance = random.Random(request.param) if request.param else None
    return stalled(tmp_path_factory.mktemp("harmless") / "r", ["pending", "delivered", "cleared"], 20, chance)


def test_what_was_produced_is_received_or_counted(harmless: tuple[Recorder, set[int]]) -> None:
    """Exactly; also per vCPU, where the sequence numbers tell."""
    recorder, _ = harmless
    path = recorder.path
    loss = recorder.loss()
    events = received(path)
    produced = json.loads((path / "meta.json").read_text())["counters"]["produced"]
    assert loss.ring_full > 0
    assert (loss.map_full, loss.missed, loss.not_written) == (0, 0, 0)
    assert produced == len(events) + loss.ring_full == recorder.events + loss.ring_full
    assert sum(one.count for one in loss.vcpus.values()) == loss.ring_full
    for vcpu in np.unique(events["vcpu"][events["vcpu"] > 0]):
        own = np.sort(events["seq"][events["vcpu"] == vcpu])
        assert (np.diff(own) > 0).all()
        gaps = int(own[-1]) - len(own)
        assert gaps <= (loss.vcpus[int(vcpu)].count if int(vcpu) in loss.vcpus else 0)


def test_a_gap_is_undecided_and_never_lost(harmless: tuple[Recorder, set[int]]) -> None:
    """None of these guests lost anything: none may be said to, nor to have been abandoned."""
    recorder, pids = harmless
    path = recorder.path
    judgement = judge(Recording.open(path))
    judged = ends_of(path, pids)
    assert judged.keys() <= {"delivered", "cleared", "undecided"}, judged
    assert judged["delivered"] <= 40
    assert judged["cleared"] <= 20
    undecided = judgement.lifecycles[judgement.lifecycles["end"] == "undecided"]
    assert all(undecided["why"].str.len() > 0)
    document = report(path)
    assert document["exit_status"] in (3, 4)  # 3: another VMM of this machine lost something
    assert document["loss"]["ring_full"] > 0


def test_what_was_lost_is_at_most_what_was_truly_lost(tmp_path: Path) -> None:
    """Where guests did lose requests, a gap may hide it, and never adds to it."""
    path = tmp_path / "r"
    _, pids = stalled(path, ["lost", "handed_over", "exposed", "delivered"], 20, random.Random(7))
    judged = ends_of(path, pids)
    assert judged.keys() <= {"lost", "handed_over", "delivered", "undecided"}, judged
    assert judged["lost"] <= 40
    assert judged["handed_over"] <= 20
    assert judged["delivered"] <= 40  # handed_over delivers in its second VM


# --- killed -------------------------------------------------------------------------------------------------

_PROG_GET_FD_BY_ID, _MAP_GET_FD_BY_ID, _LINK_GET_FD_BY_ID = 13, 14, 30  # enum bpf_cmd, uapi linux/bpf.h


class _Id(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("open_flags", ctypes.c_uint32))


def bpf_of(pid: int) -> set[tuple[int, int]]:
    """Return the BPF programs, maps and links that a process holds."""
    kinds = {"prog_id": _PROG_GET_FD_BY_ID, "map_id": _MAP_GET_FD_BY_ID, "link_id": _LINK_GET_FD_BY_ID}
    held: set[tuple[int, int]] = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            found = re.findall(r"^(prog_id|map_id|link_id):\s*(\d+)", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        held.update((kinds[kind], int(number)) for kind, number in found)
    return held


def alive(one: tuple[int, int]) -> bool:
    """Tell whether the kernel still has it."""
    descriptor = host.bpf_syscall(one[0], _Id(one[1]))
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor != -errno.ENOENT


def test_nothing_stays_in_the_kernel_after_kill_9(tmp_path: Path) -> None:
    """Programs, maps and links end with the process: nothing is pinned."""
    record = Record(tmp_path / "r")
    record.await_live()
    held = bpf_of(record.process.pid)
    assert {kind for kind, _ in held} >= {_PROG_GET_FD_BY_ID, _MAP_GET_FD_BY_ID}
    assert all(map(alive, held))
    assert record.finish(signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: not any(map(alive, held)))


def test_kill_9_costs_at_most_the_open_interval(tmp_path: Path) -> None:
    """What a segment holds is judged as ever, and the report says that the end is missing."""
    path = tmp_path / "r"
    record = Record(path)
    record.await_live()
    with lab("lost") as process:
        pass
    wait_until(lambda: list(path.glob("segment-*")))
    with lab("delivered"):
        pass
    record.finish(signal.SIGKILL)
    assert not Recording.open(path).clean
    done = run("report", path)
    assert done.returncode == 3
    assert "did not end cleanly" in done.stdout + done.stderr
    document = report(path)
    assert not document["recording"]["clean"]
    (row,) = [row for row in document["lifecycles"] if row["pid"] == process.pid]
    assert row["end"] == "lost"


def test_kill_9_is_never_an_all_clear(tmp_path: Path) -> None:
    """What was lost after the last segment is in none: the report says until when it reaches, with status 4."""
    path = tmp_path / "r"
    with Vmm() as vmm:
        record = Record(path, "-p", str(vmm.pid))
        record.await_live()
        record.finish(signal.SIGKILL)
        done = run("report", path)
    assert done.returncode == 4
    assert "the recording breaks off at" in " ".join(done.stdout.split())


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """Before it is live, while a segment is written: the recording opens, or there is none yet. One line if so."""
    chance = random.Random(23)
    with lab("delivered", "--repeat", "20000") as guests:
        try:
            for turn in range(6):
                path = tmp_path / str(turn)
                record = Record(path)
                if turn >= 2:
                    record.await_live()
                time.sleep(chance.uniform(0, 1.5 if turn >= 2 else 0.8))
                record.finish(signal.SIGKILL)
                done = run("report", path, "--format", "json")
                if not (path / "meta.json").exists():
                    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
                    continue
                document = json.loads(done.stdout)
                assert not document["recording"]["clean"]
                assert document["recording"]["left_out"] == []
                assert document["loss"]["total"] == 0
                seen = ends(document, guests.pid)
                assert seen.keys() <= {"delivered", "open"}
                assert seen.get("open", 0) <= 1
                assert "did not end cleanly" in done.stderr
        finally:
            guests.kill()


# --- told to end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """With everything that happened until then, and status 0."""
    record = Record(tmp_path / "r")
    record.await_live()
    with lab("lost") as process:
        pass
    assert record.finish(number) == 0
    assert record.lines == []
    document = report(tmp_path / "r")
    assert document["recording"]["clean"]
    assert ends(document, process.pid) == {"lost": 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_too(tmp_path: Path, number: signal.Signals) -> None:
    """And is no failure of it."""
    record = Record(tmp_path / "r", "--", "sleep", "600")
    record.await_live()
    children = Path(f"/proc/{record.process.pid}/task/{record.process.pid}/children")
    (pid,) = wait_until(lambda: children.read_text().split())
    wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
    assert record.finish(number) == 0
    assert not Path(f"/proc/{pid}").exists()


def test_a_duration_ends_it(tmp_path: Path) -> None:
    """Of its own accord."""
    done = run("record", "-o", tmp_path / "r", "--duration", "0.3")
    assert (done.returncode, done.stdout) == (0, "")
    assert report(tmp_path / "r")["recording"]["clean"]


# --- while it runs ------------------------------------------------------------------------------------------


def test_a_segment_appears_within_two_seconds(tmp_path: Path) -> None:
    """Of the event; three times, at different places of the interval."""
    path = tmp_path / "r"
    with recording(path) as record:
        before = record.events()
        for wait_s in (0.0, 0.4, 0.8):
            time.sleep(wait_s)
            with lab("lost"):
                pass
            begin = time.monotonic()
            wait_until(lambda last=before: record.events() > last, 2.0)  # type: ignore[misc]
            assert time.monotonic() - begin <= 2.0
            wait_until(lambda: not list(path.glob(".*.tmp")))
            before = record.events()
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


CONTRACT = {
    *("vm", "pid", "vcpu", "request", "raised_by", "raised_ns", "end", "ended_ns", "userspace_exits", "saves"),
    *("blind_saves", "nested", "stale", "why"),
}


def test_follow_prints_each_lifecycle_within_a_second(tmp_path: Path) -> None:
    """One JSON object a line, with the contract's keys; the same that the report says later."""
    with recording(tmp_path / "r", "--follow", "--format", "json") as record:
        pids = set()
        for name in ("lost", "handed_over", "delivered_twice", "five_vcpus"):
            with lab(name) as process:
                pids.add(process.pid)
        held = subprocess.Popen(
            [sys.executable, "-m", "lab", "run", "exposed", "--hold", "60"],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert held.stdout and held.stdout.readline() == "held\n"
        pids.add(held.pid)
        wait_until(lambda: len(record.lines) >= 10)
    held.kill()
    held.communicate()
    rows = [(when_ns, json.loads(line)) for when_ns, line in record.lines]
    for when_ns, row in rows:
        assert row.keys() >= CONTRACT
        if row["end"] != "open":
            assert 0 <= when_ns - row["ended_ns"][1] < 1_000_000_000, row
    expected = sum(len(SCENARIOS[name].expect) for name in ("lost", "handed_over", "delivered_twice", "five_vcpus"))
    own = [row for _, row in rows if row["pid"] in pids]
    assert len(own) == expected + 1
    assert (own[-1]["end"], own[-1]["exposed"]) == ("open", True)
    document = report(tmp_path / "r")

    def key(row: dict[str, Any]) -> str:
        return json.dumps(row, sort_keys=True)

    assert sorted((row for _, row in rows), key=key) == sorted(document["lifecycles"], key=key)


def test_follow_in_words(tmp_path: Path) -> None:
    """A heading, then a line each, in 80 columns."""
    done = run("record", "-o", tmp_path / "r", "--follow", "--", *COMMAND, "lab", "run", "lost")
    assert done.returncode == 0, done.stderr
    assert "lost" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_follow_survives_a_reader_that_leaves(tmp_path: Path) -> None:
    """`record --follow | head -1`: no traceback, and the recording is whole up to there."""
    guests = f"{sys.executable} -m lab run lost --repeat 200 >/dev/null"
    record = f"{COMMAND[0]} record -o {tmp_path / 'r'} --follow --format json"
    command = f"{record} -- sh -c '{guests}' | head -1"
    done = subprocess.run(["sh", "-c", command], cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=60)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    document = report(tmp_path / "r")
    assert document["recording"]["clean"]
    assert "lost" in document["summary"]


# --- what is in it ------------------------------------------------------------------------------------------


def test_no_kernel_address_is_in_any_output(tmp_path: Path) -> None:
    """Neither in words nor as a number; also where every request and every boundary is recorded."""
    path = tmp_path / "r"
    with recording(path, "--requests", "all", "--detail", "full", "--follow"):
        for name in ("five_vcpus", "lost"):
            with lab(name):
                pass
    outputs = [run("report", path, "--format", style).stdout for style in ("text", "json", "csv")]
    assert run("report", path, "--html", tmp_path / "page.html").returncode == 3
    outputs += [(path / "meta.json").read_text(), (tmp_path / "page.html").read_text()]
    doctor = [run("doctor"), run("doctor", "--json")]
    assert all("Traceback" not in done.stderr for done in doctor)
    outputs += [done.stdout + done.stderr for done in doctor]
    assert all(outputs)
    for text in outputs:
        assert not (found := ADDRESS.search(text)), text[max(0, found.start() - 200) : found.end() + 50]
    events = received(path)
    assert len(events) > 100
    # A mask of vCPUs may have any bit.
    words = events[~np.isin(events["kind"], (Kind.REQUEST_ALL, Kind.REQUEST_ALL_END))]
    for name in ("time_ns", "since_ns", "requests", "before"):
        assert (words[name] < 1 << 63).all(), name
    # The upper half of arg is a negative errno (at least -4095) or nothing: an address of the kernel is neither. Of a
    # wake-up it is a time; a fingerprint is any number.
    times = events["arg"][events["kind"] == Kind.WAKEUP]
    assert (times < 1 << 63).all()
    others = events[~np.isin(events["kind"], (Kind.WAKEUP, Kind.READ, Kind.WRITTEN))]
    upper = (others["arg"] >> np.uint64(32)).astype(np.uint32).view(np.int32)
    assert ((upper <= 0) & (upper >= -4095)).all()
    for file in path.glob("*.parquet"):
        assert not re.search(rb"ffff[0-9a-f]{12}", file.read_bytes())


# --- full maps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("places", "at_once", "fits"), [(1, 1, True), (2, 1, True), (1, 2, False)])
def test_vms_that_have_ended_leave_their_places(places: int, at_once: int, fits: bool) -> None:
    """Of any number one after the other there is always the next one; of too many at once the loss is counted."""
    together = threading.Barrier(at_once)

    def meet() -> None:
        together.wait(PATIENCE_S)

    plan = first("auto", choices(), lambda plan: plan).opened
    settings = Settings(watched=1 << TRIPLE_FAULT, cpus=host.possible_cpus(), max_vms=places, filtered=True)
    with open_engine(plan, settings, (os.getpid(),)) as engine:
        engine.attach()
        truth = lab_runner.run("open", repeat=5, vms=at_once, hold=meet)
        events, loss = engine.drain(), engine.loss()
    new = events[events["kind"] == Kind.VCPU_NEW]
    assert len(new) == len(truth.lifecycles) == 5 * at_once
    assert len(set(new["detail"].tolist())) == 5 * at_once
    assert (loss.map_full == 0) is fits
