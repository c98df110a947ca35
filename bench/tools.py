"""What kvmreq costs a guest beside the tools that one would take instead, in the same run and in turns.

Every tool runs as its user runs it, for the whole host. Its figure is the ratio to rounds without any tracer just
before and just after, and beside it stands how much it saw of each exit: a tool that sees nothing costs nothing. A tool
that is not here, or that does not work here, is named with its reason; nothing is ever installed.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.command import ROOT, recording
from bench.overhead import Empty, Guests, Times, build
from bench.table import Figure, Missing
from tracer.engines import choices, first

_STARTS = 3  # of each tool
_ROUNDS = 2  # while it is live, and as many without any tracer, half of them before and half after
_EXITS = 50_000
_EXITS_OF_SLOW = 5_000
_POKE = 50  # exits of another guest, for a tool that says nothing before it has seen some
_PATIENCE_S = 180  # for a tool to be live, or to end: seconds here, minutes in an emulated machine
# What is mounted goes with the tool. Some mount these where they look for them, others only look.
_MOUNTS = "mount -t tracefs none /sys/kernel/tracing; mount -t debugfs none /sys/kernel/debug"
_PRIVATE = ("unshare", "--mount", "sh", "-c", f'({_MOUNTS}) 2>/dev/null; exec "$@"', "sh")
_KVM_EXITS = ("kvm_exit", "kvm_entry", "kvm_userspace_exit")


class NotHere(Exception):
    """A tool does not work here: its own reason."""


@dataclass
class Seen:
    """What a tool says, once it has ended, that it has seen of the guest."""

    number: float = 0
    unit: str = "events"


@dataclass
class _Running:
    """A tool that runs, with everything that it says on either stream."""

    words: Sequence[str]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*_PRIVATE, *self.words],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=self._file,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
        )

    @property
    def said(self) -> str:
        return os.pread(self._file.fileno(), 1 << 24, 0).decode(errors="replace")

    def wait_until(self, live: Callable[[], bool]) -> None:
        """Wait until the tool is live. Raises NotHere when it ends before that."""
        end = time.monotonic() + _PATIENCE_S
        while not live():
            if self.process.poll() is not None:
                raise NotHere(_reason(self.words[0], self.said))
            if time.monotonic() > end:
                raise NotHere(f"it was not live within {_PATIENCE_S} s")
            time.sleep(0.01)

    def stop(self) -> str:
        """End it as Ctrl-C does; return what it has said."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
            self.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise NotHere(f"it did not end within {_PATIENCE_S} s of an interrupt") from None
        finally:
            said = self.said
            self._file.close()
        return said


