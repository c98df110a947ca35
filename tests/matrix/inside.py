"""What runs in a booted kernel: every engine records every scenario, once; judged is elsewhere.

``python3 -m tests.matrix.inside ENGINE...``; $MATRIX_OUT/given holds tests of the kernel to be run as well. Imports the
standard library and the lab only: pandas takes 20 s here. What was seen goes to ``inside.json`` in $MATRIX_OUT after
every engine, the recordings beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lab.kvm import Kvm
from lab.stage import no_triple_fault_event
from tests.matrix import CHECKOUT, busy, stat_counts, truth

LIVE_S = 240  # for record to be live: some 15 s on an idle machine
SCENARIO_S = 120  # for one scenario: 10 s for the longest
END_S = 120  # for record to write what it has
COUNT_S = 300  # for one engine's counts beside those of tracefs
COUNTED = {"stat": ("kprobe", "tracepoint"), "full": ("fentry", "kprobe", "tracepoint")}  # by tests.matrix.*_counts
GONE_S = 30  # for the kernel to take away what a killed process held: it frees programs after a grace period
POLL_S = 0.05
AGAIN = ("delivered", "lost", "nested_reflected")  # what is run again when kvm_amd was loaded again

_BPF_PROG_GET_NEXT_ID = 11  # enum bpf_cmd, uapi linux/bpf.h
_NR_BPF = 321
_TRACING = Path("/sys/kernel/tracing")


class _NextId(ctypes.Structure):
    # The member of union bpf_attr (uapi linux/bpf.h) for BPF_*_GET_NEXT_ID.
    _fields_ = (("start_id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("open_flags", ctypes.c_uint32))


def _programs() -> set[str]:
    """Return every BPF program in the kernel."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = set()
    request = _NextId()
    while libc.syscall(_NR_BPF, _BPF_PROG_GET_NEXT_ID, ctypes.byref(request), ctypes.sizeof(request)) == 0:
        found.add(f"BPF program {request.next_id}")
        request.start_id = request.next_id
    return found


def _lines(what: str, path: Path) -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return {f"{what} {line.strip()}" for line in path.read_text().splitlines() if not line.startswith("#")}
    return set()


def traces() -> set[str]:
    """Return everything in the kernel that a tracer can leave behind."""
    return {
        *_programs(),
        *_lines("probe event", _TRACING / "kprobe_events"),
        *_lines("kprobe", Path("/sys/kernel/debug/kprobes/list")),
        *_lines("traced function", _TRACING / "enabled_functions"),
        *(f"tracing instance {path.name}" for path in (_TRACING / "instances").glob("*")),
    }


def left_behind(before: set[str]) -> list[str]:
    """Return what is still there and was not before, once the kernel has had its time."""
    end = time.monotonic() + GONE_S
    while (left := traces() - before) and time.monotonic() < end:
        time.sleep(POLL_S)
    return sorted(left)


def headers() -> list[str]:
    """Return the kernel headers that are present: kvmreq must work without them."""
    modules = Path("/lib/modules") / platform.release()
    places = (modules / "build", modules / "source", Path("/sys/kernel/kheaders.tar.xz"))
    return [str(path) for path in places if path.exists()]


class Refused(Exception):
    """The engine does not work here: kvmreq's own reason."""


@dataclass
class Record:
    """A `kvmreq record` that is live."""

    path: Path
    engine: str
    options: Sequence[str] = ()
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        # Not in $MATRIX_OUT: to read there what another process is writing fails on 9p ("No data available", 7.3.4).
        self.notes = Path(tempfile.gettempdir(), f"{self.path.name}.notes")
        with self.notes.open("wb") as notes:
            own = [sys.executable, "-m", "command", "record", "-o", str(self.path), "--engine", self.engine]
            self.process = subprocess.Popen(
                [*own, *self.options],
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=notes,
                stderr=notes,
            )
        end = time.monotonic() + LIVE_S
        while "recording into" not in self.said:
            if self.process.poll() is not None:
                last = [line for line in self.said.splitlines() if line.strip()]
                status = self.process.returncode
                raise Refused(last[-1].removeprefix("kvmreq: ") if last else f"record ended with status {status}")
            if time.monotonic() > end:
                self.kill()
                raise Refused(f"record was not live within {LIVE_S} s")
            time.sleep(POLL_S)

    @property
    def said(self) -> str:
        """What it has printed until now."""
        return self.notes.read_text(errors="replace")

    def finish(self) -> int:
        """End it as Ctrl-C does; return its exit status."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End it as nobody should."""
        self.process.kill()
        self.process.wait()


def _in_child(work: Callable[[], dict[str, Any]], limit_s: float) -> dict[str, Any]:
    """Run work in a process of its own, and return what it returned, or ``{"error": why}``.

    A fork: what this process has imported need not be imported again, and it has no threads.
    """
    source, target = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(source)
        try:
            try:
                told = work()
            except Exception as error:  # whatever it is, it is this scenario's end and not the matrix's
                told = {"error": f"{type(error).__name__}: {error}"}
            with os.fdopen(target, "w") as pipe:
                json.dump(told, pipe)
        finally:
            os._exit(0)  # never on into what the parent does next
    os.close(target)
    with os.fdopen(source) as pipe, _deadline(pid, limit_s):
        text = pipe.read()
        os.waitpid(pid, 0)
    return dict(json.loads(text)) if text else {"error": f"it did not end within {limit_s:.0f} s, or crashed"}


