"""The BPF engines: programs compiled by BCC, attached by the plan, read through the mapped ring.

The only importer of bcc, beside the question that fentry.py asks. Everything that BCC or the kernel prints while it
fails goes into the error, not to the terminal.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lab import scratch
from lab.kvm import LabError
from probes import program
from probes.btf import Btf, MissingField
from probes.plan import Hook, Plan, Via
from probes.schema import EVENT, LOOK, NO_IOCTL
from tracer import fentry, host
from tracer.errors import CannotTrace
from tracer.loss import Loss, VcpuLoss
from tracer.ring import Ring

# enum counter of probes/programs/vcpu.c.
_COUNTERS = (
    "produced",
    "ring_full",
    "map_full",
    "missed",
    "boundaries",
    "guest",
    "kicks_lost",
    "answered",
    "far_vcpus",
)

# How long after a look at the vCPUs the next one begins by itself. It never begins before so many times as long has
# passed as the last one took.
_LOOK_S = 0.25
_LOOK_SHARE = 50

_libc = ctypes.CDLL(None)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)

# BCC runs an optimiser of its own after clang's: one of them is enough, and nobody reads the debug information.
_CFLAGS = ["-Wno-unused-function", "-g0", "-Xclang", "-disable-llvm-passes"]


class _ProgInfo(ctypes.Structure):
    # struct bpf_prog_info (uapi linux/bpf.h), as far as recursion_misses. Linux commit 9ed9e9ba2337
    # ("bpf: Count the number of times recursion was prevented") (in v5.12).
    _fields_ = (
        ("before", ctypes.c_uint8 * 192),
        ("run_time_ns", ctypes.c_uint64),
        ("run_cnt", ctypes.c_uint64),
        ("recursion_misses", ctypes.c_uint64),
    )


@contextmanager
def _stderr_kept() -> Iterator[Callable[[], str]]:
    """Keep what BCC, clang and libbpf print while they work; the yielded function returns it."""
    with os.fdopen(os.memfd_create("kvmreq"), "w+b") as kept:
        saved = os.dup(2)
        os.dup2(kept.fileno(), 2)

        def text() -> str:
            kept.seek(0)
            return kept.read().decode(errors="replace")

        try:
            yield text
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _why(error: BaseException, printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line or "invalid" in line or "not allowed" in line]
    return f"{error}: {(telling or lines)[-1]}" if lines else str(error)


def _bpf_class() -> Any:
    """Return BCC's class, without its habit of attaching what has certain names: the plan decides when."""
    from bcc import BPF

    class Unattached(BPF):  # type: ignore[misc]
        def _trace_autoload(self) -> None:
            pass

    return Unattached


