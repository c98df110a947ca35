"""`kvmreq stat` on this machine's KVM: a known number of exits, and the same numbers as tracefs and a recording."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.runner import runnable
from tracer import tracefs

from .session import ADDRESS, CHECKOUT, COMMAND, PATIENCE_S, lab, recording, run, wait_until

REASONS = {scenario.name: reason for scenario, reason in runnable()}
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(REASONS["quiet"]), reason=f"the lab cannot run: {REASONS['quiet']}"),
]
EXITS = 23


@pytest.fixture(scope="module")
def exit_loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a VMM whose guest does nothing but OUT."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc: apt install gcc")
    binary = tmp_path_factory.mktemp("exit_loop") / "exit_loop"
    subprocess.run(["gcc", "-O2", "-o", binary, CHECKOUT / "bench/exit_loop.c"], check=True)
    return binary


@contextlib.contextmanager
def looping(binary: Path, exits: int = EXITS) -> Iterator[subprocess.Popen[str]]:
    """Yield a VMM that makes so many exits when it is given a line, and then ends."""
    process = subprocess.Popen(
        [binary, "1", str(exits)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout
    assert int(process.stdout.readline()) == process.pid
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class Stat:
    """A `stat` that runs; ``notes`` are its standard error."""

    def __init__(self, *arguments: str, stdout: int = subprocess.PIPE) -> None:
        self.notes: list[str] = []
        self.process = subprocess.Popen(
            [*COMMAND, "stat", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_until(lambda: self.notes or self.process.poll() is not None, 60)
        assert "counting with" in self.notes[0], self.notes

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.notes.append(line.rstrip())

    def finish(self, number: signal.Signals | None = None) -> str:
        """Return what it printed by its end, which must be a good one."""
        if number is not None:
            self.process.send_signal(number)
        text = self.process.stdout.read() if self.process.stdout else ""
        assert self.process.wait(PATIENCE_S) == 0, self.notes
        self._reader.join(PATIENCE_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        assert not ADDRESS.search(text + "\n".join(self.notes))
        return text


def begin(guest: subprocess.Popen[str]) -> None:
    """Let a VMM make its exits."""
    assert guest.stdin
    guest.stdin.write("\n")


def user_exits(text: str) -> dict[str, int]:
    """Return how often each reason was counted in all intervals of a JSON output."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        for row in json.loads(line)["user_exits"]:
            found[row["reason"]] = found.get(row["reason"], 0) + row["count"]
    return found


def test_23_exits_are_23(exit_loop: Path) -> None:
    """Each with its time, but for the last one, which never came back; and the stat ends with the VMM."""
    with looping(exit_loop) as guest:
        stat = Stat("-p", str(guest.pid), "--format", "json", "--interval", "0.2")
        begin(guest)
        guest.wait(PATIENCE_S)
        text = stat.finish()
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    assert user_exits(text) == {"KVM_EXIT_IO": EXITS}
    assert sum(row["timed"] for line in lines for row in line["user_exits"]) == EXITS - 1
    assert {(vm["pid"], tuple(vm["vcpus"])) for line in lines for vm in line["vms"]} == {(guest.pid, (0,))}
    assert all(not any(line["loss"].values()) for line in lines)
    for one, following in itertools.pairwise(lines):
        assert one["end_ns"] == following["begin_ns"]
    for row in (row for line in lines for row in line["user_exits"]):
        assert 0 < row["p50_ns"] <= row["p99_ns"] <= row["max_ns"] <= row["time_ns"]
    # A table of exits from the guest, or the reason why there is none.
    guest_exits = sum(row["count"] for line in lines for row in line["guest_exits"])
    assert bool(guest_exits) is not any("exits from the guest" in said for line in lines for said in line["unseen"])


