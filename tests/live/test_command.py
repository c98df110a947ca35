"""Whatever a user gets wrong: one line that says what, why, and what to do; and the statuses that scripts rely on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from command.main import main
from lab.runner import runnable
from tracer import host
from tracer.recorder import Recorder, Wish

from .session import COMMAND, Record, Vmm, lab, recording, report, run

REASONS = {scenario.name: reason for scenario, reason in runnable()}
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(REASONS["lost"]), reason=f"the lab cannot run: {REASONS['lost']}"),
]
LAB = ["--", *COMMAND, "lab", "run"]


def quick(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in this process: as `run`, and faster. Not for `record`, which handles signals."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def fails(status: int, *arguments: str | Path, says: str) -> None:
    """Run a command that must fail with one line."""
    done = run(*arguments) if arguments[0] == "record" else quick(*arguments)
    own = [line for line in done.stderr.splitlines() if not line.startswith("kvmreq: recording into ")]
    assert done.returncode == status, done.stderr
    assert len(own) == 1, done.stderr
    assert own[0].startswith("kvmreq: ")
    assert says in own[0], own[0]
    assert own[0].endswith(")") or "unknown request" in own[0], f"no hint: {own[0]}"
    assert done.stdout == ""


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recording with a lost request. Tests change copies of it."""
    path = tmp_path_factory.mktemp("lost") / "r"
    done = run("record", "-o", path, *LAB, "lost")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def copy(lost: Path, tmp_path: Path) -> Path:
    """Return a copy of that recording."""
    return Path(shutil.copytree(lost, tmp_path / "copy"))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return what mounts a tmpfs with some options; it is gone after the test."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        path = tmp_path / f"tmpfs{len(mounted)}"
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "kvmreq-test", path], check=True)
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", path], check=True)


# --- record -------------------------------------------------------------------------------------------------


def test_an_unknown_request_names_those_that_exist(tmp_path: Path) -> None:
    """Nothing is created."""
    fails(1, "record", "-o", tmp_path / "r", "--requests", "triple_fault,nonsense", says="unknown request 'nonsense'")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--engine", "nonsense"],
        ["--ring", "3"],
        ["--duration", "-1"],
        ["--duration", "nan"],
        ["--detail", "nonsense"],
        ["-p", "0"],
        ["-p", "x"],
        ["--format", "xml"],
        ["--nonsense"],
    ],
)
def test_wrong_usage_is_status_2(tmp_path: Path, arguments: list[str]) -> None:
    """The parser's own words."""
    done = quick("record", "-o", tmp_path / "r", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(("kvmreq record: error: ", "kvmreq: error: "))
    assert not (tmp_path / "r").exists()


def test_an_engine_that_this_host_refuses_says_why(tmp_path: Path) -> None:
    """And which tell what works."""
    if host.no_kprobes() is None:
        pytest.skip("this kernel has kprobes: no engine is refused")
    fails(1, "record", "-o", tmp_path / "r", "--engine", "kprobe", says="without kprobes (CONFIG_KPROBE_EVENTS)")
    assert not (tmp_path / "r").exists()


def test_a_pid_that_is_no_vmm(tmp_path: Path) -> None:
    """And one that is nobody's, and one too large for any."""
    fails(1, "record", "-o", tmp_path / "r", "-p", str(os.getppid()), says="is no VMM")
    for pid in (4194304, 2**31, 2**64, 10**30):
        fails(1, "record", "-o", tmp_path / "r", "-p", str(pid), says=f"no process {pid}")
    assert not (tmp_path / "r").exists()


def test_a_command_that_cannot_be_run(tmp_path: Path) -> None:
    """Not there, not executable, a directory."""
    (tmp_path / "file").write_text("")
    for command in ("no-such-command", "/no/such/command", str(tmp_path / "file"), str(tmp_path)):
        fails(1, "record", "-o", tmp_path / "r", "--", command, says=command)
        assert not (tmp_path / "r").exists()
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    fails(1, "record", "-o", tmp_path / "s", "--", str(tmp_path / "script"), says="cannot be run")


def test_a_command_that_dies(tmp_path: Path) -> None:
    """Is told, and the recording is whole."""
    path = tmp_path / "r"
    done = run("record", "-o", path, "--", "sh", "-c", "kill -SEGV $$")
    assert done.returncode == 1
    assert "sh was killed by SIGSEGV" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert report(path)["recording"]["clean"]


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    """Its status is not ours: the recording succeeded."""
    done = run("record", "-o", tmp_path / "r", "--", "sh", "-c", "exit 23")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "kvmreq: sh ended with status 23"


def test_an_existing_recording_is_not_written_over(copy: Path) -> None:
    """Not a byte of it."""
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    fails(1, "record", "-o", copy, "--duration", "1", says="exists already")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_places_that_cannot_be_written(tmp_path: Path, mount: Callable[[str], Path]) -> None:
    """A read-only file system, a directory in nowhere, a file as directory."""
    (tmp_path / "file").write_text("")
    fails(1, "record", "-o", mount("ro") / "r", "--duration", "1", says="Read-only file system")
    fails(1, "record", "-o", tmp_path / "no" / "r", "--duration", "1", says="No such file or directory")
    fails(1, "record", "-o", tmp_path / "file" / "r", "--duration", "1", says="Not a directory")
    fails(1, "record", "-o", Path("/dev/null/r"), "--duration", "1", says="Not a directory")


def test_a_disk_that_fills_up(mount: Callable[[str], Path]) -> None:
    """One line; what was written before is whole."""
    path = mount("size=48k") / "r"
    record = Record(path, "--detail", "full", "--requests", "all")
    record.await_live()
    with lab("reused", "--repeat", "100000") as guests:
        try:
            status = record.finish(None)
        finally:
            guests.kill()
    assert status == 1
    # A kernel that is not in the table of names is told of, too.
    own = [line for line in record.notes if "recording into" not in line and "the names of requests" not in line]
    assert len(own) == 1, record.notes
    assert "No space left on device (make room" in own[0]
    read = quick("report", path, "--format", "json")
    assert read.returncode in (0, 3, 4), read.stderr
    document = json.loads(read.stdout)
    assert not document["recording"]["clean"]
    assert document["recording"]["left_out"] == []


def test_without_privileges(tmp_path: Path) -> None:
    """In one line too."""
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv")
    tmp_path.chmod(0o777)
    command = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", *COMMAND]
    done = subprocess.run(
        [*command, "record", "-o", str(tmp_path / "r"), "--duration", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "CAP_BPF" in done.stderr
    assert "run as root" in done.stderr
    assert (done.stderr.count("\n"), done.stdout) == (1, "")


# --- report -------------------------------------------------------------------------------------------------


def test_what_is_no_recording(tmp_path: Path) -> None:
    """Nothing, a file, another directory; also beside one that is good."""
    (tmp_path / "file").write_text("")
    fails(1, "report", tmp_path / "nothing", says="no recording at")
    fails(1, "report", tmp_path / "file", says="is a file, a recording is a directory")
    fails(1, "report", tmp_path, says="it has no meta.json")
    fails(1, "report", Path("/dev/null"), says="is a file, a recording is a directory")


def test_one_bad_recording_among_good_ones(lost: Path, tmp_path: Path) -> None:
    """Is an error before anything is printed."""
    fails(1, "report", lost, tmp_path / "nothing", says="no recording at")


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ("", "is damaged"),
        ('{"schema": 1', "is damaged"),
        ("[1]", "names no schema"),
        ('{"schema": 999}', "this kvmreq reads up to"),
        ('{"schema": 1}', "missing required field `host`"),
    ],
)
def test_a_bad_meta(copy: Path, meta: str, says: str) -> None:
    """Damaged, foreign, or newer."""
    (copy / "meta.json").write_text(meta)
    fails(1, "report", copy, says=says)


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[40:200] = bytes(byte ^ 0x10 for byte in raw[40:200])
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_text("foreign " * 1000),
        _flip,
    ],
)
@pytest.mark.parametrize("style", ["text", "json", "csv"])
def test_a_damaged_segment_is_named(copy: Path, damage: Callable[[Path], Any], style: str) -> None:
    """In one line, with what can be done; the report of the rest is printed all the same."""
    segment = min(copy.glob("segment-*"))
    damage(segment)
    done = quick("report", copy, "--format", style)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kvmreq: {segment}: ")
    assert line.endswith("restore it from a copy)")
    assert done.stdout
    if style == "json":
        document = json.loads(done.stdout)
        assert "lost" not in document["summary"]
        assert document["recording"]["left_out"]


