"""Stock Debian kernels: which there are, and each one fetched and unpacked in the cache.

Asks for the newest build of a series, since Debian drops old builds from its pools.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.matrix import MatrixError, apt, cache

UNPACK_S = 300


@dataclass(frozen=True)
class Series:
    """A line of kernels: the release's first numbers as a regular expression, and where Debian may have it."""

    numbers: str
    suites: tuple[str, ...]
    elsewhere: tuple[tuple[str, ...], ...] = ()  # where to look next, in this order


SERIES = {
    "5.10": Series(r"5\.10", ("bullseye", "bullseye-security")),
    "6.1": Series(r"6\.1", ("bookworm", "bookworm-security")),
    # The same sources, compiled by Debian 12's gcc 12: other functions are inlined.
    "6.12-deb12": Series(r"6\.12", ("bookworm-backports", "bookworm-security")),
    "6.12": Series(r"6\.12", ("trixie", "trixie-security")),
    "newest": Series(r"\d+", ("trixie-backports",)),
}
# A series that is not in the table, such as 6.18 or 7.2, is looked for in these, the newest first.
OTHERS = (("sid",), ("trixie-backports",), ("trixie", "trixie-security"), ("bookworm-backports",))
DEFAULT = ("5.10", "6.1", "6.12", "newest")


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: ``vmlinuz`` and ``lib/modules/RELEASE`` in a folder of its own."""

    series: str
    release: str
    version: str  # of the package
    folder: Path

    @property
    def image(self) -> Path:
        """What QEMU boots."""
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        """What belongs into a root's /lib/modules."""
        return self.folder / "lib/modules" / self.release


def series(name: str) -> Series:
    """Return the series of a name from the table, or of a bare number such as 7.2."""
    if name in SERIES:
        return SERIES[name]
    if re.fullmatch(r"\d+\.\d+", name):
        return Series(re.escape(name), OTHERS[0], OTHERS[1:])
    raise MatrixError(f"no kernel series {name}: known are {', '.join(SERIES)}, and numbers such as 7.2")


def fetch(name: str) -> Kernel:
    """Return the newest kernel of a series, fetched if it is not in the cache.

    Without a network the cached one is returned, whatever its age.
    """
    home = cache() / "kernels"
    home.mkdir(parents=True, exist_ok=True)
    wanted = series(name)
    with locked(home / ".lock"):
        latest = home / f".latest-{name}"  # a link to the build that was fetched last for this name
        try:
            archive, image, version, parts = _find(wanted, name)
        except MatrixError:
            if not (latest / "vmlinuz").exists():
                raise
            return _cached(name, latest.resolve())
        release = image.removeprefix("linux-image-")
        folder = home / release
        if not (folder / "version").exists() or (folder / "version").read_text() != version:
            _unpack(archive, parts, release, version, folder)
        _link(latest, release)
        return _cached(name, folder)


def _cached(name: str, folder: Path) -> Kernel:
    return Kernel(name, folder.name, (folder / "version").read_text(), folder)


def _find(wanted: Series, name: str) -> tuple[apt.Archive, str, str, list[str]]:
    # In the first suites that have it.
    tried: list[str] = []
    for suites in (wanted.suites, *wanted.elsewhere):
        archive = apt.Archive(suites, cache() / "apt" / "+".join(suites))
        archive.refresh()
        found = _newest_image(archive, wanted)
        if found is not None:
            return archive, *found
        tried += suites
    raise MatrixError(f"no complete kernel of series {name} in {', '.join(tried)}")


def _newest_image(archive: apt.Archive, wanted: Series) -> tuple[str, str, list[str]] | None:
    # Plain builds only: no cloud, rt or unsigned flavour, no metapackage and no backport to an older release.
    pattern = rf"linux-image-{wanted.numbers}(\.\d+)+(-\d+)?(\+deb[\d.]+)?-amd64"
    found = [package for package in archive.names("linux-image-.*") if re.fullmatch(pattern, package)]
    versions = archive.versions(found)
    while versions:
        image = apt.newest(versions)
        release = image.removeprefix("linux-image-")
        # Linux packages from 6.19 on: the image is empty, its parts are linux-binary and linux-modules.
        split = {f"linux-binary-{release}", f"linux-modules-{release}"} & set(archive.depends(image))
        parts = sorted(split) or [image]
        if len(archive.versions(parts)) == len(parts):
            return image, versions[image], parts
        del versions[image]  # its modules have left the pool already
    return None


def _unpack(archive: apt.Archive, packages: Sequence[str], release: str, version: str, folder: Path) -> None:
    for left_over in folder.parent.glob(".new-*"):  # of a fetch that was killed; the lock is ours
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as scratch:
        tree, kernel = Path(scratch, "tree"), Path(scratch, "kernel")
        for package in archive.download(packages, Path(scratch)):
            apt.run(["dpkg", "-x", str(package), str(tree)], UNPACK_S)
        modules = _first(tree / f"{usr}lib/modules/{release}" for usr in ("usr/", ""))
        image = _first((tree / f"boot/vmlinuz-{release}", modules / "vmlinuz"))
        (kernel / "lib/modules").mkdir(parents=True)
        image.rename(kernel / "vmlinuz")
        modules.rename(kernel / "lib/modules" / release)
        # The newest packages have no modules.order: depmod warns, modprobe works.
        apt.run([shutil.which("depmod") or "/usr/sbin/depmod", "-b", str(kernel), release], UNPACK_S)
        (kernel / "version").write_text(version)
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        kernel.rename(folder)


def _first(candidates: Iterator[Path] | tuple[Path, ...]) -> Path:
    tried = list(candidates)
    for candidate in tried:
        if candidate.exists():
            return candidate
    raise MatrixError(f"the kernel package is laid out in a new way: it has no {tried[0].name}")


def _link(link: Path, target: str) -> None:
    temporary = link.with_name(link.name + ".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.rename(link)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file: one process at a time works on what it guards."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
