"""Each rule of DESIGN.md's lifecycles and verdicts, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from analysis.lifecycle import Finished, Lifecycles, gap_story
from probes.schema import EVENT, PAYLOAD_PENDING, SEQUENCE, VALID_TRIPLE_FAULT, End, Flag, Kind, Site
from tracer.loss import Loss, VcpuLoss

TF = 1 << 10
NMI = 1 << 17
SET_MCE, GET_EVENTS, SET_EVENTS = 0x4040AE9E, 0x8040AE9F, 0x4040AEA0
EIO = (2**32 - 5) << 32
CARRIED = VALID_TRIPLE_FAULT | PAYLOAD_PENDING


class Tape:
    """Events of vCPU 1, one every 10 ns, and of its VMM."""

    def __init__(self, flags: int = Flag.CREATED, word: int = 0) -> None:
        self.events: list[dict[str, int]] = []
        self.flags, self.seq, self.word, self.now = flags, 0, 0, 0
        self.add(Kind.VCPU_NEW, word, arg=4, detail=7)
        self.events[0].update(since_ns=0, before=0)

    def add(self, kind: int, word: int | None = None, arg: int = 0, detail: int = 0, flags: int = 0) -> Tape:
        word = self.word if word is None else word
        self.seq = self.seq % SEQUENCE + 1
        self.now += 10
        self.events.append(
            {
                "time_ns": self.now,
                "since_ns": self.now - 10,
                "requests": word,
                "before": self.word,
                "arg": arg,
                "vcpu": 1,
                "seq": self.seq,
                "pid": 100,
                "detail": detail,
                "kind": kind,
                "flags": self.flags | flags,
            }
        )
        self.word = word
        return self

    def raised(self) -> Tape:
        return self.add(Kind.IOCTL_EXIT, TF, SET_MCE)

    def saved(self, detail: int, error: int = 0) -> Tape:
        return self.add(Kind.SAVE, None, GET_EVENTS | error, detail, flags=Flag.READ)

    def restored(self, word: int, detail: int) -> Tape:
        return self.add(Kind.RESTORE, word, SET_EVENTS, detail)

    def delivered(self) -> Tape:
        return self.add(Kind.RUN_EXIT, 0, 8)

    def ended(self) -> Tape:
        return self.add(Kind.VCPU_END, None, End.CLOSED)

    def vmm_exits(self) -> Tape:
        self.now += 10
        self.events.append({"time_ns": self.now, "pid": 100, "kind": Kind.VMM_EXIT, "arg": End.EXITED})
        return self

    def drop(self, index: int) -> Tape:
        del self.events[index]
        return self

    def batch(self, begin: int = 0, end: int | None = None) -> Any:
        rows = [tuple(event.get(name, 0) for name in EVENT.names or ()) for event in self.events[begin:end]]
        return np.array(rows, EVENT)

    def feed(self, loss: Loss | None = None, *, blind: bool = False) -> Finished:
        return Lifecycles({10: "triple_fault", 17: "nmi"}).feed(self.batch(), blind=blind, loss=loss)

    def one(self, loss: Loss | None = None, *, blind: bool = False) -> dict[str, Any]:
        rows = self.feed(loss, blind=blind).lifecycles.to_dict("records")
        assert len(rows) == 1
        return {str(name): value for name, value in rows[0].items()}

    def left(self, loss: Loss) -> dict[str, Any]:
        core = Lifecycles({10: "triple_fault"})
        assert not len(core.feed(self.batch(), loss=loss).lifecycles)
        rows = core.finish(loss).lifecycles.to_dict("records")
        assert len(rows) == 1
        assert core.carried == 0
        return {str(name): value for name, value in rows[0].items()}


def test_delivered() -> None:
    tape = Tape().raised().add(Kind.RUN_EXIT, None, 5).delivered()
    assert tape.one() == {
        "vm": 7, "pid": 100, "vcpu": 4, "vcpu_number": 1, "request": "triple_fault", "raised_by": "set_mce",
        "raised_after_ns": 10, "raised_ns": 20, "end": "delivered", "ended_after_ns": 30, "ended_ns": 40,
        "userspace_exits": 1, "saves": 0, "blind_saves": 0, "copies_without": False,
        "nested": False, "stale": False, "exposed": False,
        "why": "", "raised_in": "ioctl", "requester_tid": 0, "requester_cpu": 0, "kicked_ns": -1,
        "left_guest_ns": -1, "reentered_ns": -1,
    }  # fmt: skip
    assert tape.feed().shutdowns["source"].tolist() == ["request"]


def _late() -> Tape:
    """Return a tape of a vCPU whose next event but two is the last one before its numbers begin again."""
    tape = Tape()
    tape.seq = tape.events[0]["seq"] = SEQUENCE - 2
    return tape


@pytest.mark.parametrize("exits", range(5))
def test_sequence_numbers_come_round(exits: int) -> None:
    """After 32 bits of them: that is no gap, nor is it another thread's event."""
    tape = _late().raised()
    for _ in range(exits):
        tape.add(Kind.RUN_EXIT, None, 5)
    assert tape.delivered().one()["end"] == "delivered"