def _reason(program: str, said: str) -> str:
    """Return why a tool ended: what it says with its own name in front, else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    own = [place for place, line in enumerate(lines) if line.startswith(f"{program}:")]
    return " ".join(lines[own[-1] :] if own else lines[-1:]) or "it ended and said nothing"


@contextmanager
def _running(words: Sequence[str]) -> Iterator[_Running]:
    running = _Running(words)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@contextmanager
def _perf(scratch: Path, words: Sequence[str], count: Callable[[str], float]) -> Iterator[Seen]:
    """Run a subcommand of perf that takes orders: it begins when it is told to, and says that it has."""
    seen = Seen()
    paths = [scratch / name for name in ("control", "ack")]
    with ExitStack() as stack:
        descriptors = []
        for path in paths:
            os.mkfifo(path)
            stack.callback(path.unlink)
            descriptors.append(os.open(path, os.O_RDWR))
            stack.callback(os.close, descriptors[-1])
        control, ack = descriptors
        order = ["-D", "-1", "--control", f"fifo:{paths[0]},{paths[1]}"]
        running = stack.enter_context(_running(["perf", *words, *order]))
        os.write(control, b"enable\n")
        running.wait_until(lambda: bool(select.select([ack], [], [], 0)[0]))
        yield seen
        seen.number = count(running.stop())


def _perf_stat(scratch: Path, _guests: Guests) -> AbstractContextManager[Seen]:
    def count(said: str) -> float:
        return sum(int(line.split(",")[0]) for line in said.splitlines() if re.match(r"\d+,", line))

    return _perf(scratch, ["stat", "-a", "-x", ",", "-e", "kvm:*"], count)


def _perf_kvm_stat(scratch: Path, _guests: Guests) -> AbstractContextManager[Seen]:
    def count(said: str) -> float:
        samples = re.search(r"\((\d+) samples\)", said)
        return int(samples[1]) if samples else 0

    return _perf(scratch, ["kvm", "stat", "record", "-a", "-o", str(scratch / "perf.data")], count)


@contextmanager
def _perf_trace(scratch: Path, guests: Guests) -> Iterator[Seen]:
    seen, out = Seen(), scratch / "perf-trace"
    out.write_bytes(b"")
    other = Guests(scratch / "exit_loop", 1, 1 << 30, _POKE)
    try:
        with _running(["perf", "trace", "-a", "-o", str(out), "-e", "kvm:*"]) as running:

            def live() -> bool:
                other.round()
                return out.stat().st_size > 0

            running.wait_until(live)
            yield seen
            running.stop()
    finally:
        other.close()
    with out.open() as lines:
        seen.number = sum(f"/{guests.pid} kvm:" in line for line in lines)


@contextmanager
def _trace_cmd(scratch: Path, guests: Guests) -> Iterator[Seen]:
    seen, out = Seen(), scratch / "trace.dat"
    with _running(["stdbuf", "-oL", "trace-cmd", "record", "-e", "kvm", "-o", str(out)]) as running:
        running.words = running.words[2:]
        running.wait_until(lambda: "Hit Ctrl^C" in running.said)
        yield seen
        running.stop()
    report = subprocess.Popen(
        ["trace-cmd", "report", "-i", str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with report:
        assert report.stdout is not None
        seen.number = sum(f"-{guests.pid} " in line for line in report.stdout)


@contextmanager
def _kvmexit(_scratch: Path, guests: Guests) -> Iterator[Seen]:
    seen = Seen()
    with _running(["kvmexit-bpfcc"]) as running:
        running.wait_until(lambda: "Hit Ctrl-C" in running.said)
        yield seen
        said = running.stop()
    seen.number = sum(int(count) for count in re.findall(rf"^{guests.pid} +\d+ +\w.* +(\d+) *$", said, re.MULTILINE))


@contextmanager
def _bpftrace(_scratch: Path, guests: Guests) -> Iterator[Seen]:
    seen = Seen()
    # What an interval prints comes after everything is attached: probes are, in their order.
    script = (
        ",".join(f"tracepoint:kvm:{name}" for name in _KVM_EXITS)
        + " { @[pid, probe] = count(); }"
        + ' interval:ms:10 /!@live/ { @live = 1; printf("live\\n"); }'
    )
    with _running(["bpftrace", "-B", "none", "-e", script]) as running:
        running.wait_until(lambda: "live\n" in running.said)
        yield seen
        said = running.stop()
    seen.number = sum(int(count) for count in re.findall(rf"^@\[{guests.pid}, \S+\]: (\d+)$", said, re.MULTILINE))


@contextmanager
def _stat(_scratch: Path, _guests: Guests) -> Iterator[Seen]:
    seen = Seen()
    words = [sys.executable, "-m", "command", "stat", "--format", "json"]
    with _running(words) as running:
        running.wait_until(lambda: "counting with" in running.said)
        yield seen
        said = running.stop()
    intervals = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    seen.number = sum(
        row["count"] for interval in intervals for row in (*interval["guest_exits"], *interval["user_exits"])
    )


def _record(*words: str) -> Callable[[Path, Guests], AbstractContextManager[Seen]]:
    @contextmanager
    def way(scratch: Path, _guests: Guests) -> Iterator[Seen]:
        seen, path = Seen(), scratch / "recording"
        with recording(path, *words):
            yield seen
        counters = json.loads((path / "meta.json").read_text())["counters"]
        full = "full" in words
        seen.number, seen.unit = counters["produced" if full else "boundaries"], "events" if full else "readings"
        shutil.rmtree(path)

    return way


_EMPTY: dict[bool, Empty] = {}  # by whether they are on the hooks of detail full


def _empty(*, full: bool) -> Callable[[Path, Guests], AbstractContextManager[Seen]]:
    @contextmanager
    def way(_scratch: Path, _guests: Guests) -> Iterator[Seen]:
        with _EMPTY[full].attached():
            yield Seen(0, "nothing")

    return way


@dataclass(frozen=True)
class Way:
    """A tool, and how it is started: ``enter`` returns once it is live. ``program``: whether it is not kvmreq's own."""

    name: str
    enter: Callable[[Path, Guests], AbstractContextManager[Seen]]
    program: str | None = None
    package: str | None = None
    slow: bool = False  # takes some 100 us for each exit

    @property
    def exits(self) -> int:
        """Return of how many exits a round is, traced by this."""
        return _EXITS_OF_SLOW if self.slow else _EXITS


