"""Which engine is taken, where the better ones fail: each fault injected on purpose."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from probes import guest, program, stat
from probes import plan as plans
from probes.btf import MissingField
from probes.plan import Plan
from probes.program import Settings
from tracer import bpf, engines, fentry, host, preconditions
from tracer.engines import Choice, attached, first
from tracer.errors import CannotTrace


def _plan(engine: str) -> Plan:
    return Plan(engine, (), ())


OFFERS = [
    Choice("fentry", None, "the module kvm has no BTF"),
    Choice("kprobe", _plan("kprobe"), None),
    Choice("tracepoint", _plan("tracepoint"), None),
    Choice("ftrace", _plan("ftrace"), None),
]


class _Host:
    """Opens engines, of which some fail."""

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.tried: list[str] = []

    def __call__(self, plan: Plan) -> str:
        self.tried.append(plan.engine)
        if plan.engine in self.broken:
            raise CannotTrace(f"the {plan.engine} engine cannot be loaded: no such map", hint="a hint")
        return plan.engine


def test_auto_takes_the_first_that_can_be_opened_and_says_why_not_the_others() -> None:
    """One that has no plan is not tried; one that fails is told apart from it, without the hint meant for the end."""
    taken = first("auto", OFFERS, here := _Host("kprobe"))
    assert (taken.opened, here.tried) == ("tracepoint", ["kprobe", "tracepoint"])
    why = "the kprobe engine cannot be loaded: no such map"
    assert taken.why == f"fentry: the module kvm has no BTF; kprobe: {why}"
    assert taken.failed == (why,)


def test_the_best_there_is_has_no_reasons() -> None:
    """Nothing was refused before it."""
    taken = first("auto", OFFERS[1:], _Host())
    assert (taken.opened, taken.why, taken.failed) == ("kprobe", "the best there is", ())


def test_an_engine_that_was_asked_for_is_the_only_one_that_is_tried() -> None:
    """Its own reason is what the user gets, whether it is known before or comes from the kernel."""
    here = _Host("kprobe")
    assert first("tracepoint", OFFERS, here).why == "asked for"
    with pytest.raises(CannotTrace, match=r"the kprobe engine cannot be loaded: no such map \(a hint\)"):
        first("kprobe", OFFERS, here)
    with pytest.raises(CannotTrace, match="the fentry engine does not work here: the module kvm has no BTF"):
        first("fentry", OFFERS, here)
    with pytest.raises(CannotTrace, match=r"unknown engine 'dtrace'.*fentry, kprobe, tracepoint, ftrace, auto"):
        first("dtrace", OFFERS, here)
    assert here.tried == ["tracepoint", "kprobe"]


def test_where_none_works_every_reason_is_told() -> None:
    """In one line."""
    with pytest.raises(CannotTrace) as told:
        first("auto", OFFERS, _Host("kprobe", "tracepoint", "ftrace"))
    for engine in ("kprobe", "tracepoint", "ftrace"):
        assert f"{engine}: the {engine} engine cannot be loaded: no such map" in str(told.value)
    assert "fentry: the module kvm has no BTF" in str(told.value)


class _Bcc:
    """Programs as BCC holds them, on a kernel that refuses something."""

    made: list[_Bcc]
    refuses: frozenset[str]

    def __init__(self, **_: object) -> None:
        if "ringbuf" in self.refuses:
            raise Exception("could not open bpf map: ring, error: Invalid argument")
        self.clean = False
        self.raw_tracepoint_fds: dict[bytes, int] = {}
        _Bcc.made.append(self)

    def __getitem__(self, name: bytes) -> Any:
        if name == b"ring" and "mmap" in self.refuses:
            raise OSError(1, "Operation not permitted")
        return _Map()

    def _attach(self, *, fn_name: bytes, event: bytes = b"", tp: bytes = b"") -> None:
        target = (event or tp or fn_name.rpartition(b"__")[2]).decode()
        if target in self.refuses:
            raise Exception(f"Failed to attach BPF program {fn_name!r} to {target}")

    attach_kprobe = attach_kretprobe = attach_raw_tracepoint = attach_tracepoint = _attach
    attach_kfunc = attach_kretfunc = _attach

    def cleanup(self) -> None:
        self.clean = True


class _Map:
    map_fd = -1

    def Leaf(self) -> int:
        return 0

    def __setitem__(self, key: object, value: object) -> None:
        pass


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Bcc]]:
    """A kernel with all that the plans ask for, and a BCC that can be told what it refuses."""
    monkeypatch.setattr(_Bcc, "made", [], raising=False)
    monkeypatch.setattr(_Bcc, "refuses", frozenset(), raising=False)
    monkeypatch.setattr(bpf, "_bpf_class", lambda: _Bcc)
    monkeypatch.setattr(bpf, "Ring", lambda *_: type("Ring", (), {"close": lambda self: None})())
    monkeypatch.setattr(host, "modules", lambda names: dict.fromkeys(names, "kvm"))
    monkeypatch.setattr(host, "addresses", lambda names: dict.fromkeys(names, 4096))
    yield _Bcc
    host.forget_addresses()


def _every(engine: str) -> Choice:
    hooks = plans.HOOKS[engine][0]
    targets = {hook.target for hook in hooks}
    return Choice(engine, plans.make(engine, targets, targets), None)


@pytest.mark.parametrize(
    ("refuses", "taken", "why"),
    [
        (set(), "fentry", None),
        # A function that kallsyms has and BTF has not.
        ({"kvm_arch_vcpu_create"}, "tracepoint", "the fentry engine cannot hook kvm_arch_vcpu_create"),
        ({"ringbuf"}, None, "could not open bpf map: ring, error: Invalid argument"),
        ({"mmap"}, None, "the tracepoint engine cannot be loaded: .*Operation not permitted"),
        # One that decides nothing is left out.
        ({"kvm_vcpu_reset"}, "fentry", None),
    ],
)
def test_an_engine_that_the_kernel_refuses_half_way_leaves_nothing_behind(
    kernel: type[_Bcc], monkeypatch: pytest.MonkeyPatch, refuses: set[str], taken: str | None, why: str | None
) -> None:
    """The programs are freed before the next engine is tried."""
    monkeypatch.setattr(kernel, "refuses", frozenset(refuses))
    offers = [_every(engine) for engine in ("fentry", "kprobe", "tracepoint")]
    settings = Settings(watched=1, cpus=2)

    def opens(plan: Plan) -> bpf.Engine:
        return attached(bpf.Engine(plan, settings), lambda engine: None)[0]

    if taken is None:
        with pytest.raises(CannotTrace, match=why):
            first("auto", offers, opens)
        assert all(one.clean for one in kernel.made)
        return
    got = first("auto", offers, opens)
    assert got.opened.plan.engine == taken
    assert (why or "the best there is") in got.why
    assert [one.clean for one in kernel.made] == [True] * (len(kernel.made) - 1) + [False]


class _Types:
    """BTF that has these fields, and every one that programs cannot do without but a mutex's."""

    def __init__(self, *fields: str) -> None:
        self.fields = fields

    def __enter__(self) -> _Types:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def has(self, path: str) -> bool:
        return path in self.fields

    def offset(self, path: str) -> int:
        if "mutex" in path and not self.has(path):
            raise MissingField(path)
        return 8 * len(path)

    def offsets(self, fields: Any) -> dict[str, int]:
        return {name: self.offset(path) for name, path, optional in fields if not optional}