def test_a_gap_where_sequence_numbers_come_round_is_one() -> None:
    """It has as many events as elsewhere."""
    tape = _late().raised()
    tape.seq = 3  # instead of SEQUENCE: 1, 2 and 3 and that are missing
    lifecycles = tape.delivered().feed()
    (row,) = lifecycles.lifecycles.to_dict("records")
    assert (row["end"], row["why"].startswith("4 events")) == ("undecided", True), row["why"]


def test_shutdown_of_the_hardware() -> None:
    finished = Tape().add(Kind.RUN_EXIT, 0, 8).feed()
    assert not len(finished.lifecycles)
    assert finished.shutdowns["source"].tolist() == ["hardware"]


@pytest.mark.parametrize(
    ("type_", "sources"), [(3, ["crash"]), (6, ["sev_term"]), (7, ["tdx_fatal"]), (2, []), (0, [])]
)
def test_deaths_that_are_no_shutdown_exit(type_: int, sources: list[str]) -> None:
    """KVM_EXIT_SYSTEM_EVENT by its type; a reset is none, nor is one that the recording does not tell the type of."""
    assert Tape().add(Kind.RUN_EXIT, 0, 24, type_).feed().shutdowns["source"].tolist() == sources
    assert not len(Tape().add(Kind.RUN_EXIT, 0, 24 | EIO, type_).feed().shutdowns), "what kvm_run held before"
    assert not len(Tape().add(Kind.RUN_EXIT, 0, 5, type_).feed().shutdowns)


def test_a_vm_that_kvm_gave_up_is_told_once() -> None:
    """However many of its events say so."""
    finished = Tape().raised().add(Kind.RUN_EXIT, None, 5 | EIO, flags=Flag.DEAD).ended().feed()
    assert finished.lifecycles["end"].tolist() == ["abandoned"]
    again = Tape().add(Kind.RUN_EXIT, 0, 5 | EIO, flags=Flag.DEAD).add(Kind.VCPU_END, None, 4, flags=Flag.DEAD)
    for shutdowns in (finished.shutdowns, again.feed().shutdowns):
        assert shutdowns[["vm", "source"]].to_dict("records") == [{"vm": 7, "source": "vm_dead"}]


@pytest.mark.parametrize(
    ("saves", "end"),
    [
        ((), "abandoned"),
        ((0,), "lost"),
        ((CARRIED,), "handed_over"),
        ((VALID_TRIPLE_FAULT,), "lost"),
        ((PAYLOAD_PENDING,), "lost"),  # KVM gives the flag with the field that it fills in
        ((0, CARRIED), "handed_over"),
        ((CARRIED, 0), "lost"),
    ],
)
@pytest.mark.parametrize("how", ["ended", "vmm_exits"])
def test_last_save_decides(saves: tuple[int, ...], end: str, how: str) -> None:
    tape = Tape().raised()
    for detail in saves:
        tape.saved(detail)
    row = getattr(tape, how)().one()
    assert (row["end"], row["why"]) == (end, "")
    assert (row["saves"], row["blind_saves"]) == (saves.count(CARRIED), len(saves) - saves.count(CARRIED))