WAYS = (
    Way("empty programs on the hooks of record", _empty(full=False)),
    Way("kvmreq record", _record()),
    Way("kvmreq record --requests all", _record("--requests", "all")),
    Way("empty programs on the hooks of detail full", _empty(full=True)),
    Way("kvmreq record --requests all --detail full", _record("--requests", "all", "--detail", "full")),
    Way("kvmreq stat", _stat),
    Way("bpftrace, counting what kvmreq stat does", _bpftrace, "bpftrace", "bpftrace"),
    Way("perf stat -e kvm:*", _perf_stat, "perf", "linux-perf"),
    Way("perf kvm stat record", _perf_kvm_stat, "perf", "linux-perf"),
    Way("perf trace -e kvm:*", _perf_trace, "perf", "linux-perf", slow=True),
    Way("trace-cmd record -e kvm", _trace_cmd, "trace-cmd", "trace-cmd"),
    Way("kvmexit", _kvmexit, "kvmexit-bpfcc", "bpfcc-tools"),
)


@dataclass
class _Measured:
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    unit: str = ""

    def add(self, traced: Sequence[Times], untraced: Sequence[Times], seen: Seen, exits: int) -> None:
        for ratios, clock in ((self.wall, 0), (self.cpu, 1)):
            ratios.append(sum(times[clock] for times in traced) / sum(times[clock] for times in untraced))
        self.seen.append(seen.number / exits)
        self.unit = seen.unit


def tries(ways: Sequence[Way], starts: int = _STARTS, scale: float = 1.0) -> Iterator[tuple[Way, _Measured | str]]:
    """Start every tool so often, in turns; yield after each what is known of it by then, or why it does not work.

    ``scale``: of the exits of a round, for slow machines.
    """
    measured = {way.name: _Measured() for way in ways}
    refused: set[str] = set()
    for full in (False, True):
        _EMPTY[full] = first("auto", choices(full=full), Empty).opened
    with tempfile.TemporaryDirectory(prefix="kvmreq-bench-") as directory:
        scratch = Path(directory)
        build(scratch / "exit_loop")
        guests = Guests(scratch / "exit_loop", 1, 1 << 30, int(_EXITS * scale))
        try:
            for way in (way for _ in range(starts) for way in ways):
                if way.name in refused:
                    continue
                try:
                    if way.program is not None and not shutil.which(way.program):
                        raise NotHere(f"not here: apt install {way.package}")
                    exits = int(way.exits * scale)
                    untraced = [guests.round() for _ in range(_ROUNDS // 2)]
                    with way.enter(scratch, guests) as seen:
                        traced = [guests.round(exits) for _ in range(_ROUNDS)]
                    untraced += [guests.round() for _ in range(_ROUNDS // 2)]
                except NotHere as why:
                    refused.add(way.name)
                    yield way, str(why)
                else:
                    measured[way.name].add(traced, untraced, seen, exits * _ROUNDS)
                    yield way, measured[way.name]
        finally:
            guests.close()
            for full in (False, True):
                _EMPTY.pop(full).close()


def told(way: Way, known: _Measured | str) -> Iterator[Figure | Missing]:
    """Yield what is known of a tool as lines of the table."""
    if isinstance(known, str):
        yield Missing("tools", way.name, known)
        return
    yield Figure("tools", f"{way.name} / untraced", statistics.median(known.wall), "x")
    saw = f"{statistics.median(known.seen):.2f} {known.unit} an exit" if known.unit != "nothing" else "nothing"
    yield Figure("tools", f"  CPU time of the vCPU; it saw {saw}", statistics.median(known.cpu), "x")


def figures() -> Iterator[Figure | Missing]:
    """Yield for each tool its ratio, and what it saw."""
    for way, known in dict(tries(WAYS)).items():
        yield from told(way, known)
