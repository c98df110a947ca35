"""What recording costs a guest that exits to user space as fast as it can, against empty programs on the same hooks."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from bench.command import recording
from bench.table import Figure
from probes import program
from probes.plan import Plan, Via
from tracer.engines import choices, first

_ROUNDS = 9
_EXITS = 200_000
Times = tuple[float, float]  # wall, CPU of the vCPU's thread
_EMPTY = "int empty_{index}(void *ctx)\n{{\n\treturn 0;\n}}\n"


class Empty:
    """Empty programs on every hook of a plan: the least that tracing there can cost."""

    def __init__(self, plan: Plan) -> None:
        os.environ["BCC_KERNEL_SOURCE"] = str(program.headers())
        from bcc import BPF

        self._hooks = plan.attachable
        self._bpf: Any = BPF(text="".join(_EMPTY.format(index=index) for index in range(len(self._hooks))))

    @contextmanager
    def attached(self) -> Iterator[None]:
        for index, hook in enumerate(self._hooks):
            name = f"empty_{index}"
            if hook.via is Via.RAW_TRACEPOINT:
                self._bpf.attach_raw_tracepoint(tp=hook.target, fn_name=name)
            elif hook.via is Via.TRACEPOINT:
                self._bpf.attach_tracepoint(tp=hook.target, fn_name=name)
            elif hook.via is Via.KPROBE:
                self._bpf.attach_kprobe(event=hook.target, fn_name=name)
            else:
                self._bpf.attach_kretprobe(event=hook.target, fn_name=name)
        try:
            yield
        finally:
            for name in list(self._bpf.raw_tracepoint_fds):
                self._bpf.detach_raw_tracepoint(tp=name)
            for name in list(self._bpf.tracepoint_fds):
                self._bpf.detach_tracepoint(tp=name)
            for name in list(self._bpf.kprobe_fds):
                self._bpf.detach_kprobe_event(name)

    def close(self) -> None:
        self._bpf.cleanup()


class Guests:
    """Guests that exit in a loop, each on a CPU of its own; the first one is measured."""

    def __init__(self, binary: Path, number: int, rounds: int, exits: int) -> None:
        cpus = sorted(os.sched_getaffinity(0), reverse=True)
        self._processes = []
        for index in range(number):
            # One round more, to warm up; the guests beside the first one run longer, so that it is never alone.
            process = subprocess.Popen(
                [str(binary), str(rounds + 1), str(exits if index == 0 else exits * 5 // 4)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            os.sched_setaffinity(process.pid, {cpus[index % len(cpus)]})
            self._processes.append(process)
        for process in self._processes:
            self._line(process)
        self.round()

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"exit_loop ended with status {process.wait()}")
        return line

    @property
    def pid(self) -> int:
        """Return the process of the first guest."""
        return self._processes[0].pid

    def round(self, exits: int | None = None) -> Times:
        """Run one round, of so many exits; return the nanoseconds of one KVM_RUN round trip of the first guest."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{exits or ''}\n")
            process.stdin.flush()
        first, *_ = [self._line(process).split() for process in self._processes]
        return float(first[0]), float(first[1])

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def build(binary: Path) -> None:
    """Compile the VMM of a guest that exits in a loop."""
    subprocess.run(["gcc", "-O2", "-o", binary, Path(__file__).with_name("exit_loop.c")], check=True)


def figures() -> Iterator[Figure]:
    """Yield the figures of one busy vCPU, and of one that has a second one beside it."""
    empty = first("auto", choices(), Empty).opened
    with tempfile.TemporaryDirectory(prefix="kvmreq-bench-") as scratch:
        binary = Path(scratch) / "exit_loop"
        build(binary)
        for number in (1, 2):
            yield from _measure(Path(scratch), binary, empty, number)
    empty.close()


def _measure(scratch: Path, binary: Path, empty: Empty, number: int) -> Iterator[Figure]:
    guests = Guests(binary, number, 3 * _ROUNDS, _EXITS)
    taken = iter(range(_ROUNDS))
    ways: tuple[Callable[[], AbstractContextManager[object]], ...] = (
        nullcontext,
        empty.attached,
        lambda: recording(scratch / f"{number}-{next(taken)}"),
    )
    rounds: list[list[Times]] = []
    try:
        for _ in range(_ROUNDS):
            times = []
            for way in ways:
                with way():
                    times.append(guests.round())
            rounds.append(times)
    finally:
        guests.close()

    def ratio(above: int, below: int, clock: int = 0) -> float:
        return statistics.median(one[above][clock] / one[below][clock] for one in rounds)

    if number == 1:
        yield Figure("overhead", "KVM_RUN round trip, untraced", statistics.median(one[0][0] for one in rounds), "ns")
    who = "one vCPU" if number == 1 else "two vCPUs"
    yield Figure("overhead", f"{who}: empty programs / untraced", ratio(1, 0), "x")
    yield Figure("overhead", f"{who}: recording / untraced", ratio(2, 0), "x", 1.10 if number == 1 else None)
    yield Figure("overhead", f"{who}: recording / empty programs", ratio(2, 1), "x")
    yield Figure("overhead", f"{who}: empty programs / untraced, its CPU time", ratio(1, 0, 1), "x")
    yield Figure("overhead", f"{who}: recording / untraced, its CPU time", ratio(2, 0, 1), "x")
