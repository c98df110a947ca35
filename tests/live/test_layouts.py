"""The programs compile for kernels that lay their structures out otherwise than this one.

Where a program needs more stack than BPF has, LLVM ends the process by itself, so each compilation is a process.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from probes.plan import HOOKS

from .session import CHECKOUT

pytestmark = pytest.mark.live

# The bytes between file.f_op and file.private_data: of Linux 6.12 and 5.10, and of 6.1, which is the most.
DISTANCES = (8, 160)

COMPILE = """
import os, sys
from probes import plan as plans, program
from probes.btf import Btf
from probes.requests import TRIPLE_FAULT
from bcc import BPF
from tracer.bpf import _CFLAGS

engine, distance, full = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "full"
with Btf("kvm") as btf:
    found = program.offsets(btf)
found["OFFSET_PRIVATE_DATA"] = distance
for constant, _, optional in program._FIELDS:
    if optional:
        found.setdefault(constant, 4096)
targets = [hook.target for hook in plans.HOOKS[engine][0]]
plan = plans.make(engine, targets, targets)
symbols = {"kvm_vcpu_ioctl": 1 << 63, "kvm_vm_ioctl": 3 << 62}
settings = program.Settings(watched=1 << TRIPLE_FAULT, cpus=2, full=full, filtered=True)
os.environ["BCC_KERNEL_SOURCE"] = str(program.headers())
BPF(text=program.source(plan, settings, found, symbols).encode(), cflags=_CFLAGS)
"""


@pytest.mark.parametrize("engine", HOOKS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("detail", ["boundary", "full"])
def test_programs_compile_for_every_layout(engine: str, distance: int, detail: str) -> None:
    """With every field that a kernel may lack, and within the stack that BPF has."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, engine, str(distance), detail],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
