"""The lab's copy of KVM's ABI, against this machine's linux/kvm.h; and the scenarios as data, without KVM."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path

import pytest

from lab import kvm
from lab.runner import Truth
from lab.scenarios import SCENARIOS, Scenario

Values = Callable[[list[str]], dict[str, int]]

STRUCTS = [
    kvm.KvmRegs,
    kvm.KvmSegment,
    kvm.KvmDtable,
    kvm.KvmSregs,
    kvm.KvmVcpuEvents,
    kvm.KvmX86Mce,
    kvm.KvmUserspaceMemoryRegion,
    kvm.KvmEnableCap,
    kvm.KvmMpState,
    kvm.KvmRun,
]
NUMBERS = [
    *((one.name, int(one)) for enum in (kvm.Ioctl, kvm.Cap, kvm.Exit, kvm.MpState) for one in enum),
    ("KVM_VCPUEVENT_VALID_TRIPLE_FAULT", kvm.KVM_VCPUEVENT_VALID_TRIPLE_FAULT),
    ("KVM_API_VERSION", kvm.KVM_API_VERSION),
]
# What C does not name, or names otherwise: the padding of unions.
UNNAMED = {"exit", "padding"}


def c_name(struct: type[ctypes.Structure]) -> str:
    """Return the struct's name in C.

    >>> c_name(kvm.KvmX86Mce)
    'kvm_x86_mce'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", struct.__name__).lower()


def members(
    struct: type[ctypes.Structure | ctypes.Union], prefix: str = "", base: int = 0
) -> Iterator[tuple[str, int]]:
    """Yield the path in C and the offset of every member, nested ones too."""
    for name, kind, *_ in struct._fields_:
        offset = base + getattr(struct, name).offset
        anonymous = name in getattr(struct, "_anonymous_", ())
        if not anonymous and not (issubclass(struct, ctypes.Union) and name in UNNAMED):
            yield prefix + name, offset
        if issubclass(kind, (ctypes.Structure, ctypes.Union)):
            yield from members(kind, prefix if anonymous else f"{prefix}{name}.", offset)


def compiles(tmp_path: Path, statement: str) -> subprocess.CompletedProcess[str]:
    """Try to compile a statement against linux/kvm.h."""
    source = tmp_path / "abi.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/kvm.h>\n"
        f"int main(void)\n{{\n{statement}\nreturn 0;\n}}\n"
    )
    return subprocess.run(["gcc", "-o", tmp_path / "abi", source], check=False, capture_output=True, text=True)


@pytest.fixture
def c_values(tmp_path: Path) -> Values:
    """Return a function that evaluates C expressions with linux/kvm.h; skips what an older header lacks."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc: apt install gcc libc6-dev")
    if compiles(tmp_path, "").returncode:
        pytest.skip("needs linux/kvm.h: apt install linux-libc-dev")

    def evaluate(expressions: list[str]) -> dict[str, int]:
        def printed(names: list[str]) -> str:
            return "".join(f'printf("%s %llu\\n", "{name}", (unsigned long long)({name}));\n' for name in names)

        if compiles(tmp_path, printed(expressions)).returncode:
            expressions = [one for one in expressions if not compiles(tmp_path, printed([one])).returncode]
            compiles(tmp_path, printed(expressions))
        output = subprocess.run([tmp_path / "abi"], check=True, capture_output=True, text=True).stdout
        return {name: int(value) for name, _, value in (line.rpartition(" ") for line in output.splitlines())}

    return evaluate


def compare(ours: dict[str, int], theirs: dict[str, int]) -> None:
    """Everything that the header has is as in the lab; what it lacks is said."""
    assert {name: ours[name] for name in theirs} == theirs
    if missing := sorted(ours.keys() - theirs.keys()):
        pytest.skip(f"all else compared; this linux/kvm.h is too old for {', '.join(missing)}")


@pytest.mark.parametrize("struct", STRUCTS, ids=c_name)
def test_structs_are_laid_out_as_in_c(struct: type[ctypes.Structure], c_values: Values) -> None:
    """Size, and the offset of every member."""
    name = f"struct {c_name(struct)}"
    ours = {f"offsetof({name}, {path})": offset for path, offset in members(struct)}
    ours[f"sizeof({name})"] = ctypes.sizeof(struct)
    compare(ours, c_values(list(ours)))


def test_every_struct_is_compared() -> None:
    """A struct that is added to the lab is added here."""
    public = {one for name, one in vars(kvm).items() if re.match("Kvm[A-Z]", name)}
    assert public == set(STRUCTS)


def test_numbers_are_those_of_the_header(c_values: Values) -> None:
    """Ioctls, capabilities, exit reasons and flags."""
    ours = dict(NUMBERS)
    compare(ours, c_values(list(ours)))


@pytest.mark.parametrize("enum", [kvm.Ioctl, kvm.Cap, kvm.Exit, kvm.MpState])
def test_no_number_is_written_twice(enum: type[IntEnum]) -> None:
    """An IntEnum would make the second one an alias without a word."""
    assert len(enum) == len(enum.__members__)


ENDS = {"delivered", "cleared", "handed_over", "lost", "abandoned"}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_expectations_are_possible(scenario: Scenario) -> None:
    """A finished scenario leaves nothing open, and each end agrees with the saves before it."""
    for one in scenario.expect:
        assert one["end"] in ENDS
        assert 0 <= one["vm"] < scenario.vms
        assert one["end"] != "lost" or one["blind_saves"]
        assert one["end"] != "handed_over" or one["saves"]
        assert one["end"] != "abandoned" or not one["saves"] + one["blind_saves"]
    assert all(one["end"] == "open" for one in scenario.held)
    assert len(scenario.title) <= 58, "the list must fit in 80 columns"
    assert len(scenario.name) <= 21


def test_the_truth_of_many_runs_numbers_their_vms() -> None:
    """Each run of handed_over makes two VMs; only the second one shuts down."""
    truth = Truth.of(SCENARIOS["handed_over"], 3)
    assert [one["vm"] for one in truth.lifecycles] == [0, 1, 2, 3, 4, 5]
    assert [one["vm"] for one in truth.shutdowns] == [1, 3, 5]
    json.dumps(truth.lifecycles)


def test_a_failed_call_says_what_and_why_and_what_to_do() -> None:
    """One line, with the errno's name."""
    error = kvm.CallFailed("KVM_RUN", 13)
    assert str(error).startswith("KVM_RUN failed: EACCES, Permission denied (run as root")
    assert error.errno == 13
