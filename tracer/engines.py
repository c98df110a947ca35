"""Every engine, the best first: which of them works here and why the others do not, and the one that is set to work.

BCC is imported where a BPF engine is opened and nowhere else: the ftrace engine is for hosts that have none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from probes import plan as plans
from probes.plan import Plan, Via
from probes.program import Settings
from tracer import ftrace, host
from tracer.errors import CannotTrace
from tracer.fentry import no_fentry
from tracer.loss import Loss
from tracer.preconditions import unmet

Opened = TypeVar("Opened")
Proof = TypeVar("Proof")


@dataclass(frozen=True)
class Choice:
    """An engine and the reason why it was taken, or why it cannot be."""

    engine: str
    plan: Plan | None
    why_not: str | None


@dataclass(frozen=True)
class Taken(Generic[Opened]):
    """What an engine was made into that was taken, and why that one."""

    opened: Opened
    why: str
    failed: tuple[str, ...]  # of those before it: that they had every hook, and yet could not be loaded or attached


class Engine(Protocol):
    """Hooks in the running kernel, and what they have to say. Leaving it takes them all away."""

    plan: Plan  # once attached without the hooks that the kernel refused

    def attach(self) -> None:
        """Set every hook of the plan, in its order."""

    def drain(self, most: int = 1 << 20) -> npt.NDArray[np.void]:
        """Return the events that wait, ``most`` at the most."""

    @property
    def pending(self) -> int:
        """Return how many events are known to wait."""

    def counters(self) -> dict[str, int]:
        """Return totals: events produced, boundaries read and so on."""

    def loss(self) -> Loss:
        """Return what was lost in the kernel until now."""

    def asking(self) -> AbstractContextManager[None]:
        """Meanwhile this process asks vCPUs: of each that is seen for it an answer is counted."""

    def watching(self, pid: int) -> AbstractContextManager[None]:
        """Meanwhile this process is among those that are traced, whatever the user asked for."""

    def settle(self) -> None:
        """Look whether vCPUs have ended that no hook has seen to end."""

    def loaded_again(self, modules: Collection[str]) -> None:
        """Set the hooks in these modules anew: they went when the modules were unloaded."""

    def detach(self) -> None:
        """Take every hook away. What waits can still be drained."""

    def close(self) -> None:
        """Detach and free everything."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


AnyEngine = TypeVar("AnyEngine", bound=Engine)

#: In the order of preference.
ENGINES = ("fentry", "kprobe", "tracepoint", "ftrace")
# A program that a trampoline calls may be preempted, and is left out meanwhile for other tasks of that CPU: what it
# would have told is missed, and counted. Programs on kprobes and trace events are not preempted. What those miss, for
# another task's use of a map, is less; but only where somebody counts it are they better.
_PREEMPTED = ("kprobe", "fentry", "tracepoint", "ftrace")


def choices(*, full: bool = False) -> list[Choice]:
    """Return every engine, the best first, each with its plan or the reason why it cannot work here.

    ``full``: with the plan for detail full.
    """
    preempted = host.preempts() and host.counts_kprobe_misses()
    return [_choice(engine, full) for engine in (_PREEMPTED if preempted else ENGINES)]


