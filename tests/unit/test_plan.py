"""The hook plan as data: what is there, what is missing, what stays unseen."""

from __future__ import annotations

import json

import pytest

from probes.plan import HOOKS, Via, make, tells

EVENTS = (Via.RAW_TRACEPOINT, Via.TRACE_EVENT)
FUNCTIONS = {hook.target for hooks, _ in HOOKS.values() for hook in hooks if hook.via not in EVENTS}
TRACEPOINTS = {hook.target for hooks, _ in HOOKS.values() for hook in hooks if hook.via in EVENTS}


@pytest.mark.parametrize("engine", HOOKS)
def test_a_whole_kernel_leaves_only_what_the_engine_is_blind_for(engine: str) -> None:
    """Every hook is set, in its order."""
    plan = make(engine, FUNCTIONS, TRACEPOINTS)
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
    plan = make(engine, FUNCTIONS - {target}, TRACEPOINTS - {target})
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


@pytest.mark.parametrize("engine", ["kprobe", "fentry", "ftrace"])
def test_a_flavour_that_is_not_loaded_is_no_gap(engine: str) -> None:
    """On AMD nobody misses what Intel's module would tell; what AMD's own lacks is named."""
    amd = make(engine, FUNCTIONS - {"svm_set_efer"}, TRACEPOINTS, vendors=["kvm_amd"])
    targets = {planned.hook.target for planned in amd.hooks}
    assert {target for target in targets if "vmx" in target} == set()
    assert [planned.hook.target for planned in amd.hooks if planned.missing] == ["svm_set_efer"]
    intel = make(engine, FUNCTIONS, TRACEPOINTS, vendors=["kvm_intel"])
    assert {hook.vendor for hook in intel.attachable} == {None, "kvm_intel"}


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
    plain, other = make(engine, FUNCTIONS, TRACEPOINTS), make(engine, FUNCTIONS, TRACEPOINTS, preempted=True)
    assert [hook.program for hook in plain.attachable] == [hook.program for hook in other.attachable]
    changed = {hook.target for hook in other.attachable if hook.via is Via.TRACEPOINT}
    assert "kvm:kvm_userspace_exit" in changed
    raw = {hook.target for hook in other.attachable if hook.via is Via.RAW_TRACEPOINT}
    assert not raw & {"sys_enter", "sys_exit", "kvm_userspace_exit"}


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
    assert HOOKS[engine][0][-1].program in ("on_sys_enter", "on_kvm_vcpu_ioctl", "vcpu_ioctl")


def test_a_refused_hook_is_no_hook() -> None:
    """It stands in the plan with the kernel's reason, and nobody counts on what it would have told."""
    whole = make("fentry", FUNCTIONS, TRACEPOINTS)
    hook = next(hook for hook in whole.attachable if hook.target == "kvm_multiple_exception")
    left = whole.refusing(hook, "Invalid argument")
    assert hook not in left.attachable
    assert len(left.attachable) == len(whole.attachable) - 1
    assert [line["unseen"] for line in left.as_json() if "Invalid argument" in (line["unseen"] or "")] == [
        f"{hook.unseen} (refused: Invalid argument)"
    ]
    assert tells(whole.as_json()) - tells(left.as_json()) == {"exception"}
