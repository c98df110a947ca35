"""`kvmreq --version`: written once, in setup.cfg, and told by a checkout as by what is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from command import version

CHECKOUT = Path(__file__).resolve().parents[2]
SETTINGS = ConfigParser()
SETTINGS.read(CHECKOUT / "setup.cfg")
PACKAGES = SETTINGS.get("options", "packages").split(", ")
OTHER = "7.11.13"


def says(folder: Path, *options: str) -> str:
    """Return what the command that is in a folder says is its version, asked from elsewhere."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from command.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, *options, "-c", code, "--version"],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of all that a package is made from, with a version of its own."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in PACKAGES:
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(CHECKOUT / name, copy)
    written = (CHECKOUT / "setup.cfg").read_text()
    ours = f"version = {SETTINGS.get('metadata', 'version')}\n"
    assert written.count(ours) == 1
    (copy / "setup.cfg").write_text(written.replace(ours, f"version = {OTHER}\n"))
    return copy


def test_it_is_that_of_setup_cfg(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, whatever else is installed."""
    assert version.version() == SETTINGS.get("metadata", "version")
    assert says(CHECKOUT) == f"kvmreq {SETTINGS.get('metadata', 'version')}\n"


def test_a_checkout_that_is_not_installed_reads_its_own(sources: Path) -> None:
    """No metadata of an installation is there to be asked."""
    assert says(sources, "-I") == f"kvmreq {OTHER}\n"


def test_what_is_installed_tells_it_too(sources: Path, tmp_path: Path) -> None:
    """Built as for an installation: every package is there, and what they read; setup.cfg is not."""
    pytest.importorskip("setuptools", reason="needs setuptools, as python3-venv brings it")
    site = tmp_path / "site"
    site.mkdir()
    build = "from setuptools import setup; setup()"
    words = ["build", "--build-base", str(tmp_path / "build"), "--build-lib", str(site), "egg_info", "-e", str(site)]
    subprocess.run([sys.executable, "-c", build, *words], cwd=sources, capture_output=True, check=True)
    shutil.rmtree(sources)
    assert says(site) == f"kvmreq {OTHER}\n"
    # Another project's setup.cfg beside the packages is not ours.
    (site / "setup.cfg").write_text("[metadata]\nname = other\nversion = 1\n")
    assert says(site) == f"kvmreq {OTHER}\n"


def test_every_package_of_the_command_is_installed() -> None:
    """A folder with code that setup.cfg forgets would be found missing by users alone."""
    folders = {path.parent.name for path in CHECKOUT.glob("*/__init__.py")} - {"tests", "bench"}
    assert folders == set(PACKAGES)
