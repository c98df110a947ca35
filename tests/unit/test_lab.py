"""The lab's copy of KVM's ABI, against this machine's linux/kvm.h; and the scenarios as data, without KVM."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from lab import kvm, userfault
from lab.check import differences
from lab.runner import Run, Truth
from lab.scenarios import SCENARIOS
from lab.stage import (
    DECLARED,
    RAISED_INSIDE_KVM_RUN,
    TRIPLE_FAULT,
    Lifecycle,
    Outcome,
    Scenario,
    Several,
    request_of,
    vmcb,
)
from probes.plan import make, tells
from probes.schema import Site

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
    kvm.KvmCpuid2,
    kvm.KvmCpuidEntry2,
    kvm.KvmGuestDebug,
    kvm.KvmDirtyGfn,
    kvm.KvmInterrupt,
    kvm.KvmClockData,
    kvm.KvmMsi,
    kvm.KvmIrqRouting,
    kvm.KvmIrqRoutingEntry,
    kvm.KvmTprAccessCtl,
    kvm.KvmLapicState,
    kvm.KvmMpState,
    kvm.KvmRun,
    userfault.UffdioApi,
    userfault.UffdioRange,
    userfault.UffdioRegister,
    userfault.UffdioCopy,
    userfault.UffdMsg,
]
ENUMS = (kvm.Ioctl, kvm.Cap, kvm.Exit, kvm.MpState, userfault.Ioctl)
NUMBERS = [
    *((one.name, int(one)) for enum in ENUMS for one in enum),
    *((name, value) for name, value in vars(kvm).items() if name.startswith("KVM_")),
    *((name, value) for name, value in vars(userfault).items() if name.startswith("UFFD")),
    ("SYS_userfaultfd", userfault._SYS_USERFAULTFD),
]
# What C does not name, or names otherwise: the padding of unions.
UNNAMED = {"exit", "padding"}
# What C has in a union without a name: the same place, another path.
SAME = {"arg.pagefault.ptid": "arg.pagefault.feat.ptid"}


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
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include <sys/syscall.h>\n"
        "#include <linux/kvm.h>\n#include <linux/userfaultfd.h>\n"
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
    ours = {f"offsetof({name}, {SAME.get(path, path)})": offset for path, offset in members(struct)}
    ours[f"sizeof({name})"] = ctypes.sizeof(struct)
    compare(ours, c_values(list(ours)))


def test_every_struct_is_compared() -> None:
    """A struct that is added to the lab is added here."""
    public = {one for name, one in {**vars(kvm), **vars(userfault)}.items() if re.match("(Kvm|Uffd)[A-Za-z]", name)}
    assert public == set(STRUCTS)


def test_numbers_are_those_of_the_header(c_values: Values) -> None:
    """Ioctls, capabilities, exit reasons and flags."""
    ours = dict(NUMBERS)
    compare(ours, c_values(list(ours)))


@pytest.mark.parametrize("enum", ENUMS)
def test_no_number_is_written_twice(enum: type[IntEnum]) -> None:
    """An IntEnum would make the second one an alias without a word."""
    assert len(enum) == len(enum.__members__)


ENDS = {"delivered", "reflected", "cleared", "handed_over", "lost", "abandoned"}
RAISERS = {"set_mce", "set_vcpu_events", *RAISED_INSIDE_KVM_RUN}
# Of other requests than the triple fault.
OTHER_ENDS = {"serviced", "cleared", "handed_over", "lost", "abandoned"}
_SETTERS = {"set_regs", "set_sregs", "set_mp_state", "set_vcpu_events"}
OTHER_RAISERS = {*_SETTERS, "nmi", "smi", "ioctl", "remote", "kvm_run", "unknown"}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_expectations_are_possible(scenario: Scenario) -> None:
    """A finished scenario leaves nothing open, and each end agrees with the saves before it."""
    for one in (one for outcome in scenario.outcomes for one in outcome.lifecycles):
        assert request_of(one) in scenario.about
        fault = request_of(one) == TRIPLE_FAULT
        assert one["end"] in (ENDS if fault else OTHER_ENDS)
        assert one["raised_by"] in (RAISERS if fault else OTHER_RAISERS)
        assert 0 <= one["vm"] < scenario.vms
        assert one["end"] != "lost" or one.get("blind_saves")
        assert one["end"] != "handed_over" or one.get("saves")
        assert one["end"] != "abandoned" or not one.get("saves", 0) + one.get("blind_saves", 0)
        assert one["end"] != "reflected" or one["nested"]
    assert all(one["end"] == "open" for one in scenario.held)
    assert len(set(map(repr, scenario.outcomes))) == len(scenario.outcomes)
    assert len(scenario.title) <= 58, "the list must fit in 80 columns"
    assert len(scenario.outcome) <= 55, "the same, where it can run"
    assert len(scenario.name) <= 21


def test_an_outcome_in_words_names_each_request_once() -> None:
    """A triple fault is what has no name: no end of another request may look like one of its."""
    fault, other, lost = (SCENARIOS[name].outcomes[0].lifecycles[0] for name in ("delivered", "nmi", "lost"))
    dropped: Lifecycle = {**other, "end": "lost"}
    assert str(Outcome((fault, other))) == "delivered, nmi serviced"
    assert str(Outcome((other, dropped))) == "nmi serviced and lost"
    assert str(Outcome((fault, lost))) == "delivered, lost"


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_what_cannot_be_counted_has_bounds(scenario: Scenario) -> None:
    """Of requests that it is about; a triple fault is always counted."""
    for several in (several for outcome in scenario.outcomes for several in outcome.several):
        like = several.like
        assert request_of(like) in scenario.others
        assert 0 <= like.get("vm", 0) < scenario.vms
        assert like.get("end", "serviced") in OTHER_ENDS
        assert like.get("raised_by", "remote") in OTHER_RAISERS
        assert several.most is None or 0 <= several.few(False) <= several.few(True) <= several.most


def test_what_kvm_run_does_inside_is_seen_by_an_engine_with_hooks_there() -> None:
    """Others see kvm_run, and of what one KVM_RUN raised and serviced nothing but a shutdown."""
    (rsm,), (signalled,) = (SCENARIOS[name].outcomes[0].lifecycles for name in ("rsm", "rsm_signal"))
    mce = SCENARIOS["delivered"].outcomes[0].lifecycles[0]
    both = Outcome((rsm, signalled, mce), ((0, 7),))
    assert both.seen(RAISED_INSIDE_KVM_RUN) == both.seen({"rsm"}) == both
    blind = both.seen({"exception"})
    assert blind == Outcome(({**signalled, "raised_by": "kvm_run"}, mce), ((0, 7), (0, 0)))
    reflected: Lifecycle = {**rsm, "end": "reflected", "nested": True}
    assert Outcome((reflected,)).seen(()) == Outcome()


def test_a_vmcb_is_as_long_as_a_page_and_names_what_it_intercepts() -> None:
    """Bits 31 and 32 of the intercepts at offset 0xc: shutdown, and VMRUN, without which KVM refuses the VMCB."""
    with_it, without = (int.from_bytes(vmcb(0x1234, wish)[0xC:0x14], "little") for wish in (True, False))
    assert (with_it, without) == (1 << 31 | 1 << 32, 1 << 32)
    assert len(vmcb(0x1234, True)) == 4096
    assert vmcb(0x1234, True)[0x578:0x57A] == b"\x34\x12"


def test_the_words_raised_inside_kvm_run_are_those_of_the_analysis() -> None:
    """Every site but the one that user space causes through kvm_run, and those that raise nothing."""
    nothing = {Site.REFLECT, Site.HARDWARE_SHUTDOWN, Site.SYNC_EVENTS}
    assert {site.name.lower() for site in Site if site not in nothing} == RAISED_INSIDE_KVM_RUN


def test_a_plan_tells_which_of_them_it_sees() -> None:
    """By its hooks, not by the name of its engine."""
    functions = {"emulator_triple_fault", "kvm_multiple_exception", "kvm_vcpu_ioctl"}
    assert tells(make("kprobe", functions, ()).as_json()) == {"rsm", "exception"}
    assert tells(make("tracepoint", functions, {"sys_enter"}).as_json()) == frozenset()


def a_run(name: str, runs: int = 1) -> Run:
    """Return runs that took 10 to 20 ns."""
    return Run(name, 7, [7], 10, 20, [SCENARIOS[name].outcomes[0]] * runs)


def a_report(run: Run) -> dict[str, Any]:
    """Return a report that says what it must say of a run, and something of other VMs."""
    truth = run.truth()
    vms = [{"vm": 100 + place, "pid": 7, "first_ns": 10 + place} for place in range(run.vms)]
    others = [{"vm": 90, "pid": 7, "first_ns": 9}, {"vm": 91, "pid": 8, "first_ns": 11}]
    return {
        "recording": {"requests": ["triple_fault", "nmi", "clock_update"], "detail": "boundary"},
        "vms": [*vms[::-1], *others],
        "lifecycles": [{**one, "vm": 100 + one["vm"], "why": ""} for one in truth.lifecycles] + [{"vm": 90}],
        "shutdowns": [{**one, "vm": 100 + one["vm"]} for one in truth.shutdowns] + [{"vm": 91}],
    }


def test_a_right_report_does_not_differ() -> None:
    """VMs are those of the run's processes, in the order in which they began."""
    run = Run.from_json(a_run("handed_over", 3).as_json())
    assert run == a_run("handed_over", 3)
    assert differences(a_report(run), run, RAISED_INSIDE_KVM_RUN) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"end": "lost"}, ["lack", "must not"]),
        ({"why": "something"}, ["something"]),
        ({"raised_by": "kvm_run"}, ["lack", "must not"]),
        ({"vm": 90}, ["lack"]),
    ],
)
def test_a_wrong_report_differs(change: dict[str, Any], told: list[str]) -> None:
    """What it lacks, what it has too much, and what it doubts."""
    run = a_run("rsm")
    report = a_report(run)
    report["lifecycles"][0].update(change)
    wrong = differences(report, run, RAISED_INSIDE_KVM_RUN)
    assert len(wrong) == len(told)
    assert all(line.startswith("rsm: ") and part in line for line, part in zip(wrong, told, strict=True))


