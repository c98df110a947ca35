"""A recording of detail full that one VMM floods with readings of its vCPU, hundreds of thousands in each millisecond.

python -m bench.flood record DIR RING_MIB     records until its standard input ends
python -m bench.flood produce RATE SECONDS    a VMM that causes RATE events a second, once it is given a line

A program beside the engine's own reads the vCPU of a thread that calls getpgid BURST times, as if it left the guest and
entered it again. All the rest is the recorder as it is: readings, ring, losses, reader, segments on disk.
"""

from __future__ import annotations

import os
import select
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from bench.guest import READY
from lab.kvm import Kvm
from probes import program
from tracer.recorder import Recorder, Wish

BURST = 64
_GETPGID = 121  # __NR_getpgid, x86-64
_PAUSE_S = 0.0005

_PROGRAM = """
int on_flood(struct bpf_raw_tracepoint_args *ctx)
{
	u64 thread = this_thread(), vcpu;
	struct in_ioctl *in;
	struct vcpu_state *state;

	if (ctx->args[1] != GETPGID)
		return 0;
	in = threads.lookup(&thread);
	if (!in)
		return 0;
	vcpu = in->last_vcpu;
	state = vcpus.lookup(&vcpu);
	if (!state)
		return 0;
#pragma clang loop unroll(disable)
	for (int i = 0; i < BURST; i++)
		boundary(state, vcpu, i & 1 ? KIND_GUEST_ENTRY : KIND_GUEST_EXIT, 0, 0, 0);
	return 0;
}
"""


def _record(path: Path, ring_bytes: int) -> None:
    from bcc import BPF, lib

    source = program.source

    def flooded(*arguments: Any) -> str:
        return f"{source(*arguments)}\n#define GETPGID {_GETPGID}\n#define BURST {BURST}\n{_PROGRAM}"

    recorder = Recorder(path, Wish(requests=("all",), full=True, ring_bytes=ring_bytes))
    with mock.patch.object(program, "source", flooded):
        recorder.start()
    # Not by BCC's own method: that takes one program for each tracepoint, and the engine has one there.
    function = recorder._engine._bpf.load_func(b"on_flood", BPF.RAW_TRACEPOINT)  # type: ignore[attr-defined]
    hook = lib.bpf_attach_raw_tracepoint(function.fd, b"sys_enter")
    if hook < 0:
        raise OSError(-hook, f"the flood cannot be attached: {os.strerror(-hook)}")
    print(READY, flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        recorder.poll()
    os.close(hook)
    recorder.stop()


def _produce(rate: int, seconds: float) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        print(READY, flush=True)
        sys.stdin.readline()
        vcpu.get_regs()  # this thread is now known to be the vCPU's
        begin = time.monotonic()
        calls = 0
        while (passed := time.monotonic() - begin) < seconds:
            due = min(int(passed * rate / BURST) - calls, rate // 100 // BURST)  # what was held up is not made up for
            for _ in range(due):
                os.getpgid(0)
            calls = int(passed * rate / BURST)
            time.sleep(_PAUSE_S)
        print(time.monotonic() - begin)


if __name__ == "__main__":
    if sys.argv[1] == "record":
        _record(Path(sys.argv[2]), int(sys.argv[3]) << 20)
    else:
        _produce(int(sys.argv[2]), float(sys.argv[3]))