@contextlib.contextmanager
def _deadline(pid: int, limit_s: float) -> Iterator[None]:
    def kill(*_: object) -> None:
        os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def witness(program: Path) -> dict[str, Any]:
    """Run one of the kernel's own tests, and return when, and how it ended."""
    begin_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    try:
        done = subprocess.run(
            [program], capture_output=True, text=True, errors="replace", timeout=SCENARIO_S, check=False
        )
        status, said = done.returncode, (done.stdout + done.stderr).strip()[-500:]
    except subprocess.TimeoutExpired:
        status, said = -1, f"it did not end within {SCENARIO_S} s"
    end_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return {"name": program.name, "begin_ns": begin_ns, "end_ns": end_ns, "status": status, "said": said}


def load_again(record: Record) -> bool:
    """Unload KVM's module and load it again under a recording; tell whether the engine let it go."""
    if subprocess.run(["modprobe", "-r", "kvm_amd"], capture_output=True, check=False).returncode:
        return False  # fentry holds it
    subprocess.run(["modprobe", "kvm_amd", "nested=1"], check=True)
    end = time.monotonic() + END_S
    while "loaded again" not in record.said:
        if record.process.poll() is not None or time.monotonic() > end:
            return True  # what is recorded from now on will tell
        time.sleep(POLL_S)
    return True


def no_witnesses() -> str | None:
    """Say why the kernel's own tests, which are those of a newer one, do not belong here."""
    with Kvm() as kvm:
        return no_triple_fault_event(kvm)


def _version_of(package: str) -> str:
    query = ["dpkg-query", "-W", "-f", "${Version}", package]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout or "none"


def say(text: str) -> None:
    """Show progress."""
    print(f"{time.monotonic():7.1f} {text}", flush=True)


def try_engine(
    engine: str, out: Path, names: Sequence[str], witnesses: Sequence[Path], options: Sequence[str], *, again: bool
) -> dict[str, Any]:
    """Record every scenario with one engine, then kill another recording; return what happened."""
    before, began = traces(), time.monotonic()
    told: dict[str, Any] = {"engine": engine, "refused": None}
    try:
        record = Record(out / engine, engine, options)
    except Refused as refusal:
        told["refused"] = str(refusal)
        told["left_behind"] = left_behind(before)
        return told
    told["live_s"] = time.monotonic() - began
    say(f"{engine}: live after {told['live_s']:.0f} s")
    try:
        told["runs"] = [{"name": name, **_in_child(partial(truth.run, name), SCENARIO_S)} for name in names]
        told["witnesses"] = [witness(program) for program in witnesses]
        if again and load_again(record):
            told["runs"] += [
                {"name": f"{name} (kvm_amd loaded again)", **_in_child(partial(truth.run, name), SCENARIO_S)}
                for name in names
                if name in AGAIN
            ]
        told["work_s"] = time.monotonic() - began - told["live_s"]
        say(f"{engine}: {len(names)} scenarios and {len(witnesses)} tests of the kernel took {told['work_s']:.0f} s")
        try:
            told["status"] = record.finish()
        except subprocess.TimeoutExpired:
            told["status"] = f"it did not end within {END_S} s"
        told["said"] = record.said
    finally:
        if record.process.poll() is None:
            record.kill()
    told["left_behind"] = left_behind(before)
    try:
        record = Record(out / f"{engine}-killed", engine)
    except Refused as refusal:
        told["left_behind_by_kill"] = [f"a second recording was refused: {refusal}"]
    else:
        told["attached"] = len(traces() - before)
        record.kill()
        if engine == "ftrace":
            # Nothing in the kernel hangs on the process that made it: the next start takes it away.
            with contextlib.suppress(Refused):
                Record(out / f"{engine}-next", engine).finish()
        told["left_behind_by_kill"] = left_behind(before)
    told["seconds"] = time.monotonic() - began
    say(f"{engine}: {told['seconds']:.0f} s in all")
    return told


def together(engines: Sequence[str], out: Path, names: Sequence[str]) -> dict[str, Any]:
    """Record every scenario with several engines at the same time; return what happened."""
    told: dict[str, Any] = {"engines": list(engines), "status": {}, "runs": []}
    records: list[Record] = []
    try:
        for engine in engines:
            records.append(Record(out / f"together-{engine}", engine))
        say(f"{' and '.join(engines)}: live at the same time")
        told["runs"] = [{"name": name, **_in_child(partial(truth.run, name), SCENARIO_S)} for name in names]
    except Refused as refusal:
        told["refused"] = str(refusal)
    finally:
        for record in reversed(records):
            told["status"][record.engine] = record.finish()
    say(f"{' and '.join(engines)}: {len(told['runs'])} scenarios at the same time")
    return told


