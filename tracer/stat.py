"""Statistics of a live host: programs that count in the kernel, and a reader that looks at what they counted.

Exits cost no event. The ring carries only which vCPUs come and go, so that a count has an owner.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from probes import exits, program, requests
from probes import stat as programs
from probes.plan import Plan, Via
from probes.requests import TRIPLE_FAULT
from probes.schema import KVM_EXIT_SHUTDOWN, Kind
from tracer import canary, guests, host, tracefs
from tracer.bpf import Engine
from tracer.engines import Choice, attached, choices, first, uncounted
from tracer.errors import KvmreqError
from tracer.loss import Loss

_RING_BYTES = 1 << 20  # some 13,000 vCPUs that come and go between two looks
_POLL_S = 0.05
_MAX_VCPUS = 4096

_BPF_MAP_DELETE_ELEM, _BPF_MAP_LOOKUP_BATCH = 3, 24  # enum bpf_cmd, uapi linux/bpf.h
_ENOENT = 2


class _Batch(ctypes.Structure):
    # The `batch` member of union bpf_attr (uapi linux/bpf.h). Linux commit 057996380a42
    # ("bpf: Add batch ops to all htab bpf map") (in v5.6).
    _fields_ = (
        ("in_batch", ctypes.c_uint64),
        ("out_batch", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("map_fd", ctypes.c_uint32),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _Element(ctypes.Structure):
    # The member of union bpf_attr (uapi linux/bpf.h) for BPF_MAP_*_ELEM.
    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _Map:
    # A hash of the programs, read as a whole: numpy arrays that the kernel fills, used again each time.
    def __init__(self, table: Any, key: npt.DTypeLike, value: npt.DTypeLike) -> None:
        self._descriptor = int(table.map_fd)
        self._keys = np.zeros(table.max_entries, key)
        self._values = np.zeros(table.max_entries, value)
        if (ctypes.sizeof(table.Key), ctypes.sizeof(table.Leaf)) != (self._keys.itemsize, self._values.itemsize):
            raise AssertionError("the programs and the reader differ in what a map holds")

    def read(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        position = ctypes.c_uint64()
        request = _Batch(
            out_batch=ctypes.addressof(position),
            keys=self._keys.ctypes.data,
            values=self._values.ctypes.data,
            count=len(self._keys),
            map_fd=self._descriptor,
        )
        result = host.bpf_syscall(_BPF_MAP_LOOKUP_BATCH, request)
        if result < 0 and result != -_ENOENT:  # which says that the end was reached
            raise KvmreqError(f"the kernel does not give its counts: errno {-result}", hint="Linux 5.6 or later does")
        return self._keys[: request.count].copy(), self._values[: request.count].copy()

    def delete(self, keys: npt.NDArray[Any]) -> None:
        for place in range(len(keys)):
            request = _Element(map_fd=self._descriptor, key=keys.ctypes.data + place * keys.itemsize)
            host.bpf_syscall(_BPF_MAP_DELETE_ELEM, request)


@dataclass(frozen=True)
class Only:
    """What a user wants counted; empty: everything."""

    pids: Sequence[int] = ()
    vms: Sequence[int] = ()  # numbers as the output tells them
    vcpus: Sequence[int] = ()  # KVM's vcpu_id


@dataclass(frozen=True)
class Vcpu:
    """A vCPU that was seen."""

    vm: int  # a number that people get: VMs that run already count by pid, later ones as they come
    vcpu: int  # KVM's vcpu_id
    guest: guests.Guest


@dataclass(frozen=True)
class Reading:
    """What had been counted at a moment, and what had not."""

    begin_ns: int  # of the interval that ends with it; CLOCK_MONOTONIC
    end_ns: int
    counts: programs.Counts  # since each vCPU was first seen
    vcpus: Mapping[int, Vcpu]  # those that are wanted, by the number that they are counted under
    ended: frozenset[int]  # those that the kernel has forgotten since
    filtered: bool  # whether only some are wanted
    loss: Loss  # since the beginning
    unseen: Sequence[str]


class _Programs(Engine):
    # The engine with the programs of probes/programs/stat.c.
    def __init__(self, plan: Plan, pids: Sequence[int]) -> None:
        settings = program.Settings(
            watched=1 << TRIPLE_FAULT,
            cpus=host.possible_cpus(),
            filtered=bool(pids),
            ring_bytes=_RING_BYTES,
            max_vcpus=_MAX_VCPUS,
        )
        super().__init__(plan, settings, pids, program.Addition(programs.constants(plan.engine), programs.FILES))
        self.values = _Map(self._bpf[b"stat_values"], programs.KEY, programs.VALUE)
        self.words = _Map(self._bpf[b"stat_requests"], "u4", programs.WORDS)


def _plan(engine: str) -> Plan:
    hooks = programs.HOOKS[engine]
    tracepoints = host.tracepoints(hook.target for hook in hooks if hook.via is Via.RAW_TRACEPOINT)
    targets = [hook.target for hook in hooks if hook.via is not Via.RAW_TRACEPOINT]
    functions = host.addresses(targets) if targets else {}
    return programs.make(engine, functions, tracepoints, host.tracepoint_arguments(), uncounted=uncounted())


def _offers() -> Iterator[Choice]:
    for choice in choices():
        if choice.engine not in programs.HOOKS:
            continue
        if choice.why_not is not None:
            yield choice
        else:
            made = _plan(choice.engine)
            yield Choice(choice.engine, made, made.hopeless)


def _heard(made: _Programs) -> canary.Heard:
    """Have a canary counted, and forget it."""

    def misses(own: npt.NDArray[np.void]) -> Iterator[str]:
        number = np.unique(own["vcpu"])
        counted, values = made.values.read()
        vcpus, words = made.words.read()
        mine, word = np.isin(counted["vcpu"], number), np.isin(vcpus, number)
        delivered = mine & (counted["kind"] == exits.Kind.USER) & (counted["reason"] == KVM_EXIT_SHUTDOWN)
        made.values.delete(counted[mine])
        made.words.delete(vcpus[word])
        for what, seen in (
            ("the request that was pending", words[word]["raised"][:, TRIPLE_FAULT]),
            ("its delivery", words[word]["serviced"][:, TRIPLE_FAULT]),
            ("its exit to user space", values[delivered]["count"]),
        ):
            if seen.sum() != 1:
                yield what

    return canary.listen(made, misses)


@dataclass
class Statistics:
    """Counting on a live host. Use: ``start()``, :meth:`readings`, and ``close()``."""

    only: Only = field(default_factory=Only)
    engine: str = "auto"

    def start(self) -> None:
        """Attach. Raises KvmreqError."""
        self._traced = guests.Held(self.only.pids)
        running = guests.running()
        taken = first(self.engine, _offers(), lambda plan: attached(_Programs(plan, self.only.pids), _heard))
        self._programs, heard = taken.opened
        self.plan = self._programs.plan
        self.notes = [f"{why}: the {self.plan.engine} engine is used" for why in taken.failed]
        formats = tracefs.formats(exits.EVENTS)
        self._names = {name: exits.parse(formats.get(name, "")) for name in exits.EVENTS}
        self.names = requests.names(host.release())
        self._vcpus: dict[int, Vcpu] = {}
        self._vms: dict[int, int] = {}
        self._ended: set[int] = set()
        self._reserved = {pid: place for place, pid in enumerate(sorted(running), 1)}
        self._next_vm = len(running) + 1
        self._meet(heard.others)
        plan = [*self._programs.plan.as_json(), *canary.untried(heard)]
        self._unseen = [line["unseen"] for line in plan if line["hook"] is None]
        self._unseen += [
            f"the names of {name}'s reasons (its format in tracefs cannot be read)"
            for name in exits.EVENTS
            if name not in formats
        ]

    @property
    def exit_hook(self) -> str:
        """Return the program that the kernel took for kvm_exit; empty where it took none."""
        return next((hook.program for hook in self._programs.plan.attachable if hook.target == "kvm_exit"), "")

    def name(self, kind: exits.Kind, number: int, variant: int) -> str:
        """Return the kernel's name of a reason."""
        return exits.reason(self._names, kind, number, variant)

    def _meet(self, batch: npt.NDArray[np.void]) -> None:
        for event in batch[np.isin(batch["kind"], (Kind.VCPU_NEW, Kind.VCPU_END, Kind.VMM_EXIT))]:
            kind, number, pid = int(event["kind"]), int(event["vcpu"]), int(event["pid"])
            if kind == Kind.VCPU_NEW:
                self._vcpus[number] = Vcpu(self._vm(int(event["detail"]), pid), int(event["arg"]), guests.guest(pid))
            elif kind == Kind.VCPU_END:
                self._ended.add(number)
            else:
                self._ended |= {number for number, vcpu in self._vcpus.items() if vcpu.guest.pid == pid}

    def _vm(self, number: int, pid: int) -> int:
        if number not in self._vms:
            reserved = self._reserved.pop(pid, None)
            self._vms[number] = self._next_vm if reserved is None else reserved
            self._next_vm += reserved is None
        return self._vms[number]

    def _wanted(self) -> dict[int, Vcpu]:
        return {
            number: vcpu
            for number, vcpu in self._vcpus.items()
            if (not self.only.vms or vcpu.vm in self.only.vms) and (not self.only.vcpus or vcpu.vcpu in self.only.vcpus)
        }

    def _read(self) -> tuple[programs.Counts, frozenset[int]]:
        # Ends come first: what is counted of a vCPU whose end has been read is final.
        self._meet(self._programs.drain())
        ended = frozenset(self._ended)
        counts = programs.Counts(*self._programs.values.read(), *self._programs.words.read())
        self._meet(self._programs.drain())  # who they are: said before they are counted
        return counts, ended

    # Of vCPUs that have ended all has been told: their places are needed.
    def _forget(self, counts: programs.Counts, ended: frozenset[int]) -> None:
        if not ended:
            return
        over = np.fromiter(ended, "u4")
        self._programs.values.delete(counts.keys[np.isin(counts.keys["vcpu"], over)])
        self._programs.words.delete(counts.vcpus[np.isin(counts.vcpus, over)])
        for number in ended:
            self._vcpus.pop(number, None)
        self._ended -= ended

    def readings(self, length_s: float, over: Callable[[], bool], most: int | None = None) -> Iterator[Reading]:
        """Yield what has been counted at the end of each interval, until ``over`` says so or there were ``most``.

        The last one may be shorter: the hooks are taken away before it is read, so that nothing goes uncounted.
        """
        begin = host.monotonic_ns()
        number, due, last = 0, time.monotonic(), False
        while not last:
            due += length_s
            while not (last := over()) and (left := due - time.monotonic()) > 0:
                time.sleep(min(left, _POLL_S))
                self._programs.settle()
            number += 1
            last = last or number == most
            if last:
                self._programs.detach()
            counts, ended = self._read()
            end = host.monotonic_ns()
            filtered = bool(self.only.vms or self.only.vcpus)
            wanted, loss = self._wanted(), self._programs.loss()
            yield Reading(begin, end, counts, wanted, ended, filtered, loss, tuple(self._unseen))
            self._forget(counts, ended)
            begin = end

    @property
    def over(self) -> bool:
        """Tell whether every process that was asked for has ended."""
        return self._traced.ended

    def close(self) -> None:
        """Take every hook away and free everything."""
        self._programs.close()
        self._traced.close()

    def __enter__(self) -> Statistics:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