def test_times_are_those_that_the_vmm_measures(exit_loop: Path) -> None:
    """The time in user space is less than the whole round trip, and none of 20,011 exits is missed."""
    with looping(exit_loop, 20_011) as guest:
        stat = Stat("-p", str(guest.pid), "--format", "json")
        begin(guest)
        assert guest.stdout
        round_trip_ns = float(guest.stdout.readline().split()[0])
        guest.wait(PATIENCE_S)
        text = stat.finish()
    assert user_exits(text) == {"KVM_EXIT_IO": 20_011}
    rows = [row for line in text.splitlines() for row in json.loads(line)["user_exits"]]
    assert 0 < sum(row["time_ns"] for row in rows) < round_trip_ns * 20_011


@pytest.mark.parametrize(("arguments", "count"), [(["--vcpu", "0"], EXITS), (["--vcpu", "1"], 0)])
def test_vcpus_that_are_not_wanted_are_not_counted(exit_loop: Path, arguments: list[str], count: int) -> None:
    """By KVM's own number."""
    with looping(exit_loop) as guest:
        stat = Stat("-p", str(guest.pid), "--format", "json", *arguments)
        begin(guest)
        guest.wait(PATIENCE_S)
        assert sum(user_exits(stat.finish()).values()) == count


def test_a_command_is_counted_to_its_end_and_text_has_no_control_codes() -> None:
    """On a pipe: plain lines, the total at the end, no escape."""
    done = subprocess.run(
        [*COMMAND, "stat", "--interval", "0.3", "--", sys.executable, "-m", "lab", "run", "quiet", "--repeat", "3"],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=60,
        check=True,
    )
    assert "exits to user space" in done.stdout
    assert "KVM_EXIT_IO" in done.stdout
    assert all(each.isprintable() or each == "\n" for each in done.stdout)
    assert all(len(line) < 80 for line in done.stdout.splitlines())


def test_a_terminal_is_refreshed() -> None:
    """The same table in the same place; --count ends it."""
    pytest.importorskip("rich", reason="rich is missing: make test installs it")
    master, slave = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the other side was closed
            while part := os.read(master, 1 << 16):
                shown.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        stat = Stat("--count", "2", "--interval", "0.2", stdout=slave)
        stat.finish()
    finally:
        os.close(slave)
        reader.join(PATIENCE_S)
        os.close(master)
    text = shown.decode()
    assert re.search(r"\x1b\[\d*A", text), "no line was written over"
    assert "in all, until" in text
    assert "\x1b[?25h" in text, "the cursor must come back"


def test_ctrl_c_is_a_good_end() -> None:
    """What was counted until then is printed."""
    stat = Stat("--format", "json", "--interval", "60")
    text = stat.finish(signal.SIGINT)
    assert len(text.splitlines()) == 1


def test_a_recording_of_detail_full_counts_the_same(tmp_path: Path) -> None:
    """23 exits are 23 in a recording, too; one of detail boundary is refused in one line."""
    with recording(tmp_path / "full", "--detail", "full"):
        quiet = lab("quiet")
        assert quiet.wait(PATIENCE_S) == 0
    done = run("stat", tmp_path / "full", "-p", str(quiet.pid), "--format", "json")
    assert done.returncode == 0, done.stderr
    assert user_exits(done.stdout) == {"KVM_EXIT_IO": EXITS}
    with recording(tmp_path / "boundary"):
        pass
    done = run("stat", tmp_path / "boundary")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "--detail full" in done.stderr


def test_the_kernels_own_trace_counts_the_same() -> None:
    """Event for event and name for name, over every scenario of one VM."""
    with tracefs.root() as root:
        if root is None:
            pytest.skip("tracefs cannot be mounted: run as root, on a kernel with CONFIG_TRACING")
    done = subprocess.run(
        [sys.executable, "-m", "tests.matrix.stat_counts"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(result["user"]["KVM_EXIT_IO"] >= EXITS for result in json.loads(done.stdout))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["no-such-recording"], 1, "no recording at"),
        (["-p", "1"], 1, "no VMM"),
        (["a-recording", "--", "true"], 2, "not both"),
        (["--", "no-such-command"], 1, "command not found"),
        (["--interval", "0"], 2, "not a number of seconds, more than 0"),
    ],
)
def test_mistakes_end_in_a_line(arguments: list[str], status: int, said: str) -> None:
    """Of what, why and what to do."""
    done = run("stat", *arguments)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