def test_save_that_failed_is_none() -> None:
    row = Tape().raised().saved(0, EIO).ended().one()
    assert (row["end"], row["blind_saves"]) == ("abandoned", 0)


def test_second_end_is_ignored() -> None:
    tape = Tape().raised().saved(0).vmm_exits().add(Kind.VCPU_END, None, End.REUSED)
    assert tape.one()["end"] == "lost"
    core = Lifecycles({10: "triple_fault"})
    assert [len(core.feed(tape.batch(at, at + 1)).lifecycles) for at in range(5)] == [0, 0, 0, 1, 0]
    assert core.carried == 0


def test_reflected_and_read_when_l1_ran_again() -> None:
    """What was pending in L2 and vanished without a shutdown exit went to L1, wherever the vCPU is by then."""
    tape = Tape().add(Kind.SITE, TF, Site.NESTED_VMEXIT, flags=Flag.NESTED).add(Kind.RUN_EXIT, 0, 2)
    row = tape.one()
    assert (row["end"], row["nested"], row["why"]) == ("reflected", True, "")
    assert Tape().add(Kind.SITE, TF, Site.EXCEPTION).add(Kind.RUN_EXIT, 0, 2).one()["end"] == "undecided"


def test_what_kvm_run_may_have_cleared_in_l2_was_not_seen_to_be_reflected() -> None:
    """An engine without a hook inside KVM_RUN cannot tell one from the other; what it saw delivered was."""
    tape = Tape().add(Kind.SITE, TF, Site.NESTED_VMEXIT, flags=Flag.NESTED)
    for end, arg in (("undecided", 2), ("delivered", 8)):
        row = (
            Tape().add(Kind.SITE, TF, Site.NESTED_VMEXIT, flags=Flag.NESTED).add(Kind.RUN_EXIT, 0, arg, flags=Flag.SYNC)
        )
        assert row.one()["end"] == end
    assert "kvm_run" in tape.add(Kind.RUN_EXIT, 0, 2, flags=Flag.SYNC).one()["why"]
    seen = Tape(Flag.CREATED | Flag.NESTED).raised().add(Kind.RESTORE, 0, SET_EVENTS, 0x20, flags=Flag.SYNC)
    assert seen.one()["end"] == "cleared"


def test_reflected() -> None:
    tape = Tape(Flag.CREATED | Flag.NESTED)
    row = tape.raised().add(Kind.SITE, 0, Site.REFLECT).one()
    assert (row["end"], row["nested"]) == ("reflected", True)


def test_reflected_before_the_flag_of_nested_mode_was_read() -> None:
    """The function says it, whatever the vCPU was in when the word was read."""
    assert Tape().raised().add(Kind.SITE, 0, Site.REFLECT).one()["end"] == "reflected"


@pytest.mark.parametrize(
    ("kind", "arg"),
    [(Kind.RUN_EXIT, 5), (Kind.RUN_EXIT, Site.REFLECT), (Kind.SITE, Site.EXCEPTION), (Kind.WAKEUP, 0)],
)
def test_vanished_inside_run(kind: int, arg: int) -> None:
    row = Tape().raised().add(kind, 0, arg).one()
    assert row["end"] == "undecided"
    assert row["why"] == "the request disappeared inside KVM_RUN without a shutdown exit"


def test_vanished_outside() -> None:
    row = Tape().raised().add(Kind.RUN_ENTER, 0).one()
    assert row["end"] == "undecided"
    assert row["why"] == "the request disappeared while no ioctl was in progress"


def test_other_requests_are_serviced_or_cleared() -> None:
    assert Tape().add(Kind.IOCTL_EXIT, NMI, 0xAE9A).add(Kind.RUN_EXIT, 0, 5).one()["end"] == "serviced"
    assert Tape().add(Kind.IOCTL_EXIT, NMI, 0xAE9A).add(Kind.IOCTL_EXIT, 0, 0xAE9A).one()["end"] == "cleared"


def test_cleared() -> None:
    row = Tape().raised().restored(0, VALID_TRIPLE_FAULT).one()
    assert (row["end"], row["why"]) == ("cleared", "")
    row = Tape().raised().add(Kind.IOCTL_EXIT, 0, SET_MCE).one()
    assert (row["end"], row["why"]) == ("cleared", "cleared by another ioctl than KVM_SET_VCPU_EVENTS")


