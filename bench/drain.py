"""What an event costs the reader: the mapped ring against BCC's own callback, on the same events in one run."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from bench.table import Figure
from probes import program, schema
from probes.schema import EVENT
from tracer.ring import Ring

_RING_BYTES = 32 << 20  # as kvmreq has it
_BURST = 64
_FILL = 300_000
_PASSES = 7
_SECONDS = 10
_AIM = 2_500_000  # events a second
_POLL_S = 0.05  # as the recorder polls
_GETPGID = 121  # __NR_getpgid, x86

_PROGRAM = """
BPF_ARRAY(producer, u32, 1);
BPF_ARRAY(both, u32, 1);
BPF_ARRAY(counters, u64, 2);
BPF_RINGBUF_OUTPUT(mapped, PAGES);
BPF_RINGBUF_OUTPUT(called, PAGES);

static inline void fill(struct event *event, u64 number)
{
	event->time_ns = bpf_ktime_get_ns();
	event->since_ns = event->time_ns - 1000;
	event->requests = event->before = 1024;
	event->arg = number;
	event->vcpu = 1;
	event->seq = number;
	event->pid = event->tid = bpf_get_current_pid_tgid();
	event->detail = 0;
	event->cpu = bpf_get_smp_processor_id();
	event->kind = 10;
	event->flags = 0;
}

int on_sys_enter(struct bpf_raw_tracepoint_args *ctx)
{
	u32 zero = 0, one = 1, *pid = producer.lookup(&zero), *wanted = both.lookup(&zero);
	u64 *produced = counters.lookup(&zero), *full = counters.lookup(&one);

	if (ctx->args[1] != GETPGID || !pid || !wanted || !produced || !full || *pid != bpf_get_current_pid_tgid() >> 32)
		return 0;
#pragma clang loop unroll(disable)
	for (int i = 0; i < BURST; i++) {
		struct event *event = mapped.ringbuf_reserve(sizeof(*event));

		++*produced;
		if (!event) {
			++*full;
			continue;
		}
		fill(event, *produced);
		mapped.ringbuf_submit(event, BPF_RB_NO_WAKEUP);
		if (!*wanted)
			continue;
		event = called.ringbuf_reserve(sizeof(*event));
		if (!event)
			continue;
		fill(event, *produced);
		called.ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	}
	return 0;
}
"""

# A process that causes AIM events a second for SECONDS, once it is told to begin; it says how long it took.
_PRODUCER = """
import os, sys, time
burst, aim, seconds = map(int, sys.argv[1:])
sys.stdin.readline()
begin = time.monotonic()
calls = 0
while (passed := time.monotonic() - begin) < seconds:
    due = int(passed * aim / burst) - calls
    for _ in range(due):
        os.getpgid(0)
    calls += due
    time.sleep(0.0005)
print(time.monotonic() - begin)
"""


_C_TYPES = {"u8": ctypes.c_uint64, "u4": ctypes.c_uint32, "u2": ctypes.c_uint16, "u1": ctypes.c_uint8}


class _Event(ctypes.Structure):
    _fields_ = tuple(zip(EVENT.names or (), (_C_TYPES[field.dtype] for field in schema.FIELDS), strict=True))


class _Source:
    """Programs that put a burst of events into both rings whenever the producer calls getpgid."""

    def __init__(self) -> None:
        os.environ["BCC_KERNEL_SOURCE"] = str(program.headers())
        from bcc import BPF

        text = (
            f"#define GETPGID {_GETPGID}\n#define BURST {_BURST}\n"
            f"#define PAGES {_RING_BYTES // os.sysconf('SC_PAGE_SIZE')}\n" + schema.c_struct() + _PROGRAM
        )
        self.bpf: Any = BPF(text=text)
        self.ring = Ring(self.bpf["mapped"].map_fd, _RING_BYTES, EVENT)
        self.bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="on_sys_enter")

    def produce_for(self, pid: int, *, both: bool) -> None:
        self.bpf["producer"][ctypes.c_int(0)] = ctypes.c_uint32(pid)
        self.bpf["both"][ctypes.c_int(0)] = ctypes.c_uint32(both)

    def counters(self) -> tuple[int, int]:
        """Return the events produced, and those for which the mapped ring had no room."""
        counters = self.bpf["counters"]
        return counters[ctypes.c_int(0)].value, counters[ctypes.c_int(1)].value

    def close(self) -> None:
        self.ring.close()
        self.bpf.detach_raw_tracepoint(tp="sys_enter")
        self.bpf.cleanup()


def _per_event(source: _Source) -> Iterator[Figure]:
    """Both readers read every field of every event, in turns; the CPU time of this thread is what counts."""
    seen = 0
    total = 0

    def callback(_context: object, data: int, _size: int) -> None:
        nonlocal seen, total
        event = ctypes.cast(data, ctypes.POINTER(_Event)).contents
        total += (
            event.time_ns
            + event.since_ns
            + event.requests
            + event.before
            + event.arg
            + event.vcpu
            + event.seq
            + event.pid
            + event.tid
            + event.detail
            + event.cpu
            + event.kind
            + event.flags
        )
        seen += 1

    source.bpf["called"].open_ring_buffer(callback)
    mapped, called = [], []
    source.produce_for(os.getpid(), both=True)
    for _ in range(_PASSES):
        for _ in range(_FILL // _BURST):
            os.getpgid(0)
        begin = time.thread_time_ns()
        events = source.ring.drain()
        added = sum(int(events[name].sum(dtype="u8")) for name in EVENT.names or ())
        mapped.append((time.thread_time_ns() - begin) / len(events))
        seen = total = 0
        begin = time.thread_time_ns()
        source.bpf.ring_buffer_consume()
        called.append((time.thread_time_ns() - begin) / seen)
        if seen != len(events) or not added or not total:
            raise RuntimeError(f"the readers saw different events: {len(events)} and {seen}")
    ratio = statistics.median(theirs / ours for ours, theirs in zip(mapped, called, strict=True))
    yield Figure("drain", "kvmreq's reader, every field of an event", statistics.median(mapped), "ns")
    yield Figure("drain", "BCC's callback, the same fields", statistics.median(called), "ns")
    yield Figure("drain", "BCC's callback / kvmreq's reader", ratio, "x", 8.0, at_least=True)


def _flood(source: _Source) -> Iterator[Figure]:
    begun, lost_before = source.counters()
    received = 0
    spent = time.thread_time_ns()
    with subprocess.Popen(
        [sys.executable, "-c", _PRODUCER, str(_BURST), str(_AIM), str(_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        source.produce_for(child.pid, both=False)
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None or source.ring.pending:
            if not source.ring.pending:
                time.sleep(_POLL_S)
            received += len(source.ring.drain())
        took = float(child.stdout.read())
    spent = time.thread_time_ns() - spent
    produced, lost = source.counters()
    produced, lost = produced - begun, lost - lost_before
    yield Figure("drain", f"flood of {took:.0f} s", produced / took / 1e6, "M/s")
    yield Figure("drain", f"  produced {produced:,}, received {received:,}: lost", produced - received, "events", 0)
    yield Figure("drain", "  counted as lost: the ring was full", lost, "events", 0)
    yield Figure("drain", "  reader's share of one CPU", 100 * spent / 1e9 / took, "%")


def figures() -> Iterator[Figure]:
    """Yield the cost of an event, then whether any is lost in a flood."""
    source = _Source()
    yield from _per_event(source)
    yield from _flood(source)
    source.close()