def test_a_page_that_cannot_be_written(lost: Path, tmp_path: Path, mount: Callable[[str], Path]) -> None:
    """After the report itself, which needs no page."""
    for page in (tmp_path / "no" / "page.html", tmp_path, mount("ro") / "page.html"):
        done = quick("report", lost, "--html", page)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("kvmreq: ")
        assert str(page) in line
        assert line.endswith(")")


def test_statuses_of_a_report(tmp_path: Path) -> None:
    """0 nothing lost, 3 something, 4 undecided; several recordings: the worst."""
    good, lost, undecided = tmp_path / "good", tmp_path / "lost", tmp_path / "undecided"
    with Vmm() as vmm:
        with recording(good, "-p", str(vmm.pid)):
            vmm.tell("mce", "run")
        recorder = Recorder(undecided, Wish(pids=[vmm.pid], ring_bytes=4096))
        recorder.start()
        vmm.tell("mce", *["bounce"] * 100, "run")  # a full ring, and nobody who reads it
        recorder.stop()
        with recording(lost, "-p", str(vmm.pid)):
            vmm.tell("mce", "save")
            vmm.end()
    # The real command for each, then what it makes of several.
    assert [run("report", path).returncode for path in (good, lost, undecided)] == [0, 3, 4]
    for paths, status in (((good, lost), 3), ((good, undecided), 4), ((undecided, lost), 3), ((good, good), 0)):
        assert quick("report", *paths).returncode == status


def test_a_reader_that_leaves(lost: Path) -> None:
    """`kvmreq report DIR | head -1`."""
    command = f"{COMMAND[0]} report {lost} --format json | head -c 10"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


# --- lab ----------------------------------------------------------------------------------------------------


def test_lab() -> None:
    """An unknown scenario is one line; a known one says that it ran."""
    fails(1, "lab", "run", "nonsense", says="there is no scenario nonsense")
    assert quick("lab", "run", "lost", "--repeat", "0").returncode == 2
    done = run("lab", "run", "quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert run("lab", "list").returncode == 0