@pytest.mark.parametrize(
    ("kind", "arg", "by"),
    [
        (Kind.IOCTL_EXIT, SET_MCE, "set_mce"),
        (Kind.IOCTL_EXIT, 0x1234, "ioctl"),
        (Kind.RESTORE, SET_EVENTS, "set_vcpu_events"),
        (Kind.SITE, Site.RSM, "rsm"),
        (Kind.SITE, Site.EXCEPTION, "exception"),
        (Kind.SITE, Site.REALMODE_INTERRUPT, "realmode_interrupt"),
        (Kind.SITE, Site.EMULATION, "emulation"),
        (Kind.SITE, Site.NESTED_VMEXIT, "nested_vmexit"),
        (Kind.SITE, Site.NESTED_ABORT, "nested_abort"),
        (Kind.SITE, Site.HARDWARE_SHUTDOWN, "kvm_run"),
        (Kind.RUN_EXIT, 5, "kvm_run"),
        (Kind.RUN_ENTER, 0, "remote"),
    ],
)
def test_raised_by(kind: int, arg: int, by: str) -> None:
    assert Tape().add(kind, TF, arg).delivered().one()["raised_by"] == by


def test_raised_by_the_ioctl_that_creates_the_vcpu() -> None:
    assert Tape(Flag.CREATED, TF).delivered().one()["raised_by"] == "ioctl"


def test_a_save_through_kvm_run_is_no_ioctl() -> None:
    """KVM_SYNC_X86_EVENTS: KVM saves as KVM_RUN returns."""
    assert Tape().add(Kind.SAVE, TF, flags=Flag.SYNC).delivered().one()["raised_in"] == "kvm_run"
    assert Tape().add(Kind.SAVE, TF).delivered().one()["raised_in"] == "ioctl"


def test_attached_with_it_pending() -> None:
    row = Tape(0, TF).delivered().one()
    assert (row["raised_by"], row["raised_after_ns"], row["raised_ns"]) == ("unknown", 0, 10)
    assert row["end"] == "delivered"


def test_stale() -> None:
    assert Tape().raised().add(Kind.RESET).delivered().one()["stale"]
    assert not Tape().raised().add(Kind.RESET).ended().one()["stale"]
    # Set again after the reset: it is the restored guest's own.
    assert not Tape().raised().add(Kind.RESET).restored(TF, CARRIED).delivered().one()["stale"]
    assert Tape().raised().restored(TF, CARRIED).add(Kind.RESET).delivered().one()["stale"]
    # A restore raised it, and writes real-mode registers afterwards: stale only if another restore left it as it was.
    assert not Tape().restored(TF, CARRIED).add(Kind.RESET).delivered().one()["stale"]
    assert Tape().restored(TF, CARRIED).restored(TF, 0).add(Kind.RESET).delivered().one()["stale"]
    # Raised by the reset itself; set by no restore that failed, or that had the flag and nothing pending.
    assert not Tape().add(Kind.RESET, TF).delivered().one()["stale"]
    failed = Tape().restored(TF, CARRIED).add(Kind.RESTORE, TF, SET_EVENTS | EIO)
    assert not failed.add(Kind.RESET).delivered().one()["stale"]
    assert Tape().raised().add(Kind.RESET).restored(TF, VALID_TRIPLE_FAULT).delivered().one()["stale"]


def test_open_and_exposed() -> None:
    row = Tape().raised().left(Loss())
    assert (row["end"], row["exposed"], row["ended_ns"]) == ("open", False, -1)
    assert Tape().raised().saved(0).left(Loss())["exposed"]
    assert not Tape().raised().saved(0).saved(CARRIED).left(Loss())["exposed"]


def test_gap_makes_it_undecided_and_is_named() -> None:
    row = Tape().raised().saved(CARRIED).saved(0).ended().drop(2).one()
    assert row["end"] == "undecided"
    assert row["why"] == "1 event of this vCPU was lost between 0.000000020 s and 0.000000040 s"


