"""Times in a recording are the host's, wherever the recorder runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from lab.runner import runnable

from .session import COMMAND, report

REASONS = {scenario.name: reason for scenario, reason in runnable()}
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(REASONS["lost"]), reason=f"the lab cannot run: {REASONS['lost']}"),
    pytest.mark.skipif(not Path("/proc/self/ns/time").exists(), reason="this kernel has no time namespaces"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare: apt install util-linux"),
]
AHEAD_S = 864_000


def test_a_time_namespace_moves_no_time(tmp_path: Path) -> None:
    """The hooks tell the host's CLOCK_MONOTONIC; ten days ahead of it is nothing that was recorded."""
    path = tmp_path / "r"
    begin = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    away = ["unshare", "--time", "--monotonic", str(AHEAD_S)]
    subprocess.run([*away, *COMMAND, "record", "-o", path, "--", *COMMAND, "lab", "run", "lost"], check=True)
    end = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    meta = json.loads((path / "meta.json").read_text())
    (one,) = report(path)["lifecycles"]
    times = [begin, meta["started_ns"], *one["raised_ns"], *one["ended_ns"], meta["ended_ns"], end]
    assert times == sorted(times)
    told_s = time.time() - (meta["clock"]["utc_ns"] + end - meta["clock"]["monotonic_ns"]) / 1e9
    assert abs(told_s) < 60
