"""A made-up stream of detail full: what busy guests do, as the hooks would tell it, all requests watched.

Each vCPU goes from one episode to the next, at random by weight; between two of them it is in the guest with nothing
pending. So the stream's truth is known: one lifecycle for each request that an episode raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from probes.requests import names
from probes.schema import EVENT, IN_GUEST_MODE, OUTSIDE_GUEST_MODE, REMOTE, REQUEST_FLAGS, Flag, Kind

VMS = 32
VCPUS = 8  # of each
BATCH = 1_000_000
#: What a recording of this says that it had hooks on, so that every rule of ordering is checked.
HOOKS = (
    *(f"raw_tracepoint:{name}" for name in ("kvm_entry", "kvm_exit", "kvm_vcpu_wakeup")),
    *(f"kprobe:{name}" for name in ("kvm_vcpu_kick", "kvm_make_all_cpus_request", "kvm_make_vcpus_request_mask")),
    *(f"kretprobe:{name}" for name in ("kvm_make_all_cpus_request", "kvm_make_vcpus_request_mask")),
)
#: The release whose requests the stream has.
RELEASE = "6.12"
_BITS = {name: bit for bit, name in names(RELEASE).by_bit.items()}
_EVENT, _FLUSH, _UNBLOCK, _NMI, _STEAL, _CLOCK = (
    1 << _BITS[name] for name in ("event", "tlb_flush", "unblock", "nmi", "steal_update", "clock_update")
)
_FLUSH_ALL = _BITS["tlb_flush"] | REQUEST_FLAGS["NO_WAKEUP"] | REQUEST_FLAGS["WAIT"]

# Exit reasons of VMX (uapi asm/vmx.h), KVM_EXIT_* and ioctls (uapi linux/kvm.h), EINTR as an ioctl returns it.
_INTERRUPT, _CPUID, _HLT, _IO, _MSR_WRITE, _EPT_VIOLATION, _TIMER = 1, 10, 12, 30, 32, 48, 52
_VMX = 1
_EXIT_IO, _EXIT_MMIO, _EXIT_INTR = 2, 6, 10 | (-4 & 0xFFFFFFFF) << 32
_GET_REGS, _INJECT_NMI = 0x8090AE81, 0xAE9A


class _Step(NamedTuple):
    kind: Kind
    arg: int = 0
    requests: int = 0
    detail: int = 0
    after_ns: int = 1_000  # since the step before, on average


def _left(reason: int, requests: int = 0, after_ns: int = 20_000) -> _Step:
    return _Step(Kind.GUEST_EXIT, reason, requests, _VMX, after_ns)


_BACK = _Step(Kind.GUEST_ENTRY)
# Weight and steps of each episode. Requests are those that an event finds in the word.
_EPISODES: tuple[tuple[int, tuple[_Step, ...]], ...] = (
    *((13, (_left(reason), _BACK)) for reason in (_EPT_VIOLATION, _MSR_WRITE, _CPUID, _TIMER)),
    (14, (_Step(Kind.KICK, 0, _EVENT, IN_GUEST_MODE, 20_000), _left(_INTERRUPT, _EVENT, 1_500), _BACK)),
    (
        12,
        (
            _left(_HLT),
            _Step(Kind.KICK, 0, _EVENT, OUTSIDE_GUEST_MODE, 50_000),
            _Step(Kind.WAKEUP, 51_000, _EVENT | _UNBLOCK, 1),
            _BACK,
        ),
    ),
    (
        3,
        (
            _Step(Kind.REQUEST_ALL, _FLUSH_ALL, after_ns=20_000),
            _left(_INTERRUPT, _FLUSH, 1_500),
            _Step(Kind.REQUEST_ALL_END, _FLUSH_ALL, after_ns=200),
            _BACK,
        ),
    ),
    (12, (_left(_IO), _Step(Kind.RUN_EXIT, _EXIT_IO), _Step(Kind.RUN_ENTER, after_ns=3_000), _BACK)),
    (
        5,
        (
            _left(_EPT_VIOLATION),
            _Step(Kind.RUN_EXIT, _EXIT_MMIO),
            _Step(Kind.IOCTL_ENTER, _GET_REGS),
            _Step(Kind.IOCTL_EXIT, _GET_REGS, _STEAL),
            _Step(Kind.RUN_ENTER, 0, _STEAL),
            _BACK,
        ),
    ),
    (
        1,
        (
            _left(_INTERRUPT),
            _Step(Kind.RUN_EXIT, _EXIT_INTR),
            _Step(Kind.IOCTL_ENTER, _INJECT_NMI),
            _Step(Kind.IOCTL_EXIT, _INJECT_NMI, _NMI | _STEAL),
            _Step(Kind.RUN_ENTER, 0, _NMI | _STEAL),
            _BACK,
        ),
    ),
    *(
        (1, (_Step(Kind.KICK, 0, word, IN_GUEST_MODE, 20_000), _left(_INTERRUPT, word, 1_500), _BACK))
        for word in (_CLOCK, _NMI)
    ),
)
_BEGIN = (_Step(Kind.VCPU_NEW), _Step(Kind.RUN_ENTER), _BACK)

_VM_WIDE = (Kind.REQUEST_ALL, Kind.REQUEST_ALL_END)
_NUMBERS = np.arange(1, VMS * VCPUS + 1)


class _Script:
    """Episodes as arrays: the steps of all of them one after the other."""

    def __init__(self, episodes: tuple[tuple[_Step, ...], ...]) -> None:
        self.length = np.array([len(steps) for steps in episodes])
        self.begin = np.cumsum(self.length) - self.length
        steps = [step for episode in episodes for step in episode]
        self.kind = np.array([step.kind for step in steps], "u1")
        self.arg = np.array([step.arg for step in steps], "u8")
        self.requests = np.array([step.requests for step in steps], "u8")
        self.detail = np.array([step.detail for step in steps], "u4")
        self.after_ns = np.array([step.after_ns for step in steps], float)


class _Guests:
    """Where every vCPU is in its story."""

    def __init__(self) -> None:
        self._seq = np.zeros(len(_NUMBERS), "u4")
        self._last_ns = np.zeros(len(_NUMBERS), "u8")
        self._now_ns = 1_000_000_000
        self._random = np.random.default_rng(4)

    def play(self, script: _Script, episodes: npt.NDArray[np.intp]) -> npt.NDArray[np.void]:
        """Return the events of these episodes, a row of them for each vCPU, in the order of time."""
        flat = episodes.ravel()
        length = script.length[flat]
        ends = np.cumsum(length)
        # Of each event: its place in the script, and its vCPU.
        step = np.arange(ends[-1]) - np.repeat(ends - length - script.begin[flat], length)
        vcpu = np.repeat(np.repeat(np.arange(len(_NUMBERS)), episodes.shape[1]), length)
        kind = script.kind[step]
        events = np.zeros(len(step), EVENT)
        passed = np.cumsum(self._random.exponential(script.after_ns[step]).astype(np.int64) + 1)
        first = np.searchsorted(vcpu, np.arange(len(_NUMBERS)))
        base = np.append(0, passed)[first]
        time_ns = self._now_ns + passed - base[vcpu]
        events["time_ns"], events["kind"], events["detail"] = time_ns, kind, script.detail[step]
        events["arg"], events["requests"] = script.arg[step], script.requests[step]
        events["vcpu"], events["pid"] = vcpu + 1, 1000 + vcpu // VCPUS
        events["tid"], events["cpu"] = 10_000 + vcpu, vcpu
        events["flags"] = Flag.CREATED | Flag.CAP_EXISTS

        remote = np.isin(kind, REMOTE)
        whole = np.isin(kind, _VM_WIDE)
        mine = np.flatnonzero(~(remote | whole))
        owner = vcpu[mine]
        head = np.searchsorted(owner, np.arange(len(_NUMBERS)))
        events["seq"][mine] = np.arange(len(mine)) - head[owner] + 1 + self._seq[owner]
        events["before"][mine[1:]] = events["requests"][mine[:-1]]
        events["since_ns"][mine[1:]] = events["time_ns"][mine[:-1]]
        events["before"][mine[head]], events["since_ns"][mine[head]] = 0, self._last_ns
        tail = mine[np.append(head[1:], len(mine)) - 1]
        self._seq, self._last_ns = events["seq"][tail], events["time_ns"][tail]

        events["before"][remote] = events["requests"][remote]
        events["vcpu"][whole], events["detail"][whole] = 0, vcpu[whole] // VCPUS + 1
        events["requests"][whole] = np.uint64(1) << (vcpu[whole] % VCPUS).astype("u8")
        ended = np.flatnonzero(kind == Kind.REQUEST_ALL_END)
        events["since_ns"][ended] = events["time_ns"][np.flatnonzero(kind == Kind.REQUEST_ALL)]
        events["tid"][remote | whole] = events["pid"][remote | whole]  # the VMM's main thread asks for it
        new = np.flatnonzero(kind == Kind.VCPU_NEW)
        events["arg"][new], events["detail"][new] = vcpu[new] % VCPUS, vcpu[new] // VCPUS + 1
        self._now_ns = int(time_ns.max())
        return events[np.argsort(time_ns, kind="stable")]


def busy(events: int) -> Iterator[Any]:
    """Yield batches of what 32 VMs of 8 vCPUs do: exits, interrupts, halts, flushes, returns to user space, NMIs."""
    guests = _Guests()
    begin = guests.play(_Script((_BEGIN,)), np.zeros((len(_NUMBERS), 1), np.intp))
    script = _Script(tuple(steps for _, steps in _EPISODES))
    weights = np.array([weight for weight, _ in _EPISODES], float)
    chance = weights / weights.sum()
    each = int(BATCH / (chance @ script.length) / len(_NUMBERS))
    random = np.random.default_rng(5)
    left = events
    batch = begin
    while left > 0:
        yield batch[:left]
        left -= len(batch)
        batch = guests.play(script, random.choice(len(chance), (len(_NUMBERS), each), p=chance))