def test_gaps_are_told_as_one() -> None:
    tape = Tape().raised()
    for _ in range(5):
        tape.add(Kind.RUN_ENTER)
    tape.drop(3).drop(4)
    assert tape.ended().one()["why"] == "2 events of this vCPU were lost between 0.000000030 s and 0.000000070 s"


def test_a_gap_before_all_that_was_seen_begins_with_the_clock() -> None:
    why = Tape().raised().add(Kind.RUN_ENTER).ended().drop(0).drop(0).one()["why"]
    assert why.startswith("2 events of this vCPU were lost between 0.000000001 s and 0.000000030 s")


def test_two_threads_at_once_are_no_event_that_was_lost() -> None:
    tape = Tape().raised().add(Kind.RUN_ENTER).ended()
    tape.events[2]["seq"] = tape.events[1]["seq"]
    tape.events[3]["seq"] -= 1
    row = tape.one()
    assert (row["end"], row["why"].split(":")[0]) == (
        "undecided",
        "two threads used this vCPU at once around 0.000000030 s",
    )


def test_gap_story() -> None:
    assert gap_story(2, 1, 1_500_000_000).startswith("2 events of this vCPU were lost between 0.000000001 s and 1.5")
    assert gap_story(0, 1, 2).startswith("two threads used this vCPU at once")


def test_gap_before_the_raise_decides_nothing() -> None:
    tape = Tape().add(Kind.RUN_ENTER).raised().saved(0).ended().drop(1)
    assert tape.one()["end"] == "lost"


def test_raise_and_end_that_were_not_seen() -> None:
    row = Tape().raised().ended().drop(1).one()
    assert (row["end"], row["raised_by"]) == ("undecided", "unknown")
    assert "it was not seen being raised" in row["why"]
    row = Tape().raised().delivered().add(Kind.RUN_ENTER).drop(2).one()
    assert row["end"] == "undecided"
    assert "its end was not seen" in row["why"]


def test_vcpu_new_that_came_late() -> None:
    # The ring was full until a moment before the vCPU ended: whether it was saved, nobody knows.
    tape = Tape().raised().saved(CARRIED).add(Kind.VCPU_NEW, None, 4, 7).ended()
    tape.events[3].update(since_ns=0, before=0)
    del tape.events[:3]
    row = tape.one()
    assert (row["end"], row["raised_by"], row["vm"]) == ("undecided", "unknown", 7)
    # The same, but its raise has gone through.
    tape = Tape().raised().saved(CARRIED).add(Kind.VCPU_NEW, None, 4, 7).ended()
    tape.events[3].update(since_ns=0, before=0)
    del tape.events[2], tape.events[0]
    row = tape.one()
    assert (row["end"], row["raised_by"], row["raised_ns"]) == ("undecided", "set_mce", 20)


def test_events_lost_before_the_exit_of_the_vmm() -> None:
    # The save that carried it was lost, and after it came only the exit of the process, which has no seq.
    tape = Tape().raised().saved(0).saved(CARRIED).vmm_exits().drop(3)
    row = tape.one(Loss(ring_full=1, vcpus={1: VcpuLoss(1, 40, 40)}))
    assert row["end"] == "undecided"
    assert "1 event of this vCPU was lost" in row["why"]


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (Loss(ring_full=1, vcpus={1: VcpuLoss(1, 5, 5)}), "the last events of this vCPU were lost"),
        (Loss(ring_full=1, vcpus={0: VcpuLoss(1, 5, 5)}), "events of whole VMs or VMMs were lost"),
        (Loss(missed=1), "the tracer missed hooks, and they may be what decides it"),
    ],
)
def test_finish_with_loss(loss: Loss, why: str) -> None:
    row = Tape().raised().saved(0).left(loss)
    assert (row["end"], row["why"], row["exposed"]) == ("undecided", why, False)


def test_finish_knows_losses_that_gaps_told() -> None:
    tape = Tape().add(Kind.RUN_ENTER).raised().drop(1)
    assert tape.left(Loss(ring_full=1, vcpus={1: VcpuLoss(1, 5, 5)}))["end"] == "open"