def watched(report: dict[str, Any], *requests: str) -> dict[str, Any]:
    """Return what a recording that watched these requests only would have reported."""
    rows = [row for row in report["lifecycles"] if request_of(row) in requests]
    return {**report, "lifecycles": rows, "recording": {**report["recording"], "requests": list(requests)}}


def test_only_what_was_watched_and_what_a_scenario_is_about_is_compared() -> None:
    """A triple fault is what every scenario is about; of other requests it says what it knows."""
    run = a_run("exit_storm")
    report = a_report(run)
    assert {request_of(row) for row in report["lifecycles"]} == {"triple_fault", "nmi"}
    for requests in (("triple_fault",), ("nmi",), ("nmi", "triple_fault"), ("tlb_flush",)):
        assert differences(watched(report, *requests), run, ()) == []
    only_faults = watched(report, "triple_fault")
    assert "lack" in differences({**only_faults, "recording": report["recording"]}, run, ())[0]
    other = {**report["lifecycles"][0], "request": "clock_update"}
    assert differences({**report, "lifecycles": [*report["lifecycles"], other]}, run, ()) == []
    fault = {**report["lifecycles"][0], "request": "triple_fault"}
    assert "must not" in differences({**report, "lifecycles": [*report["lifecycles"], fault]}, run, ())[0]


