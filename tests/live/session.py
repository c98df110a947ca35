"""The real command, run as a user runs it: `record` beside a test, and what `report` says afterwards.

Every wait has a deadline and ends with the event that it waits for.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
COMMAND = [str(CHECKOUT / ".venv/bin/kvmreq")]
PATIENCE_S = 20.0

#: A kernel address as people print it, and as a plain number: the upper half of x86's addresses.
ADDRESS = re.compile(r"(?<![0-9a-f])(?:0x)?ffff[0-9a-f]{12}(?![0-9a-f])|(?<!\d)184467\d{14}(?!\d)", re.IGNORECASE)


def run(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def report(path: Path) -> dict[str, Any]:
    """Return the JSON report of a recording, which must be readable."""
    done = run("report", path, "--format", "json")
    assert done.returncode in (0, 3, 4), done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["exit_status"] == done.returncode
    assert not ADDRESS.search(done.stdout + done.stderr)
    return document


def lab(*arguments: str) -> subprocess.Popen[str]:
    """Start ``python3 -m lab run ARGUMENTS``."""
    return subprocess.Popen(
        [sys.executable, "-m", "lab", "run", *arguments], stdout=subprocess.DEVNULL, cwd=CHECKOUT, text=True
    )


def lab_tells(name: str) -> str:
    """Run a scenario to its end; return the line of JSON in which it tells of itself."""
    command = [sys.executable, "-m", "lab", "run", name, "--json"]
    return subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True, timeout=60).stdout


def wait_until(what: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """Return the first true value of ``what``."""
    end = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < end, f"nothing within {timeout_s} s"
        time.sleep(0.01)
    return value


class Record:
    """A `record` that runs. ``lines`` are its standard output, each with when it came; ``notes`` its standard error."""

    def __init__(self, path: Path, *arguments: str) -> None:
        self.path = path
        self.lines: list[tuple[int, str]] = []
        self.notes: list[str] = []
        self.process = subprocess.Popen(
            [*COMMAND, "record", "-o", str(path), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._readers = [threading.Thread(target=self._read_lines), threading.Thread(target=self._read_notes)]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append((time.monotonic_ns(), line.rstrip("\n")))

    def _read_notes(self) -> None:
        assert self.process.stderr
        self.notes.extend(line.rstrip("\n") for line in self.process.stderr)

    def live(self) -> bool:
        """Tell whether it has said that it records."""
        return any("recording into" in line for line in [*self.notes])

    def await_live(self) -> None:
        """Wait until it records."""
        wait_until(lambda: self.live() or self.process.poll() is not None)
        assert self.live(), self.notes

    def finish(self, number: signal.Signals | None = signal.SIGINT) -> int:
        """Send a signal, or wait for the end of its own accord; return the exit status."""
        if number is not None:
            self.process.send_signal(number)
        status = self.process.wait(PATIENCE_S)
        self._join()
        assert not ADDRESS.search("\n".join([*self.notes, *(line for _, line in self.lines)]))
        return status

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(PATIENCE_S)
        assert self.process.stdout and self.process.stderr
        self.process.stdout.close()
        self.process.stderr.close()

    def events(self) -> int:
        """Return how many events the recording holds now."""
        from tracer.recording import Recording

        return sum(len(one.events) for one in Recording.open(self.path).segments() if one)


@contextlib.contextmanager
def recording(path: Path, *arguments: str) -> Iterator[Record]:
    """Run `record` around a block, and end it by SIGINT, which must be clean."""
    record = Record(path, *arguments)
    try:
        record.await_live()
        yield record
        if record.process.poll() is None:
            assert record.finish() == 0, record.notes
    finally:
        if record.process.poll() is None:
            record.process.kill()
            record.process.wait()
            record._join()


def ends(document: Mapping[str, Any], pid: int) -> dict[str, int]:
    """Return how many lifecycles of one VMM ended how; others may run on this machine."""
    return dict(Counter(row["end"] for row in by_pid(document["lifecycles"], pid)))


def by_pid(rows: Iterable[dict[str, Any]], pid: int) -> list[dict[str, Any]]:
    """Return the rows of a report that are about one VMM."""
    return [row for row in rows if row["pid"] == pid]


# A VMM that does as it is told, a word a line, and answers each with "done".
VMM = """
import ctypes, mmap, sys, threading, time
from pathlib import Path
from lab.kvm import Exit, Kvm, MpState, TimedOut
from lab.scratch import raise_by_mce
from lab.stage import SIGN_OF_LIFE, Stage, bounce, save_blindly, shut_down

def sleep_in_kvm_run():
    def wait():
        try:
            vcpu.run(timeout_s=60)
        except TimedOut:
            pass
    thread = threading.Thread(target=wait)
    thread.start()
    syscall = Path(f"/proc/self/task/{thread.native_id}/syscall")
    while not syscall.read_text().startswith("16 ") or f"{0xae80:#x}" not in syscall.read_text():
        time.sleep(0.01)
    return thread

# 3 is read(-1) to int $0x80, and close(EDI) to syscall:
#   53                push %rbx
#   b8 03 00 00 00    mov $3, %eax
#   bb ff ff ff ff    mov $-1, %ebx
#   cd 80             int $0x80
#   5b c3             pop %rbx; ret
READ_NOTHING = bytes.fromhex("53 b803000000 bbffffffff cd80 5b c3")

def read_as_32_bit_code(edi):
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(READ_NOTHING)
    where = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(where)(edi)

with Kvm() as kvm, Stage(kvm, SIGN_OF_LIFE, lambda: None).guest(irqchip=True) as vcpu:
    for line in sys.stdin:
        word = line.strip()
        if word == "mce":
            raise_by_mce(vcpu)
        elif word == "save":
            save_blindly(vcpu)
        elif word == "bounce":
            bounce(vcpu)
        elif word == "run":
            shut_down(vcpu)
        elif word == "halt":
            vcpu.set_mp_state(MpState.KVM_MP_STATE_HALTED)
            thread = sleep_in_kvm_run()
        elif word == "int80":
            assert read_as_32_bit_code(vcpu.fd) == -9  # EBADF
        elif word == "kick":
            import signal
            from lab.kvm import KICK
            vcpu.kvm_run.immediate_exit = 1
            signal.pthread_kill(thread.ident, KICK)
            thread.join()
            vcpu.kvm_run.immediate_exit = 0
        print("done", flush=True)
"""


class Vmm:
    """A process with one VM, told what to do."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", VMM], cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        self.tell("nothing")

    def tell(self, *words: str) -> None:
        """Have it do these things; returns when they are done."""
        assert self.process.stdin and self.process.stdout
        for word in words:
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "done\n", word

    def end(self) -> None:
        """Let it close everything and exit."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        assert self.process.wait(10) == 0

    def __enter__(self) -> Vmm:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
