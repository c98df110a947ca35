"""The canary, live: it is in no recording, and it is seen whatever was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live.session import Vmm, recording, report
from tracer.recording import Recording

pytestmark = pytest.mark.live


@pytest.mark.parametrize("requests", ["triple_fault", "nmi", "all"])
@pytest.mark.parametrize("detail", ["boundary", "full"])
def test_a_recording_of_nothing_is_empty_and_an_all_clear(tmp_path: Path, requests: str, detail: str) -> None:
    """Also where the request of the canary is not watched, and where everything is told."""
    with recording(tmp_path / "r", "--requests", requests, "--detail", detail) as record:
        own = record.process.pid
    found = Recording.open(tmp_path / "r")
    events = [event for segment in found.segments() if segment for event in segment.events if event["pid"] == own]
    assert events == []
    assert found.meta["untried"] is None
    assert own not in [guest["pid"] for guest in found.meta["guests"].values()]


def test_with_a_pid_the_canary_is_seen_too(tmp_path: Path) -> None:
    """And is in nobody's way: of the process asked for everything is told, of the tracer nothing."""
    with Vmm() as vmm:
        with recording(tmp_path / "r", "-p", str(vmm.pid)) as record:
            own = record.process.pid
            vmm.tell("mce", "run")
        document = report(tmp_path / "r")
        vmm.end()
    assert {vm["pid"] for vm in document["vms"]} == {vmm.pid} != {own}
    assert document["loss"]["total"] == 0
