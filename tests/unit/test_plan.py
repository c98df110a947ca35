"""The hook plan as data: what is there, what is missing, what stays unseen."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import pytest

from probes.plan import HOOKS, Plan, Via, make, tells

EVENTS = (Via.RAW_TRACEPOINT, Via.TRACE_EVENT)
FUNCTIONS = {hook.target for hooks, _ in HOOKS.values() for hook in hooks if hook.via not in EVENTS}
TRACEPOINTS = {hook.target for hooks, _ in HOOKS.values() for hook in hooks if hook.via in EVENTS}

# What raw tracepoints hand over on a kernel of today.
ARGUMENTS = {
    "kvm_entry": ("kvm_vcpu *", "bool"),
    "kvm_exit": ("kvm_vcpu *", "u32"),
    "kvm_vcpu_wakeup": ("__u64", "bool", "bool"),
}


def whole(engine: str, without: Collection[str] = (), **more: Any) -> Plan:
    """Return the plan for detail full of a kernel that lacks only those functions and tracepoints."""
    gone = set(without)
    return make(engine, FUNCTIONS - gone, TRACEPOINTS - gone, full=True, arguments=ARGUMENTS, **more)


@pytest.mark.parametrize("engine", HOOKS)
def test_a_whole_kernel_leaves_only_what_the_engine_is_blind_for(engine: str) -> None:
    """Every hook is set, in its order."""
    plan = whole(engine)
    hooks, blind = HOOKS[engine]
    assert plan.hopeless is None
    assert plan.attachable == hooks
    lines = plan.as_json()
    assert [line["hook"] for line in lines] == [f"{hook.via}:{hook.target}" for hook in hooks] + [None] * len(blind)
    assert [line["unseen"] for line in lines if line["hook"] is None] == [one.unseen for one in blind]
    assert json.loads(json.dumps(lines)) == lines


@pytest.mark.parametrize(
    ("engine", "target"), [(engine, hook.target) for engine, (hooks, _) in HOOKS.items() for hook in hooks]
)
def test_each_missing_hook_says_what_stays_unseen(engine: str, target: str) -> None:
    """And the engine has no hope exactly where it cannot do without it."""
    plan = whole(engine, {target})
    hooks = HOOKS[engine][0]
    gone = [hook for hook in hooks if hook.target == target]
    assert [hook for hook in hooks if hook not in plan.attachable] == gone
    told = {hook.fact for hook in hooks if hook not in gone}
    named = [hook for hook in hooks if hook not in gone or hook.fact not in told]
    for hook, line in zip(named, plan.as_json(), strict=False):
        assert line["fact"] == hook.fact
        assert (line["hook"] is None) is (hook in gone)
        if hook in gone:
            assert line["unseen"].startswith(f"{hook.unseen} (this kernel has no such ")
    if any(hook.required for hook in gone):
        assert plan.hopeless is not None
        assert target in plan.hopeless
    else:
        assert plan.hopeless is None


def test_what_only_detail_full_tells_is_hooked_there_only() -> None:
    """Neither guest entries nor kicks cost anything, nor are they missed, in detail boundary."""
    boundary, full = (make("ftrace", FUNCTIONS, TRACEPOINTS, full=full) for full in (False, True))
    more = {hook.target for hook in full.attachable} - {hook.target for hook in boundary.attachable}
    assert {"kvm:kvm_entry", "kvm:kvm_exit", "svm_vcpu_run", "vmx_vcpu_run", "kvm_vcpu_kick"} < more
    facts = [{line["fact"] for line in plan.as_json()} for plan in (boundary, full)]
    assert facts[0] < facts[1]
    assert "whether a vCPU was still in guest mode when the requester that waits for it went on" in facts[1] - facts[0]


@pytest.mark.parametrize("engine", ["kprobe", "fentry", "ftrace"])
def test_a_flavour_that_is_not_loaded_is_no_gap(engine: str) -> None:
    """On AMD nobody misses what Intel's module would tell; what AMD's own lacks is named."""
    amd = make(engine, FUNCTIONS - {"svm_set_efer"}, TRACEPOINTS, vendors=["kvm_amd"])
    targets = {planned.hook.target for planned in amd.hooks}
    assert {target for target in targets if "vmx" in target} == set()
    assert [planned.hook.target for planned in amd.hooks if planned.missing] == ["svm_set_efer"]
    intel = make(engine, FUNCTIONS, TRACEPOINTS, vendors=["kvm_intel"])
    assert {hook.vendor for hook in intel.attachable} == {None, "kvm_intel"}


def test_tds_are_entered_and_left_by_functions_of_their_own() -> None:
    """Where KVM has them both they and those of other guests are hooked; elsewhere nobody misses them."""
    tdx = {"tdx_vcpu_run", "tdx_get_exit_info"}
    there = {hook.target for hook in whole("ftrace", vendors=["kvm_intel"]).attachable}
    assert there > tdx | {"vmx_vcpu_run", "vmx_get_exit_info"}
    without = whole("ftrace", tdx, vendors=["kvm_intel"])
    assert not [planned for planned in without.hooks if planned.missing]
    assert not tdx & {hook.target for hook in whole("ftrace", vendors=["kvm_amd"]).attachable}


def test_what_tells_the_same_fact_stands_in() -> None:
    """A function that was renamed leaves no gap under its old name."""
    old, new = "svm_can_emulate_instruction", "svm_check_emulate_instruction"
    for one, other in ((old, new), (new, old)):
        plan = make("kprobe", FUNCTIONS - {one}, TRACEPOINTS)
        assert not [planned for planned in plan.hooks if planned.missing]
        assert other in {hook.target for hook in plan.attachable}
    assert [planned.missing for planned in make("kprobe", FUNCTIONS - {old, new}, TRACEPOINTS).hooks].count(None) < len(
        make("kprobe", FUNCTIONS, TRACEPOINTS).hooks
    )


@pytest.mark.parametrize("engine", ["tracepoint", "kprobe", "fentry"])
def test_where_raw_tracepoints_are_preempted_trace_events_do(engine: str) -> None:
    """The same programs, in the same order."""
    plain, other = whole(engine), whole(engine, preempted=True)
    assert [hook.program for hook in plain.attachable] == [hook.program for hook in other.attachable]
    changed = {hook.target for hook in other.attachable if hook.via is Via.TRACEPOINT}
    assert "kvm:kvm_userspace_exit" in changed
    raw = {hook.target for hook in other.attachable if hook.via is Via.RAW_TRACEPOINT}
    assert not raw & {"sys_enter", "sys_exit", "kvm_userspace_exit"}
    assert raw >= {"kvm_entry", "kvm_exit"}, "their trace events tell no vCPU"
    assert "kvm:kvm_vcpu_wakeup" in changed


@pytest.mark.parametrize("engine", ["tracepoint", "kprobe", "fentry"])
def test_detail_boundary_has_none_of_what_detail_full_adds(engine: str) -> None:
    """Neither its hooks nor what it cannot see; and every hook that is added comes last."""
    plain, full = make(engine, FUNCTIONS, TRACEPOINTS), whole(engine)
    assert full.attachable[: len(plain.attachable)] == plain.attachable
    assert all(hook.full for hook in full.attachable[len(plain.attachable) :])
    assert not any(hook.full for hook in plain.attachable)
    assert set(full.blind) > set(plain.blind)
    assert not any(one.full for one in plain.blind)


@pytest.mark.parametrize("engine", ["kprobe", "fentry"])
def test_a_requester_that_newer_kernels_lack_is_no_gap(engine: str) -> None:
    """The other one tells of every request that concerns every vCPU."""
    plan = whole(engine, {"kvm_make_all_cpus_request_except", "kvm_vcpu_kick"})
    assert not [planned.hook.target for planned in plan.hooks if planned.missing]


@pytest.mark.parametrize("engine", ["tracepoint", "kprobe", "fentry"])
def test_arguments_decide_the_program_of_a_raw_tracepoint(engine: str) -> None:
    """Without BTF the kernel decides; what nobody knows is left out."""

    def of_exit(*types: str) -> tuple[str, str | None] | None:
        arguments = ARGUMENTS | {"kvm_exit": types or None}
        plan = make(engine, FUNCTIONS, TRACEPOINTS, full=True, arguments=arguments)
        hooks = [hook for hook in plan.attachable if hook.target == "kvm_exit"]
        assert len(hooks) == 1 or any("its arguments" in (line["unseen"] or "") for line in plan.as_json())
        return (hooks[0].program, hooks[0].other) if hooks else None

    assert of_exit("kvm_vcpu *", "u32") == ("on_guest_exit", None)
    assert of_exit("unsigned int", "kvm_vcpu *", "u32") == ("on_guest_exit_with_reason", None)
    assert of_exit("u32", "u32") is None
    assert of_exit() == ("on_guest_exit_with_reason", "on_guest_exit")
    refused = make(engine, FUNCTIONS, TRACEPOINTS, full=True, arguments=ARGUMENTS | {"kvm_exit": None})
    hook = next(hook for hook in refused.attachable if hook.target == "kvm_exit")
    taken = refused.taking(hook)
    assert [(one.program, one.other) for one in taken.attachable if one.target == "kvm_exit"] == [
        ("on_guest_exit", None)
    ]


@pytest.mark.parametrize("engine", HOOKS)
def test_a_kernel_without_anything_has_no_hope(engine: str) -> None:
    """Every hook that is needed is named."""
    plan = make(engine, set(), set())
    assert plan.attachable == ()
    assert plan.hopeless is not None
    for hook in HOOKS[engine][0]:
        assert (f"{hook.target} (" in plan.hopeless) is hook.required


@pytest.mark.parametrize("engine", HOOKS)
def test_what_ends_an_ioctl_is_set_before_what_begins_one(engine: str) -> None:
    """Else a begin would go without its end while the hooks are being set."""
    assert [hook for hook in HOOKS[engine][0] if not hook.full][-1].program in (
        "on_sys_enter",
        "on_kvm_vcpu_ioctl",
        "vcpu_ioctl",
    )


def test_a_refused_hook_is_no_hook() -> None:
    """It stands in the plan with the kernel's reason, and nobody counts on what it would have told."""
    plan = make("fentry", FUNCTIONS, TRACEPOINTS)
    hook = next(hook for hook in plan.attachable if hook.target == "kvm_multiple_exception")
    left = plan.refusing(hook, "Invalid argument")
    assert hook not in left.attachable
    assert len(left.attachable) == len(plan.attachable) - 1
    assert [line["unseen"] for line in left.as_json() if "Invalid argument" in (line["unseen"] or "")] == [
        f"{hook.unseen} (refused: Invalid argument)"
    ]
    assert tells(plan.as_json()) - tells(left.as_json()) == {"exception"}
