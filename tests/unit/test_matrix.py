"""The matrix itself: what it calls wrong, what it lets pass, and that a restricted run says so. Boots nothing."""

from __future__ import annotations

import doctest
import lzma
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lab.runner import Run
from lab.scenarios import SCENARIOS
from lab.stage import RAISED_INSIDE_KVM_RUN, Scenario, never_outside
from tests.matrix import MatrixError, apt, inside, kernels, suite, truth, vendors, verdicts

ROW: dict[str, Any] = {"vm": 0, "vcpu": 0, "raised_by": "set_mce", "end": "lost", "blind_saves": 1}
TOLD: dict[str, Any] = {
    "name": "a_test", "begin_ns": 100, "end_ns": 200, "vms": 1, "lifecycles": [ROW], "shutdowns": [],
}  # fmt: skip


def report(*rows: dict[str, Any], vms: tuple[int, ...] = (7,)) -> dict[str, Any]:
    """Return a report with VMs that began within TOLD, and one from before it with a request of its own."""
    earlier = {**ROW, "vm": 1, "why": ""}
    return {
        "vms": [{"vm": 1, "first_ns": 50, "pid": 5}, *({"vm": vm, "first_ns": 150 + vm, "pid": 5} for vm in vms)],
        "lifecycles": [earlier, *({"vm": vms[0], "why": "", **row} for row in rows)],
        "shutdowns": [],
        "recording": {"plan": [], "requests": ["triple_fault"], "detail": "boundary"},
        "loss": {"missed": 0},
    }


def row(**changes: Any) -> dict[str, Any]:
    """Return the row that TOLD must give, changed."""
    return {**ROW, "vm": 7, **changes}


def test_a_test_of_the_kernel_is_as_it_must_be() -> None:
    """Whatever happened before is not this run's."""
    assert truth.compared(report(row()), TOLD) == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "lifecycles lack"),
        ([row(end="undecided", why="a gap")], "lifecycles lack"),
        ([row(why="a gap")], "lifecycles have a doubt: a gap"),
        ([row(blind_saves=2)], "lifecycles lack"),
        ([row(), row()], "lifecycles have what they must not"),
        ([row(raised_by="exception")], "lifecycles lack"),
    ],
)
def test_what_differs_is_wrong(rows: list[dict[str, Any]], words: str) -> None:
    """Each in words that name it."""
    wrong = truth.compared(report(*rows), TOLD)
    assert wrong
    assert wrong[0].startswith(words)


@pytest.mark.parametrize("vms", [(7, 8), (7, 8, 9)])
def test_each_vm_must_be_seen(vms: tuple[int, ...]) -> None:
    """A VM too many is as wrong as one too few."""
    assert truth.compared(report(row(), vms=vms), TOLD) == [f"it had 1 VMs, and the report has {len(vms)} of them"]


def told_of(name: str) -> str:
    """Return what the lab tells of a run of a scenario within the time of TOLD."""
    return Run(name, 5, [5], 100, 200, [SCENARIOS[name].outcomes[0]]).as_json()


def test_a_scenario_is_exact_declared_or_wrong() -> None:
    """Declared is what the plan of the recording does not tell; here it tells nothing of KVM_RUN."""
    name, (must,) = next((one.name, one.expect) for one in SCENARIOS.values() if hidden_but_there(one))
    rows = {"exact": {**must, "vm": 7}, "declared": {**must, "vm": 7, "raised_by": "kvm_run"}}
    shutdowns = [{**one, "vm": 7} for one in SCENARIOS[name].shutdowns]
    assert truth.differences({**report(rows["exact"]), "shutdowns": shutdowns}, told_of(name)) == ([], [])
    wrong, hidden = truth.differences({**report(rows["declared"]), "shutdowns": shutdowns}, told_of(name))
    assert (wrong, hidden) == ([], [f"raised_by is kvm_run, not {must['raised_by']}"])
    assert truth.differences(report(), told_of(name))[0]


def hidden_but_there(scenario: Scenario) -> bool:
    """Tell whether a scenario's one request is raised inside KVM_RUN and outlives it."""
    rows = scenario.expect
    inside_run = len(rows) == 1 and scenario.vms == 1 and rows[0]["raised_by"] in RAISED_INSIDE_KVM_RUN
    return inside_run and not never_outside(rows[0])


def boot(**changes: Any) -> dict[str, Any]:
    """Return the results of a boot in which everything was right, but for one engine's changes."""
    engine = {
        "engine": "kprobe", "refused": None, "status": 0, "clean": True, "loss": 0, "missed": 0, "attached": 23,
        "left_behind": [], "left_behind_by_kill": [],
        "scenarios": {"lost": {"result": "exact", "reasons": []}, "rsm": {"result": "cannot run", "reasons": ["old"]}},
        "witnesses": {},
        **changes,
    }  # fmt: skip
    return {"headers": [], "complete": True, "kvm_has_btf": True, "bcc": "0.31.0", "engines": [engine]}


