"""The demo: what it says of scenarios that are as they must be, and of one that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab.runner import runnable

from .session import CHECKOUT

REASONS = {scenario.name: reason for scenario, reason in runnable()}
PLAYED = ("delivered", "lost", "nmi")
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(
        any(REASONS[name] for name in PLAYED), reason=f"the lab cannot run: {[REASONS[name] for name in PLAYED]}"
    ),
]
# A few of its scenarios, and one whose process fails: no scenario has that name.
SOME = """
import dataclasses, sys
from command.main import main
from lab import runner

every = {scenario.name: (scenario, reason) for scenario, reason in runner.runnable()}
*played, broken, out = sys.argv[1:]
chosen = [every[name] for name in played]
if broken:
    chosen.insert(1, (dataclasses.replace(chosen[0][0], name=broken), None))
runner.runnable = lambda: chosen
sys.exit(main(["demo", "-o", out]))
"""


def demo(out: Path, broken: str = "") -> subprocess.CompletedProcess[str]:
    """Run it on these scenarios."""
    command = [sys.executable, "-c", SOME, *PLAYED, broken, str(out)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=120)


def test_each_scenario_is_judged_for_what_it_is_about(tmp_path: Path) -> None:
    """Not for triple faults alone; the page is its owner's, as all of the recording."""
    done = demo(tmp_path / "d")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 of 3 scenarios got the verdict that they must get; ")
    assert "nmi" in done.stdout
    assert (tmp_path / "d/report.html").stat().st_mode & 0o777 == 0o600


def test_a_scenario_that_fails_does_not_end_it(tmp_path: Path) -> None:
    """It counts as one that was not right, and says how to look into it."""
    done = demo(tmp_path / "d", "no_such")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 of 4 scenarios got the verdict that they must get; ")
    assert "kvmreq: no_such failed (kvmreq lab run no_such runs it alone)" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
