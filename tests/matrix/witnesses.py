"""KVM's own selftests as witnesses: what each does is written in its source, and so is what kvmreq must say of it.

Built from Debian's linux-source-6.1, statically, so that they run on every root. They stay in the cache.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.matrix import MatrixError, apt, cache
from tests.matrix.kernels import locked

PACKAGE = "linux-source-6.1"
SUITES = ("bookworm", "bookworm-security")
# All that the tests are built from: to unpack the rest takes longer than to build them.
PARTS = ("tools", "include", "scripts", "arch/x86/include", "Makefile")
BUILD_S = 600

# tools/testing/selftests/kvm/x86_64/NAME.c of Linux 6.1, and on AMD (the emulated CPU has SVM and no VMX):
EXPECT: Mapping[str, Mapping[str, Any]] = {
    # L2 does IN. The test enables the capability, adds a pending triple fault to the events and sets them
    # (raised_by set_vcpu_events, while the vCPU is in L2: nested). It runs with immediate_exit to complete the IN
    # (-EINTR: one exit to user space), reads the events back, which must have it (a look), and runs: L1 does not
    # intercept the shutdown, so that KVM_RUN ends with KVM_EXIT_SHUTDOWN (delivered, from the request).
    "triple_fault_event_test": {
        "vms": 1,
        "lifecycles": [
            {
                "vm": 0,
                "vcpu": 0,
                "raised_by": "set_vcpu_events",
                "end": "delivered",
                "userspace_exits": 1,
                "saves": 0,
                "blind_saves": 0,
                "nested": True,
                "stale": False,
            }
        ],
        "shutdowns": [{"vm": 0, "vcpu": 0, "source": "request"}],
    },
    # Thirteen stages, in SMM and in L2. After each but the eighth (where it continues) and the last (where it is
    # done) the vCPU is saved, its VM destroyed and another one made: twelve VMs. Nothing shuts down, so that eleven
    # saves and restores without the flag must not look like a loss.
    "smm_test": {"vms": 12, "lifecycles": [], "shutdowns": []},
    # L2 does UD2, and no exception of it can be delivered: the CPU itself shuts down, and L1 does not intercept that.
    # KVM_RUN ends with KVM_EXIT_SHUTDOWN, and no request was made.
    "svm_nested_shutdown_test": {
        "vms": 1,
        "lifecycles": [],
        "shutdowns": [{"vm": 0, "vcpu": 0, "source": "hardware"}],
    },
}


def programs(say: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Return the tests, built if the cache has none of this version of the source."""
    home = cache() / "witnesses"
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / ".lock"):
        archive = apt.Archive(SUITES, cache() / "apt" / "+".join(SUITES))
        archive.refresh()
        version = archive.versions([PACKAGE]).get(PACKAGE)
        if version is None:
            raise MatrixError(f"no package {PACKAGE} in {', '.join(SUITES)}: KVM's own tests cannot be built")
        folder = home / version
        if not folder.exists():
            say(f"== building KVM's own tests from {PACKAGE} {version}\n")
            _build(archive, folder)
    return [folder / name for name in EXPECT]


def _build(archive: apt.Archive, folder: Path) -> None:
    for left_over in folder.parent.glob(".new-*"):  # of a run that was killed; the lock is ours
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as scratch:
        built = Path(scratch, "built")
        for package in archive.download([PACKAGE], Path(scratch)):
            apt.run(["dpkg", "-x", str(package), scratch], BUILD_S)
        wanted = [f"{PACKAGE}/{part}" for part in PARTS]
        apt.run(["tar", "-xJf", f"{scratch}/usr/src/{PACKAGE}.tar.xz", "-C", scratch, *wanted], BUILD_S)
        tests = f"{scratch}/{PACKAGE}/tools/testing/selftests/kvm"
        targets = [f"{built}/x86_64/{name}" for name in EXPECT]
        make = ["make", "-s", "-C", tests, f"OUTPUT={built}", "LDFLAGS=-static -pthread -no-pie"]
        apt.run([*make, *targets], BUILD_S)
        (built / "x86_64").rename(folder)