def test_order_of_two_threads_is_no_gap_to_count() -> None:
    # The ring holds 1, 3, 2, 4, 5: nothing is missing there, so the lost event comes after them.
    tape = Tape().add(Kind.RUN_ENTER).add(Kind.RUN_ENTER).add(Kind.RUN_ENTER).raised()
    tape.events[1], tape.events[2] = tape.events[2], tape.events[1]
    assert tape.left(Loss(ring_full=1, vcpus={1: VcpuLoss(1, 5, 5)}))["end"] == "undecided"


def test_finish_forgets_everything() -> None:
    core = Lifecycles({10: "triple_fault"})
    core.feed(Tape().batch())
    assert core.carried == 1
    core.finish(Loss())
    assert core.carried == 0


def test_blind_proves_no_end_of_a_vcpu() -> None:
    row = Tape().raised().saved(0).ended().one(blind=True)
    assert (row["end"], row["why"]) == ("undecided", "the tracer missed hooks, and they may be what decides it")
    assert Tape().raised().delivered().one(blind=True)["end"] == "delivered"


def test_interrupt() -> None:
    tape = Tape().raised().saved(0).ended()
    core = Lifecycles({10: "triple_fault"})
    core.feed(tape.batch(0, 3))
    core.interrupt()
    row = core.feed(tape.batch(3)).lifecycles.iloc[0]
    assert (row["end"], row["why"]) == ("undecided", "a part of the recording is missing while it was pending")
    # What is raised after it can be judged.
    core = Lifecycles({10: "triple_fault"})
    core.feed(tape.batch(0, 1))
    core.interrupt()
    assert core.feed(tape.batch(1)).lifecycles["end"].tolist() == ["lost"]


def test_missing_part_hides_no_later_loss() -> None:
    tape = Tape().add(Kind.RUN_ENTER).raised()
    core = Lifecycles({10: "triple_fault"})
    core.feed(tape.batch(0, 1))
    core.interrupt()
    core.feed(tape.batch(2))
    row = core.finish(Loss(ring_full=1, vcpus={1: VcpuLoss(1, 5, 5)})).lifecycles.iloc[0]
    assert row["end"] == "undecided"


def test_batch_that_cannot_be_written() -> None:
    batch = Tape().raised().delivered().batch()
    batch.flags.writeable = False
    assert Lifecycles({10: "triple_fault"}).feed(batch).lifecycles["end"].tolist() == ["delivered"]


def test_pending_before_tracing_began_and_never_saved_since() -> None:
    """A save before the tracer came may have dropped it: `abandoned` would be a guess."""
    row = Tape(0, TF).ended().one()
    assert (row["end"], row["raised_by"]) == ("undecided", "unknown")
    assert "before tracing began" in row["why"]


def test_pending_before_tracing_began_and_saved_since() -> None:
    assert Tape(0, TF).saved(0).ended().one()["end"] == "lost"


# --- detail full -------------------------------------------------------------------------------------------------

NMI = 1 << 17


def lifecycles_of(*events: dict[str, int]) -> list[dict[str, Any]]:
    """Return the rows that a stream of detail full makes; each event goes on from the one before it."""
    rows, word, seq, since = [], 0, 0, 0
    for given in events:
        event = {"vcpu": 1, "pid": 100, "cpu": 2, "tid": 101, **given}
        if event["vcpu"] and event["kind"] != Kind.KICK:
            seq += 1
            event |= {"seq": seq, "before": word, "since_ns": since}
            event.setdefault("requests", word)
            word, since = event["requests"], event["time_ns"]
        rows.append(tuple(event.get(name, 0) for name in EVENT.names or ()))
    core = Lifecycles({0: "tlb_flush", 17: "nmi"}, full=True)
    finished = core.feed(np.array(rows, EVENT))
    return [
        {str(name): value for name, value in row.items()}
        for table in (finished.lifecycles, core.finish(Loss()).lifecycles)
        for row in table.to_dict("records")
    ]


def asked(time_ns: int, vm: int, request: int, mask: int) -> dict[str, int]:
    """Return the event of thread 9 making a request of vCPUs of a VM."""
    event = {"time_ns": time_ns, "kind": Kind.REQUEST_ALL, "vcpu": 0, "tid": 9}
    return event | {"detail": vm, "arg": request, "requests": mask}


