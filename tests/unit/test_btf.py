"""Offsets from BTF, against bpftool's reading of the same types."""

from __future__ import annotations

import ctypes
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from probes import btf as module
from probes.btf import BTF_DIRECTORY, Btf, MissingField
from probes.plan import HOOKS, Via
from probes.program import offsets

VMLINUX = BTF_DIRECTORY / "vmlinux"
pytestmark = pytest.mark.skipif(not VMLINUX.exists(), reason=f"{VMLINUX} is missing: the kernel has no BTF")


@pytest.fixture(scope="module")
def btf() -> Iterator[Btf]:
    """Yield the running kernel's types."""
    with Btf("kvm") as found:
        yield found


class Oracle:
    """Fields as `bpftool btf dump -j` tells them; slow and obvious."""

    def __init__(self, types: list[dict[str, Any]]) -> None:
        self.types = {one["id"]: one for one in types}
        self.structs = {one["name"]: one for one in types if one["kind"] == "STRUCT"}

    def real(self, number: int) -> dict[str, Any]:
        """Return the type behind typedefs and qualifiers."""
        one = self.types[number]
        while one["kind"] in ("TYPEDEF", "CONST", "VOLATILE", "RESTRICT", "TYPE_TAG"):
            one = self.types[one["type_id"]]
        return one

    def offset(self, path: str) -> int:
        """Return the offset of a field in bytes."""
        first, *rest = path.split(".")
        one, bits = self.structs[first], 0
        for name in rest:
            found = dict(self.members(one))
            here, number = found[name]
            bits += here
            one = self.real(number)
        return bits // 8

    def members(self, one: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield name, offset in bits and type of every member, those of anonymous members too."""
        for member in one["members"]:
            if member["name"] == "(anon)":
                for name, (bits, number) in self.members(self.real(member["type_id"])):
                    yield name, (member["bits_offset"] + bits, number)
            else:
                yield member["name"], (member["bits_offset"], member["type_id"])


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """Return bpftool's view."""
    if not shutil.which("bpftool"):
        pytest.skip("no bpftool: apt install bpftool")
    module = BTF_DIRECTORY / "kvm"
    command = ["bpftool", "-j", "btf", "dump", "file", str(module if module.exists() else VMLINUX)]
    if module.exists():
        command[2:2] = ["-B", str(VMLINUX)]
    types = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["types"]
    if module.exists():
        base = ["bpftool", "-j", "btf", "dump", "file", str(VMLINUX)]
        types = json.loads(subprocess.run(base, check=True, capture_output=True).stdout)["types"] + types
    return Oracle(types)


@pytest.mark.parametrize(
    "path",
    [
        "kvm_vcpu.requests",
        "kvm_vcpu.kvm",
        "kvm_vcpu.vcpu_id",
        "kvm_vcpu.run",
        "kvm_vcpu.arch.cr0",
        "kvm_vcpu.stat.guest_mode",
        "kvm_run.exit_reason",
        "kvm_run.s.regs.events",
        "kvm_run.internal.ndata",  # in an anonymous union
        "file.f_op",
        "file_operations.unlocked_ioctl",
        "task_struct.files",
        "task_struct.signal",
        "fdtable.max_fds",
        "pt_regs.dx",
    ],
)
def test_offsets_are_bpftools(btf: Btf, oracle: Oracle, path: str) -> None:
    """Through nested, anonymous and typedef'd members."""
    assert btf.offset(path) == oracle.offset(path)


def test_sizes_are_those_of_the_abi(btf: Btf) -> None:
    """Of structs, arrays, pointers and integers behind typedefs."""
    assert btf.size("kvm_vcpu.requests") == btf.size("kvm_vcpu.kvm") == ctypes.sizeof(ctypes.c_void_p)
    assert btf.size("kvm_run.exit_reason") == 4
    assert btf.size("kvm_vcpu_events") == 64
    assert btf.size("kvm_run.padding1") in (6, 7)


def test_every_field_of_the_programs_is_found(btf: Btf) -> None:
    """Those that are optional may be missing; those that are there have sane offsets."""
    found = offsets(btf, "tracepoint")
    assert {"OFFSET_REQUESTS", "OFFSET_KVM", "OFFSET_RUN", "OFFSET_VCPU_ID"} <= found.keys()
    assert all(abs(offset) < 1 << 17 for offset in found.values())


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("no_such_struct", "no_such_struct"),
        ("no_such_struct.field", "no_such_struct"),
        ("kvm_vcpu.no_such_field", "kvm_vcpu has no field no_such_field"),
        ("kvm_vcpu.arch.no_such_field", "kvm_vcpu.arch has no field no_such_field"),
        ("kvm_vcpu.requests.no_such_field", "kvm_vcpu.requests has no field no_such_field"),
        ("kvm_vcpu.kvm.arch", "kvm_vcpu.kvm has no field arch"),  # a pointer is not followed
    ],
)
def test_a_missing_field_is_named(btf: Btf, path: str, named: str) -> None:
    """And does not stay in the way of the next question."""
    for _ in range(2):
        with pytest.raises(MissingField, match=named):
            btf.offset(path)
        assert not btf.has(path)
    assert btf.has("kvm_vcpu.requests")


