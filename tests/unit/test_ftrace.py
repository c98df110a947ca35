"""What the ftrace engine checks before it begins, what it removes, and that it does without BCC."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from probes import fetch, plan
from tracer import engines, ftrace, host, preconditions
from tracer.ftrace import dead, events, locked_down, no_clock, no_probe_events, no_root, no_tracefs, refused, tracefs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tracefs that has everything."""
    made = tmp_path / "tracing"
    for name in ("instances", "events/kvm/kvm_userspace_exit"):
        (made / name).mkdir(parents=True)
    (made / "kprobe_events").touch()
    (made / "trace_clock").write_text("[local] global counter mono mono_raw boot\n")
    (made / "events/kvm/kvm_userspace_exit/format").touch()
    return made


def test_a_host_that_has_everything_is_not_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second place is looked at, too."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(host, "lockdown", lambda: "integrity")
    monkeypatch.setattr(host, "no_btf", lambda: None)
    places = (root.parent / "nothing", root)
    assert tracefs(places) == root
    assert refused(places) is None
    assert events(["kvm:kvm_userspace_exit", "kvm:other"], places) == {"kvm:kvm_userspace_exit"}


def test_every_refusal_names_its_cause(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what to do about it, where there is something."""
    monkeypatch.setattr(host, "no_btf", lambda: "no BTF")
    monkeypatch.setattr(host, "lockdown", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert refused((root,)) == "no BTF"
    (root / "trace_clock").write_text("[local] global monotone\n")
    assert refused((root,)) == no_clock(root) == "tracefs offers no trace_clock mono (CLOCK_MONOTONIC)"
    monkeypatch.setattr(host, "lockdown", lambda: "confidentiality")
    assert refused((root,)) == locked_down() == "the kernel is locked down (confidentiality): tracefs is refused"
    (root / "kprobe_events").unlink()
    assert refused((root,)) == no_probe_events(root)
    assert "CONFIG_KPROBE_EVENTS" in (no_probe_events(root) or "")
    monkeypatch.setattr(host, "no_kprobes", lambda: None)
    assert refused((root / "nothing",)) == no_tracefs((root / "nothing",))
    monkeypatch.setattr(host, "no_kprobes", lambda: "built without kprobes")
    assert refused((root / "nothing",)) == "built without kprobes"
    assert "mount -t tracefs" in (no_tracefs((root / "nothing",)) or "")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert refused((root,)) == no_root() == "this process may not use tracefs: run as root"


def test_only_what_a_dead_kvmreq_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what a live one has, and not what somebody else made."""
    proc = tmp_path / "proc"
    (proc / "7").mkdir(parents=True)
    (proc / "7/stat").write_text("7 (a) b (c) S " + " ".join(str(number) for number in range(4, 50)))
    assert not dead("kvmreq-7-22", proc)
    assert not dead("kvmreq_7_22_2", proc)
    names = ("kvmreq-7-21", "kvmreq-8-22", "kvmreq-8-22-3", "kvmreq-7-22", "kvmreq-8", "kvmreq", "somebody-8-22")
    for name in names:
        (tmp_path / "instances" / name).mkdir(parents=True)
    probes = ["p:kvmreq_8_22/vcpu_put vcpu_put vcpu=%di:x64", "r256:kvmreq_7_22/x f", "p:kprobes/kvmreq_8_22 f"]
    (tmp_path / "kprobe_events").write_text("\n".join(probes) + "\n")
    commands: list[str] = []
    monkeypatch.setattr(ftrace, "command", lambda _, text: commands.append(text))
    monkeypatch.setattr(ftrace, "_remove_instance", Path.rmdir)
    gone = ftrace.remove_dead(tmp_path, proc)
    assert gone == ["kvmreq-7-21", "kvmreq-8-22", "kvmreq-8-22-3", "kvmreq_8_22"]
    assert {path.name for path in (tmp_path / "instances").iterdir()} == set(names) - set(gone)
    assert commands == ["-:kvmreq_8_22/vcpu_put"]


def test_without_bcc_the_bpf_engines_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing imports it to find that out."""
    monkeypatch.setitem(sys.modules, "bcc", None)
    monkeypatch.setattr(preconditions, "PRECONDITIONS", {})
    monkeypatch.setattr(host, "no_btf", lambda: None)
    monkeypatch.setattr(host, "preempts", lambda: False)
    why = {choice.engine: choice.why_not for choice in engines.choices()}
    assert list(why) == ["fentry", "kprobe", "tracepoint", "ftrace"]
    assert (
        why["fentry"]
        == why["kprobe"]
        == why["tracepoint"]
        == "Python cannot import bcc: install the package python3-bpfcc"
    )
    assert why["ftrace"] != why["kprobe"]


AT = {name: number * 8 for number, (name, _, _) in enumerate(fetch._FIELDS)}


@pytest.mark.parametrize("hook", [hook for hook in plan.FTRACE if hook.via is not plan.Via.TRACE_EVENT])
def test_every_probe_fetches_under_names_of_its_own(hook: plan.Hook) -> None:
    """A kernel refuses a name that is there twice, and more than 128 arguments."""
    words = fetch.arguments(hook.program, AT)
    names = [word.partition("=")[0] for word in words]
    assert len(set(names)) == len(names) <= 128
    assert all(word.count("(") == word.count(")") and ":" in word for word in words)
    assert not set(names) & {"common_type", "common_flags", "common_preempt_count", "common_pid"}


def test_what_a_verdict_hangs_on_reads_no_memory_that_may_not_be_there_where_that_counts_as_a_miss() -> None:
    """Linux 5.10 counts ten misses for each restore otherwise, and every request of the recording is undecided."""
    counts = {"fault_handler": AT["fault_handler"]}
    others = {name: offset for name, offset in AT.items() if name not in counts}
    assert fetch.arguments("set_events_end", AT) == ["ret=$retval:s32"]
    assert len(fetch.arguments("set_events_end", others)) > len(fetch.PRESERVED)
