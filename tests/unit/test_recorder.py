"""What the recorder does while KVM's modules come and go, and of the guests that run when it begins."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from probes.schema import EVENT
from tracer import guests, host
from tracer.errors import BadRecording
from tracer.loss import Loss
from tracer.recorder import Recorder, Wish, _SegmentWriter


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


@pytest.mark.parametrize("error", [BadRecording("the disk is full"), ValueError("no URI"), MemoryError()])
def test_a_writer_that_fails_wakes_who_waits_for_it(error: Exception) -> None:
    """Whatever it fails of: more than the queue holds can be handed over, is counted, and its end is awaited."""

    def segment(*_: object) -> None:
        raise error

    writer: Any = SimpleNamespace(path=Path("r"), segment=segment)
    thread = _SegmentWriter(writer)
    for _ in range(23):
        thread.put([np.zeros(2, EVENT)], Loss(), 1)
    thread.finish()
    assert not thread.is_alive()
    assert thread.not_written == 46
    assert isinstance(thread.error, BadRecording)
    assert str(error) in str(thread.error)


def test_one_that_is_dead_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_SegmentWriter, "run", lambda self: None)
    thread = _SegmentWriter(SimpleNamespace(path=Path("r")))  # type: ignore[arg-type]
    for _ in range(23):
        thread.put([np.zeros(2, EVENT)], Loss(), 1)
    thread.finish()


def test_a_recorder_that_fails_leaves_no_thread_at_work() -> None:
    """It may be in the middle of loading a library, and Python's end would wait for that."""

    def update(**_: object) -> None:
        raise BadRecording("the directory has gone")

    at_work = threading.Event()
    recorder: Any = Recorder.__new__(Recorder)
    recorder._engine = SimpleNamespace(pending=0, detach=lambda: None, loss=Loss, close=lambda: None)
    recorder._writer = SimpleNamespace(path=Path("r"), segment=lambda *_: at_work.wait(0.2), update=update)
    recorder._segments = thread = _SegmentWriter(recorder._writer)
    recorder._traced = guests.Held([])
    recorder._cut = update
    thread.put([np.zeros(2, EVENT)], Loss(), 1)
    with pytest.raises(BadRecording, match="has gone"):
        recorder.stop()
    assert not thread.is_alive()


class _Engine:
    """Of so many vCPUs, sees those that are asked so many times."""

    def __init__(self, *sees: int) -> None:
        self.sees = list(sees)
        self.answered = 0

    def counters(self) -> dict[str, int]:
        return {"answered": self.answered}

    @contextmanager
    def asking(self) -> Iterator[None]:
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
    monkeypatch.setattr(guests, "running", lambda: {4711: [11, 12, 13]})
    monkeypatch.setattr(guests, "ask", lambda pid, descriptors: asked)
    recorder._census()
    assert (recorder._unanswered, engine.sees) == (missing, [])
    assert len(recorder.notes) == bool(missing)
