"""`kvmreq export`: one file for its owner alone, whole or not at all, and the same events that were recorded."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from command.main import main
from probes.schema import EVENT, PAYLOAD_PENDING, SCHEMA_VERSION, VALID_TRIPLE_FAULT, End, Flag, Kind, Site
from reports import events as lines
from reports import export
from tracer.errors import CannotExport
from tracer.loss import Loss, VcpuLoss
from tracer.recording import Recording, Writer, from_arrow

META: dict[str, Any] = {
    "schema": SCHEMA_VERSION,
    "host": "höst",
    "kernel": "6.12.0",
    "engine": "tracepoint",
    "detail": "boundary",
    "requests": ["triple_fault", "nmi"],
    "requests_by_bit": {"10": "triple_fault", "17": "nmi,\n"},
    "clock": {"monotonic_ns": 1_000, "utc_ns": 1_795_000_000_000_000_000},
    "started_ns": 500,
    "plan": [],
    "guests": {},
    "ended_ns": None,
    "formats": {
        "kvm_exit": '(REC->isa == 1) ? __print_symbolic(REC->exit_reason, { 48, "EPT_VIOLATION" })'
        ' : __print_symbolic(REC->exit_reason, { 0x400, "npf" })'
    },
}
CHECKOUT = Path(__file__).resolve().parents[2]
LOSS = Loss(ring_full=5, missed=2, vcpus={1: VcpuLoss(5, 10, 20)})
GET_EVENTS, EINTR = 0x8040AE9F, (2**32 - 4) << 32
# One event of each kind, with what its arg and detail mean.
MEANT: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"kind": Kind.VCPU_NEW, "arg": 3, "detail": 7, "flags": 9},
     {"vm": 7, "vcpu_id": 3, "flags": ["created", "cap_exists"]}),
    ({"kind": Kind.VCPU_END, "arg": End.REUSED}, {"end": "reused"}),
    ({"kind": Kind.VMM_EXIT, "arg": End.EXITED, "vcpu": 0}, {"end": "exited"}),
    ({"kind": Kind.VM_CAP, "arg": 1, "detail": 7, "vcpu": 0}, {"vm": 7, "cap": 1}),
    ({"kind": Kind.IOCTL_ENTER, "arg": 0x4040AE9E}, {"ioctl": "X86_SET_MCE"}),
    ({"kind": Kind.IOCTL_EXIT, "arg": 0xAEFF | EINTR}, {"ioctl": "0xaeff", "errno": 4}),
    ({"kind": Kind.SAVE, "arg": GET_EVENTS, "detail": 0x25, "requests": 1 << 10, "before": 1 << 10 | 1 << 17 | 1 << 3},
     {"ioctl": "GET_VCPU_EVENTS", "errno": 0, "payload_flags": 0x25, "payload_pending": 0,
      "requests": ["triple_fault"], "before": ["bit_3", "triple_fault", "nmi__"]}),
    ({"kind": Kind.RESTORE, "arg": 0x4040AEA0, "detail": VALID_TRIPLE_FAULT | PAYLOAD_PENDING},
     {"ioctl": "SET_VCPU_EVENTS", "errno": 0, "payload_flags": 0x20, "payload_pending": 1}),
    ({"kind": Kind.RUN_ENTER, "arg": 0xAE80}, {"ioctl": "RUN"}),
    ({"kind": Kind.RUN_EXIT, "arg": 10 | EINTR}, {"exit_reason": "INTR", "errno": 4}),
    ({"kind": Kind.RESET}, {}),
    ({"kind": Kind.RESET, "arg": 0x4138AE84}, {"ioctl": "SET_SREGS"}),
    ({"kind": Kind.SITE, "arg": Site.RSM, "flags": Flag.NESTED}, {"site": "rsm", "flags": ["nested"]}),
    ({"kind": Kind.GUEST_ENTRY}, {}),
    ({"kind": Kind.GUEST_EXIT, "arg": 48}, {"hardware_exit": 48}),
    ({"kind": Kind.GUEST_EXIT, "arg": 48, "detail": 1}, {"hardware_exit": 48, "hardware_exit_name": "EPT_VIOLATION"}),
    ({"kind": Kind.GUEST_EXIT, "arg": 48, "detail": 2}, {"hardware_exit": 48}),
    ({"kind": Kind.GUEST_EXIT, "arg": 0x400, "detail": 2}, {"hardware_exit": 0x400, "hardware_exit_name": "npf"}),
    ({"kind": Kind.WAKEUP, "arg": 2_300, "detail": 1}, {"blocked_ns": 2_300, "slept": 1}),
    ({"kind": Kind.KICK, "seq": 0, "detail": 1, "requests": 1 << 10, "before": 1 << 10},
     {"mode": "in_guest_mode", "requests": ["triple_fault"], "before": ["triple_fault"]}),
    ({"kind": Kind.KICK, "seq": 0, "detail": 9}, {"mode": "9"}),
    ({"kind": Kind.REQUEST_ALL, "vcpu": 0, "seq": 0, "arg": 17 | 1 << 9, "detail": 7, "requests": 2**64 - 1},
     {"vm": 7, "request": "nmi__", "request_flags": ["wait"], "targets": ["all"]}),
    ({"kind": Kind.REQUEST_ALL_END, "vcpu": 0, "seq": 0, "arg": 0 | 1 << 8 | 1 << 10, "detail": 7, "requests": 5},
     {"vm": 7, "request": "outside_guest_mode", "request_flags": ["no_wakeup", "no_action"], "targets": [0, 2]}),
    ({"kind": Kind.IN_GUEST_STILL, "seq": 0, "arg": 17 | 1 << 9, "detail": 2, "requests": 1 << 17},
     {"request": "nmi__", "request_flags": ["wait"], "mode": "exiting_guest_mode", "requests": ["nmi__"]}),
]  # fmt: skip


def some() -> Any:
    """Return one event of each kind."""
    events = np.zeros(len(MEANT), EVENT)
    events["time_ns"] = 2_000 + 100 * np.arange(len(events))
    events["since_ns"][1:] = events["time_ns"][:-1]
    events["seq"], events["vcpu"], events["pid"], events["tid"], events["cpu"] = range(1, len(events) + 1), 1, 11, 12, 3
    for place, (values, _) in enumerate(MEANT):
        for name, value in values.items():
            events[name][place] = value
    return events


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Return a recording of three segments, the second one with a loss."""
    writer = Writer(tmp_path / "r", META)
    events = some()
    writer.segment(events[:7], Loss(), 2_650)
    writer.segment(events[7:11], LOSS, 3_050)
    writer.segment(events[11:], LOSS, 4_000)
    writer.update(ended_ns=5_000, segments=3)
    return writer.path


