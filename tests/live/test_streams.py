"""Streams decide nothing about the work, and a COMMAND is told to end and waited for while the ring is drained."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.runner import runnable
from tracer.recording import Recording

from .session import CHECKOUT, COMMAND, PATIENCE_S, report, run

REASONS = {scenario.name: reason for scenario, reason in runnable()}
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(REASONS["lost"]), reason=f"the lab cannot run: {REASONS['lost']}"),
]

LOST = f"cd {CHECKOUT} && exec {sys.executable} -m lab run lost --repeat 23 >/dev/null 2>&1"


@contextmanager
def full_pipe() -> Iterator[int]:
    """Yield the writing end of a pipe that is full, and whose reader stands still."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        pass
    os.set_blocking(writer, True)
    yield writer
    os.close(reader)
    os.close(writer)


@contextmanager
def no_reader() -> Iterator[int]:
    """Yield the writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextmanager
def gone_terminal() -> Iterator[int]:
    """Yield a terminal that has gone away."""
    main, terminal = pty.openpty()
    os.close(main)
    yield terminal
    os.close(terminal)


@contextmanager
def full_device() -> Iterator[int]:
    """Yield what never has room."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


STREAMS = (full_pipe, no_reader, gone_terminal, full_device)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("follow", [False, True])
def test_whatever_listens_all_is_recorded(tmp_path: Path, stream: object, follow: bool) -> None:
    """COMMAND runs and its losses are in the recording; only results that could not be told are a failure."""
    path = tmp_path / "r"
    options = ["--follow", "--format", "json"] if follow else []
    with stream() as descriptor:  # type: ignore[operator]
        done = subprocess.run(
            [*COMMAND, "record", "-o", str(path), *options, "--", "sh", "-c", LOST],
            stdout=descriptor,
            stderr=descriptor,
            timeout=60,
            check=False,
        )
    assert done.returncode == (1 if follow else 0)
    document = report(path)
    assert document["recording"]["clean"]
    assert document["summary"]["lost"] >= 23


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """No file of ours gets their number."""
    path = tmp_path / "r"
    command = f"exec {COMMAND[0]} record -o {path} -- sh -c '{LOST}' {closed}"
    done = subprocess.run(["sh", "-c", command], check=False, timeout=60)
    assert done.returncode == 0
    assert report(path)["summary"]["lost"] >= 23


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording whose report no pipe holds."""
    path = tmp_path_factory.mktemp("large") / "r"
    done = run("record", "-o", path, "--", "sh", "-c", LOST.replace("23", "499"))
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("verb", [("report", "--format", "json"), ("report",), ("export", "--to", "csv")])
def test_every_byte_of_a_result_is_written_or_the_status_says_so(large: Path, verb: tuple[str, ...]) -> None:
    """Also to what does not block, by a reader that is slow; not to what is full or closed."""
    whole = run(verb[0], large, *verb[1:])
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen([*COMMAND, verb[0], str(large), *verb[1:]], stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    time.sleep(0.5)  # a slow reader
    with os.fdopen(reader) as out:
        assert out.read() == whole.stdout
    assert process.wait(PATIENCE_S) == whole.returncode == (0 if verb[0] == "export" else 3)
    for wrong in (">/dev/full", ">&-"):
        command = f"exec {COMMAND[0]} {verb[0]} {large} {' '.join(verb[1:])} {wrong}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert "standard output" in done.stderr
        assert done.stderr.count("\n") == 1


# --- COMMAND ------------------------------------------------------------------------------------------------

OBSTINATE = f"trap '' TERM; cd {CHECKOUT} && exec {sys.executable} -m lab run delivered --repeat 1000000"


def test_the_ring_is_drained_while_a_command_is_waited_for(tmp_path: Path) -> None:
    """Which ignores that it is told to end, and works the host meanwhile: nothing is lost."""
    path = tmp_path / "r"
    options = ("--ring", "1", "--duration", "0.5", "--requests", "all")
    done = run("record", "-o", path, *options, "--", "sh", "-c", OBSTINATE)
    assert done.returncode == 0, done.stderr
    assert "was killed" in done.stderr
    recording = Recording.open(path)
    *_, last = recording.segments()
    assert last is not None
    assert last.loss.total == 0
    assert recording.clean


def test_the_end_of_the_duration_is_no_failure_of_the_command(tmp_path: Path) -> None:
    done = run("record", "-o", tmp_path / "r", "--duration", "0.3", "--", "sleep", "600")
    assert done.returncode == 0
    assert "SIGTERM" not in done.stderr


def test_a_command_is_no_orphan_of_a_recorder_that_fails(tmp_path: Path) -> None:
    """The directory goes away under it."""
    path = tmp_path / "r"
    script = f"echo $$ >{tmp_path}/pid; mv {path} {tmp_path}/away; {LOST.replace('exec ', '')}; exec sleep 600"
    done = run("record", "-o", path, "--", "sh", "-c", script)
    assert done.returncode == 1, done.stderr
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_dashes_of_the_command_are_its_own(tmp_path: Path) -> None:
    """As are its options; only those before it are ours."""
    words = ["echo", "--", "hi", "--duration", "3", "-p", "1"]
    for place, before in enumerate(([], ["--"])):
        done = run("record", "-o", tmp_path / str(place), *before, *words)
        assert (done.returncode, done.stdout) == (0, " ".join(words[1:]) + "\n"), done.stderr


def test_a_hangup_ends_the_command_too(tmp_path: Path) -> None:
    """A closed ssh session: everything until then is in the recording."""
    path = tmp_path / "r"
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "record", "-o", str(path), "--", "sh", "-c", f"({LOST}); echo done; exec sleep 600"],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, 0x540E, 0),  # TIOCSCTTY  # noqa: PLW1509
    )  # fmt: skip
    os.close(terminal)
    told = b""
    while b"done" not in told:
        told += os.read(main, 4096)
    os.close(main)
    assert process.wait(PATIENCE_S) == 0
    document = report(path)
    assert document["recording"]["clean"]
    assert document["summary"]["lost"] >= 23
