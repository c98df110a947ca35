"""A real QEMU as the VMM: what it reads of a vCPU, and which of that is a save."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .session import PATIENCE_S, by_pid, recording, report, wait_until

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no QEMU: apt install qemu-system-x86"),
]
_MACHINE = ("-accel", "kvm", "-machine", "q35", "-m", "64", "-display", "none", "-nodefaults")
# What SeaBIOS writes to its debug port once it has set the local APIC up, which takes NMIs from then on.
_TAKES_NMIS = "Found 1 cpu(s)"


class Qmp:
    """QEMU's machine protocol."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        json.loads(self._file.readline())
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Return what a command returns."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "event" not in answer:
                assert "return" in answer, answer
                return answer["return"]

    def hmp(self, line: str) -> str:
        """Return what the human monitor says."""
        return str(self("human-monitor-command", **{"command-line": line}))

    def close(self) -> None:
        """Let go of it."""
        self._file.close()
        self._socket.close()


@contextmanager
def qemu(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Qmp]]:
    """Run a guest in its firmware."""
    path = folder / f"qmp{len(list(folder.glob('qmp*')))}"
    said = path.with_suffix(".said")
    command = ["qemu-system-x86_64", *_MACHINE, "-qmp", f"unix:{path},server=on,wait=off", *arguments]
    command += ["-chardev", f"file,path={said},id=said", "-device", "isa-debugcon,iobase=0x402,chardev=said"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(path.exists)
            wait_until(lambda: "-incoming" in arguments or _TAKES_NMIS in said.read_text(errors="replace"))
            monitor = Qmp(path)
            try:
                yield process, monitor
            finally:
                monitor.close()
        finally:
            process.kill()


def migrate(monitor: Qmp, to: Path) -> None:
    """Write the guest into a file."""
    monitor("migrate", uri=f"exec:cat > {to}")
    wait_until(lambda: monitor("query-migrate").get("status") in ("completed", "failed"))
    assert monitor("query-migrate")["status"] == "completed"


def exits(monitor: Qmp) -> int:
    """Return how often the vCPU has left the guest."""
    (vcpu,) = monitor("query-stats", target="vcpu", providers=[{"provider": "kvm", "names": ["exits"]}])
    return int(vcpu["stats"][0]["value"])


def nmis(document: Mapping[str, Any], pid: int) -> list[tuple[str, bool]]:
    return [
        (row["end"], row["copies_without"]) for row in by_pid(document["lifecycles"], pid) if row["request"] == "nmi"
    ]


def test_an_nmi_between_stop_and_migrate_is_lost(tmp_path: Path) -> None:
    """QEMU reads a vCPU when the NMI comes, and does not read it again: the copy has none pending."""
    with recording(tmp_path / "r", "--requests", "triple_fault,nmi") as record, qemu(tmp_path) as (process, monitor):
        monitor("stop")
        monitor("inject-nmi")
        migrate(monitor, tmp_path / "copy")
        monitor("quit")
        process.wait(PATIENCE_S)
        assert record.finish() == 0
    document = report(tmp_path / "r")
    assert nmis(document, process.pid) == [("lost", True)]
    assert document["exit_status"] == 3
    (save,) = by_pid(document["saves"], process.pid)
    assert (save["carried"], save["ran_again"]) == (False, False)
    assert {"regs", "sregs", "msrs", "events", "lapic", "mp_state"} <= set(save["read"])


def test_a_guest_that_goes_on_gets_its_nmi(tmp_path: Path) -> None:
    """The NMI of a guest that was stopped is handled when it goes on."""
    with recording(tmp_path / "r", "--requests", "triple_fault,nmi") as record, qemu(tmp_path) as (process, monitor):
        monitor("stop")
        monitor.hmp("info registers")
        monitor("inject-nmi")
        before = exits(monitor)
        monitor("cont")
        wait_until(lambda: exits(monitor) > before)
        monitor("stop")
        monitor("quit")
        process.wait(PATIENCE_S)
        assert record.finish() == 0
    document = report(tmp_path / "r")
    assert [end for end, _ in nmis(document, process.pid)] == ["serviced"]


def test_a_copy_on_this_host_is_recognised(tmp_path: Path) -> None:
    """A guest with nothing pending is migrated, and runs on in another QEMU: nothing is said of it."""
    with recording(tmp_path / "r", "--requests", "triple_fault,nmi") as record:
        with qemu(tmp_path) as (process, monitor):
            monitor("stop")
            migrate(monitor, tmp_path / "copy")
            monitor("quit")
            process.wait(PATIENCE_S)
        with qemu(tmp_path, "-incoming", f"exec:cat {tmp_path / 'copy'}") as (copy, other):
            wait_until(lambda: other("query-status")["status"] in ("paused", "running", "postmigrate"))
            other("cont")
            wait_until(lambda: other("query-status")["status"] == "running")
            other("quit")
            copy.wait(PATIENCE_S)
        assert record.finish() == 0
    document = report(tmp_path / "r")
    assert (document["saves"], document["restores"]) == ([], [])
    assert document["exit_status"] == 0