@pytest.mark.parametrize("owner", ["kvm_vcpu.mutex.owner", "kvm_vcpu.mutex.rtmutex.owner"])
def test_the_owner_of_a_mutex_is_found_on_a_real_time_kernel_too(monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    """And only the tracepoint engine asks for it: the others work where there is none."""
    monkeypatch.setattr(guest, "mask_arguments", lambda btf: {})
    types: Any = _Types(owner)
    assert program.offsets(types, "tracepoint")["OFFSET_MUTEX_OWNER"] == 8 * len(owner)
    none: Any = _Types()
    for engine in ("fentry", "kprobe"):
        assert "OFFSET_MUTEX_OWNER" not in program.offsets(none, engine)
    with pytest.raises(MissingField, match=r"kvm_vcpu\.mutex\.owner"):
        program.offsets(none, "tracepoint")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (("bpf_ringbuf.spinlock",), None),
        (("bpf_ringbuf.spinlock", "bpf_ringbuf.spinlock.lock.owner"), "may sleep where programs may not"),
        ((), "no BPF ring buffers, which came with Linux 5.8"),
    ],
)
def test_without_a_ring_that_programs_may_use_no_bpf_engine_is_offered(
    monkeypatch: pytest.MonkeyPatch, fields: tuple[str, ...], why: str | None
) -> None:
    """ftrace needs none."""
    monkeypatch.setattr(host, "Btf", lambda: _Types(*fields))
    monkeypatch.setattr(preconditions, "PRECONDITIONS", {})
    monkeypatch.setattr(host, "no_btf", lambda: None)
    monkeypatch.setattr(engines, "no_bcc", lambda: None)
    monkeypatch.setattr(engines, "no_fentry", lambda: "not asked")
    monkeypatch.setattr(host, "no_kprobes", lambda: "not asked")
    host._kernel.cache_clear()
    try:
        assert (why or "None") in str(host.no_ring())
        if why:
            assert all(why in str(engines._refused(engine)) for engine in ("fentry", "kprobe", "tracepoint"))
            assert why not in str(engines._refused("ftrace"))
    finally:
        host._kernel.cache_clear()


