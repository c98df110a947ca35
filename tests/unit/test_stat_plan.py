"""What kvmreq stat hooks: told by the kernel's own prototypes, and what stays unseen where it has none."""

from __future__ import annotations

import pytest

from probes.guest import programs
from probes.plan import Via
from probes.stat import ERROR, HOOKS, make
from reports.stat_help import HELP

VCPU = "kvm_vcpu *"
OLD, NEW = ("unsigned int", VCPU, "u32"), (VCPU, "u32")
WITH_REASON, WITHOUT = "on_guest_exit_with_reason", "on_guest_exit"
TARGETS = {hook.target for hooks in HOOKS.values() for hook in hooks}


@pytest.mark.parametrize(
    ("arguments", "fitting"),
    [(OLD, (WITH_REASON,)), (NEW, (WITHOUT,)), (None, (WITH_REASON, WITHOUT)), (("u32", "u32"), ()), ((VCPU,), ())],
)
def test_the_prototype_decides(arguments: tuple[str, ...] | None, fitting: tuple[str, ...]) -> None:
    """Without BTF the larger one is tried first: the kernel refuses it where there are fewer arguments."""
    assert programs("kvm_exit", arguments) == fitting


@pytest.mark.parametrize("engine", HOOKS)
@pytest.mark.parametrize("tracepoint", ["kvm_exit", "kvm_entry"])
def test_an_unknown_prototype_is_not_guessed(engine: str, tracepoint: str) -> None:
    """The hook is left out, and the plan says why."""
    arguments = {"kvm_exit": NEW, "kvm_entry": (VCPU, "bool"), tracepoint: ("u32", "u32")}
    plan = make(engine, TARGETS, TARGETS, arguments)
    assert plan.hopeless is None
    assert tracepoint not in {hook.target for hook in plan.attachable}
    (line,) = (line for line in plan.as_json() if line["unseen"] and "its arguments" in line["unseen"])
    assert line["hook"] is None


@pytest.mark.parametrize("engine", HOOKS)
def test_a_kernel_without_kvm_has_no_hope(engine: str) -> None:
    """And every hook that is needed is named."""
    plan = make(engine, set(), set(), {})
    assert plan.hopeless is not None
    for hook in HOOKS[engine]:
        assert (f"{hook.target} (" in plan.hopeless) is hook.required


@pytest.mark.parametrize("engine", HOOKS)
def test_what_ends_a_time_is_hooked_before_what_begins_it(engine: str) -> None:
    """Else exits of the first moment would stay without their end."""
    order = [hook.target for hook in HOOKS[engine] if hook.via is Via.RAW_TRACEPOINT]
    assert order.index("kvm_entry") < order.index("kvm_exit")


def test_help_states_the_error_of_the_histograms() -> None:
    """It is written out there, so that a parser needs no numpy."""
    assert f"{ERROR:.2%}" in HELP
    assert f"{2 * ERROR:.1%}" in HELP
    assert all(len(line) < 90 for line in HELP.splitlines())
