"""Every engine's programs compile with this machine's BCC and this kernel's offsets, also those it cannot attach."""

from __future__ import annotations

import os
from typing import Any

import pytest

from probes import plan, program
from probes.btf import Btf
from probes.plan import HOOKS, Via

pytestmark = pytest.mark.live

EVERYTHING = {hook.target for hooks, _ in HOOKS.values() for hook in hooks}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("engine", HOOKS)
def test_programs_compile(monkeypatch: pytest.MonkeyPatch, engine: str, full: bool) -> None:
    """With every hook of the plan; nothing is loaded."""
    from tracer.bpf import _CFLAGS, _bpf_class

    monkeypatch.setitem(os.environ, "BCC_KERNEL_SOURCE", str(program.headers()))
    whole = plan.make(engine, EVERYTHING, EVERYTHING)
    with Btf("kvm") as btf:
        found = program.offsets(btf)
    settings = program.Settings(watched=1 << 10, cpus=2, full=full, filtered=full, ring_bytes=1 << 20)
    modules = dict.fromkeys(EVERYTHING, "kvm")
    symbols = dict.fromkeys(("kvm_vcpu_ioctl", "kvm_vm_ioctl"), 1)
    if engine != "fentry":  # the macros of older kernels, too
        symbols |= dict.fromkeys(("bpf_get_current_task_btf", "bpf_task_pt_regs"), 1) if full else {}
    text = program.source(whole, settings, {"SIZE_STACK": 16384, **found}, symbols, modules)
    bpf: Any = _bpf_class()(text=text.encode(), cflags=_CFLAGS)
    try:
        names = {program.name(hook, modules).encode() for hook in whole.attachable}
        assert all(bpf.module and name_is_a_function(bpf, name) for name in names)
        if engine == "fentry":
            assert {name.split(b"__")[0] for name in names} >= {b"kfunc", b"kretfunc"}
            assert not any(hook.via in (Via.KPROBE, Via.KRETPROBE) for hook in whole.attachable)
    finally:
        bpf.cleanup()


def name_is_a_function(bpf: Any, name: bytes) -> bool:
    """Tell whether the compiled module holds a program of that name."""
    from bcc import lib

    return any(lib.bpf_function_name(bpf.module, index) == name for index in range(lib.bpf_num_functions(bpf.module)))