BEGIN = {"time_ns": 10, "kind": Kind.VCPU_NEW, "detail": 7, "arg": 4, "flags": Flag.CREATED}


def test_raised_in_the_guest_by_a_kick() -> None:
    (row,) = lifecycles_of(
        BEGIN,
        {"time_ns": 20, "kind": Kind.RUN_ENTER},
        {"time_ns": 30, "kind": Kind.GUEST_ENTRY},
        {"time_ns": 35, "kind": Kind.KICK, "requests": NMI, "tid": 202, "cpu": 5},
        {"time_ns": 40, "kind": Kind.GUEST_EXIT, "requests": NMI},
        {"time_ns": 50, "kind": Kind.GUEST_ENTRY, "requests": 0},
    )
    assert row["raised_by"] == "remote"
    assert (row["raised_in"], row["raised_after_ns"], row["raised_ns"]) == ("guest", 30, 35)
    assert (row["requester_tid"], row["requester_cpu"], row["kicked_ns"]) == (202, 5, 35)
    assert (row["left_guest_ns"], row["end"], row["reentered_ns"]) == (40, "serviced", 50)
    assert (row["ended_after_ns"], row["ended_ns"]) == (40, 50)


def test_a_request_of_all_vcpus_is_each_ones() -> None:
    (row,) = lifecycles_of(
        BEGIN,
        {"time_ns": 20, "kind": Kind.RUN_EXIT, "arg": 2},
        asked(25, 7, 0x300, 2**64 - 1),
        {"time_ns": 30, "kind": Kind.RUN_ENTER, "requests": 1},
        {"time_ns": 40, "kind": Kind.RUN_EXIT, "arg": 2, "requests": 0},
    )
    assert (row["request"], row["raised_in"], row["raised_by"]) == ("tlb_flush", "user_space", "remote")
    assert (row["requester_tid"], row["kicked_ns"], row["reentered_ns"]) == (9, 25, -1)


def test_a_request_of_another_vm_or_of_other_vcpus_is_not() -> None:
    (row,) = lifecycles_of(
        BEGIN,
        {"time_ns": 20, "kind": Kind.RUN_EXIT, "arg": 2},
        asked(24, 8, 0x300, 2**64 - 1),
        asked(25, 7, 0x300, 1 << 5),
        asked(26, 7, 0x312, 1 << 4),
        asked(27, 7, 0x700, 2**64 - 1),  # KVM_REQ_OUTSIDE_GUEST_MODE: its number, and no bit
        {"time_ns": 30, "kind": Kind.RUN_ENTER, "requests": 1},
    )
    assert (row["end"], row["raised_by"], row["requester_tid"], row["kicked_ns"]) == ("open", "remote", 0, -1)


def test_raised_while_halted() -> None:
    (row,) = lifecycles_of(
        BEGIN,
        {"time_ns": 20, "kind": Kind.RUN_ENTER},
        {"time_ns": 29, "kind": Kind.KICK, "requests": NMI, "tid": 202},
        {"time_ns": 30, "kind": Kind.WAKEUP, "requests": NMI, "arg": 9, "detail": 1},
        {"time_ns": 40, "kind": Kind.GUEST_ENTRY, "requests": 0},
    )
    assert (row["raised_in"], row["requester_tid"], row["left_guest_ns"]) == ("halted", 202, -1)
    assert (row["raised_ns"], row["reentered_ns"]) == (29, 40)


def test_a_kick_that_comes_late_is_the_one_of_its_time() -> None:
    """Of another CPU: one at the last reading without the request is not for it, and of two at once the first is."""
    began = (BEGIN, {"time_ns": 20, "kind": Kind.RUN_EXIT}, {"time_ns": 40, "kind": Kind.RUN_ENTER, "requests": NMI})
    kicks = [
        {"time_ns": time_ns, "kind": Kind.KICK, "requests": NMI, "tid": tid}
        for time_ns, tid in ((20, 201), (30, 202), (30, 203))
    ]
    for count, kicked in enumerate(((-1, 0), (-1, 0), (30, 202), (30, 202))):
        (row,) = lifecycles_of(*began, *kicks[:count])
        assert (row["kicked_ns"], row["requester_tid"]) == kicked


