"""Why fentry cannot be used: each cause refused on purpose. That it works is proved on the kernels of the matrix."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from probes.btf import MissingField
from tracer import fentry, host


class _Types:
    def __init__(self, known: bool) -> None:
        self._known = known

    def __enter__(self) -> _Types:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def function(self, name: str) -> int:
        if not self._known:
            raise MissingField(f"the kernel's BTF has no {name}")
        return 23


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A kernel with KVM built in, which does what the answers say; negative numbers are errors."""
    answers: dict[str, Any] = {"load": 1000, "attach": 1001, "closed": [], "module": "vmlinux", "known": True}

    def syscall(command: int, attributes: Any) -> int:
        if command == fentry._PROG_LOAD:
            answers["loaded"] = attributes
            return int(answers["load"])
        assert command == fentry._RAW_TRACEPOINT_OPEN
        assert attributes.prog_fd == answers["load"]
        return int(answers["attach"])

    monkeypatch.setattr(host, "modules", lambda names: {name: answers["module"] for name in names if answers["module"]})
    monkeypatch.setattr(host, "bpf_syscall", syscall)
    monkeypatch.setattr(fentry, "Btf", lambda module: _Types(answers["known"]))
    real = os.close
    monkeypatch.setattr(
        os, "close", lambda number: answers["closed"].append(number) if number >= 1000 else real(number)
    )
    return answers


def test_what_was_attached_for_the_question_is_taken_away(kernel: dict[str, Any]) -> None:
    """The program asks for the function that every plan needs."""
    assert fentry.no_fentry() is None
    assert sorted(kernel["closed"]) == [1000, 1001]
    assert (kernel["loaded"].attach_btf_id, kernel["loaded"].insn_cnt) == (23, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"module": None}, "no function kvm_vcpu_ioctl"),
        ({"known": False}, "BTF has no kvm_vcpu_ioctl"),
        ({"load": -errno.EPERM}, "BPF_PROG_TYPE_TRACING: Operation not permitted"),
        ({"attach": -errno.EBUSY}, "a trampoline on kvm_vcpu_ioctl: Device or resource busy"),
        ({"module": "kvm"}, "module kvm has no BTF"),
    ],
)
def test_each_refusal_has_its_own_words(
    kernel: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    """And leaves nothing behind."""
    monkeypatch.setattr(fentry, "BTF_DIRECTORY", tmp_path)
    kernel |= change
    assert reason in (fentry.no_fentry() or "")
    assert kernel["closed"] == ([1000] if change.get("attach") else [])


@pytest.mark.parametrize(("library", "old"), [(b"...KFUNC_PROBE(event...", True), (b"..MODULE_KFUNC_PROBE(..", False)])
def test_an_old_bcc_is_told_by_what_it_compiles_with(
    monkeypatch: pytest.MonkeyPatch, library: bytes, old: bool
) -> None:
    """Built-in functions are within reach of every BCC."""
    pytest.importorskip("bcc", reason="no BCC: apt install python3-bpfcc")
    monkeypatch.setattr(fentry, "_mapped", lambda name: library)
    assert bool(fentry.bcc_too_old("kvm")) is old
    assert fentry.bcc_too_old("vmlinux") is None


def test_the_library_is_the_one_that_python_has_loaded() -> None:
    """Named by the process's own map."""
    pytest.importorskip("bcc", reason="no BCC: apt install python3-bpfcc")
    library = fentry._mapped("libbcc.so")
    assert library is not None
    assert b"KFUNC_PROBE" in library
    assert fentry._mapped("no-such-library.so") is None
