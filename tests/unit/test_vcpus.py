"""The state machine of the ftrace engine, on streams of records written out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from probes.fetch import PRESERVED
from probes.schema import (
    EVENT,
    IN_GUEST_MODE,
    NO_IOCTL,
    PAYLOAD_PENDING,
    RAN,
    REMOTE,
    VALID_TRIPLE_FAULT,
    End,
    Flag,
    Kind,
    Site,
)
from tracer.vcpus import KVM_GET_VCPU_EVENTS, KVM_RUN, KVM_SET_VCPU_EVENTS, Vcpus

TF = 1 << 10
ALL, EXCEPT, MASK = "kvm_make_all_cpus_request", "kvm_make_all_cpus_request_except", "kvm_make_vcpus_request_mask"
CALLS = [
    *("entering__svm_vcpu_run", "left__svm_get_exit_info", "awake__kvm_apic_accept_events", "kick__kvm_vcpu_kick"),
    *(f"{role}__{name}" for name in (ALL, EXCEPT, MASK) for role in ("request", "request_end")),
]
VCPU, KVM, PID, TID = 0xFFFF888000001000, 0xFFFFC90000002000, 4000, 4001
SET_MCE, SET_SREGS = 0x4040AE9E, 0x4138AE84


class Stream:
    """Records of one thread, a nanosecond apart."""

    def __init__(self, **settings: Any) -> None:
        self.vcpus = Vcpus(
            watched=TF, cap_exists=True, sites={"site_x": Site.EXCEPTION, "site_rsm": Site.RSM}, calls=CALLS, **settings
        )
        self.now = 100
        self.word = 0
        self.cap = 0
        self.exits = 5

    def __call__(self, program: str, tid: int = TID, **fields: Any) -> Stream:
        known = {"vcpu": VCPU, "kvm": KVM, "vcpu_id": 3, "owner": 1, "tgid": PID, "nested": 0, "common_pid": tid}
        known |= {"requests": self.word, "cap": self.cap, "cr0": 1, "valid_regs": 0, "flags": 0, "pending": 0}
        known |= {"exits": self.exits}
        self.now += 1
        self.vcpus.takes[program](SimpleNamespace(**(known | fields)), self.now, 1)
        return self

    def ioctl(self, cmd: int, *, leaves: int | None = None, ret: int = 0) -> Stream:
        self("vcpu_ioctl", cmd=cmd)
        self.word = self.word if leaves is None else leaves
        return self("vcpu_put")("ioctl_end", ret=ret)

    def run(self, reason: int, *, leaves: int | None = None, errno: int = 0, **put: Any) -> Stream:
        self("vcpu_ioctl", cmd=KVM_RUN)
        self.exits += not errno
        self.word = self.word if leaves is None else leaves
        return self("vcpu_put", **put)("kvm_userspace_exit", reason=reason, errno=errno)

    def register(self, cmd: int) -> Stream:
        """Let an ioctl pass that kvm_vcpu_ioctl() handles itself."""
        return self("vcpu_ioctl", cmd=cmd)("vcpu_put")

    @property
    def events(self) -> Any:
        made = np.array(self.vcpus.events, EVENT)
        own = made[(made["vcpu"] != 0) & ~np.isin(made["kind"], REMOTE)]
        assert own["seq"].tolist() == list(range(1, len(own) + 1))
        assert (own["since_ns"][1:] == own["time_ns"][:-1]).all() or not self.vcpus.full
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


def test_a_system_event_tells_its_type() -> None:
    """Where KVM_RUN did not fail: else kvm_run holds what it held before."""
    stream = Stream()("vcpu_create").run(24, errno=-4, system_event=3).run(24, system_event=3).run(5, system_event=3)
    assert [(one["kind"], one["arg"], one["detail"]) for one in stream.events[1:]] == [(Kind.RUN_EXIT, 24, 3)]


def test_a_vm_that_kvm_gives_up_is_told_where_kvm_run_fails_and_at_its_end() -> None:
    """Whatever is watched; -EIO alone says nothing."""
    stream = Stream()("vcpu_create").run(5, errno=-5).run(5, errno=-5, dead=1)("vcpu_destroy", dead=1)
    assert [(one["kind"], bool(one["flags"] & Flag.DEAD)) for one in stream.events] == [
        (Kind.VCPU_NEW, False), (Kind.RUN_EXIT, True), (Kind.VCPU_END, True),
    ]  # fmt: skip


def test_registers_that_kvm_cannot_read_are_no_save() -> None:
    """Of an SEV-ES guest kvm_run holds what user space left there."""
    stream = Stream()("vcpu_create").ioctl(SET_MCE, leaves=TF)
    stream.run(5, valid_regs=4, flags=0, protected=1).run(5, valid_regs=4, flags=0, protected=0)
    assert [Kind(one["kind"]) for one in stream.events[2:]] == [Kind.RUN_EXIT, Kind.RUN_EXIT, Kind.SAVE]


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


@pytest.mark.parametrize("registers", [{}, dict.fromkeys(PRESERVED, 0)])
@pytest.mark.parametrize(("ret", "leaves"), [(0, TF), (-22, 0)])
def test_a_restore_through_kvm_run_is_told_by_kvms_rule_where_no_register_holds_the_vcpu(
    registers: dict[str, int], ret: int, leaves: int
) -> None:
    """Nor where the kernel is not asked for any."""
    stream = Stream()("vcpu_create")("vcpu_ioctl", cmd=KVM_RUN)("set_events", flags=0x20, pending=1)
    restore = stream("set_events_end", ret=ret, **registers).events[-1]
    assert (restore["kind"], restore["requests"], restore["flags"] & Flag.SYNC) == (Kind.RESTORE, leaves, Flag.SYNC)


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


def test_what_writing_registers_raises_is_told_where_that_ends() -> None:
    """Also where it is a reset: the reset has the word as it was before."""
    stream = Stream()
    stream.vcpus.watched |= 1 << 14
    stream("vcpu_create").ioctl(SET_MCE, leaves=TF)("vcpu_ioctl", cmd=SET_SREGS)
    stream.word |= 1 << 14
    stream("vcpu_put", cr0=0)
    reset, end = stream.events[-2:]
    assert (reset["kind"], reset["before"], reset["requests"]) == (Kind.RESET, TF, TF)
    assert (end["kind"], end["arg"], end["before"], end["requests"]) == (Kind.IOCTL_EXIT, SET_SREGS, TF, TF | 1 << 14)
    assert end["since_ns"] == reset["time_ns"] < end["time_ns"]


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


def test_only_what_the_tracer_asks_is_an_answer_to_it() -> None:
    """Other threads may ask, another kvmreq too, and the tracer has other ioctls."""
    stream = Stream()
    stream.vcpus.asker = 88
    stream("vcpu_ioctl", cmd=NO_IOCTL)("vcpu_ioctl", tid=88, cmd=SET_MCE)
    assert stream.vcpus.answered == 0
    stream("vcpu_ioctl", tid=88, cmd=NO_IOCTL)("vcpu_ioctl", tid=88, cmd=NO_IOCTL)
    assert stream.vcpus.answered == 2


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


# --- detail full ----------------------------------------------------------------------------------------------


def inside_run(**settings: Any) -> Stream:
    """Return the stream of a thread that is inside KVM_RUN, with the events of that taken away."""
    stream = Stream(full=True, **settings)("vcpu_create")("vcpu_ioctl", cmd=KVM_RUN)
    assert [kind for kind, _, _ in stream.story] == [Kind.VCPU_NEW, Kind.RUN_ENTER]
    return stream


@pytest.mark.parametrize("told_first", [False, True])
def test_the_guest_is_entered_and_left_with_the_word_of_that_moment(told_first: bool) -> None:
    """kvm_exit asks for its reason while it is written down: that record can lie before it in the buffer or behind."""
    stream = inside_run()("entering__svm_vcpu_run")("kvm_entry", requests=None)
    stream.word = TF
    left = [("left__svm_get_exit_info", {}), ("kvm_exit", {"exit_reason": 0x60, "isa": 2})]
    for program, fields in reversed(left) if told_first else left:
        stream(program, **fields)
    stream.word = 0
    stream("entering__svm_vcpu_run")("kvm_entry")
    _, _, entry, exit_, again = stream.events
    assert [entry["kind"], exit_["kind"], again["kind"]] == [Kind.GUEST_ENTRY, Kind.GUEST_EXIT, Kind.GUEST_ENTRY]
    assert (exit_["before"], exit_["requests"], exit_["arg"], exit_["detail"]) == (0, TF, 0x60, 2)
    assert entry["time_ns"] < exit_["time_ns"] < again["time_ns"]
    assert (again["before"], again["requests"]) == (TF, 0)


def test_what_another_tracer_asks_of_the_exit_tells_nothing() -> None:
    """Nor does what KVM itself asks later: the next entry is read where it begins."""
    stream = inside_run()("entering__svm_vcpu_run")("kvm_entry")
    stream("left__svm_get_exit_info")("kvm_exit", exit_reason=1, isa=2)("left__svm_get_exit_info")
    stream("entering__svm_vcpu_run")("kvm_entry")("kvm_exit", exit_reason=2, isa=2)
    stream.word = TF
    stream("vcpu_put")("kvm_userspace_exit", reason=2, errno=0)
    assert stream.story[2:] == [
        (Kind.GUEST_ENTRY, False, False),
        (Kind.GUEST_EXIT, False, False),
        (Kind.GUEST_ENTRY, False, False),
        (Kind.GUEST_EXIT, False, True),  # its own reading was missed, so it is that where KVM_RUN ends
        (Kind.RUN_EXIT, True, True),
    ]
    assert stream.events["arg"][3] == 1


def test_an_entry_that_is_told_before_the_run_function_begins_is_read_there() -> None:
    """As on 5.10: the reading of an entry is never that of the one before."""
    stream = inside_run()
    for word in (TF, 0):
        stream("kvm_entry")
        stream.word = word
        stream("entering__svm_vcpu_run")("left__svm_get_exit_info")("kvm_exit", exit_reason=1, isa=2)
    assert stream.story[2:] == [
        (Kind.GUEST_ENTRY, False, True),
        (Kind.GUEST_EXIT, True, True),
        (Kind.GUEST_ENTRY, True, False),
        (Kind.GUEST_EXIT, False, False),
    ]
    assert (np.diff(stream.events["time_ns"].astype(np.int64)) > 0).all()
    assert not stream.vcpus.lost


def test_a_thread_that_runs_another_vcpu_tells_of_that_one() -> None:
    """A VMM may run all of its vCPUs on one thread."""
    stream = inside_run()("kvm_entry")("entering__svm_vcpu_run")("left__svm_get_exit_info")
    stream("kvm_exit", exit_reason=1, isa=2)("vcpu_put")("kvm_userspace_exit", reason=2, errno=0)
    other = {"vcpu": VCPU + 0x4000, "vcpu_id": 4}
    stream("vcpu_create", **other)("vcpu_ioctl", cmd=KVM_RUN, **other)("kvm_entry")("entering__svm_vcpu_run", **other)
    made = np.array(stream.vcpus.events, EVENT)
    assert made["kind"].tolist()[-3:] == [Kind.VCPU_NEW, Kind.RUN_ENTER, Kind.GUEST_ENTRY]
    assert set(made["vcpu"][-3:].tolist()) == {made["vcpu"][-1]} != {made["vcpu"][0]}


def test_an_entry_whose_requests_were_not_read_is_lost_and_not_made_up() -> None:
    """What is read later is what the guest has seen since: a gap in the numbers, told by vCPU."""
    stream = inside_run()("entering__svm_vcpu_run")("kvm_entry")("left__svm_get_exit_info")
    stream("kvm_exit", exit_reason=1, isa=2)("kvm_entry")("left__svm_get_exit_info")("kvm_exit", exit_reason=2, isa=2)
    made = np.array(stream.vcpus.events, EVENT)
    assert made["kind"].tolist()[2:] == [Kind.GUEST_ENTRY, Kind.GUEST_EXIT, Kind.GUEST_EXIT]
    assert made["seq"].tolist()[2:] == [3, 4, 6]
    (loss,) = stream.vcpus.lost.values()
    assert (loss.count, loss.first_ns) == (1, loss.last_ns)


def test_a_vcpu_that_stops_blocking_is_read_before_it_services_anything() -> None:
    """Where it looks for a SIPI: what woke it is still pending."""
    stream = inside_run()("entering__svm_vcpu_run")("kvm_entry")("left__svm_get_exit_info")
    stream("kvm_exit", exit_reason=0x78, isa=2)("kvm_vcpu_wakeup", ns=5000, waited=1, valid=1)
    stream.word = TF
    stream("awake__kvm_apic_accept_events")
    wakeup = stream.events[-1]
    assert (wakeup["kind"], wakeup["arg"], wakeup["detail"], wakeup["requests"]) == (Kind.WAKEUP, 5000, 1, TF)


def test_a_kick_is_told_apart_from_the_story_of_the_vcpu() -> None:
    """The next own event does not know what the kicker saw."""
    stream = inside_run()("entering__svm_vcpu_run")("kvm_entry")
    stream("kick__kvm_vcpu_kick", tid=77, requests=TF, mode=IN_GUEST_MODE)
    stream("left__svm_get_exit_info")("kvm_exit", exit_reason=0x60, isa=2)
    kick, exit_ = stream.events[-2:]
    assert (kick["kind"], kick["tid"], kick["pid"], kick["detail"]) == (Kind.KICK, 77, PID, IN_GUEST_MODE)
    assert (kick["vcpu"], kick["seq"], kick["since_ns"]) == (exit_["vcpu"], 0, 0)
    assert kick["before"] == kick["requests"] == TF
    assert (exit_["before"], exit_["requests"]) == (0, 0)
    assert not Stream(full=True, pids={PID + 1})("vcpu_create")("kick__kvm_vcpu_kick", mode=0).vcpus.events


def request(stream: Stream, role: str, function: str, tid: int = 88, **fields: int) -> None:
    """Have a thread call a function that raises a request of several vCPUs, or return from it."""
    fields = {"third": 0, "third_mask": 0, "fourth": 0, "fourth_mask": 0, "request": 0x1200, **fields}
    stream(f"{role}__{function}", tid=tid, **fields)


def test_a_request_of_all_vcpus_is_told_once_however_kvm_makes_it() -> None:
    """By whom, and how long that took."""
    stream = inside_run()
    for function in (ALL, EXCEPT, MASK):
        request(stream, "request", function)
    for function in (MASK, EXCEPT, ALL):
        request(stream, "request_end", function)
    new, _, begun, ended = stream.events
    assert [begun["kind"], ended["kind"]] == [Kind.REQUEST_ALL, Kind.REQUEST_ALL_END]
    assert (begun["arg"], begun["requests"], begun["detail"], begun["tid"]) == (
        0x1200,
        (1 << 64) - 1,
        new["detail"],
        88,
    )
    assert (ended["arg"], ended["requests"], ended["detail"]) == (0x1200, (1 << 64) - 1, new["detail"])
    assert begun["since_ns"] == 0 < begun["time_ns"] == ended["since_ns"] < ended["time_ns"]
    assert begun["vcpu"] == ended["vcpu"] == begun["seq"] == ended["seq"] == 0
    assert begun["pid"] == PID


@pytest.mark.parametrize("place", [{"third": 9, "third_mask": 5}, {"third": 0, "fourth": 9, "fourth_mask": 5}])
def test_a_request_of_some_vcpus_tells_which(place: dict[str, int]) -> None:
    """Whether the bitmap is the third argument or the fourth."""
    stream = inside_run()
    request(stream, "request", MASK, **place)
    request(stream, "request_end", MASK)
    assert stream.events["requests"].tolist()[-2:] == [5, 5]


@pytest.mark.parametrize(("spared", "index", "mask"), [(0, 3, -1), (9, 3, ~8), (9, 64, -1)])
def test_a_request_of_all_but_one_vcpu_tells_which_one_is_spared(spared: int, index: int, mask: int) -> None:
    """None is where the caller gave none; what has no bit in the mask cannot be told."""
    stream = inside_run()
    request(stream, "request", EXCEPT, spared=spared, index=index)
    assert int(stream.events["requests"][-1]) == mask & (1 << 64) - 1


def test_a_requester_whose_return_was_missed_is_told_of_again() -> None:
    """No function calls one before it, nor for another request. Nothing is told of a VM that nobody knows."""
    stream = inside_run()
    request(stream, "request", ALL, request=7)
    request(stream, "request", EXCEPT)
    request(stream, "request", EXCEPT)
    request(stream, "request", ALL)
    request(stream, "request_end", EXCEPT)
    request(stream, "request_end", ALL)
    request(stream, "request", ALL, kvm=KVM + 8)
    kinds = [Kind.REQUEST_ALL] * 4 + [Kind.REQUEST_ALL_END]
    assert stream.events["kind"].tolist()[2:] == kinds


def test_a_thread_that_ends_takes_along_what_it_was_in_the_middle_of() -> None:
    """Its number is another's next."""
    stream = inside_run()("entering__svm_vcpu_run")
    request(stream, "request", ALL, tid=TID)
    stream("sched_process_exit")
    stream("kvm_entry")
    request(stream, "request_end", ALL, tid=TID)
    assert stream.events["kind"].tolist()[2:] == [Kind.REQUEST_ALL]