def first(engine: str, offers: Iterable[Choice], opens: Callable[[Plan], Opened]) -> Taken[Opened]:
    """Return what ``opens`` makes of the engine that was asked for; for ``auto`` of the first that it can be made of.

    That a plan has every hook is a promise of the kernel's symbols. Only to load the programs and to set them shows
    whether it is kept, so one that fails there is a reason to try the next. Raises :class:`CannotTrace`, with the
    reason of each engine that was tried.
    """
    known = list(offers)
    tried = [choice for choice in known if engine in ("auto", choice.engine)]
    if not tried:
        names = ", ".join(choice.engine for choice in known)
        raise CannotTrace(f"unknown engine {engine!r}", hint=f"engines: {names}, auto")
    refused: list[tuple[str, str | None]] = []
    failed: list[str] = []
    for choice in tried:
        why_not = choice.why_not
        if why_not is None and choice.plan is not None:
            try:
                opened = opens(choice.plan)
            except CannotTrace as error:
                if engine != "auto":
                    raise
                why_not = error.message
                failed.append(why_not)
            else:
                why = "asked for" if engine != "auto" else _reasons(refused) or "the best there is"
                return Taken(opened, why, tuple(failed))
        refused.append((choice.engine, why_not))
    if engine != "auto":
        raise CannotTrace(
            f"the {engine} engine does not work here: {tried[0].why_not}", hint="kvmreq doctor tells which do"
        )
    if len(reasons := {reason for _, reason in refused}) == 1:
        raise CannotTrace(f"no engine works here: {reasons.pop()}", hint="kvmreq doctor tells more")
    raise CannotTrace(f"no engine works here ({_reasons(refused)})", hint="kvmreq doctor tells more")


def _reasons(refused: Iterable[tuple[str, str | None]]) -> str:
    return "; ".join(f"{engine}: {reason}" for engine, reason in refused)


def open_engine(plan: Plan, settings: Settings, pids: Iterable[int] = ()) -> Engine:
    """Return the engine of a plan, not yet attached. Raises CannotTrace."""
    if plan.engine == "ftrace":
        return ftrace.Engine(plan, settings, pids)
    from tracer import bpf

    return bpf.Engine(plan, settings, pids)


def attached(engine: AnyEngine, proves: Callable[[AnyEngine], Proof]) -> tuple[AnyEngine, Proof]:
    """Return an engine with its hooks set, and what ``proves`` gives of it. Raises CannotTrace.

    One that cannot set its hooks, or not prove that they see, is closed.
    """
    try:
        engine.attach()
        return engine, proves(engine)
    except BaseException:
        engine.close()
        raise


def no_bcc() -> str | None:
    """Say why the BPF engines cannot be used, if Python has no bcc."""
    try:
        found = importlib.util.find_spec("bcc")
    except (ImportError, ValueError):
        found = None
    return None if found else "Python cannot import bcc: install the package python3-bpfcc"


def uncounted() -> bool:
    """Tell whether the kernel may leave out runs of kprobe programs without counting them."""
    return host.preempts() and not host.counts_kprobe_misses()


def _refused(engine: str) -> str | None:
    reason = unmet(engine)
    if engine == "ftrace" or reason is not None:
        return reason or ftrace.refused()
    reason = host.no_btf() or no_bcc() or host.no_ring()
    if reason is None and engine == "kprobe":
        reason = host.no_kprobes()
    if reason is None and engine == "tracepoint" and host.kvm().flavours and host.hides_addresses():
        unable = host.no_dev_kvm()
        reason = unable and f"the kernel hides its addresses (kernel.kptr_restrict), and of a VM of its own: {unable}"
    if reason is None and engine == "fentry":
        reason = no_fentry()
    return reason


def _choice(engine: str, full: bool) -> Choice:
    reason = _refused(engine)
    if reason is not None:
        return Choice(engine, None, reason)
    hooks = plans.HOOKS[engine][0]
    tracepoints = host.tracepoints(hook.target for hook in hooks if hook.via is Via.RAW_TRACEPOINT)
    tracepoints |= ftrace.events(hook.target for hook in hooks if hook.via is Via.TRACE_EVENT)
    functions = {hook.target for hook in hooks if hook.via not in (Via.RAW_TRACEPOINT, Via.TRACE_EVENT)}
    plan = plans.make(
        engine,
        host.addresses(functions) if functions else {},
        tracepoints,
        vendors=host.kvm().flavours or None,
        preempted=host.preempts_raw_tracepoints(),
        uncounted=uncounted(),
        full=full,
        arguments=host.tracepoint_arguments() if full else {},
    )
    if plan.hopeless and not host.kvm().flavours:
        return Choice(engine, plan, "KVM is not loaded: load kvm_intel or kvm_amd")
    return Choice(engine, plan, plan.hopeless)