@pytest.mark.parametrize(
    ("symbols", "flavours", "dev_kvm", "why"),
    [
        (b"0 A percpu\nffffffff81000000 T kvm_vcpu_ioctl\n", ("kvm_amd",), "/dev/kvm is missing", None),
        (b"0 A percpu\n0000000000000000 T kvm_vcpu_ioctl\n", ("kvm_amd",), None, None),
        (
            b"0 A percpu\n0000000000000000 T kvm_vcpu_ioctl\n",
            ("kvm_amd",),
            "/dev/kvm is missing",
            "kernel.kptr_restrict.*: /dev/kvm is missing",
        ),
        (b"0 A percpu\n", (), "/dev/kvm is missing", None),  # KVM is not loaded: the plan says that
    ],
)
def test_where_addresses_are_hidden_the_tracepoint_engine_needs_a_vm_of_its_own(
    monkeypatch: pytest.MonkeyPatch, symbols: bytes, flavours: tuple[str, ...], dev_kvm: str | None, why: str | None
) -> None:
    """By an address of 0 it would know no vCPU, and say nothing."""
    monkeypatch.setattr(host, "_kallsyms", lambda: symbols)
    monkeypatch.setattr(host, "kvm", lambda: host.Kvm(flavours, {}))
    monkeypatch.setattr(host, "no_dev_kvm", lambda: dev_kvm)
    monkeypatch.setattr(preconditions, "PRECONDITIONS", {})
    for free in ("no_btf", "no_ring"):
        monkeypatch.setattr(host, free, lambda: None)
    monkeypatch.setattr(engines, "no_bcc", lambda: None)
    assert re.search(why or "^None$", str(engines._refused("tracepoint")))