def names(folder: Path) -> list[str]:
    """Return what is in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run the command; return its status, its output and its notes."""
    try:
        status = main(["export", *map(str, arguments)])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    captured = capfd.readouterr()
    return status, captured.out, captured.err


# --- what is in the files -----------------------------------------------------------------------------------


def expected() -> list[dict[str, Any]]:
    """Return the events as objects, written out from what each kind means."""
    rows = []
    for event, (values, meant) in zip(some(), MEANT, strict=True):
        common = {name: int(event[name]) for name in ("time_ns", "since_ns", "vcpu", "seq", "pid", "tid", "cpu")}
        common["utc_ns"] = common["time_ns"] - 1_000 + 1_795_000_000_000_000_000
        kind = Kind(values["kind"])
        words: dict[str, Any] = {"requests": [], "before": []}
        if kind in (Kind.REQUEST_ALL, Kind.REQUEST_ALL_END):
            words = {}  # `requests` holds vCPUs there
        rows.append({**common, "kind": kind.name.lower(), **words, "flags": [], **meant})
    return rows


@pytest.mark.parametrize("chunk", [1 << 17, 2])
def test_json_has_an_object_for_each_event(
    recorded: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Each kind has exactly the keys that mean something for it, in the documented order."""
    monkeypatch.setattr(lines, "_CHUNK", chunk)
    status, out, err = run(capfd, recorded, "--to", "json")
    assert (status, err) == (0, "")
    read = [json.loads(line) for line in out.splitlines()]
    assert read == expected()
    for row in read:
        assert list(row) == [name for name in lines.COLUMNS if name in row]


def test_csv_has_a_line_for_each_event(recorded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the documented columns; what means nothing is empty, and lists are joined."""
    status, out, err = run(capfd, recorded, "--to", "csv", "-o", "-")
    assert (status, err) == (0, "")
    read = list(csv.DictReader(io.StringIO(out)))
    assert list(read[0]) == list(lines.COLUMNS)
    words = [
        {name: "|".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in row.items()}
        for row in expected()
    ]
    assert read == [dict.fromkeys(lines.COLUMNS, "") | row for row in words]


def test_every_column_is_documented() -> None:
    """The page has the columns as they are written, with what they hold."""
    page = (CHECKOUT / "docs/export.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows == [f"| {name} | {meaning} |" for name, meaning in lines.COLUMNS.items()]


def test_parquet_holds_the_whole_recording(recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every event as it was recorded, meta.json, losses; zstd and page checksums."""
    path = tmp_path / "one.parquet"
    assert run(capfd, recorded, "--to", "parquet", "-o", path) == (0, "", f"kvmreq: {path} written\n")
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        assert (from_arrow(file.read()) == some()).all()
        assert file.metadata.num_row_groups == 1
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        told = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
    assert json.loads(told["kvmreq.meta"]) == json.loads((recorded / "meta.json").read_text())
    assert Loss.from_json(json.loads(told["kvmreq.loss"])) == LOSS
    assert json.loads(told["kvmreq.losses"]) == [[3_050, 7]]
    assert json.loads(told["kvmreq.left_out"]) == []
    content = bytearray(path.read_bytes())
    place = content.index(b"\x28\xb5\x2f\xfd") + 6  # inside the first page: behind zstd's magic number
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        file.read()


def test_parquet_is_written_in_groups(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small segments share a group of rows; no group grows beyond its size."""
    monkeypatch.setattr(export, "_ROWS", 10)
    monkeypatch.setattr(export, "_PARTS", 2)
    path = tmp_path / "one.parquet"
    with export.new_file(path) as out:
        export.export(Recording.open(recorded), "parquet", out)
    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        assert sizes == [10, 1, 10, 3]
        assert (from_arrow(file.read()) == some()).all()


@pytest.mark.parametrize("style", export.FORMATS)
def test_an_empty_recording_can_be_exported(tmp_path: Path, style: str) -> None:
    """Nothing happened: the file is there, and says so."""
    writer = Writer(tmp_path / "r", META)
    writer.update(ended_ns=600, segments=0)
    with export.new_file(tmp_path / "out") as out:
        export.export(Recording.open(writer.path), style, out)
    content = (tmp_path / "out").read_bytes()
    if style == "parquet":
        with pq.ParquetFile(tmp_path / "out") as file:
            assert file.metadata.num_rows == 0
    else:
        assert content.count(b"\n") == {"csv": 1, "json": 0, "perfetto": content.count(b"\n")}[style]
        assert bool(content) == (style != "json")


# --- the file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", export.FORMATS)
def test_the_file_is_the_owners_alone_and_new(
    recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], style: str
) -> None:
    """A second export into it is an error in one line, and changes nothing."""
    path = tmp_path / "out"
    arguments = (recorded, "--to", style, "-o", path)
    assert run(capfd, *arguments)[0] == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    status, out, err = run(capfd, *arguments)
    assert (status, out) == (1, "")
    assert err == f"kvmreq: {path} exists already (nothing is written over: name another file with -o)\n"
    assert path.read_bytes() == content
    assert names(tmp_path) == ["out", "r"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    """Somebody else's file of that name is not replaced at the end either."""
    path = tmp_path / "out"
    with pytest.raises(CannotExport, match="exists already"), export.new_file(path) as out:
        out.write(b"ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    """Ctrl-C, too."""
    with pytest.raises(error), export.new_file(tmp_path / "out") as out:
        out.write(b"half")
        raise error
    assert not names(tmp_path)


@pytest.mark.parametrize("where", ["missing/out", "r/meta.json/out"])
def test_a_place_that_cannot_be_written(
    recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], where: str
) -> None:
    """One line that says what, why and what to do."""
    status, out, err = run(capfd, recorded, "--to", "csv", "-o", tmp_path / where)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "cannot be written: " in err and "name a file with -o" in err


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """Return a file system with room for one page."""
    path = tmp_path / "tiny"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "kvmreq-test", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs: sudo make test")
@pytest.mark.parametrize("style", export.FORMATS)
def test_a_full_disk_leaves_nothing(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], style: str) -> None:
    """The half that fits is taken away again."""
    writer = Writer(tmp_path / "r", META)
    events = np.tile(some(), 700)
    events["time_ns"] = np.random.default_rng(7).integers(1 << 40, size=len(events))
    writer.segment(events, Loss(), 2_650)
    status, out, err = run(capfd, writer.path, "--to", style, "-o", tiny / "out")
    assert (status, out) == (1, "")
    assert err.startswith(f"kvmreq: {tiny}/out cannot be written: No space left on device (nothing was left behind")
    assert len(err.splitlines()) == 1
    assert not names(tiny)


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["perfetto", "parquet"])
def test_binary_formats_need_a_file(recorded: Path, capfd: pytest.CaptureFixture[str], style: str) -> None:
    """Standard output is for text: wrong usage."""
    for more in ((), ("-o", "-")):
        status, out, err = run(capfd, recorded, "--to", style, *more)
        assert (status, out) == (2, "")
        assert err.endswith(f"kvmreq export: error: --to {style} needs -o FILE\n")


@pytest.mark.parametrize("style", export.FORMATS)
def test_damaged_segments_are_named(
    recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], style: str
) -> None:
    """What can be read is exported, what is left out is told, and the status is 1."""
    damaged = recorded / "segment-000002.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    path = tmp_path / "out"
    status, out, err = run(capfd, recorded, "--to", style, "-o", path)
    assert (status, out) == (1, "")
    first, second = err.splitlines()
    assert first == f"kvmreq: {path} written"
    assert second.startswith(f"kvmreq: {damaged}: ")
    assert "left out" in second
    if style == "json":
        assert [json.loads(line) for line in path.read_text().splitlines()] == expected()[:7] + expected()[11:]
    elif style == "parquet":
        told = pq.read_metadata(path).metadata or {}
        assert json.loads(told[b"kvmreq.left_out"])[0].startswith("segment-000002.parquet: ")


def test_a_recording_that_was_killed_is_said_to_be_so(recorded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As by `report`; what there is, is whole."""
    meta = json.loads((recorded / "meta.json").read_text())
    (recorded / "meta.json").write_text(json.dumps(meta | {"ended_ns": None}))
    status, out, err = run(capfd, recorded, "--to", "json")
    assert (status, out.count("\n")) == (0, len(MEANT))
    assert err == f"kvmreq: {recorded} did not end cleanly: what came after its last segment is not in it\n"


def test_no_recording(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is created."""
    status, out, err = run(capfd, tmp_path, "--to", "parquet", "-o", tmp_path / "out")
    assert (status, out) == (1, "")
    assert err.startswith(f"kvmreq: {tmp_path} is no recording")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_a_reader_that_goes_away(recorded: Path, unbuffered: list[str]) -> None:
    """`| head -1` is no error to speak of, and no success."""
    writer = Writer(recorded.parent / "long", META)
    writer.segment(np.tile(some(), 7_000), Loss(), 2_650)
    writer.update(ended_ns=5_000, segments=1)
    command = [sys.executable, *unbuffered, "-m", "command", "export", str(writer.path), "--to", "json"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith(b'{"time_ns": 2000, ')
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