# --- what user space reads and writes -------------------------------------------------------------------------------

GET_REGS, SET_REGS, GET_SREGS, GET_MSRS, EINTR = 0x8090AE81, 0x4090AE82, 0x8138AE83, 0xC008AE88, -4


def read(stream: Stream, msrs: int = 1) -> Stream:
    return stream.register(GET_REGS).register(GET_SREGS).ioctl(GET_MSRS, ret=msrs)


def told(stream: Stream) -> list[tuple[Kind, bool]]:
    """Return what was told of copies, and whether the vCPU had been saved by then."""
    kinds = (Kind.SAVE, Kind.READ, Kind.WRITTEN)
    return [(Kind(one["kind"]), bool(one["flags"] & Flag.READ)) for one in stream.events if one["kind"] in kinds]


def test_registers_that_are_read_make_a_save_until_the_vcpu_runs() -> None:
    stream = read(Stream()("vcpu_create")).run(5, errno=EINTR).ioctl(KVM_GET_VCPU_EVENTS)
    assert told(stream) == [(Kind.READ, True), (Kind.SAVE, True), (Kind.READ, True)]
    assert [int(one["detail"]) for one in stream.events if one["kind"] == Kind.READ] == [0b0111, 0b1111]
    assert told(stream.run(2).ioctl(KVM_GET_VCPU_EVENTS))[3:] == [(Kind.SAVE, False)]


