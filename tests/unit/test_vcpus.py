"""The state machine of the ftrace engine, on streams of records written out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from probes.fetch import PRESERVED
from probes.schema import EVENT, PAYLOAD_PENDING, VALID_TRIPLE_FAULT, End, Flag, Kind, Site
from tracer.vcpus import KVM_GET_VCPU_EVENTS, KVM_RUN, KVM_SET_VCPU_EVENTS, Vcpus

TF = 1 << 10
VCPU, KVM, PID, TID = 0xFFFF888000001000, 0xFFFFC90000002000, 4000, 4001
SET_MCE, SET_SREGS = 0x4040AE9E, 0x4138AE84


class Stream:
    """Records of one thread, a nanosecond apart."""

    def __init__(self, **settings: Any) -> None:
        self.vcpus = Vcpus(
            watched=TF, cap_exists=True, sites={"site_x": Site.EXCEPTION, "site_rsm": Site.RSM}, **settings
        )
        self.now = 100
        self.word = 0
        self.cap = 0

    def __call__(self, program: str, tid: int = TID, **fields: Any) -> Stream:
        known = {"vcpu": VCPU, "kvm": KVM, "vcpu_id": 3, "owner": 1, "tgid": PID, "nested": 0, "common_pid": tid}
        known |= {"requests": self.word, "cap": self.cap, "cr0": 1, "valid_regs": 0, "flags": 0, "pending": 0}
        self.now += 1
        self.vcpus.takes[program](SimpleNamespace(**(known | fields)), self.now, 1)
        return self

    def ioctl(self, cmd: int, *, leaves: int | None = None, ret: int = 0) -> Stream:
        self("vcpu_ioctl", cmd=cmd)
        self.word = self.word if leaves is None else leaves
        return self("vcpu_put")("ioctl_end", ret=ret)

    def run(self, reason: int, *, leaves: int | None = None, errno: int = 0, **put: Any) -> Stream:
        self("vcpu_ioctl", cmd=KVM_RUN)
        self.word = self.word if leaves is None else leaves
        return self("vcpu_put", **put)("kvm_userspace_exit", reason=reason, errno=errno)

    @property
    def events(self) -> Any:
        made = np.array(self.vcpus.events, EVENT)
        assert made["seq"][made["vcpu"] != 0].tolist() == list(range(1, int((made["vcpu"] != 0).sum()) + 1))
        return made

    @property
    def story(self) -> list[tuple[Kind, bool, bool]]:
        return [(Kind(one["kind"]), bool(one["before"] & TF), bool(one["requests"] & TF)) for one in self.events]


def test_a_request_is_raised_by_an_ioctl_and_delivered() -> None:
    """What changed nothing and had nothing pending is not told."""
    stream = Stream()("vcpu_create").run(2).ioctl(SET_MCE, leaves=TF).run(8, leaves=0)("vcpu_destroy")
    assert stream.story == [
        (Kind.VCPU_NEW, False, False),
        (Kind.IOCTL_EXIT, False, True),
        (Kind.RUN_EXIT, True, False),
        (Kind.VCPU_END, False, False),
    ]
    new, raised, run, end = stream.events
    assert new["flags"] == Flag.CREATED | Flag.CAP_EXISTS
    assert (new["arg"], new["pid"], new["tid"], new["cpu"]) == (3, PID, TID, 1)
    assert raised["arg"] == SET_MCE
    assert raised["since_ns"] < raised["time_ns"] <= run["since_ns"]
    assert run["arg"] == 8
    assert end["arg"] == End.DESTROYED


@pytest.mark.parametrize(
    ("cap", "read", "detail"),
    [
        (0, None, 0),
        (1, None, VALID_TRIPLE_FAULT | PAYLOAD_PENDING),
        (1, (0x21, 1), 0x21 | PAYLOAD_PENDING),
        (0, (1, 0), 1),
    ],
)
def test_a_save_tells_what_it_gave(cap: int, read: tuple[int, int] | None, detail: int) -> None:
    """As it was read where the function returned, or by KVM's rule."""
    stream = Stream()
    stream.cap = cap
    stream("vcpu_create").ioctl(SET_MCE, leaves=TF)("vcpu_ioctl", cmd=KVM_GET_VCPU_EVENTS)("get_events")
    if read:
        stream("get_events_end", flags=read[0], pending=read[1])
    save = stream("vcpu_put")("ioctl_end", ret=0).events[-1]
    assert (save["kind"], save["arg"], save["detail"]) == (Kind.SAVE, KVM_GET_VCPU_EVENTS, detail)


@pytest.mark.parametrize(("ret", "leaves"), [(0, TF), (-22, 0)])
def test_a_restore_tells_its_payload_and_its_result(ret: int, leaves: int) -> None:
    """One that KVM refused raised nothing."""
    stream = Stream()("vcpu_create")("vcpu_ioctl", cmd=KVM_SET_VCPU_EVENTS)("set_events", flags=0x20, pending=1)
    stream("set_events_end", ret=ret)
    stream.word = leaves
    restore = stream("vcpu_put")("ioctl_end", ret=ret).events[-1]
    assert (restore["kind"], restore["requests"]) == (Kind.RESTORE, leaves)
    assert restore["arg"] == KVM_SET_VCPU_EVENTS | (ret & 0xFFFFFFFF) << 32
    assert restore["detail"] == VALID_TRIPLE_FAULT | PAYLOAD_PENDING


