"""The invariant of `make soak`, in as many runs as there is time for here."""

from __future__ import annotations

import shutil

import pytest

from lab.runner import runnable

from . import soak

REASONS = {scenario.name: reason for scenario, reason in runnable()}
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(REASONS["lost"]), reason=f"the lab cannot run: {REASONS['lost']}"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv: apt install util-linux"),
]

RUNS = 20
SEED = 23


def test_a_loss_before_its_eyes_is_never_an_all_clear() -> None:
    """Whatever befalls the recorder."""
    done = list(soak.runs(RUNS, SEED))
    assert [(seed, faults.words, what, wrong) for seed, faults, what, wrong in done if wrong is not None] == []
    assert len({what for _, _, what, _ in done}) >= 3
