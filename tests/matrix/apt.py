"""Packages of any Debian release, fetched without touching the machine's own apt state.

The mirror is the one that the machine's own apt sources name.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cmp_to_key
from pathlib import Path

from tests.matrix import MatrixError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
LISTS_AGE_S = 24 * 3600  # package lists older than this are fetched again
UPDATE_S = 300
DOWNLOAD_S = 900


@dataclass(frozen=True)
class Source:
    """One archive, from one line or paragraph of apt's sources."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    keyring: Path = KEYRING


def one_line_sources(text: str) -> Iterator[Source]:
    """Yield the archives of a sources.list.

    >>> [source.suites for source in one_line_sources("deb [arch=amd64] http://mirror bookworm main # x")]
    [('bookworm',)]
    """
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line.strip())
        if match:
            options, uri, suite, components = match.groups()
            signed_by = re.search(r"signed-by=(\S+)", options or "", re.IGNORECASE)
            keyring = _keyring(signed_by[1] if signed_by else "")
            yield Source(uri, (suite,), tuple(components.split()), keyring)


def deb822_sources(text: str) -> Iterator[Source]:
    """Yield the archives of a file in deb822 format.

    >>> [s.uri for s in deb822_sources("Types: deb\\nURIs: http://a http://b\\nSuites: sid")]
    ['http://a', 'http://b']
    """
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for paragraph in re.split(r"\n\s*\n", kept):
        pairs = re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", paragraph, re.MULTILINE)
        fields = {name.lower(): value for name, value in pairs}
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").strip().lower() != "no":
            suites, components = (tuple(fields.get(name, "").split()) for name in ("suites", "components"))
            keyring = _keyring(fields.get("signed-by", "").strip())
            for uri in fields.get("uris", "").split():
                yield Source(uri, suites, components, keyring)


def _keyring(signed_by: str) -> Path:
    # Signed-By may also hold a key itself or a fingerprint.
    return Path(signed_by) if signed_by.startswith("/") and "\n" not in signed_by else KEYRING


def machine_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """Return the archives that the machine's apt uses."""
    one_line = (*etc.glob("sources.list"), *sorted(etc.glob("sources.list.d/*.list")))
    found = [source for path in one_line for source in one_line_sources(path.read_text())]
    for path in sorted(etc.glob("sources.list.d/*.sources")):
        found += deb822_sources(path.read_text())
    return found


def sources_for(suites: Collection[str], machine: Sequence[Source], codename: str) -> list[Source]:
    """Return where the machine's mirrors hold other suites.

    A suite of security updates is left out where the machine itself uses none.
    """
    found = []
    for suite in suites:
        security = suite.endswith("-security")
        own = f"{codename}-security" if security else codename
        mirror = next((s for s in machine if own in s.suites and "main" in s.components), None)
        if mirror is not None:
            found.append(Source(mirror.uri, (suite,), ("main",), mirror.keyring))
        elif not security:
            raise MatrixError(f"no mirror for {suite}: this machine's apt sources have no {codename} main")
    return found


def codename(os_release: Path = Path("/etc/os-release")) -> str:
    """Return the code name of the machine's distribution."""
    match = re.search(r'^VERSION_CODENAME="?([\w-]+)', os_release.read_text(), re.MULTILINE)
    if match is None:
        raise MatrixError(f"{os_release} has no VERSION_CODENAME: the matrix needs a Debian host")
    return match[1]


@dataclass
class Archive:
    """Some suites of Debian, with an apt configuration of their own in ``state``."""

    suites: tuple[str, ...]
    state: Path
    _options: list[str] = field(init=False)

    def __post_init__(self) -> None:
        listing = self.state / "sources.list"
        self._options = [
            f"Dir::Etc::SourceList={listing}",
            "Dir::Etc::SourceParts=/dev/null",
            f"Dir::State::Lists={self.state}/lists",
            f"Dir::Cache={self.state}/cache",
            "APT::Sandbox::User=root",  # the user _apt may not be able to enter the cache
            "Acquire::Check-Valid-Until=false",  # an old release is asked for by intent
            "Acquire::Languages=none",
            "Acquire::Retries=3",
        ]

    def refresh(self) -> None:
        """Fetch the package lists, unless they are recent."""
        listing, stamp = self.state / "sources.list", self.state / "updated"
        lines = [
            f"deb [signed-by={source.keyring}] {source.uri} {source.suites[0]} main\n"
            for source in sources_for(self.suites, machine_sources(), codename())
        ]
        recent = stamp.exists() and time.time() - stamp.stat().st_mtime < LISTS_AGE_S
        if recent and listing.read_text() == "".join(lines):
            return
        for folder in (self.state / "lists/partial", self.state / "cache/archives/partial"):
            folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        listing.write_text("".join(lines))
        self._run(UPDATE_S, "apt-get", "-qq", "update", "-o", "APT::Update::Error-Mode=any")
        stamp.touch()

    def names(self, pattern: str) -> list[str]:
        """Return the packages whose whole name matches a regular expression."""
        output = self._run(UPDATE_S, "apt-cache", "search", "--names-only", f"^{pattern}$")
        return [line.split(" - ")[0] for line in output.splitlines()]

    def versions(self, packages: Sequence[str]) -> dict[str, str]:
        """Return the version that would be fetched of each of these packages that can be fetched."""
        if not packages:
            return {}
        output = self._run(UPDATE_S, "apt-cache", "policy", *packages)
        return dict(re.findall(r"^(\S+):\n.*\n  Candidate: (\d\S*)$", output, re.MULTILINE))

    def depends(self, package: str) -> list[str]:
        """Return the packages that a package depends on, also those that nobody offers any more."""
        output = self._run(UPDATE_S, "apt-cache", "depends", "--no-recommends", "--no-suggests", package)
        return re.findall(r"^ [ |]Depends: <?([^<>\s]+)>?$", output, re.MULTILINE)

    def download(self, packages: Sequence[str], folder: Path) -> list[Path]:
        """Fetch packages into a folder and return their files."""
        self._run(DOWNLOAD_S, "apt-get", "-qq", "download", *packages, cwd=folder)
        return sorted(folder.glob("*.deb"))

    def _run(self, limit_s: int, program: str, *arguments: str, cwd: Path | None = None) -> str:
        options = [word for option in self._options for word in ("-o", option)]
        return run([program, *options, *arguments], limit_s, cwd)


def newest(versions: dict[str, str]) -> str:
    """Return the package with the highest version."""

    def compare(one: str, other: str) -> int:
        higher = ["dpkg", "--compare-versions", versions[one], "gt", versions[other]]
        return 1 if subprocess.run(higher, check=False).returncode == 0 else -1

    return max(versions, key=cmp_to_key(compare))


def run(command: Sequence[str], limit_s: int, cwd: Path | None = None) -> str:
    """Run a program and return its output; its failure is a MatrixError with what it said."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False
        )
    except FileNotFoundError:
        raise MatrixError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise MatrixError(f"{command[0]} took more than {limit_s} s") from None
    if done.returncode:
        raise MatrixError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout
