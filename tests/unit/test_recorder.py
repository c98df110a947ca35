"""What the recorder does while KVM's modules come and go, and of the guests that run when it begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from tracer import guests, host
from tracer.recorder import Recorder, Wish


def test_hooks_are_set_once_when_kvm_and_its_flavour_are_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when kvm is there alone, however long its flavour takes to come, nor when nothing has changed."""
    told: list[list[str]] = []
    recorder: Any = Recorder.__new__(Recorder)
    recorder._modules = {"kvm": 1, "kvm_amd": 2}
    recorder._engine = SimpleNamespace(loaded_again=told.append, plan=SimpleNamespace(as_json=list))
    recorder._writer = SimpleNamespace(update=lambda **_: None)
    recorder._census = lambda: None
    recorder.notes = []
    for now in ({"kvm": 1}, {}, {"kvm": 7}, {"kvm": 7}, {"kvm": 7, "kvm_amd": 8}, {"kvm": 7, "kvm_amd": 8}):
        monkeypatch.setattr(host, "kvm_modules", lambda now=now: now)
        recorder._look_at_modules()
    assert told == [["kvm", "kvm_amd"]]
    assert recorder.notes == ["kvm and kvm_amd were loaded again: hooks in them are set anew"]
    monkeypatch.setattr(host, "kvm_modules", lambda: {"kvm": 7, "kvm_amd": 9})
    recorder._look_at_modules()
    assert told[1:] == [["kvm_amd"]]


class _Engine:
    """Of so many vCPUs, sees those that are asked so many times."""

    def __init__(self, *sees: int) -> None:
        self.sees = list(sees)
        self.answered = 0
        self.asking = 0

    def counters(self) -> dict[str, int]:
        return {"answered": self.answered}

    def descriptors_of(self, pid: int, low: int, high: int) -> None:
        assert (pid, low, high) == (4711, 11, 13)

    @contextmanager
    def asking_for(self, pid: int) -> Iterator[None]:
        self.asking = pid
        yield
        self.answered += self.sees.pop(0)


@pytest.mark.parametrize(
    ("sees", "asked", "missing"),
    [
        ((3,), guests.Asked(3, 0), 0),
        ((2, 3), guests.Asked(3, 0), 0),  # one that was left out answers when it is asked again
        ((0, 0, 0), guests.Asked(3, 0), 3),
        ((2, 2, 2), guests.Asked(3, 0), 1),
        ((2, 2, 2), guests.Asked(2, 1), 1),
        ((0,), guests.Asked(0, 0), 0),  # the process has gone
    ],
)
def test_every_vcpu_that_was_asked_must_have_answered(
    monkeypatch: pytest.MonkeyPatch, sees: tuple[int, ...], asked: guests.Asked, missing: int
) -> None:
    """One that did not is a loss: what was pending in it, nobody knows."""
    recorder: Any = Recorder.__new__(Recorder)
    recorder._engine = engine = _Engine(*sees)
    recorder.wish, recorder.notes = Wish(), []
    monkeypatch.setattr(host, "is_root_of_pids", lambda: True)
    monkeypatch.setattr(guests, "running", lambda: {4711: [11, 12, 13]})
    monkeypatch.setattr(guests, "ask", lambda pid, descriptors: asked)
    recorder._census()
    assert (recorder._unanswered, engine.sees, engine.asking) == (missing, [], 4711)
    assert len(recorder.notes) == bool(missing)
