"""What the recorder does while KVM's modules come and go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tracer import host
from tracer.recorder import Recorder


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
