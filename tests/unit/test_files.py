"""Results go where the user says: to files that are whole, and into whatever is no file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tracer import files

from .test_environment import COMMAND
from .test_meta import recorded  # noqa: F401 - a fixture

CONTENT = b"<!doctype html>" + b"x" * 100_003


def _written(path: Path, content: bytes) -> None:
    with files.new(path) as file:
        file.write(content)


def names(folder: Path) -> list[str]:
    """Return what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


WRITERS: tuple[Callable[[Path, bytes], None], ...] = (files.replace, _written)
both = pytest.mark.parametrize("write", WRITERS, ids=["replace", "new"])


@both
def test_a_device_stays_one(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    """Nothing takes its name, as root could."""
    if os.geteuid() != 0:
        pytest.skip("makes a device: sudo make test")
    device = tmp_path / "null"
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    before = device.stat()
    write(device, CONTENT)
    assert (device.stat().st_ino, device.stat().st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == ["null"]


@both
def test_a_fifo_is_written_into(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    """Its reader gets every byte."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    write(fifo, CONTENT)
    reader.join()
    assert got == [CONTENT]
    assert names(tmp_path) == ["fifo"]


def test_where_a_link_leads_the_file_is_replaced(tmp_path: Path) -> None:
    """The link stays, and so do the mode and the owner of the file; a link to nowhere makes one."""
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "page"
    target.write_text("old")
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to("there/page")
    files.replace(link, CONTENT)
    assert link.is_symlink()
    assert target.read_bytes() == CONTENT
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    target.unlink()
    files.replace(link, CONTENT)
    assert (link.is_symlink(), target.read_bytes()) == (True, CONTENT)


def test_a_new_file_is_never_written_over(tmp_path: Path) -> None:
    """Nor is a link that leads to one, or to nowhere."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("nothing")
    for name in ("file", "link", "nowhere"):
        with pytest.raises(FileExistsError):
            _written(tmp_path / name, CONTENT)
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["file", "link", "nowhere"]


@contextlib.contextmanager
def _failing(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, *, of_directories: bool = False
) -> Iterator[None]:
    real = getattr(os, name)

    def fail(*arguments: object) -> object:
        if of_directories and not stat.S_ISDIR(os.fstat(arguments[0]).st_mode):  # type: ignore[arg-type]
            return real(*arguments)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        yield


@both
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_a_file_system_that_cannot_sync_a_directory_or_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None], number: int
) -> None:
    """Makes the file all the same, and says nothing against it."""
    with _failing(monkeypatch, "fsync", number, of_directories=True), _failing(monkeypatch, "link", number):
        write(tmp_path / "file", CONTENT)
        assert (tmp_path / "file").read_bytes() == CONTENT
        assert names(tmp_path) == ["file"]
        with pytest.raises(FileExistsError):
            _written(tmp_path / "file", CONTENT)


def _report(
    recording: Path, *words: str | Path, out: int | Path = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    command = [COMMAND, "report", recording, *words]
    if isinstance(out, Path):
        with out.open("wb") as file:
            return subprocess.run(command, stdout=file, stderr=subprocess.PIPE, check=False)
    return subprocess.run(command, stdout=out, stderr=subprocess.PIPE, check=False)


@pytest.mark.skipif(not COMMAND.exists(), reason="the command is not set up: make test")
def test_a_page_to_standard_output(recorded: Path, tmp_path: Path) -> None:  # noqa: F811
    """``-`` is that, and the page alone; /dev/stdout is it, too, behind the report, wherever it leads."""
    page = _report(recorded, "--html", "-")
    assert (page.returncode, page.stderr) == (3, b"")
    assert page.stdout.startswith(b"<!DOCTYPE html>")
    text = _report(recorded).stdout
    behind = _report(recorded, "--html", "/dev/stdout")
    assert behind.stdout == text + page.stdout
    into = _report(recorded, "--html", "/dev/stdout", out=tmp_path / "out")
    assert into.returncode == 3
    assert (tmp_path / "out").read_bytes() == text + page.stdout
    assert _report(recorded, "--html", "-", "--format", "json").returncode == 2
    assert names(tmp_path) == ["out"]
    assert Path("/dev/stdout").is_symlink()