def test_a_boot_in_which_all_is_right_has_no_failures() -> None:
    """What this kernel cannot run counts as nothing."""
    assert verdicts.failures("6.1", boot(), {}) == []
    assert verdicts.counts(boot()) == {"exact": 1, "cannot run": 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"refused": "no", "left_behind": []}, "refused: no"),
        ({"status": 1}, "record ended with status 1"),
        ({"clean": False}, "not cleanly"),
        ({"loss": 3}, "3 events were lost"),
        ({"attached": 0}, "was not seen in the kernel"),
        ({"left_behind": ["BPF program 5"]}, "left behind after Ctrl-C: BPF program 5"),
        ({"left_behind_by_kill": ["tracing instance kvmreq"]}, "left behind after kill -9: tracing instance kvmreq"),
        ({"scenarios": {"lost": {"result": "wrong", "reasons": ["it is open"]}}}, "lost: it is open"),
        ({"witnesses": {"smm_test": {"result": "wrong", "reasons": ["status 1"]}}}, "smm_test: status 1"),
    ],
)
def test_each_failure_is_told(changes: dict[str, Any], words: str) -> None:
    """One line each, with where."""
    (failure,) = verdicts.failures("6.1", boot(**changes), {})
    assert str(failure).startswith("6.1 kprobe: ")
    assert words in str(failure)


def test_an_engine_may_be_refused_only_where_that_is_known() -> None:
    """fentry needs BTF of the module, and a BCC that reaches modules."""
    refused = boot(engine="fentry", refused="no", left_behind=[])
    assert verdicts.failures("x", refused, verdicts.may_be_refused(refused))
    for change in ({"kvm_has_btf": False}, {"bcc": "0.26.0+ds-1"}):
        known = verdicts.may_be_refused({**refused, **change})
        assert list(known) == ["fentry"]
        assert verdicts.failures("x", refused, known) == []


def test_headers_and_an_early_end_are_failures() -> None:
    """Both would make everything else worthless."""
    failures = verdicts.failures("x", {**boot(), "headers": ["/lib/modules/x/build"], "complete": False}, {})
    assert len(failures) == 2


def test_counts_that_differ_from_those_of_tracefs_are_failures() -> None:
    """Each difference is told; a comparison of nothing is none."""
    told = {
        "what": "full",
        "engine": "kprobe",
        "kicks": 23,
        "kicks_differ": [],
        "user": {"KVM_EXIT_IO": 5},
        "same": True,
    }
    same = verdicts.of_counts(told)
    assert same["counted"] == {"kicks": 23, "user": 5}
    assert verdicts.failures("6.1", {**boot(), "counts": [same]}, {}) == []
    differ = verdicts.of_counts({**told, "kicks_differ": [{"of": [7], "kvmreq": 22, "tracefs": 23}], "same": False})
    nothing = verdicts.of_counts({"what": "stat", "engine": "kprobe", "user": {}, "same": False})
    words = [str(one) for one in verdicts.failures("6.1", {**boot(), "counts": [differ, nothing]}, {})]
    assert ["'kvmreq': 22" in words[0], "nothing was counted" in words[1], len(words)] == [True, True, 2]


def test_what_a_restricted_run_leaves_out_is_said() -> None:
    """A run of everything leaves nothing out."""
    whole = suite.parse([])
    whole.kernels = list(kernels.DEFAULT)
    assert suite.left_out(whole) == []
    part = suite.parse(["5.10", "6.1", "--debian13", "fentry", "--witnesses", "6.1"])
    lines = suite.left_out(part)
    assert "ftrace in debian13" in lines
    assert not [line for line in lines if line.startswith("fentry") or line.endswith("debian12")]
    assert "kernel newest" in lines
    assert (
        "KVM's own tests, kvm_amd loaded again, counts beside tracefs's, and two engines at the same time on 5.10"
        in lines
    )


def test_a_number_is_looked_for_in_every_suite() -> None:
    """The newest first; a name that is none is refused with those that are."""
    assert kernels.series("7.3").suites == ("sid",)
    assert ("trixie-backports",) in kernels.series("7.3").elsewhere
    with pytest.raises(MatrixError, match=r"known are 5\.10, 6\.1"):
        kernels.series("latest")


def test_work_in_a_child_comes_back_or_is_ended() -> None:
    """A scenario that hangs or crashes costs its time limit, and the others go on."""
    assert inside._in_child(lambda: {"vms": 1}, 10) == {"vms": 1}
    assert "within 0 s" in inside._in_child(lambda: dict(iter(lambda: ("a", 1), None)), 0.2)["error"]
    assert inside._in_child(lambda: {"vms": int("x")}, 10)["error"].startswith("ValueError")


def test_examples() -> None:
    """Those in docstrings hold."""
    assert doctest.testmod(apt).failed == 0


