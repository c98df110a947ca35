"""The canary, live: it is in no recording, and it is seen whatever was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.live.session import Vmm, by_pid, lab_tells, recording, report
from tracer import canary, host
from tracer.errors import CannotTrace
from tracer.recorder import Recorder, Wish
from tracer.recording import Recording
from tracer.stat import Statistics

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


@pytest.fixture
def _hidden() -> Iterator[None]:
    """A host that hides the kernel's addresses from everybody."""
    setting = Path("/proc/sys/kernel/kptr_restrict")
    before = setting.read_text()
    setting.write_text("2")
    try:
        yield
    finally:
        setting.write_text(before)


@pytest.mark.usefixtures("_hidden")
def test_what_shows_the_engine_a_vcpu_is_in_no_recording(tmp_path: Path) -> None:
    """Nor is it taken for a guest that ran already."""
    with recording(tmp_path / "r", "--engine", "tracepoint") as record:
        own = record.process.pid
    meta = Recording.open(tmp_path / "r").meta
    assert own not in [guest["pid"] for guest in meta["guests"].values()]


@pytest.mark.usefixtures("_hidden")
@pytest.mark.parametrize("requests", ["triple_fault", "all"])
def test_an_engine_that_knows_no_address_knows_vcpus_by_one_of_its_own(tmp_path: Path, requests: str) -> None:
    """A guest that ran already, and one that begins later: what each loses is seen."""
    with Vmm() as vmm:
        vmm.tell("mce")
        with recording(tmp_path / "r", "--engine", "tracepoint", "--requests", requests):
            vmm.tell("save")
            vmm.end()
            pid = json.loads(lab_tells("lost"))["pid"]
    document = report(tmp_path / "r")
    for one, ended in ((vmm.pid, {"lost": 1}), (pid, {"lost": 1})):
        rows = [row for row in by_pid(document["lifecycles"], one) if row["request"] == "triple_fault"]
        assert {row["end"]: 1 for row in rows} == ended
    assert document["loss"]["total"] == 0


@pytest.mark.usefixtures("_hidden")
def test_stat_counts_where_addresses_are_hidden() -> None:
    """It has a canary of its own, which is counted."""
    with Statistics(engine="tracepoint") as live:
        (reading,) = live.readings(0.1, lambda: False, 1)
    assert not len(reading.counts.keys[np.isin(reading.counts.keys["vcpu"], list(reading.vcpus), invert=True)])


@pytest.mark.parametrize("tracer", ["record", "stat"])
def test_hooks_that_see_nothing_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracer: str) -> None:
    """Set by the address of another function they see no vCPU: that would be an empty recording, and an all-clear."""
    known = host.addresses

    def wrong(names: Any) -> dict[str, int]:
        return {name: address + 64 * (name == "kvm_vcpu_ioctl") for name, address in known(names).items()}

    monkeypatch.setattr(host, "addresses", wrong)
    monkeypatch.setattr(canary, "_AWAIT_S", 0.5)
    with pytest.raises(CannotTrace, match=r"do not see a scratch VM: its creation, its end, the request"):
        if tracer == "record":
            Recorder(tmp_path / "r", Wish(engine="tracepoint")).start()
        else:
            Statistics(engine="tracepoint").start()
    assert not (tmp_path / "r").exists()
