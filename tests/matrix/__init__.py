"""Stock Debian kernels, booted in QEMU to run kvmreq's live tests inside.

Needs neither KVM on the host nor kernel headers: QEMU emulates SVM. What is fetched and made is kept in
``cache()``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

# Debian packages that the host needs, and a program that each one brings.
HOST_PACKAGES = {
    "busybox-static": "busybox",  # virtme-ng's initramfs
    "debian-archive-keyring": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "file": "file",  # virtme-ng reads a kernel's release with it
    "gcc": "gcc",  # KVM's own tests, as the next three
    "kmod": "depmod",
    "libc6-dev": "/usr/include/stdio.h",
    "linux-libc-dev": "/usr/include/linux/kvm.h",
    "make": "make",
    "mmdebstrap": "mmdebstrap",  # the Debian 13 root
    "qemu-system-x86": "qemu-system-x86_64",
    "udev": "udevadm",  # without it on the booted root neither output nor status come back
    "xz-utils": "xz",
}


class MatrixError(Exception):
    """The matrix cannot go on: what failed, why, and what to do."""


def cache() -> Path:
    """Return the folder of kernels and roots: $KVMREQ_MATRIX_CACHE, or .cache/matrix in the checkout."""
    return Path(os.environ.get("KVMREQ_MATRIX_CACHE") or CHECKOUT / ".cache/matrix").resolve()


def missing_packages() -> list[str]:
    """Return the Debian packages that the host still needs."""
    search = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return [name for name, brings in HOST_PACKAGES.items() if shutil.which(brings, os.F_OK, search) is None]