def counts(engines: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Compare with tracefs what statistics and detail full count; return what each comparison found."""
    found = []
    for what, engine in ((what, engine) for what, known in COUNTED.items() for engine in engines if engine in known):
        began, file = time.monotonic(), out / f"{what}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"tests.matrix.{what}_counts", engine]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=COUNT_S)
        said = (done.stderr.strip().splitlines() or [""])[-1]
        results = (
            json.loads(file.read_text()) if file.exists() else [{"engine": engine, "refused": said, "same": False}]
        )
        found += [{"what": what, "seconds": time.monotonic() - began, **result} for result in results]
        say(f"{engine}: counts of {what} and of tracefs are {'the same' if not done.returncode else 'NOT the same'}")
    return found


def full(engines: Sequence[str], out: Path) -> dict[str, Any]:
    """Record every request of a busy guest in detail full, with several engines at the same time as with tracefs."""
    told: dict[str, Any] = {"engines": list(engines), "status": {}, "said": {}}
    records: list[Record] = []
    with stat_counts.instance() as path:
        try:
            for engine in engines:
                records.append(Record(out / f"full-{engine}", engine, ("--detail", "full", "--requests", "all")))
            say(f"{' and '.join(engines)}: live at the same time, in detail full")
            told["work"] = _in_child(busy.work, SCENARIO_S)
        except Refused as refusal:
            told["refused"] = str(refusal)
        finally:
            for record in reversed(records):
                told["status"][record.engine] = record.finish()
                told["said"][record.engine] = record.said
        seen = stat_counts.parsed((path / "trace").read_text().splitlines())
        told["overrun"] = stat_counts.lost(path)
    mine = told.get("work", {}).get("pid")
    exits: Counter[int] = Counter()
    for (pid, vcpu, _), number in seen.exits.items():
        exits[vcpu] += number if pid == mine else 0
    told["tracefs"] = {
        "kvm_entry": {str(vcpu): number for (pid, vcpu, _), number in seen.entries.items() if pid == mine},
        "kvm_exit": {str(vcpu): number for vcpu, number in exits.items() if number},
    }
    say(f"{' and '.join(engines)}: {sum(exits.values())} exits of a busy guest in detail full")
    return told


def main(words: Sequence[str]) -> int:
    """Try every engine; the exit status says only whether it came to the end."""
    parser = argparse.ArgumentParser("python3 -m tests.matrix.inside")
    parser.add_argument("engines", nargs="+", metavar="ENGINE")
    parser.add_argument("--again", action="store_true", help="load kvm_amd again under each recording")
    parser.add_argument(
        "--counts", action="store_true", help="compare what is counted with what tracefs counts, as well"
    )
    parser.add_argument("--together", nargs=2, default=(), metavar="ENGINE", help="these two at the same time, as well")
    parser.add_argument("--requests", default="all", help="as of record, for the recording of each engine")
    parser.add_argument("--detail", default="boundary", help="as of record, for the recording of each engine")
    parser.add_argument("--scenarios", nargs="+", metavar="NAME", help="these scenarios only (default: all)")
    arguments = parser.parse_args(words)
    options = ("--requests", arguments.requests, "--detail", arguments.detail)
    out = Path(os.environ["MATRIX_OUT"])
    reasons = {name: why for name, why in truth.scenarios().items() if name in (arguments.scenarios or (name,))}
    names = [name for name, reason in reasons.items() if reason is None]
    witnesses = sorted((out / "given").glob("*"))
    without = no_witnesses()
    told: dict[str, Any] = {
        "release": platform.release(),
        "build": platform.version(),
        "python": platform.python_version(),
        "bcc": _version_of("python3-bpfcc"),
        "headers": headers(),
        "kvm_has_btf": Path("/sys/kernel/btf/kvm").exists(),
        "cannot_run": {
            **{name: reason for name, reason in reasons.items() if reason is not None},
            **{program.name: without for program in witnesses if without is not None},
        },
        "engines": [],
        "failed": [],
        "complete": False,
    }
    if without is not None:
        witnesses = []

    def keep() -> None:
        text = json.dumps(told, indent=1)
        (out / "inside.json").write_text(text)

    for engine in arguments.engines:
        keep()
        try:
            told["engines"].append(try_engine(engine, out, names, witnesses, options, again=arguments.again))
        except OSError as error:  # of this engine alone: the others are still worth trying
            told["failed"].append(f"{engine}: {error}")
    works = [one["engine"] for one in told["engines"] if one["refused"] is None]
    keep()
    try:
        told["counts"] = counts(works, out) if arguments.counts else []
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        told["failed"].append(f"counts: {error}")
    if arguments.together:
        keep()
        try:
            told["together"] = together(arguments.together, out, names)
            keep()
            told["full"] = full(arguments.together, out)
        except (OSError, subprocess.TimeoutExpired) as error:
            told["failed"].append(f"{' and '.join(arguments.together)}: {error}")
    told["complete"] = not told["failed"]
    keep()
    for failure in told["failed"]:
        say(f"failed: {failure}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