def test_raised_by_an_ioctl_that_goes_on() -> None:
    (row,) = lifecycles_of(
        BEGIN, {"time_ns": 20, "kind": Kind.IOCTL_ENTER}, {"time_ns": 30, "kind": Kind.SITE, "requests": NMI}
    )
    assert row["raised_in"] == "ioctl"


def test_a_kick_for_something_else_raises_nothing() -> None:
    (row,) = lifecycles_of(
        BEGIN,
        {"time_ns": 20, "kind": Kind.RUN_ENTER},
        {"time_ns": 30, "kind": Kind.GUEST_ENTRY},
        {"time_ns": 35, "kind": Kind.KICK, "requests": 1 << 3, "tid": 202},
        {"time_ns": 40, "kind": Kind.GUEST_EXIT, "requests": NMI},
    )
    assert (row["raised_by"], row["kicked_ns"], row["requester_tid"]) == ("kvm_run", -1, 0)


# --- what other requests stand for -------------------------------------------------------------------------------


def ended_with(name: str, *events: dict[str, int]) -> tuple[str, int, int]:
    """Return how request 20 ended under that name, and its saves and blind saves."""
    rows, word, since = [], 0, 0
    stream = (BEGIN, *events, {"time_ns": 90, "kind": Kind.VCPU_END, "flags": events[-1].get("flags", 0)})
    for number, given in enumerate(stream, start=1):
        event = {"vcpu": 1, "pid": 100, "seq": number, "before": word, "since_ns": since, "requests": word, **given}
        word, since = event["requests"], event["time_ns"]
        rows.append(tuple(event.get(field, 0) for field in EVENT.names or ()))
    (row,) = Lifecycles({20: name}).feed(np.array(rows, EVENT)).lifecycles.to_dict("records")
    return row["end"], row["saves"], row["blind_saves"]


RAISED = {"time_ns": 20, "kind": Kind.IOCTL_EXIT, "arg": 0xAEB7, "requests": 1 << 20}
SAVED = {"time_ns": 30, "kind": Kind.SAVE, "arg": 0x8040AE9F, "flags": Flag.READ}
LOOK = {**SAVED, "flags": 0}
FAILED = {"time_ns": 30, "kind": Kind.SAVE, "arg": 0x8040AE9F | (2**32 - 14) << 32}


@pytest.mark.parametrize(
    ("name", "events", "expected"),
    [
        ("nmi", (RAISED, SAVED), ("handed_over", 1, 0)),
        ("smi", (RAISED, SAVED), ("lost", 0, 1)),
        ("smi", (RAISED, {**SAVED, "requests": 0}), ("serviced", 0, 0)),
        ("smi", (RAISED, FAILED), ("abandoned", 0, 0)),
        ("smi", (RAISED,), ("abandoned", 0, 0)),
        ("smi", (RAISED, LOOK), ("abandoned", 0, 0)),
        ("smi", (LOOK, {**RAISED, "time_ns": 40}), ("abandoned", 0, 0)),
        (
            "smi",
            (
                SAVED,
                {**RAISED, "time_ns": 40, "flags": Flag.READ},
                {"time_ns": 80, "kind": Kind.IOCTL_EXIT, "flags": Flag.READ},
            ),
            ("lost", 0, 1),
        ),
        ("hv_crash", ({**SAVED, "requests": 1 << 20},), ("undecided", 0, 0)),
        ("tlb_flush", (RAISED, SAVED), ("abandoned", 0, 0)),
        ("bit_20", (RAISED,), ("abandoned", 0, 0)),
        ("bit_20", (RAISED, SAVED), ("undecided", 0, 0)),
        ("bit_63", (RAISED, SAVED), ("undecided", 0, 0)),
        ("bit_40", (RAISED, SAVED), ("abandoned", 0, 0)),
    ],
)
def test_a_request_is_lost_if_it_stands_for_what_the_save_has_not(
    name: str, events: tuple[dict[str, int], ...], expected: tuple[str, int, int]
) -> None:
    assert ended_with(name, *events) == expected