class Engine:
    """Programs attached to the running kernel, and what they have to say.

    A context manager: leaving it detaches everything. Nothing is pinned, so the kernel also drops everything when the
    process dies.
    """

    def __init__(
        self,
        plan: Plan,
        settings: program.Settings,
        pids: Iterable[int] = (),
        more: program.Addition = program.NOTHING_MORE,
    ) -> None:
        self.plan = plan
        self.settings = settings
        self._modules = fentry.modules(hook.target for hook in plan.attachable) if plan.engine == "fentry" else {}
        try:
            with Btf("kvm") as btf:
                found = program.offsets(btf, plan.engine)
        except MissingField as error:
            raise CannotTrace(
                f"the {plan.engine} engine cannot read vCPUs: {error}", hint="kvmreq doctor tells what works here"
            ) from error
        if any(hook.target == "kvm_exit" for hook in plan.attachable):
            found |= host.reason_offsets()
        symbols = host.addresses(("kvm_vcpu_ioctl", "kvm_vm_ioctl", "bpf_get_current_task_btf", "bpf_task_pt_regs"))
        self._hidden = plan.engine == "tracepoint" and not symbols.get("kvm_vcpu_ioctl")
        host.forget_addresses()
        text = program.source(plan, settings, found, symbols, self._modules, more)
        os.environ["BCC_KERNEL_SOURCE"] = str(program.headers())
        with ExitStack() as undo:
            with _stderr_kept() as printed:
                try:
                    self._bpf: Any = _bpf_class()(text=text.encode(), cflags=_CFLAGS)
                    undo.callback(self._bpf.cleanup)
                    self._counters = self._bpf[b"counters"]
                    self._lost = self._bpf[b"lost"]
                    self._lost[ctypes.c_uint32(0)] = self._lost.Leaf()
                    for pid in pids:
                        self._bpf[b"filter"][ctypes.c_uint32(pid)] = ctypes.c_uint8(1)
                    self._ring = Ring(self._bpf[b"ring"].map_fd, settings.ring_bytes, EVENT)
                except Exception as error:
                    # BCC raises Exception itself, for everything.
                    raise CannotTrace(
                        f"the {plan.engine} engine cannot be loaded: {_why(error, printed())}",
                        hint="kvmreq doctor tells what works here",
                    ) from error
            undo.pop_all()
        self._seen_losses = -1
        self._looked_for = -1
        self._rests_until = self._look_again = 0.0
        self._vcpu_losses: Mapping[int, VcpuLoss] = {}

    def attach(self) -> None:
        """Set every hook of the plan, in its order.

        A hook that the kernel refuses although it should exist is left out of :attr:`plan`, unless the
        engine cannot do without it.
        """
        for hook in self.plan.attachable:
            with _stderr_kept() as printed:
                try:
                    self._attach(hook)
                except Exception as error:
                    why = _why(error, printed())
                    if hook.required:
                        raise CannotTrace(
                            f"the {self.plan.engine} engine cannot hook {hook.target}: {why}",
                            hint="kvmreq doctor tells what works here",
                        ) from error
                    self.plan = self.plan.refusing(hook, why)
        if self._hidden:
            self._show_own()

    def _show_own(self) -> None:
        # By what the programs know the file of a vCPU and of a VM, where no address tells: see learn().
        try:
            with scratch.vcpu() as vcpu:
                for number, file in enumerate((vcpu, vcpu.vm), start=1):
                    with suppress(OSError):  # it is no ioctl
                        fcntl.ioctl(file.fd, NO_IOCTL, number)
        except LabError as error:
            raise CannotTrace(
                f"the kernel hides its addresses, and a VM of kvmreq's own cannot show them: {error}",
                hint="kvmreq doctor tells what works here",
            ) from error

    def _attach(self, hook: Hook) -> None:
        # BCC warns of names that are no bytes.
        target, fn_name = hook.target.encode(), program.name(hook, self._modules).encode()
        match hook.via:
            case Via.RAW_TRACEPOINT:
                self._attach_raw_tracepoint(hook)
            case Via.TRACEPOINT:
                self._bpf.attach_tracepoint(tp=target, fn_name=fn_name)
            case Via.KPROBE:
                self._bpf.attach_kprobe(event=target, fn_name=fn_name)
            case Via.KRETPROBE:
                self._bpf.attach_kretprobe(event=target, fn_name=fn_name)
            case Via.FENTRY:
                self._bpf.attach_kfunc(fn_name=fn_name)
            case Via.FEXIT:
                self._bpf.attach_kretfunc(fn_name=fn_name)

    def _attach_raw_tracepoint(self, hook: Hook) -> None:
        try:
            self._bpf.attach_raw_tracepoint(tp=hook.target.encode(), fn_name=hook.program.encode())
        except Exception:  # BCC raises Exception itself; the kernel says EINVAL of arguments that are not there
            if hook.other is None:
                raise
            self._bpf.attach_raw_tracepoint(tp=hook.target.encode(), fn_name=hook.other.encode())
            self.plan = self.plan.taking(hook)

    def drain(self, most: int = 1 << 20) -> npt.NDArray[np.void]:
        """Return the events that are in the ring, ``most`` at the most."""
        return self._ring.drain(most)

    @property
    def pending(self) -> int:
        """Return how many events wait in the ring."""
        return self._ring.pending

    def counters(self) -> dict[str, int]:
        """Return the totals that the programs keep, over all CPUs: events produced, boundaries read and so on."""
        totals = {name: int(sum(self._counters[ctypes.c_int(index)])) for index, name in enumerate(_COUNTERS)}
        totals["produced"] += totals["guest"]  # the hottest programs count once
        return totals

    def loss(self) -> Loss:
        """Return what was lost in the kernel until now."""
        counters = self.counters()
        missed = counters["missed"] + self._recursion_misses()
        told = counters["ring_full"] + counters["missed"]
        if told != self._seen_losses:
            self._vcpu_losses = {
                int(number.value): VcpuLoss(int(loss.count), int(loss.first_ns), int(loss.last_ns))
                for number, loss in self._lost.items()
                if loss.count
            }
            self._seen_losses = told
        return Loss(
            ring_full=counters["ring_full"],
            map_full=counters["map_full"],
            missed=missed,
            kicks=counters["kicks_lost"],
            vcpus=self._vcpu_losses,
        )

    def _recursion_misses(self) -> int:
        total = 0
        for function in self._bpf.funcs.values():
            info = _ProgInfo()
            if host.bpf_info(function.fd, info):
                total += info.recursion_misses
        return total

    def asking(self) -> AbstractContextManager[None]:
        """Meanwhile this process asks vCPUs: the hooks know it by its number."""
        return nullcontext()

    @contextmanager
    def watching(self, pid: int) -> Iterator[None]:
        """Meanwhile this process is among those that are traced, whatever the user asked for."""
        asked_for, key = self._bpf[b"filter"], ctypes.c_uint32(pid)
        known = key in asked_for
        asked_for[key] = ctypes.c_uint8(1)
        try:
            yield
        finally:
            if not known:
                del asked_for[key]

    def settle(self) -> None:
        """Have the tracepoint engine's programs look at the vCPUs that may have ended: KVM does not tell them.

        At all of them, soon after something that may have ended some and now and then besides, for no hook is where
        a process lets go of a descriptor that it was sent; and never for more than a part of the time.
        """
        if self.plan.engine != "tracepoint":
            return
        now = time.monotonic()
        asked = self._bpf[b"looks"][ctypes.c_int(0)].value
        if now >= (self._look_again if asked == self._looked_for else self._rests_until):
            self._look()
            self._looked_for = asked

    def _look(self) -> None:
        begin = time.monotonic()
        for name in (b"vcpus", b"vmms"):
            for key in list(self._bpf[name]):
                _libc.ioctl(-1, LOOK, key.value)
        end = time.monotonic()
        self._rests_until = end + _LOOK_SHARE * (end - begin)
        self._look_again = end + max(_LOOK_S, _LOOK_SHARE * (end - begin))

    def loaded_again(self, modules: Collection[str]) -> None:
        """Set the hooks in these modules anew. Only kprobes let their module go: the others hold it."""
        hooks = [hook for hook in self.plan.attachable if hook.via in (Via.KPROBE, Via.KRETPROBE)]
        host.forget_addresses()
        where = host.modules(hook.target for hook in hooks) if hooks else {}
        for hook in hooks:
            if where.get(hook.target) not in modules:
                continue
            target, fn_name = hook.target.encode(), hook.program.encode()
            take_away = self._bpf.detach_kprobe if hook.via is Via.KPROBE else self._bpf.detach_kretprobe
            with _stderr_kept() as printed:
                try:
                    take_away(event=target, fn_name=fn_name)
                    self._attach(hook)
                except Exception as error:
                    self.plan = self.plan.refusing(hook, _why(error, printed()))

    def detach(self) -> None:
        """Take every hook away, when all that has ended is told. The ring can still be drained.

        What begins an ioctl goes before what ends one, the last attached first: an end that is gone too early would
        look like one that was missed.
        """
        if self.plan.engine == "tracepoint":
            self._look()
        for name in reversed(list(self._bpf.kprobe_fds)):
            self._bpf.detach_kprobe_event(name)
        for name in reversed(list(self._bpf.kfunc_entry_fds)):
            self._bpf.detach_kfunc(name)
        for name in reversed(list(self._bpf.kfunc_exit_fds)):
            self._bpf.detach_kretfunc(name)
        for name in reversed(list(self._bpf.raw_tracepoint_fds)):
            self._bpf.detach_raw_tracepoint(tp=name)
        for name in reversed(list(self._bpf.tracepoint_fds)):
            self._bpf.detach_tracepoint(tp=name)

    def close(self) -> None:
        """Detach and free everything."""
        self._ring.close()
        self._bpf.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