def test_a_vendor_module_is_read_by_its_symbols_and_its_types(tmp_path: Path) -> None:
    """Of a module made here: one function in both, one without BTF, one that is data, and the rest absent."""
    if not shutil.which("gcc") or not shutil.which("objcopy"):
        pytest.skip("no gcc and binutils: apt install gcc")
    source, types = tmp_path / "module.c", tmp_path / "types"
    source.write_text(
        "int nested_vmx_abort(void) { return 1; }\nint svm_set_efer(void) { return 2; }\nint nested_svm_vmexit;\n"
    )
    types.write_bytes(b"\0int\0nested_vmx_abort\0not_nested_svm_vmexit\0")
    folder = tmp_path / "lib/modules/1.2.3/kernel/arch/x86/kvm"
    folder.mkdir(parents=True)
    module = folder / "kvm-intel.ko"
    subprocess.run(["gcc", "-c", "-o", module, source], check=True)
    subprocess.run(["objcopy", "--add-section", f".BTF={types}", module], check=True)
    (folder / "kvm-amd.ko.xz").write_bytes(lzma.compress(module.read_bytes()))
    kernel = kernels.Kernel("1.2", "1.2.3", "1", tmp_path)
    assert vendors.functions(kernel, "kvm_intel") == {
        "nested_vmx_abort": vendors.BOTH,
        "nested_vmx_triple_fault": vendors.ABSENT,
    }
    amd = vendors.functions(kernel, "kvm_amd")
    assert amd.pop("svm_set_efer") == vendors.SYMBOL_ONLY
    assert set(amd.values()) == {vendors.ABSENT}
    module.unlink()
    with pytest.raises(MatrixError, match="has no kvm-intel"):
        vendors.functions(kernel, "kvm_intel")


def of_both(plan: list[str], *rows: dict[str, Any]) -> dict[str, Any]:
    """Return the report of one of two recordings of the same time; ``plan``: functions that it hooks."""
    row = {
        "vm": 7, "pid": 5, "vcpu": 0, "request": "triple_fault", "raised_ns": [1, 2], "raised_by": "kvm_run",
        "end": "lost", "userspace_exits": 0, "saves": 0, "blind_saves": 1, "nested": False, "stale": False, "why": "",
    }  # fmt: skip
    return {
        "vms": [{"vm": 7, "pid": 5, "first_ns": 10}],
        "lifecycles": [{**row, **one} for one in rows],
        "shutdowns": [{"vm": 7, "pid": 5, "vcpu": 0, "time_ns": 5, "source": "request", "nested": False}],
        "recording": {"plan": [{"fact": "", "hook": f"kprobe:{target}", "unseen": None} for target in plan]},
    }


def test_two_engines_differ_only_in_what_a_plan_declares() -> None:
    """Who raised it may be unseen to the one without the hook; nothing else may differ."""
    rsm = ["emulator_triple_fault"]
    assert truth.between(of_both(rsm, {"raised_by": "rsm"}), of_both(rsm, {"raised_by": "rsm"})) == []
    assert truth.between(of_both(rsm, {"raised_by": "rsm"}), of_both([], {})) == []
    assert truth.between(of_both([], {}), of_both(rsm, {"raised_by": "rsm"})) == []
    assert "raised by rsm and by kvm_run" in truth.between(of_both(rsm, {"raised_by": "rsm"}), of_both(rsm, {}))[0]
    assert (
        "raised by rsm and by exception"
        in truth.between(of_both([], {"raised_by": "rsm"}), of_both([], {"raised_by": "exception"}))[0]
    )
    missed = {"end": "undecided", "why": f"{truth.MISSED}, and they may be what decides it"}
    assert truth.between(of_both([], {}), of_both([], missed)) == []
    assert truth.between(of_both([], {}), of_both([], {**missed, "why": "its end was not seen"}))
    for change in ({"end": "abandoned"}, {"saves": 1}, {"vcpu": 1}, {"nested": True}, {"userspace_exits": 23}):
        assert truth.between(of_both([], {}), of_both([], change))
    assert truth.between(of_both([], {}), of_both([], {}, {}))
    assert truth.between(of_both([], {}), {**of_both([], {}), "shutdowns": []})


def test_what_two_engines_tell_differently_in_detail_full_fails(tmp_path: Path) -> None:
    """So does a guest that did not do its work, a recorder that failed, and a tracefs that lost events."""
    told: dict[str, Any] = {
        "engines": ["kprobe", "ftrace"], "status": {"kprobe": 0, "ftrace": 0},
        "work": {"pid": 1, "smm": True}, "overrun": 0,
    }  # fmt: skip
    for change, words in (
        ({"work": {"error": "LabError: it did not"}}, "LabError: it did not"),
        ({"refused": "no BPF"}, "no BPF"),
        ({"status": {"kprobe": 1, "ftrace": 0}}, "'kprobe': 1"),
        ({"overrun": 3}, "tracefs itself has lost 3 events"),
        ({}, "no recording at"),
    ):
        full = verdicts._of_full(tmp_path, {**told, **change})
        assert words in full["differences"][0]
        boot = {"headers": [], "complete": True, "engines": [], "full": full}
        assert [failure.where for failure in verdicts.failures("6.1", boot, {})] == ["6.1 kprobe and ftrace full"]
