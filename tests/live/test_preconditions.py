"""What must be so before anything is traced: with exactly that it works, without any of it nothing looks quiet."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab.runner import runnable
from tracer import host

from .session import CHECKOUT, COMMAND, Vmm, report

REASONS = {scenario.name: reason for scenario, reason in runnable()}
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(REASONS["lost"]), reason=f"the lab cannot run: {REASONS['lost']}"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv: apt install util-linux"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare: apt install util-linux"),
]

LOST = ["env", "-C", str(CHECKOUT), sys.executable, "-m", "lab", "run", "lost", "--repeat", "3"]
NEEDED = ("dac_read_search", "sys_ptrace", "perfmon", "bpf")


def limited(*capabilities: str) -> list[str]:
    """Return what runs a command with these capabilities at most."""
    return ["setpriv", "--bounding-set", ",".join(["-all", *(f"+{name}" for name in capabilities)]), "--inh-caps=-all"]


def ran(*words: str) -> subprocess.CompletedProcess[str]:
    """Run something to its end."""
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


def test_exactly_the_capabilities_of_the_engine_are_enough(tmp_path: Path) -> None:
    """For BPF without trampolines; neither CAP_SYS_ADMIN nor CAP_SYSLOG. What ran already is seen as what comes."""
    if host.preempts_raw_tracepoints():
        pytest.skip("the tracepoint engine needs tracefs here")
    path = tmp_path / "r"
    with Vmm() as vmm:
        vmm.tell("mce")
        command = [*COMMAND, "record", "-o", str(path), "--engine", "tracepoint", "--", *LOST]
        done = ran(*limited(*NEEDED), *command)
    assert done.returncode == 0, done.stderr
    document = report(path)
    assert document["summary"]["lost"] == 3
    assert vmm.pid in {row["pid"] for row in document["lifecycles"]}
    assert document["loss"]["total"] == 0


@pytest.mark.parametrize("missing", NEEDED)
@pytest.mark.parametrize("verb", ["record", "stat"])
def test_without_one_of_them_nothing_is_traced(tmp_path: Path, verb: str, missing: str) -> None:
    """And the doctor says why, in the same words."""
    rest = limited(*(name for name in NEEDED if name != missing))
    options = ["-o", str(tmp_path / "r")] if verb == "record" else []
    done = ran(*rest, *COMMAND, verb, *options, "--engine", "tracepoint", "--duration", "0.2")
    reason = f"this process lacks CAP_{missing.upper()}: run as root"
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert reason in done.stderr
    assert not (tmp_path / "r").exists()
    told = ran(*rest, *COMMAND, "doctor", "--json")
    assert reason in told.stdout


@pytest.mark.parametrize("verb", ["record", "stat"])
def test_in_a_pid_namespace_nothing_is_traced(tmp_path: Path, verb: str) -> None:
    """A number would be that of another process, and a name that of an innocent one."""
    away = ["unshare", "--pid", "--fork", "--mount-proc"]
    options = ["-o", str(tmp_path / "r")] if verb == "record" else []
    done = ran(*away, *COMMAND, verb, *options, "--duration", "0.2")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pid namespace" in done.stderr
    assert done.stderr.count("--pid=host") == 1
    assert not (tmp_path / "r").exists()
    told = ran(*away, *COMMAND, "doctor")
    assert told.returncode == 1
    assert "FAIL process numbers" in told.stdout


def test_a_process_that_ends_and_is_not_waited_for_ends_the_recording(tmp_path: Path) -> None:
    """A zombie has no vCPU; its number may be another's soon."""
    path = tmp_path / "r"
    with Vmm() as vmm:
        record = subprocess.Popen([*COMMAND, "record", "-o", str(path), "-p", str(vmm.pid)], stderr=subprocess.PIPE)
        assert record.stderr
        assert b"recording into" in record.stderr.readline()
        vmm.process.kill()  # and Vmm waits for it later
        assert record.wait(20) == 0
        record.stderr.close()
        assert Path(f"/proc/{vmm.pid}").exists()
    assert report(path)["recording"]["clean"]
