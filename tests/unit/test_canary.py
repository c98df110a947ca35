"""The canary: what the hooks must tell of a scratch VM, and what is said of those that do not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from lab import scratch
from lab.kvm import LabError
from probes.plan import Plan
from probes.schema import EVENT, KVM_EXIT_SHUTDOWN, Flag, Kind
from tracer import canary, host
from tracer.errors import CannotTrace

BIT = 1 << 10
ME = os.getpid()
NEW = {"kind": Kind.VCPU_NEW, "arg": scratch.UNUSUAL_ID, "flags": Flag.CREATED, "detail": 7}
RUN = {"kind": Kind.RUN_EXIT, "arg": KVM_EXIT_SHUTDOWN, "before": BIT}
END = {"kind": Kind.VCPU_END}
#: Of another process, of another vCPU of this one, and of one that ran before.
OTHERS = (
    {"kind": Kind.VCPU_NEW, "arg": scratch.UNUSUAL_ID, "flags": Flag.CREATED, "pid": ME + 1, "vcpu": 8, "detail": 8},
    {"kind": Kind.VCPU_NEW, "arg": 0, "flags": Flag.CREATED, "vcpu": 9, "detail": 9},
    {"kind": Kind.VCPU_NEW, "arg": scratch.UNUSUAL_ID, "vcpu": 10, "detail": 10},
    {"kind": Kind.REQUEST_ALL, "vcpu": 0, "detail": 9},
    {"kind": Kind.VMM_EXIT, "vcpu": 0, "detail": 7},
)


def _events(*rows: dict[str, Any]) -> Any:
    made = np.zeros(len(rows), EVENT)
    for place, row in enumerate(rows):
        for name, value in {"pid": ME, "vcpu": 5, **row}.items():
            made[place][name] = value
    return made


class _Engine:
    """Gives what it was told, some at each look, once a scratch VM has lived."""

    plan = Plan("tracepoint", (), ())

    def __init__(self, *batches: Any) -> None:
        self.batches = list(batches)
        self.watched: list[int] = []
        self.lived = False

    def settle(self) -> None:
        pass

    def drain(self) -> Any:
        return self.batches.pop(0) if self.batches and self.lived else _events()

    @contextmanager
    def watching(self, pid: int) -> Iterator[None]:
        self.watched.append(pid)
        yield
        self.watched.remove(pid)

    def life(self) -> None:
        assert self.watched == [ME]  # with -p it would not be seen otherwise
        self.lived = True


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "no_dev_kvm", lambda: None)
    monkeypatch.setattr(canary, "_AWAIT_S", 0.0)
    monkeypatch.setattr(canary, "_LIVES", 1)


def _listen(monkeypatch: pytest.MonkeyPatch, *batches: Any) -> canary.Heard:
    engine: Any = _Engine(*batches)
    monkeypatch.setattr(scratch, "life", engine.life)
    try:
        return canary.listen(engine)
    finally:
        assert engine.watched == []


@pytest.mark.usefixtures("_impatient")
def test_a_canary_is_seen_and_is_in_no_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others did meanwhile is: a vCPU of that number of another process, too."""
    request = {"kind": Kind.REQUEST_ALL, "vcpu": 0, "detail": 7}
    monkeypatch.setattr(canary, "_AWAIT_S", 60.0)
    heard = _listen(monkeypatch, _events(OTHERS[0], NEW, *OTHERS[1:]), _events(request, RUN), _events(END))
    assert heard.untried is None
    assert heard.own["kind"].tolist() == [Kind.VCPU_NEW, Kind.REQUEST_ALL, Kind.RUN_EXIT, Kind.VCPU_END]
    assert (heard.others == _events(*OTHERS)).all()
    assert canary.untried(heard) == []


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    ("seen", "missing"),
    [
        ((), "its creation, its end, the request that was pending, its delivery"),
        ((NEW, END), "the request that was pending, its delivery"),
        ((NEW, {**RUN, "before": 0}, END), "the request that was pending, its delivery"),
        ((NEW, {**RUN, "requests": BIT}, END), "its delivery"),
        ((NEW, {**RUN, "arg": 2}, END), "the request that was pending, its delivery"),
        ((NEW, RUN), "its end"),
        ((RUN, END), "its creation, its end, the request that was pending, its delivery"),
    ],
)
def test_what_the_hooks_do_not_see_is_named(
    monkeypatch: pytest.MonkeyPatch, seen: tuple[dict[str, Any], ...], missing: str
) -> None:
    """An engine that sees nothing would make an empty recording, and a report that says: nothing lost."""
    with pytest.raises(CannotTrace) as told:
        _listen(monkeypatch, _events(*OTHERS, *seen))
    assert told.value.message == (f"the tracepoint engine's hooks are set and do not see a scratch VM: {missing}")


@pytest.mark.usefixtures("_impatient")
def test_one_that_was_missed_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is nobody's vCPU. An end that is told late is the earlier one's."""
    first, late = (NEW, RUN), END
    monkeypatch.setattr(canary, "_LIVES", 2)
    second = [{**event, "vcpu": 6, "detail": 8} for event in (NEW, RUN, END)]
    heard = _listen(monkeypatch, _events(*first), _events(OTHERS[0], late, *second))
    assert heard.own["vcpu"].tolist() == [5, 5, 5, 6, 6, 6]
    assert (heard.others == _events(OTHERS[0])).all()


@pytest.mark.usefixtures("_impatient")
def test_without_dev_kvm_it_is_said_that_nothing_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where KVM makes no VM for this process."""

    def refuse() -> None:
        raise LabError("KVM_CREATE_VM failed")

    engine: Any = _Engine()
    monkeypatch.setattr(scratch, "life", refuse)
    assert canary.listen(engine).untried == "a scratch VM cannot be made: KVM_CREATE_VM failed"
    monkeypatch.setattr(host, "no_dev_kvm", lambda: "/dev/kvm is missing")
    heard = canary.listen(engine)
    assert (len(heard.own), heard.untried) == (0, "/dev/kvm is missing")
    (line,) = canary.untried(heard)
    assert line["hook"] is None
    assert "/dev/kvm is missing" in line["unseen"]


def test_the_number_of_the_scratch_vcpu_is_taken_by_every_kernel() -> None:
    """KVM_MAX_VCPU_ID of Linux 5.10 is 1023 (arch/x86/include/asm/kvm_host.h), and later ones take more."""
    assert 255 < scratch.UNUSUAL_ID < 1023