@pytest.mark.parametrize(("holds", "told"), [(VCPU, [Kind.SITE, Kind.RUN_EXIT]), (VCPU + 8, [Kind.RUN_EXIT])])
def test_a_function_inside_kvm_is_believed_if_a_register_holds_the_vcpu(holds: int, told: list[Kind]) -> None:
    """Any other value is no vCPU, and what lies behind it is not looked at."""
    registers = dict.fromkeys(PRESERVED, 0) | {f"{name}_requests": TF for name in PRESERVED}
    stream = Stream()("vcpu_create")("vcpu_ioctl", cmd=KVM_RUN)("site_x", **(registers | {"r12": holds}))
    stream.word = TF
    stream("vcpu_put")("kvm_userspace_exit", reason=8, errno=0)
    assert [kind for kind, _, _ in stream.story[1:]] == told


def test_rsm_has_raised_it_wherever_the_vcpu_is_kept() -> None:
    """The function that says so does nothing else: also what KVM_RUN delivers at once was a request."""
    registers = dict.fromkeys(PRESERVED, 0) | {f"{name}_requests": 0 for name in PRESERVED}
    stream = Stream()("vcpu_create")("vcpu_ioctl", cmd=KVM_RUN)("site_rsm", **registers)
    stream("vcpu_put")("kvm_userspace_exit", reason=8, errno=0)
    assert stream.story[1:] == [(Kind.SITE, False, True), (Kind.RUN_EXIT, True, False)]
    assert stream.events[1]["arg"] == Site.RSM


def test_registers_written_in_real_mode_are_a_reset_while_something_is_pending() -> None:
    """Only then does it matter; what KVM has is read, not what user space gave."""
    stream = Stream()("vcpu_create")("vcpu_ioctl", cmd=SET_SREGS)("vcpu_put", cr0=0).ioctl(SET_MCE, leaves=TF)
    stream("vcpu_ioctl", cmd=SET_SREGS)("vcpu_put", cr0=0)("vcpu_ioctl", cmd=SET_SREGS)("vcpu_put", cr0=1)
    assert [kind for kind, _, _ in stream.story[2:]] == [Kind.RESET, Kind.IOCTL_EXIT, Kind.IOCTL_EXIT]


def test_a_vcpu_in_kvm_run_saves_itself_when_its_events_are_synchronised() -> None:
    """KVM_SYNC_X86_EVENTS: what kvm_run holds is what was saved."""
    stream = Stream()("vcpu_create").ioctl(SET_MCE, leaves=TF).run(10, errno=-4, valid_regs=4, flags=0x20, pending=1)
    exit_, save = stream.events[-2:]
    assert (exit_["kind"], exit_["arg"]) == (Kind.RUN_EXIT, 10 | (-4 & 0xFFFFFFFF) << 32)
    assert (save["kind"], save["detail"]) == (Kind.SAVE, VALID_TRIPLE_FAULT | PAYLOAD_PENDING)
    assert save["flags"] & Flag.SYNC


def test_memory_that_kvm_uses_again_is_another_vcpu() -> None:
    """Its end was missed: its story ends where the next one begins."""
    stream = Stream()("vcpu_create")("vcpu_create")
    made = np.array(stream.vcpus.events, EVENT)
    assert made["kind"].tolist() == [Kind.VCPU_NEW, Kind.VCPU_END, Kind.VCPU_NEW]
    assert made["arg"][1] == End.REUSED
    assert made["vcpu"][0] == made["vcpu"][1] != made["vcpu"][2]


def test_only_the_processes_asked_for_are_told() -> None:
    """Of another one nothing is kept."""
    stream = Stream(pids={PID + 1})("vcpu_create").ioctl(SET_MCE, leaves=TF)("vcpu_destroy")
    assert not stream.vcpus.events


def test_a_capability_counts_once_kvm_has_taken_it() -> None:
    """And only the one of triple faults."""
    stream = Stream()("enable_cap", cap=218, value=1)("enable_cap_end", ret=-22)
    stream("enable_cap", cap=192, value=1)("enable_cap_end", ret=0)
    assert not stream.vcpus.events
    (event,) = stream("enable_cap", cap=218, value=1)("enable_cap_end", ret=0).events
    assert (event["kind"], event["arg"], event["pid"], event["vcpu"]) == (Kind.VM_CAP, 1, PID, 0)


def test_where_tracing_begins_inside_an_ioctl_its_end_tells_nothing() -> None:
    """The vCPU is not known yet; the next ioctl tells its state."""
    stream = Stream()("vcpu_put")("kvm_userspace_exit", reason=8, errno=0)("ioctl_end", ret=0)
    assert not stream.vcpus.events
    stream.word = TF
    assert stream.ioctl(SET_MCE).story[0] == (Kind.VCPU_NEW, False, True)
