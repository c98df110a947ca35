"""The recorder: from a live host to a recording, and to whoever follows it.

The reader drains the ring on a timer (the probes never wake it: that would cost the guest), and a second thread writes
segments, so that a slow disk stops nothing before the queue between them is full. What does not fit is counted.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from probes import exits, requests
from probes.program import Settings
from probes.schema import SCHEMA_VERSION, Kind
from tracer import canary, guests, host, tracefs
from tracer.engines import Choice, attached, choices, first, open_engine
from tracer.errors import BadRecording, KvmreqError
from tracer.loss import Loss
from tracer.recording import Writer

_POLL_S = 0.05
_SEGMENT_S = 1.0  # a segment appears at most twice this after its first event
_SEGMENT_EVENTS = 2_000_000
_ASK_TIMES = 3  # a hook can be left out once, where another program is at work on that CPU
# The two clocks run alike but for what sets one of them; more than it may take to read both.
_CLOCK_STEP_NS = 1_000_000
_MOST_CLOCKS = 1000
_QUEUE = 4  # segments that wait to be written

Batch = npt.NDArray[np.void]
#: What a follower is given: a batch of events, the loss until then, and the guests by VM number.
Follower = Callable[[Batch, Loss, Mapping[int, guests.Guest]], None]


@dataclass(frozen=True)
class Wish:
    """What a user asked to be traced."""

    engine: str = "auto"
    requests: Sequence[str] = ("triple_fault",)
    full: bool = False
    pids: Sequence[int] = ()
    ring_bytes: int = 32 << 20


def watched(wish: Wish) -> dict[int, str]:
    """Return bit -> name of the requests that a wish names. Raises KvmreqError for one that this kernel has not."""
    try:
        return requests.selected(wish.requests, requests.names(host.release()))
    except requests.UnknownRequest as error:
        raise KvmreqError(str(error)) from error


def doubts(names: Mapping[int, str], table: requests.Names) -> list[str]:
    """Return what to note when a recording begins: that the requests watched may not be what they are called."""
    doubt = table.doubt(names.values())
    return [doubt] if doubt else []


class _SegmentWriter(threading.Thread):
    """Writes segments one after the other. Whatever goes wrong is kept as ``error``; who waits for it is woken."""

    def __init__(self, writer: Writer) -> None:
        super().__init__(name="kvmreq-writer", daemon=True)
        self._writer = writer
        self._queue: queue.Queue[tuple[list[Batch], Loss, int] | None] = queue.Queue(_QUEUE)
        self.error: KvmreqError | None = None
        self.not_written = 0
        self.start()

    def run(self) -> None:
        while (item := self._queue.get()) is not None:
            batches, loss, until_ns = item
            if self.error is None:
                try:
                    self._writer.segment(np.concatenate(batches), loss, until_ns)
                    continue
                except KvmreqError as error:
                    self.error = error
                except BaseException as error:  # of a library, or no memory: nobody else would hear of it
                    self.error = BadRecording(
                        f"{self._writer.path} cannot be written: {type(error).__name__}: {error}",
                        hint="what was written before is whole",
                    )
            self.not_written += sum(map(len, batches))

    def put(self, batches: list[Batch], loss: Loss, until_ns: int) -> None:
        """Hand over a segment; waits while too many are unwritten."""
        self._hand_over((batches, loss, until_ns))

    def _hand_over(self, item: tuple[list[Batch], Loss, int] | None) -> None:
        while self.is_alive():  # nobody takes what is put before one that is not
            with contextlib.suppress(queue.Full):
                return self._queue.put(item, timeout=_POLL_S)
        return None

    def finish(self) -> None:
        """Wait until everything is written."""
        self._hand_over(None)
        self.join()


@dataclass
class Recorder:
    """One recording in the making. Use: ``start()``, then ``poll()`` until it should end, then ``stop()``."""

    path: Path
    wish: Wish
    spare: Sequence[Path] = ()  # to take instead where the path exists already
    follower: Follower | None = None
    guests: dict[int, guests.Guest] = field(default_factory=dict)
    events: int = 0
    notes: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Attach, look up the guests that already run, and create the recording. Raises KvmreqError."""
        self._traced = guests.Held(self.wish.pids)
        names = watched(self.wish)
        table = requests.names(host.release())
        settings = Settings(
            watched=sum(1 << bit for bit in names),
            dead=table.dead,
            cpus=host.possible_cpus(),
            full=self.wish.full,
            filtered=bool(self.wish.pids),
            ring_bytes=self.wish.ring_bytes,
        )
        self._clocks = [host.clock_pair()]
        kvm = host.kvm()
        taken = first(
            self.wish.engine,
            choices(full=self.wish.full),
            lambda plan: attached(open_engine(plan, settings, self.wish.pids), canary.listen),
        )
        self._engine, heard = taken.opened
        self.plan = self._engine.plan
        self.notes += [f"{why}: the {self.plan.engine} engine is used" for why in taken.failed]
        try:
            self._modules = host.kvm_modules()
            self.notes += doubts(names, table)
            self._untried = canary.untried(heard)
            if heard.untried is not None:
                self.notes.append(f"not tried on a scratch VM whether the hooks see: {heard.untried}")
            self._plan_lines = [*self._engine.plan.as_json(), *self._untried]
            self._writer = Writer(
                self.path,
                {
                    "schema": SCHEMA_VERSION,
                    "host": host.hostname(),
                    "boot_id": host.boot_id(),
                    "kernel": host.release(),
                    "kvm_module": kvm.module,
                    "kvm_parameters": kvm.parameters,
                    "engine": self.plan.engine,
                    "engine_why": taken.why,
                    "detail": "full" if self.wish.full else "boundary",
                    "requests": list(names.values()),
                    "requests_by_bit": {str(bit): name for bit, name in names.items()},
                    "requests_flags": {
                        name: sorted(table.flags[name]) for name in names.values() if name in table.flags
                    },
                    "requests_table": table.table,
                    "requests_table_exact": table.exact,
                    "pids": list(self.wish.pids),
                    "started_ns": host.monotonic_ns(),
                    "ended_ns": None,
                    "clock": self._clocks[0],
                    "plan": self._plan_lines,
                    "untried": heard.untried,
                    "formats": tracefs.formats(exits.EVENTS),
                    "guests": {},
                },
                self.spare,
            )
            self.path = self._writer.path
            self._segments = _SegmentWriter(self._writer)
            self._batches: list[Batch] = []
            self._held = 0
            self._last_segment = time.monotonic()
            self._last_loss = Loss()
            # A recording is of what others do: it begins where the canary has ended.
            self._of_canary = {"produced": len(heard.own), "boundaries": self._engine.counters()["boundaries"]}
            self._keep(heard.others)
            self._census()
        except BaseException:
            self._engine.close()
            raise

    @property
    def over(self) -> bool:
        """Tell whether every process that was asked for has ended."""
        return self._traced.ended

    def _census(self) -> None:
        hidden = guests.not_looked_at()
        if hidden and not self.wish.pids:
            self._unanswered += len(hidden)
            self.notes.append(
                f"{len(hidden)} processes may not be looked at, as {hidden[0]}: guests among them are unknown"
            )
        for pid, descriptors in guests.running().items():
            if self.wish.pids and pid not in self.wish.pids:
                continue
            missing = self._ask(pid, descriptors)
            if missing:
                self._unanswered += missing
                self.notes.append(
                    f"{missing} vCPUs of process {pid} could not be looked up: each is seen from its next ioctl on"
                )

    def _ask(self, pid: int, descriptors: Sequence[int]) -> int:
        """Ask the vCPUs of a process, and return how many of them were not seen for it."""
        missing = 0
        for _ in range(_ASK_TIMES):
            before = self._engine.counters()["answered"]
            with self._engine.asking():
                asked = guests.ask(pid, descriptors)
            missing = asked.refused + asked.asked - (self._engine.counters()["answered"] - before)
            if missing <= 0:
                break
        return missing

    def _look_at_modules(self) -> None:
        now = host.kvm_modules()
        if now == self._modules:
            return
        came = sorted(name for name, number in now.items() if self._modules.get(name) != number)
        if came == ["kvm"] and len(now) == 1:
            return  # it runs no guest before its flavour comes, too: setting hooks twice would be blind twice as long
        self._modules = now
        if not came:
            return  # one was unloaded: its hooks are gone, and so is what they would have seen
        self._engine.loaded_again(came)
        self._census()
        what = f"{' and '.join(came)} {'was' if len(came) == 1 else 'were'} loaded again"
        self.notes.append(f"{what}: hooks in {'it' if len(came) == 1 else 'them'} are set anew")
        again = {"fact": what, "hook": None, "unseen": "what its functions told until the hooks in it were set anew"}
        self._plan_lines = [*self._engine.plan.as_json(), *self._untried, again]
        self._writer.update(plan=self._plan_lines)

    def poll(self, timeout_s: float = _POLL_S) -> None:
        """Wait a moment, then take what the ring holds. Raises KvmreqError when the recording cannot go on."""
        if not self._engine.pending:
            time.sleep(timeout_s)
        self._take()
        if self._segments.error is not None:
            raise self._segments.error

    def _take(self) -> None:
        self._engine.settle()
        batch = self._engine.drain()
        self._keep(batch)
        if self.follower is not None:
            # One that fails (its reader has gone) is not called again: stop() must still write what is left.
            follower, self.follower = self.follower, None
            follower(batch, self._engine.loss() if len(batch) else self._last_loss, self.guests)
            self.follower = follower
        due = time.monotonic() - self._last_segment >= _SEGMENT_S
        if due or self._held >= _SEGMENT_EVENTS:
            self._cut()
        if due:
            self._look_at_modules()

    def _keep(self, batch: Batch) -> None:
        if len(batch):
            self._meet(batch)
            self._batches.append(batch)
            self._held += len(batch)
            self.events += len(batch)

    def _meet(self, batch: Batch) -> None:
        new = batch[batch["kind"] == Kind.VCPU_NEW]
        if len(new):
            numbers, first = np.unique(new["detail"], return_index=True)
            for vm, pid in zip(numbers.tolist(), new["pid"][first].tolist(), strict=True):
                if vm not in self.guests:
                    self.guests[vm] = guests.guest(pid)
                    self._guests_changed = True

    _guests_changed = False
    _unanswered = 0
    _untried: Sequence[dict[str, Any]] = ()
    _final_loss: Loss | None = None

    def _cut(self) -> None:
        loss = self.loss()
        self._last_segment = time.monotonic()
        self._look_at_clocks()
        if self._guests_changed:
            self._writer.update(guests={str(vm): guest.as_json() for vm, guest in self.guests.items()})
            self._guests_changed = False
        if not self._batches and loss == self._last_loss:
            return
        self._last_loss = loss
        until = host.monotonic_ns()
        self._segments.put(self._batches or [self._engine.drain(0)], loss, until)
        self._batches, self._held = [], 0

    def _look_at_clocks(self) -> None:
        now = host.clock_pair()
        ahead = [clock["utc_ns"] - clock["monotonic_ns"] for clock in (self._clocks[-1], now)]
        if abs(ahead[1] - ahead[0]) > _CLOCK_STEP_NS:
            self._clocks = [*self._clocks[:_MOST_CLOCKS], now]
            self._writer.update(clocks=self._clocks[1:])

    def loss(self) -> Loss:
        """Return everything that was lost until now, or until :meth:`stop`."""
        loss = self._engine.loss() if self._final_loss is None else self._final_loss
        return replace(loss, not_written=self._segments.not_written, unanswered=self._unanswered)

    @property
    def size(self) -> int:
        """Return the bytes that the segments have on disk."""
        return self._writer.bytes

    def stop(self) -> None:
        """Detach, take what is left, write it and close the recording. Raises KvmreqError if that fails."""
        try:
            self._engine.detach()
            while self._engine.pending:
                before = self._engine.pending
                self._take()
                if self._engine.pending == before:
                    break  # a record that its writer never finished
            self._last_segment = 0.0
            self._cut()
            self._segments.finish()
            if self._segments.error is not None:
                raise self._segments.error
            self._writer.update(
                ended_ns=host.monotonic_ns(),
                counters={name: n - self._of_canary.get(name, 0) for name, n in self._engine.counters().items()},
                segments=self._writer.segments,
                guests={str(vm): guest.as_json() for vm, guest in self.guests.items()},
            )
        finally:
            # Also where something failed: Python's end may wait for ever for a thread that it cuts off in a library.
            self._segments.finish()
            self._final_loss = self._engine.loss()
            self._engine.close()
            self._traced.close()


def offers() -> Iterable[Choice]:
    """Return every engine with the reason why it works here or not, the best first."""
    return choices()