@pytest.mark.parametrize(
    ("library", "module", "name"),
    [
        (b"... MODULE_KFUNC_PROBE ...", "kvm", "kfunc__kvm__kvm_vcpu_ioctl"),
        (b"... MODULE_KFUNC_PROBE ...", "vmlinux", "kfunc__vmlinux__kvm_vcpu_ioctl"),
        (b"... KFUNC_PROBE ...", "vmlinux", "kfunc__kvm_vcpu_ioctl"),
    ],
)
def test_an_old_bcc_finds_functions_of_a_kernel_that_has_kvm_built_in(
    monkeypatch: pytest.MonkeyPatch, library: bytes, module: str, name: str
) -> None:
    """Before 0.28 it would look for a function called vmlinux__kvm_vcpu_ioctl."""
    monkeypatch.setitem(sys.modules, "bcc", type(sys)("bcc"))
    monkeypatch.setattr(fentry, "_mapped", lambda name: library)
    monkeypatch.setattr(host, "modules", lambda names: dict.fromkeys(names, module))
    (hook,) = (hook for hook in plans.FENTRY if hook.program == "on_kvm_vcpu_ioctl")
    assert program.name(hook, fentry.modules([hook.target])) == name


@pytest.mark.parametrize(
    ("preempts", "counts", "first_two", "told"),
    [
        (False, False, ["fentry", "kprobe"], False),
        (False, True, ["fentry", "kprobe"], False),
        (True, False, ["fentry", "kprobe"], True),
        (True, True, ["kprobe", "fentry"], False),
    ],
)
def test_kprobe_is_better_than_fentry_where_programs_are_preempted_and_it_counts(
    monkeypatch: pytest.MonkeyPatch, preempts: bool, counts: bool, first_two: list[str], told: bool
) -> None:
    """Where nobody counts, the plan of kprobe says so, and no other one does."""
    monkeypatch.setattr(host, "preempts", lambda: preempts)
    monkeypatch.setattr(host, "counts_kprobe_misses", lambda: counts)
    monkeypatch.setattr(engines, "_refused", lambda engine: None)
    offers = engines.choices()
    assert [offer.engine for offer in offers] == [*first_two, "tracepoint", "ftrace"]
    saying = [offer.engine for offer in offers if offer.plan and plans.UNCOUNTED in offer.plan.blind]
    assert saying == (["kprobe"] if told else [])
    assert (plans.UNCOUNTED in stat.make("kprobe", (), (), {}, uncounted=engines.uncounted()).blind) == told


@pytest.mark.parametrize(
    ("version", "modes", "cmdline", "config", "preempts"),
    [
        ("#1 SMP Debian 5.10.262-1", None, "", None, False),
        ("#1 SMP PREEMPT_DYNAMIC", "none (voluntary) full\n", "", None, False),
        ("#1 SMP PREEMPT_DYNAMIC", "none voluntary (full) lazy\n", "preempt=none", None, True),
        ("#1 SMP PREEMPT_DYNAMIC", None, "quiet preempt=none", "CONFIG_PREEMPT=y\n", False),
        ("#1 SMP PREEMPT_DYNAMIC", None, "quiet preempt=full", "CONFIG_PREEMPT_VOLUNTARY=y\n", True),
        ("#1 SMP PREEMPT_DYNAMIC", None, "quiet", "CONFIG_PREEMPT_VOLUNTARY=y\n", False),
        ("#1 SMP PREEMPT_DYNAMIC", None, "quiet", "# CONFIG_PREEMPT_NONE is not set\nCONFIG_PREEMPT=y\n", True),
        ("#1 SMP PREEMPT_RT", None, "", None, True),
    ],
)
def test_a_kernel_is_preemptible_unless_it_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str,
    modes: str | None,
    cmdline: str,
    config: str | None,
    preempts: bool,
) -> None:
    """As it is now, before how it was started, before how it was built."""
    (tmp_path / "kernel/debug/sched").mkdir(parents=True)
    for name, text in (("kernel/debug/sched/preempt", modes), ("cmdline", cmdline), ("config", config)):
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(platform, "version", lambda: version)
    monkeypatch.setattr(host, "SYS", tmp_path)
    monkeypatch.setattr(host, "PROC", tmp_path)
    monkeypatch.setattr(host, "release", lambda: "none")
    monkeypatch.setattr(host, "BUILT", str(tmp_path / "config"))
    host.preempts.cache_clear()
    try:
        assert host.preempts() == preempts
    finally:
        host.preempts.cache_clear()
