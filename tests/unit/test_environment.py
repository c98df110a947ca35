"""The environment that the command is given: of a notebook, a service, a C locale, a folder that was deleted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .test_meta import recorded  # noqa: F401 - a fixture

COMMAND = Path(__file__).resolve().parents[2] / ".venv/bin/kvmreq"
pytestmark = pytest.mark.skipif(not COMMAND.exists(), reason="the command is not set up: make test")
PATH = os.environ["PATH"]
#: Each alone, on top of an environment that has nothing but a PATH and a home.
SETTINGS: tuple[dict[str, str], ...] = (
    {},
    {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    {"MATPLOTLIBRC": "."},
    {"MPLCONFIGDIR": "."},
    {"HOME": "/proc/nowhere"},
    {"PYTHONOPTIMIZE": "2"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "nonsense"},
    {"PYTHONHOME": "/nonexistent", "PYTHONPATH": "."},
    {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"TERM": "dumb"},
    {"TERM": ""},
    {"COLUMNS": "3"},
    {"TMPDIR": "/nonexistent"},
)
#: Of these, what could change a figure.
DRAWING = {"MPLBACKEND", "MATPLOTLIBRC", "MPLCONFIGDIR", "HOME"}


def run(folder: Path, settings: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a folder, with these settings and no others."""
    environment = {"PATH": PATH, "HOME": str(folder), **settings}
    return subprocess.run([COMMAND, *words], cwd=folder, env=environment, capture_output=True, check=False)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with settings for matplotlib, and with modules that have names of ours."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\nbackend: nonsense\nno.such: 1\n")
    for name in ("numpy", "analysis", "reports", "json"):
        (folder / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    return folder


@pytest.fixture(scope="module")
def plain(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Return a folder with the figures of a recording, drawn where nothing is set."""
    folder = tmp_path_factory.mktemp("plain")
    done = run(folder, {}, "report", recorded, "--figures", "figures")
    assert done.returncode == 3, done.stderr.decode()
    return folder / "figures"


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: ",".join(each) or "none")
def test_what_is_told_hangs_on_no_setting(
    recorded: Path,  # noqa: F811
    plain: Path,
    hostile: Path,
    settings: dict[str, str],
) -> None:
    """Every result is the same to the byte, but for characters that an encoding does not have."""
    told = run(plain, {}, "report", recorded)
    draws = settings.keys() <= DRAWING
    done = run(hostile, settings, "report", recorded, *(("--figures", "figures") if draws else ()))
    assert (done.returncode, done.stderr.decode().count("\n")) == (3, draws), done.stderr.decode()
    assert done.stdout.decode().replace("\\xb5", "µ") == told.stdout.decode()
    for picture in plain.iterdir() if draws else ():
        assert (hostile / "figures" / picture.name).read_bytes() == picture.read_bytes(), picture.name


@pytest.mark.parametrize("style", ["text", "json", "csv"])
def test_a_folder_that_is_gone(recorded: Path, tmp_path: Path, style: str) -> None:  # noqa: F811
    """What needs no place there is printed."""
    gone = tmp_path / "gone"
    gone.mkdir()
    words = f"cd {gone} && rmdir {gone} && exec {COMMAND} report {recorded} --format {style}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, check=False)
    assert done.returncode == 3, done.stderr.decode()
    assert done.stdout