@pytest.mark.parametrize(
    ("count", "detail", "right"),
    [(2, "boundary", False), (3, "boundary", True), (4, "full", False), (5, "full", True), (7, "full", True),
     (8, "full", False), (8, "boundary", False)],
)  # fmt: skip
def test_what_cannot_be_counted_is_within_bounds(
    monkeypatch: pytest.MonkeyPatch, count: int, detail: str, right: bool
) -> None:
    """Other bounds where guest entries are seen; what is like nothing that is known differs."""
    like = Lifecycle(request="nmi", vcpu=0, end="serviced")
    scenario = replace(SCENARIOS["nmi"], expect=(), several=(Several(like, 3, 7, least_full=5),))
    monkeypatch.setitem(DECLARED, "nmi", scenario)
    run = a_run("nmi")
    report = a_report(run)
    row = {**like, "vm": 100, "why": ""}
    report["lifecycles"] = [row] * count
    report["recording"]["detail"] = detail
    assert (differences(report, run, ()) == []) is right
    report["lifecycles"] = [*[row] * 5, {**row, "vcpu": 1}]
    assert "must not" in differences(report, run, ())[0]
    report["lifecycles"] = [*[row] * 5, {**row, "why": "a gap"}]
    assert "a gap" in differences(report, run, ())[0]


@pytest.mark.parametrize(
    ("own", "inside", "across", "right"),
    [(29, 0, 0, True), (28, 1, 0, True), (27, 0, 1, True), (25, 2, 1, True), (31, 0, 0, True),
     (28, 0, 0, False), (26, 0, 1, False), (27, 1, 0, False), (32, 0, 0, False)],
)  # fmt: skip
def test_raises_that_kvm_merges_are_one_and_none_is_missed(own: int, inside: int, across: int, right: bool) -> None:
    """KVM's own clock update may be pending when the scenario makes its, or come before that is looked at as gone."""
    run = a_run("clock_update")
    report = a_report(run)
    serviced = {"request": "clock_update", "vm": 100, "end": "serviced", "raised_by": "remote", "why": ""}
    rows = [
        *[{**serviced, "raised_in": "user_space", "userspace_exits": 0}] * own,
        *[{**serviced, "raised_in": "kvm_run", "userspace_exits": 1}] * inside,
        *[{**serviced, "raised_in": "user_space", "userspace_exits": 1}] * across,
        *[{**serviced, "raised_in": "kvm_run", "userspace_exits": 0}] * 5,
    ]
    report["lifecycles"] = [{**row, "vcpu": vcpu} for vcpu in range(3) for row in rows]
    wrong = differences(report, run, ())
    assert len(wrong) == (0 if right else 3)
    assert all(f"have {own + inside + 2 * across} like" in one for one in wrong)


def test_bounds_are_those_of_each_run() -> None:
    """A run that has too many makes up for none that has too few."""
    twice = Truth.of(SCENARIOS["clock_update"], 2)
    assert [one.like["vm"] for one in twice.several] == sorted([0, 1] * len(SCENARIOS["clock_update"].several))


def test_a_report_of_other_vms_differs() -> None:
    """Nothing else is compared then."""
    run = a_run("lost")
    report = a_report(run)
    del report["vms"][0]
    assert differences(report, run, ()) == ["lost: it had 2 VMs, and the report has 1 of them"]


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
