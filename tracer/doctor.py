"""The doctor: checks everything that tracing needs, reports all of it, and proves itself on a scratch VM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np

from probes import requests
from probes.btf import Btf, MissingField
from probes.program import Settings, offsets
from probes.requests import TRIPLE_FAULT
from probes.schema import Flag, Kind
from tracer import canary, guests, host
from tracer.engines import ENGINES, Choice, attached, choices, open_engine
from tracer.errors import KvmreqError
from tracer.preconditions import PRECONDITIONS


@dataclass(frozen=True)
class Check:
    """One requirement: ``ok`` is None where it is a fact and not a requirement."""

    check: str
    ok: bool | None
    detail: str


def _checks() -> Iterator[Check]:
    for name, check in PRECONDITIONS.items():
        reasons = [check(engine) for engine in ENGINES]
        least = min((reason for reason in reasons if reason is not None), key=len, default="")
        yield Check(name, None in reasons, "as they must be" if None in reasons else least)
    reason = host.no_dev_kvm()
    yield Check("/dev/kvm", reason is None, reason or "can be opened")
    kvm = host.kvm()
    yield Check(
        "KVM", bool(kvm.flavours), kvm.module if kvm.flavours else "not loaded: modprobe kvm_intel or modprobe kvm_amd"
    )
    for name in ("kvm_intel.nested", "kvm_amd.nested"):
        if name in kvm.parameters:
            yield Check(name, None, kvm.parameters[name])
    yield _btf()
    mode = host.lockdown()
    yield Check(
        "lockdown",
        mode != "confidentiality",
        f"{mode}: BPF may not read the kernel" if mode else "the kernel is not locked down",
    )
    yield _bcc()
    names = requests.names(host.release())
    yield Check("request names", None, names.doubt(names.flags) or f"{len(names.by_bit)} of Linux {names.table}")


def _btf() -> Check:
    reason = host.no_btf()
    if reason is not None:
        return Check("BTF", False, reason)
    try:
        with Btf("kvm") as btf:
            found = offsets(btf, "tracepoint")
            where = "of vmlinux and the kvm module" if btf.has_module else "of vmlinux"
    except MissingField as error:
        return Check("BTF", False, str(error))
    return Check("BTF", True, f"{where}: all {len(found)} fields found")


def _bcc() -> Check:
    try:
        import bcc
    except ImportError:
        return Check(
            "BCC", None, "Python cannot import bcc (only ftrace does without): install the package python3-bpfcc"
        )
    try:
        version = metadata.version("bcc")
    except metadata.PackageNotFoundError:
        version = str(getattr(bcc, "__version__", "of unknown version"))
    return Check("BCC", True, version)


def _self_test(choice: Choice) -> Check:
    """Raise a triple fault on a scratch VM; the hooks must see its bit rise and fall."""
    name = f"self-test, {choice.engine}"
    if choice.plan is None or choice.why_not is not None:
        return Check(name, False, f"not run: {choice.why_not}")
    try:
        engine, heard = attached(open_engine(choice.plan, _settings()), canary.listen)
        engine.close()
    except KvmreqError as error:
        return Check(name, False, error.message)
    if heard.untried is not None:
        return Check(name, False, f"not run: {heard.untried}")
    return Check(name, True, f"bit {TRIPLE_FAULT} seen to rise, to fall with KVM_EXIT_SHUTDOWN, and its vCPU to end")


def _settings() -> Settings:
    return Settings(watched=1 << TRIPLE_FAULT, cpus=host.possible_cpus(), ring_bytes=1 << 20)


def _guests(choice: Choice) -> list[dict[str, Any]]:
    """Return the guests that run, and whether a save would lose a pending triple fault of theirs."""
    running = guests.running()
    found: dict[int, tuple[bool, bool]] = {}
    if running and choice.plan is not None and choice.why_not is None:
        try:
            with open_engine(choice.plan, _settings()) as engine:
                engine.attach()
                with engine.asking():
                    for pid, descriptors in running.items():
                        guests.ask(pid, descriptors)
                events = engine.drain()
        except KvmreqError:
            events = np.empty(0, [("kind", "u1")])
        for event in events[events["kind"] == Kind.VCPU_NEW]:
            found[int(event["pid"])] = (
                bool(event["flags"] & Flag.CAP),
                bool(event["requests"] & (1 << TRIPLE_FAULT)) or found.get(int(event["pid"]), (False, False))[1],
            )
    listed = []
    for pid, descriptors in running.items():
        cap, pending = found.get(pid, (None, None))
        listed.append(
            {**asdict(guests.guest(pid)), "vcpus": len(descriptors), "triple_fault_cap": cap, "pending": pending}
        )
    return listed


def examine() -> dict[str, Any]:
    """Return everything that the doctor finds, as JSON holds it; ``works`` tells whether this host can be traced."""
    checks = list(_checks())
    engines = choices()
    tests = [_self_test(choice) for choice in engines if choice.why_not is None]
    best = next((choice for choice in engines if choice.why_not is None), None)
    # Of detail full, which is that of detail boundary and more.
    plan = next((choice.plan for choice in choices(full=True) if best and choice.engine == best.engine), None)
    return {
        "schema": "kvmreq.doctor/1",
        "host": host.hostname(),
        "kernel": host.release(),
        "checks": [asdict(check) for check in (*checks, *tests)],
        "engines": [
            {"engine": choice.engine, "works": choice.why_not is None, "why_not": choice.why_not} for choice in engines
        ],
        "auto": best.engine if best else None,
        "plan": plan.as_json() if plan else [],
        "guests": _guests(best) if best else [],
        "works": best is not None
        and bool(tests)
        and all(check.ok for check in tests if check.check.endswith(best.engine)),
    }