@pytest.mark.parametrize("msrs", [0, -14])
def test_a_part_of_the_registers_is_no_save(msrs: int) -> None:
    assert told(read(Stream()("vcpu_create"), msrs)) == []


def test_a_save_that_fails_reads_nothing() -> None:
    stream = read(Stream()("vcpu_create").ioctl(KVM_GET_VCPU_EVENTS, ret=-14))
    assert [int(one["detail"]) for one in stream.events if one["kind"] == Kind.READ] == [0b0111]


def test_registers_that_are_written_are_another_state_unless_they_were_read() -> None:
    stream = Stream()("vcpu_create").register(SET_SREGS).register(SET_REGS)
    assert told(stream) == [(Kind.WRITTEN, False)]
    assert told(read(stream).register(SET_SREGS).register(SET_REGS))[1:] == [(Kind.READ, True)]


def test_a_vcpu_that_has_not_run_since_tracing_began_is_still() -> None:
    stream = Stream().ioctl(SET_MCE, leaves=TF).run(2).run(2)
    flags = [bool(one["flags"] & Flag.STILL) for one in stream.events]
    assert flags == [True, True, False, False]


def test_the_first_run_after_a_restore_is_told_once() -> None:
    """Also where that was refused; a KVM_RUN that does not enter the guest is none."""
    stream = Stream()("vcpu_create").register(SET_SREGS).register(SET_REGS).run(5, errno=EINTR).run(2).run(2)
    stream("vcpu_ioctl", cmd=KVM_SET_VCPU_EVENTS)("set_events")("vcpu_put")("ioctl_end", ret=-22).run(2)
    ran = [bool(one["detail"] & RAN) for one in stream.events if one["kind"] == Kind.RUN_EXIT]
    assert ran == [True, True]
    stream = Stream()("vcpu_create").register(SET_SREGS).register(SET_REGS)
    stream.exits += 1
    assert stream("vcpu_destroy").events[-1]["detail"] == RAN
