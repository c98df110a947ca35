"""Places and their index against a dict, and a walk that needs more room than there is."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import memory
from analysis.lifecycle import Lifecycles
from probes.schema import EVENT, End, Flag, Kind
from tracer.loss import Loss

# Close together, as numbers of vCPUs are, and far apart.
NUMBERS = st.one_of(st.integers(0, 30), st.sampled_from([7 << 20, (7 << 20) + 16, 1 << 31]))
STEPS = st.lists(st.tuples(st.sampled_from([memory.VCPU, memory.VM, memory.THREAD]), NUMBERS), max_size=60)


@settings(deadline=None)
@given(STEPS, st.integers(0, 60))
def test_the_index_is_a_dict(steps: list[tuple[int, int]], grows: int) -> None:
    """A number that is there is taken out, one that is not is put in; in between it grows."""
    held, known = memory.empty(128), dict[tuple[int, int], int]()
    for at, key in enumerate(steps):
        if at == grows:
            held = memory.larger(held)
        if key in known:
            memory.drop(held, *key)
            memory.give(held, known.pop(key))
        else:
            known[key] = memory.take(held)
            memory.put(held, *key, known[key])
        assert held.now.indexed == held.now.used == len(known)
        assert len(set(known.values())) == len(known)
        for kind in (memory.VCPU, memory.VM, memory.THREAD):
            for number in {number for _, number in steps}:
                assert memory.look(held, kind, number) == known.get((kind, number), memory.NONE)


def test_more_vcpus_than_there_is_room_for_are_each_told_once() -> None:
    """20,011 with a request each, half of which end with their process, all at once; nothing is carried over then."""
    many = 20_011
    events = np.zeros(2 * many + 1, EVENT)
    events["vcpu"][:-1], events["seq"][:-1] = np.tile(np.arange(1, many + 1), 2), np.repeat([1, 2], many)
    events["pid"][:-1], events["time_ns"] = 50 + np.tile(np.arange(many), 2) % 2, 1000 + np.arange(len(events))
    events["kind"][:many], events["flags"][:many], events["detail"][:many] = Kind.VCPU_NEW, Flag.CREATED, 1
    events["kind"][many:-1], events["arg"][many:-1] = Kind.IOCTL_EXIT, 0x4040AE9E
    events["requests"][many:-1], events["since_ns"][many:-1] = 1 << 10, events["time_ns"][:many]
    events["kind"][-1], events["pid"][-1], events["arg"][-1] = Kind.VMM_EXIT, 51, End.EXITED
    core = Lifecycles({10: "triple_fault"})
    ended = core.feed(events).lifecycles
    assert ended["end"].tolist() == ["abandoned"] * (many // 2)
    assert ended["vcpu_number"].tolist() == list(range(2, many + 1, 2))
    assert core.carried == 2 * (many - many // 2)
    open_ = core.finish(Loss()).lifecycles
    assert open_["end"].tolist() == ["open"] * (many - many // 2) and core.carried == 0
