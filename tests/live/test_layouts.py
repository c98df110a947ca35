"""The programs of every engine compile, also those that this kernel refuses and those for kernels of another layout.

Where a program needs more stack than BPF has, LLVM ends the process by itself, so each compilation is a process.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from probes.program import ENGINES

from .session import CHECKOUT

pytestmark = pytest.mark.live

# The bytes between file.f_op and file.private_data: of Linux 6.12 and 5.10, and of 6.1, which is the most.
DISTANCES = (8, 160)

COMPILE = """
import os, sys
from probes import plan as plans, program
from probes.btf import Btf
from probes.requests import TRIPLE_FAULT
from bcc import lib
from tracer.bpf import _CFLAGS, _bpf_class

engine, distance, full = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "full"
with Btf("kvm") as btf:
    found = program.offsets(btf, engine)
found["OFFSET_PRIVATE_DATA"] = distance
for constant, _, optional in program._FIELDS:
    if optional:
        found.setdefault(constant, 4096)
targets = [hook.target for hook in plans.HOOKS[engine][0]]
plan = plans.make(engine, targets, targets, preempted=distance == 8 and full, full=full)
if distance == 8:
    found["MASK_ARGUMENTS"] = 5
else:
    found.pop("MASK_ARGUMENTS", None)
    found["OFFSET_MODE"] = found["OFFSET_REQUESTS"] - 16
modules = dict.fromkeys(targets, "kvm_amd")
symbols = {"kvm_vcpu_ioctl": 1 << 63, "kvm_vm_ioctl": 3 << 62}
if distance != 8:  # a kernel that hides them
    symbols = dict.fromkeys(symbols, 0)
if distance == 8:  # a kernel that has them
    symbols |= dict.fromkeys(("bpf_get_current_task_btf", "bpf_task_pt_regs"), 1)
else:
    found |= {"SIZE_STACK": 16384}
settings = program.Settings(watched=1 << TRIPLE_FAULT, cpus=2, full=full, filtered=True)
os.environ["BCC_KERNEL_SOURCE"] = str(program.headers())
bpf = _bpf_class()(text=program.source(plan, settings, found, symbols, modules).encode(), cflags=_CFLAGS)
there = {lib.bpf_function_name(bpf.module, index) for index in range(lib.bpf_num_functions(bpf.module))}
missing = {program.name(hook, modules).encode() for hook in plan.attachable} - there
assert not missing, missing
"""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("detail", ["boundary", "full"])
def test_programs_compile_for_every_layout(engine: str, distance: int, detail: str) -> None:
    """With every field that a kernel may lack, within the stack that BPF has, and every hook has its program."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, engine, str(distance), detail],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