def test_arguments_of_tracepoints(btf: Btf) -> None:
    """Without the leading void *."""
    assert btf.arguments("sched_process_exit")[0] == "task_struct *"
    with pytest.raises(MissingField, match="btf_trace_no_such_tracepoint"):
        btf.arguments("no_such_tracepoint")


def test_no_btf_is_named(tmp_path: Path) -> None:
    """With the option that a kernel was built without; a file that is no BTF, too."""
    with pytest.raises(MissingField, match="CONFIG_DEBUG_INFO_BTF"):
        Btf(directory=tmp_path)
    (tmp_path / "vmlinux").write_bytes(b"not BTF" * 100)
    with pytest.raises(MissingField, match="cannot be read as BTF"):
        Btf(directory=tmp_path)


class _Old:
    """libbpf before 1.0: it refuses a kernel's BTF as a whole, for kinds that it does not know."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self.given: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def _takes(self, path: bytes) -> bool:
        data = Path(path.decode()).read_bytes()
        if data != module.older(data):
            return False
        self.given.append(data)
        return True

    def btf__parse(self, path: bytes, extension: None) -> int:
        return int(self._lib.btf__parse(path, extension)) if self._takes(path) else 0

    def btf__parse_split(self, path: bytes, base: int) -> int:
        return int(self._lib.btf__parse_split(path, base)) if self._takes(path) else 0


def test_btf_with_kinds_that_an_old_libbpf_does_not_know_is_read_all_the_same(
    btf: Btf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are given to it as older ones of the same shape; what is asked for is where it was."""
    old = _Old(module._libbpf())
    monkeypatch.setattr(module, "_libbpf", lambda: old)
    with Btf("kvm") as found:
        assert offsets(found, "tracepoint") == offsets(btf, "tracepoint")
        assert found.arguments("sched_process_exit") == btf.arguments("sched_process_exit")
    vmlinux = VMLINUX.read_bytes()
    assert old.given[0] == module.older(vmlinux)
    assert len(old.given[0]) == len(vmlinux)


def test_a_kind_of_every_shape_is_stepped_over() -> None:
    """Of made-up types: what lies behind each is found, and names are those of before."""
    strings = b"\0target\0field\0"
    word = struct.Struct("<I").pack
    tails = {1: 1, 3: 3, 4: 6, 5: 6, 6: 4, 13: 4, 14: 1, 15: 6, 17: 1, 19: 6}
    types = b"".join(
        word(0)
        + word(kind << 24 | (2 if kind in (4, 5, 6, 13, 15, 19) else 0))
        + word(0)
        + word(0) * tails.get(kind, 0)
        for kind in range(1, 20)
    )
    types += word(1) + word(4 << 24 | 1) + word(8) + word(8) + word(1) + word(32)  # struct target { int field } at 4
    data = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings
    changed = module.older(data)
    kinds = [16, 17, 18, 19]
    assert changed.count(b"\x13", 0, 24 + len(types)) == 0
    assert len(changed) == len(data)
    different = [place for place in range(len(data)) if data[place] != changed[place]]
    assert [data[place] for place in different] == kinds
    assert [changed[place] for place in different] == [7, 14, 10, 4]


def test_built_in_kvm_needs_no_module(tmp_path: Path) -> None:
    """A directory with vmlinux alone: what is there is found."""
    (tmp_path / "vmlinux").symlink_to(VMLINUX)
    with Btf("kvm", tmp_path) as found:
        assert not found.has_module
        assert found.offset("file.f_op") > 0


def test_tracepoints_of_the_plan_have_prototypes(btf: Btf) -> None:
    """Those that this kernel has: the programs count on the order of their arguments."""
    targets = {hook.target for hooks, _ in HOOKS.values() for hook in hooks if hook.via is Via.RAW_TRACEPOINT}
    assert "sys_exit" in targets
    assert btf.arguments("sys_exit") == ("pt_regs *", "long int")
