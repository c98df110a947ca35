"""A Debian 13 root for the matrix: a BCC whose fentry reaches modules, and a newer Python.

Debian 12's BCC 0.26 attaches fentry to the kernel image only, Debian 13's 0.31 to modules as well.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.matrix import apt, cache
from tests.matrix.kernels import locked

SUITES = ("trixie", "trixie-security")
PACKAGES = (
    *("kmod", "procps", "udev"),  # what virtme-ng and the guest's script need
    *("python3", "python3-bpfcc", "python3-numpy", "python3-pandas", "python3-pytest"),
)
WHEELS = Path(__file__).with_name("debian13.txt")
# Debian 13's Python, and the newest C library that its own can stand in for.
PYTHON = "3.13"
PLATFORM = "manylinux_2_28_x86_64"
BUILD_S = 1200


def root(say: Callable[[str], None] = lambda text: None) -> Path:
    """Return the root, made if the cache has none or one of other packages."""
    home = cache() / "roots"
    home.mkdir(parents=True, exist_ok=True)
    contents = "\n".join((*SUITES, *PACKAGES, WHEELS.read_text()))
    folder = home / f"debian13-{hashlib.sha256(contents.encode()).hexdigest()[:12]}"
    with locked(home / ".lock"):
        if not folder.exists():
            say("== making a Debian 13 root\n")
            for left_over in home.glob(".new-*"):  # of a run that was killed; the lock is ours
                shutil.rmtree(left_over)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=home) as scratch:
                made = Path(scratch, "root")
                _bootstrap(made)
                _install_wheels(made)
                made.rename(folder)
    return folder


def _bootstrap(made: Path) -> None:
    sources = apt.sources_for(SUITES, apt.machine_sources(), apt.codename())
    lines = [f"deb [signed-by={s.keyring}] {s.uri} {s.suites[0]} main" for s in sources]
    include = f"--include={','.join(PACKAGES)}"
    apt.run(["mmdebstrap", "--variant=minbase", include, SUITES[0], str(made), *lines], BUILD_S)


def _install_wheels(made: Path) -> None:
    target = made / f"usr/local/lib/python{PYTHON}/dist-packages"
    wheels_only = ("--only-binary=:all:", "--python-version", PYTHON, "--platform", PLATFORM, "--no-deps")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-compile")
    apt.run([*pip, *wheels_only, "--target", str(target), "-r", str(WHEELS)], BUILD_S)
