"""The ftrace engine: probe events in a tracefs instance of its own. Needs neither BPF nor BCC.

The kernel only writes down what the probes fetch; what that means is worked out here, in user space, by
:mod:`tracer.vcpus`. Unlike BPF, tracefs keeps what a dead process has made: names say whose a thing is, and the next
start takes away what nobody can own any more.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import heapq
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from probes import fetch
from probes.btf import Btf, MissingField
from probes.fetch import called
from probes.plan import Hook, Plan, Via
from probes.program import Settings
from probes.schema import EVENT
from tracer import host, trace_pipe
from tracer.errors import CannotTrace
from tracer.loss import Loss
from tracer.tracefs import command
from tracer.vcpus import Vcpus

_PLACES = host.TRACEFS
_OURS = re.compile(r"kvmreq[-_](\d+)[-_](\d+)(?:[-_]\d+)?")
_LEAST_KB = 8  # of buffer for each CPU: two pages, the least that the kernel makes
# Threads that can be inside a function at once, and be seen to return from it; the kernel counts those that cannot.
_MAXACTIVE = 256
# What per_cpu/cpuN/stats counts: records that a full buffer overwrote, gave up, or could not take.
_STATS = ("overrun", "commit overrun", "dropped events")
_TYPE = np.dtype([("type", "u2")])  # every record begins with its event's number


# --- what this host offers ------------------------------------------------------------------------------------


def tracefs(places: Iterable[Path] = _PLACES) -> Path | None:
    """Return where tracefs is mounted, or None."""
    return next((place for place in places if (place / "instances").is_dir()), None)


def no_tracefs(places: Iterable[Path] = _PLACES) -> str | None:
    """Say why there is no tracefs to be used, if so."""
    if tracefs(places) is None:
        return "tracefs is not mounted: mount -t tracefs nodev /sys/kernel/tracing"
    return None


# Probes that no verdict hangs on, like those of a Site, without which a request is raised_by kvm_run. A vCPU whose end
# is missed is open, or ends when its memory is used again; one whose beginning is missed begins where it is first seen.
# Nor can their misses be told where a fetch argument that finds no address counts as one: see fault_handler in
# probes/fetch.py. What decides has no such argument there.
_DECIDE_NOTHING = {"vcpu_create", "vcpu_destroy", "vm_destroy", "vcpu_reset"}
# What tells of other threads than the vCPU's own: no verdict hangs on that either, and it is counted apart.
_OF_OTHERS = {"kick", "request", "request_end"}


def no_root() -> str | None:
    """Say why tracefs may not be used, if so."""
    return None if os.geteuid() == 0 else "this process may not use tracefs: run as root"


def no_probe_events(root: Path) -> str | None:
    """Say why probe events cannot be made, if they cannot."""
    if not (root / "kprobe_events").exists():
        return "this kernel was built without probe events (CONFIG_KPROBE_EVENTS): tracefs has no kprobe_events"
    return None


def locked_down() -> str | None:
    """Say that lockdown forbids tracefs, if it does."""
    # Linux commit 17911ff38aa5 ("tracing: Add locked_down checks to the open calls of files created for tracefs")
    # (in v5.4).
    if host.lockdown() == "confidentiality":
        return "the kernel is locked down (confidentiality): tracefs is refused"
    return None


def no_clock(root: Path) -> str | None:
    """Say that records cannot have CLOCK_MONOTONIC times, if so."""
    if "mono" not in re.findall(r"\w+", (root / "trace_clock").read_text()):
        return "tracefs offers no trace_clock mono (CLOCK_MONOTONIC)"
    return None


def refused(places: Iterable[Path] = _PLACES) -> str | None:
    """Say why this engine cannot work here, if so: the first cause that explains the others."""
    root = tracefs(places)
    reason = no_root() or (host.no_kprobes() if root is None else None) or no_tracefs(places)
    if reason is not None or root is None:
        return reason
    return no_probe_events(root) or locked_down() or no_clock(root) or host.no_btf()


def events(names: Iterable[str], places: Iterable[Path] = _PLACES) -> set[str]:
    """Return which of these tracepoints (``kvm:kvm_userspace_exit``) tracefs has."""
    root = tracefs(places)
    return {name for name in names if root and (root / "events" / name.replace(":", "/") / "format").exists()}


# --- names, and what the dead have left -------------------------------------------------------------------------


def _started(pid: int, proc: Path) -> str | None:
    try:
        # After the process name, which may hold anything: proc(5), field 22.
        return (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return None


def dead(name: str, proc: Path = host.PROC) -> bool:
    """Tell whether a thing of this name was made by a kvmreq that lives no more."""
    made = _OURS.fullmatch(name)
    return made is not None and _started(int(made[1]), proc) != made[2]


def _remove_instance(instance: Path) -> None:
    (instance / "events/enable").write_text("0")
    instance.rmdir()


def _remove_group(root: Path, group: str) -> None:
    for line in (root / "kprobe_events").read_text().splitlines():
        name = line.split()[0].partition(":")[2]
        if name.startswith(f"{group}/"):
            command(root, f"-:{name}")


def _groups(root: Path) -> set[str]:
    lines = (root / "kprobe_events").read_text().splitlines()
    return {line.split()[0].partition(":")[2].partition("/")[0] for line in lines if line}


def remove_dead(root: Path, proc: Path = host.PROC) -> list[str]:
    """Take away what a kvmreq that was killed has left, and nothing else; return the names."""
    gone = []
    for instance in sorted((root / "instances").iterdir()):
        if dead(instance.name, proc):
            with contextlib.suppress(OSError):  # another kvmreq that starts now was first
                _remove_instance(instance)
                gone.append(instance.name)
    for group in sorted(_groups(root)):
        if dead(group, proc):
            with contextlib.suppress(OSError):
                _remove_group(root, group)
                gone.append(group)
    return gone


def _process_of(thread: int) -> int:
    # For a kernel that does not tell it (mm_struct.owner): the thread may have ended, then it stands for itself.
    try:
        status = (host.PROC / str(thread) / "status").read_text()
    except OSError:
        return thread
    found = re.search(r"^Tgid:\s*(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else thread


# --- the engine -------------------------------------------------------------------------------------------------


class _Source:
    """What is known of one event: its number, its record, and who takes it."""

    def __init__(self, text: str, takes: Callable[[Any, int, int], None]) -> None:
        parsed = trace_pipe.record_format(text)
        names = parsed.dtype.names or ()
        wanted = [name for name in names if name == "common_pid" or not name.startswith(("common_", "__"))]
        self.number = parsed.number
        self.dtype = parsed.dtype
        self.wanted = wanted
        self.takes = takes
        record: Any = collections.namedtuple("record", wanted)  # type: ignore[misc]
        self.make: Callable[[Iterable[int]], Any] = record._make


class Engine:
    """Probe events of the running kernel, and what they have to say.

    A context manager: leaving it removes everything that it has made.
    """

    def __init__(self, plan: Plan, settings: Settings, pids: Iterable[int] = ()) -> None:
        self.plan = plan
        self.settings = settings
        root = tracefs()
        if root is None:
            raise CannotTrace(f"the ftrace engine does not work here: {no_tracefs()}")
        self._root = root
        try:
            with Btf("kvm") as btf:
                self._at = fetch.offsets(btf)
        except MissingField as error:
            raise CannotTrace(
                f"the ftrace engine cannot read vCPUs: {error}", hint="kvmreq doctor tells what works here"
            ) from error
        host.forget_addresses()
        self.vcpus = Vcpus(
            watched=settings.watched | settings.dead,
            cap_exists="triple_fault_event" in self._at,
            full=settings.full,
            pids=frozenset(pids),
            owner_of=_process_of,
            sites={hook.program: hook.site for hook in plan.attachable if hook.site is not None},
            calls=[hook.program for hook in plan.attachable if hook.full and hook.via is not Via.TRACE_EVENT],
        )
        self._sources: list[_Source] = []
        self._pipes: dict[int, int] = {}
        self._ready: list[tuple[int, ...]] = []
        self._held: list[tuple[int, int, int, Callable[[Any, int, int], None], Any]] = []
        self._produced = 0
        self._missed_pages = 0
        self._arrivals = 0
        self._loss = Loss()
        self._detached = False
        remove_dead(root)
        try:
            self._make_instance()
        except OSError as error:
            raise CannotTrace(
                f"the ftrace engine cannot make a tracefs instance: {error.strerror}",
                hint="kvmreq doctor tells what works here",
            ) from error

    def _make_instance(self) -> None:
        identity = f"kvmreq-{os.getpid()}-{_started(os.getpid(), host.PROC)}"
        name, number = identity, 1
        while True:
            self._instance = self._root / "instances" / name
            try:
                self._instance.mkdir()
                break
            except FileExistsError:
                number += 1  # another engine of this process
                name = f"{identity}-{number}"
        self._group = name.replace("-", "_")
        try:
            self._write("trace_clock", "mono")
            self._write("options/overwrite", "0")  # the newest are dropped, and counted: what is there has no holes
            cpus = sorted(int(path.name[3:]) for path in (self._instance / "per_cpu").iterdir())
            self._write("buffer_size_kb", str(max(_LEAST_KB, (self.settings.ring_bytes >> 10) // len(cpus))))
            try:
                # Linux commit 2808e31ec12e ("ring-buffer: Add interface for configuring trace sub buffer size")
                # (in v6.8).
                self._page = int((self._instance / "buffer_subbuf_size_kb").read_text()) << 10
            except FileNotFoundError:
                self._page = os.sysconf("SC_PAGE_SIZE")
            for cpu in cpus:
                path = self._instance / f"per_cpu/cpu{cpu}/trace_pipe_raw"
                self._pipes[cpu] = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except BaseException:
            self.close()
            raise

    def _write(self, name: str, text: str) -> None:
        (self._instance / name).write_text(text)

    def attach(self) -> None:
        """Make and enable every probe event of the plan, in its order.

        An event that the kernel refuses although its function exists is left out of :attr:`plan`, unless
        the engine cannot do without it.
        """
        for hook in self.plan.attachable:
            try:
                self._attach(hook)
            except OSError as error:
                why = self._why(error)
                if hook.required:
                    raise CannotTrace(
                        f"the ftrace engine cannot hook {hook.target}: {why}",
                        hint="kvmreq doctor tells what works here",
                    ) from error
                self.plan = self.plan.refusing(hook, why)

    def _why(self, error: OSError) -> str:
        # tracefs says what it does not like about a command. Linux commit 8a062902be72 ("tracing: Add tracing
        # error log") (in v5.2).
        with contextlib.suppress(OSError):
            told = re.findall(r"error: (.+)\n  Command: (.+)", (self._root / "error_log").read_text())
            if error.errno == errno.EINVAL and told and self._group in told[-1][1]:
                return f"{error.strerror}: {told[-1][0].strip()}"
        return error.strerror or str(error)

    def _attach(self, hook: Hook) -> None:
        if hook.via is Via.TRACE_EVENT:
            path = hook.target.replace(":", "/")
        else:
            path = f"{self._group}/{hook.program}"
            kind = "p" if hook.via is Via.KPROBE_EVENT else f"r{_MAXACTIVE}"
            words = [f"{kind}:{path}", hook.target, *fetch.arguments(hook.program, self._at)]
            command(self._root, " ".join(words))
        text = (self._instance / "events" / path / "format").read_text()
        self._sources.append(_Source(text, self.vcpus.takes[hook.program]))
        self._write(f"events/{path}/enable", "1")

    # --- reading --------------------------------------------------------------------------------------------

    def drain(self, most: int = 1 << 20) -> npt.NDArray[np.void]:
        """Return the events of everything that was recorded until now, ``most`` at the most."""
        if most and not self._detached:
            self._read(host.monotonic_ns())
        taken, self._ready = self._ready[:most], self._ready[most:]
        return np.array(taken, EVENT)

    @property
    def pending(self) -> int:
        """Return how many events are known to wait; what is still in the kernel's buffers is known by :meth:`drain`."""
        return len(self._ready)

    def _read(self, until_ns: int) -> None:
        """Take what every CPU has recorded, and make events of what was recorded until then.

        What came later waits for the next time: until another CPU's buffer has been read it is not known what lies
        before it. A record that is written meanwhile with an earlier time is taken then. It cannot matter to what was
        taken before: a thread has finished its records before anything can follow from what it did.
        """
        for cpu, pipe in self._pipes.items():
            pages = self._pages(pipe, until_ns)
            if pages:
                self._take(cpu, pages)
        held = self._held
        while held and held[0][0] <= until_ns:
            time_ns, _, cpu, takes, record = heapq.heappop(held)
            takes(record, time_ns, cpu)
        made = self.vcpus.events
        self._produced += len(made)
        self._ready += made
        made.clear()

    def _pages(self, pipe: int, until_ns: int) -> bytearray:
        pages = bytearray()
        while True:
            try:
                page = os.read(pipe, self._page)
            except BlockingIOError:
                return pages
            if not page:
                return pages
            pages += page.ljust(self._page, b"\0")
            if trace_pipe.first_time_ns(page) > until_ns:
                return pages  # a busy CPU is not followed for ever

    def _take(self, cpu: int, pages: bytearray) -> None:
        records = trace_pipe.parse(pages, self._page)
        self._missed_pages += records.missed
        buffer = np.frombuffer(pages, np.uint8)
        numbers = trace_pipe.take(buffer, records.at, _TYPE)["type"]
        rows = []
        for source in self._sources:
            places = np.flatnonzero(numbers == source.number)
            if len(places):
                taken = trace_pipe.take(buffer, records.at[places], source.dtype)[source.wanted]
                times = records.time_ns[places].tolist()
                make, takes = source.make, source.takes
                rows += [
                    (time_ns, place, cpu, takes, make(values))
                    for time_ns, place, values in zip(
                        times, (places + self._arrivals).tolist(), taken.tolist(), strict=True
                    )
                ]
        self._arrivals += len(numbers)
        rows += self._held
        rows.sort(key=_when)  # a sorted list is a heap
        self._held = rows

    # --- what was lost --------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Return totals: events produced, boundaries read, records that are missing."""
        return {
            "produced": self._produced,
            "ring_full": 0,
            "map_full": 0,
            "missed": self.loss().missed,
            "boundaries": self.vcpus.boundaries,
            "answered": self.vcpus.answered,
        }

    def loss(self) -> Loss:
        """Return what was lost in the kernel until now.

        Nobody knows what a record that is missing would have told, so all of them are hooks that were missed, which no
        event's number reveals: what was pending then is undecided.
        """
        if self._pipes:
            unread = self.vcpus.lost
            missed, kicks = self._probe_misses()
            missed += max(self._dropped(), self._missed_pages) + sum(loss.count for loss in unread.values())
            self._loss = Loss(missed=missed, kicks=kicks, vcpus=dict(unread))
        return self._loss

    def _dropped(self) -> int:
        total = 0
        for cpu in self._pipes:
            text = (self._instance / f"per_cpu/cpu{cpu}/stats").read_text()
            counts = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
            total += sum(int(counts.get(name, 0)) for name in _STATS)
        return total

    def _probe_misses(self) -> tuple[int, int]:
        """Return how many hooks were missed that a verdict may hang on, and how many that tell of kicks."""
        missed = kicks = 0
        hooks = {hook.program: hook for hook in self.plan.attachable if hook.via is not Via.TRACE_EVENT}
        # Of every probe of the host: name, hits, misses. The name may stand without its group.
        for line in (self._root / "kprobe_profile").read_text().splitlines():
            name, _hits, misses = line.split()
            hook = hooks.get(name.rpartition("/")[2])
            if hook is None or hook.site is not None or hook.program in _DECIDE_NOTHING:
                continue
            if not hook.full:
                missed += int(misses)
            elif called(hook.program)[0] in _OF_OTHERS:
                kicks += int(misses)
            # else a reading for what a trace event tells: missed where that finds none, see Vcpus.lost
        return missed, kicks

    # --- guests ---------------------------------------------------------------------------------------------

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Meanwhile this process asks vCPUs: of each that is seen for it an answer is counted."""
        self.vcpus.asker = threading.get_native_id()
        try:
            yield
        finally:
            self._read(host.monotonic_ns())
            self.vcpus.asker = 0

    @contextmanager
    def watching(self, pid: int) -> Iterator[None]:
        """Meanwhile this process is among those that are traced, whatever the user asked for."""
        asked_for = self.vcpus.pids
        if asked_for:
            self.vcpus.pids = {*asked_for, pid}
        try:
            yield
        finally:
            self.vcpus.pids = asked_for

    def settle(self) -> None:
        """Nothing to do: this engine sees KVM destroy a vCPU."""

    def loaded_again(self, modules: Collection[str]) -> None:
        """Set every hook anew: events of a module go with it, and probes do not come back by themselves."""
        del modules
        self.drain(0)
        self._write("events/enable", "0")
        _remove_group(self._root, self._group)
        self._sources = []
        self.attach()

    def detach(self) -> None:
        """Stop recording, and take what the buffers still hold."""
        if self._detached or not self._pipes:
            return
        self._write("tracing_on", "0")
        self._write("events/enable", "0")  # waits until no probe is running any more
        self._read(1 << 63)
        self._detached = True

    def close(self) -> None:
        """Remove the instance and every probe event."""
        with contextlib.suppress(OSError, ValueError):
            self.loss()
        for pipe in self._pipes.values():
            os.close(pipe)
        self._pipes = {}
        with contextlib.suppress(FileNotFoundError):
            _remove_instance(self._instance)
        _remove_group(self._root, self._group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _when(row: tuple[int, int, int, Any, Any]) -> tuple[int, int, int]:
    return row[:3]
