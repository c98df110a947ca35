"""Recordings on disk: whole, damaged in every way, on a disk that is full, and where nothing can be written."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.judge import judge
from probes.schema import EVENT, SCHEMA_VERSION, Kind
from tracer.errors import BadRecording
from tracer.loss import Loss, VcpuLoss
from tracer.recording import Recording, Writer

Events = npt.NDArray[np.void]

META: dict[str, Any] = {
    "schema": SCHEMA_VERSION,
    "host": "host",
    "kernel": "6.12.0",
    "engine": "tracepoint",
    "detail": "boundary",
    "requests": ["triple_fault"],
    "requests_by_bit": {"10": "triple_fault"},
    "clock": {"monotonic_ns": 0, "utc_ns": 0},
    "started_ns": 0,
    "plan": [],
    "guests": {},
    "ended_ns": None,
}
LOSS = Loss(ring_full=5, map_full=1, missed=2, not_written=3, vcpus={1: VcpuLoss(4, 10, 20), 0: VcpuLoss(1, 11, 11)})
SEGMENTS = 3
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs: sudo make test")


CHECKOUT = Path(__file__).resolve().parents[2]


def events_of(number: int, count: int = 23) -> Events:
    """Return the events of a segment: a vCPU that is created and seen again and again, and no request."""
    events = np.zeros(count, EVENT)
    events["time_ns"] = number * 1_000_000 + np.arange(count) * 1000
    events["since_ns"] = events["time_ns"] - 500
    events["seq"] = np.arange(1, count + 1) + (number - 1) * count
    events["vcpu"] = 1
    events["pid"] = events["tid"] = 4711
    events["kind"] = Kind.RUN_EXIT
    events["arg"] = 2
    if number == 1:
        events["kind"][0] = Kind.VCPU_NEW
        events["arg"][0], events["detail"][0] = 0, 1
    return events


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Return a recording of three segments that ended cleanly."""
    writer = Writer(tmp_path / "recording", META)
    for number in range(1, SEGMENTS + 1):
        writer.segment(events_of(number), Loss(), number * 1_000_000 + 999_999)
    writer.update(ended_ns=9_000_000, segments=writer.segments)
    return writer.path


def segment(recording: Path, number: int) -> Path:
    """Return the file of a segment."""
    return recording / f"segment-{number:06d}.parquet"


def read(path: Path) -> tuple[list[int | None], list[str]]:
    """Return how many events each segment gave (None: left out), and what was said of those left out."""
    recording = Recording.open(path)
    lengths = [None if one is None else len(one.events) for one in recording.segments()]
    return lengths, recording.left_out


# --- whole --------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Every bit of every event, the losses, and until when."""
    raw = np.random.default_rng(23).integers(0, 256, 1009 * EVENT.itemsize, dtype=np.uint8).view(EVENT)
    writer = Writer(tmp_path / "r", META)
    writer.segment(raw[:500], Loss(), 1)
    writer.segment(raw[:0], LOSS, 2)
    writer.segment(raw[500:], LOSS, 2**62)
    recording = Recording.open(tmp_path / "r")
    assert not recording.clean
    first, empty, last = recording.segments()
    assert first and empty and last
    assert first.events.tobytes() + last.events.tobytes() == raw.tobytes()
    assert [len(first.events), len(empty.events), len(last.events)] == [500, 0, 509]
    assert [first.loss, empty.loss, last.loss] == [Loss(), LOSS, LOSS]
    assert [first.until_ns, empty.until_ns, last.until_ns] == [1, 2, 2**62]
    assert (writer.segments, recording.left_out) == (3, [])
    assert writer.bytes == sum(path.stat().st_size for path in (tmp_path / "r").glob("*.parquet"))


def test_only_the_owner_may_read(recorded: Path) -> None:
    """Whatever the umask is; nothing temporary stays."""
    old = os.umask(0)
    try:
        writer = Writer(recorded.with_name("open"), META)
        writer.segment(events_of(1), Loss(), 1)
        writer.update(ended_ns=1)
    finally:
        os.umask(old)
    for directory in (recorded, writer.path):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    assert sorted(path.name for path in writer.path.iterdir()) == ["meta.json", "segment-000001.parquet"]


def test_any_parquet_reader_opens_a_segment(recorded: Path) -> None:
    """With the schema's columns, compressed by zstd."""
    file = pq.ParquetFile(segment(recorded, 1))
    assert file.schema_arrow.names == list(EVENT.names or ())
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    file.close()


WRITE = """
import sys
from pathlib import Path
import numpy as np
from probes.schema import EVENT
from tracer.loss import Loss
from tracer.recording import Writer

Writer(Path(sys.argv[1]), {}).segment(np.zeros(23, EVENT), Loss(), 1)
print(*sorted({"pandas", "pyarrow"} & sys.modules.keys()))
"""


def test_writing_needs_no_pandas(tmp_path: Path) -> None:
    """A tracer neither waits for it to be imported nor has its memory."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE, tmp_path / "r"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "pyarrow\n"


def test_meta_changes_are_whole(recorded: Path) -> None:
    """What was there before stays."""
    meta = json.loads((recorded / "meta.json").read_text())
    assert meta == {**META, "ended_ns": 9_000_000, "segments": SEGMENTS, "identity": meta["identity"]}
    assert Recording.open(recorded).clean


def test_where_nobody_says_where_to_the_next_name_is_taken(tmp_path: Path) -> None:
    """Two that begin in one second, and a third where both names are gone."""
    names = [tmp_path / name for name in ("r", "r-2")]
    assert [Writer(names[0], META, names[1:]).path for _ in range(2)] == names
    with pytest.raises(BadRecording, match="r-2 exists already"):
        Writer(names[0], META, names[1:])


def test_an_existing_directory_is_left_alone(recorded: Path, tmp_path: Path) -> None:
    """A recording, an empty directory, a file: nothing is written over."""
    before = {path.name: path.read_bytes() for path in recorded.iterdir()}
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for path in (recorded, tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(BadRecording, match=r"exists already.*-o"):
            Writer(path, META)
    assert {path.name: path.read_bytes() for path in recorded.iterdir()} == before
    assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"


# --- damaged ------------------------------------------------------------------------------------------------


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("not parquet\n" * 100)


def _foreign(path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2, 3]}), path)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _no_footer(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _newer(path: Path) -> None:
    table = pq.read_table(path)
    metadata = {**(table.schema.metadata or {}), b"kvmreq.schema": str(SCHEMA_VERSION + 1).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def _fewer_columns(path: Path) -> None:
    pq.write_table(pq.read_table(path).drop_columns(["cpu"]), path)


def _no_checksum(path: Path) -> None:
    table = pq.read_table(path)
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"kvmreq.crc32"}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def _fewer_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


@pytest.mark.parametrize(
    "damage",
    [
        *(_empty, _text, _foreign, _half, _no_footer, _zeros, _directory, _dangling, _newer, _fewer_columns),
        *(_no_checksum, _fewer_rows),
    ],
)
@pytest.mark.parametrize("number", [1, 2, SEGMENTS])
def test_a_damaged_segment_is_left_out_and_named(recorded: Path, damage: Callable[[Path], None], number: int) -> None:
    """In one line with a reason; the others are read, and the verdict knows."""
    damage(segment(recorded, number))
    lengths, left_out = read(recorded)
    assert lengths == [None if number == one else 23 for one in range(1, SEGMENTS + 1)]
    (line,) = left_out
    assert line.startswith(f"segment-{number:06d}.parquet: ")
    assert "\n" not in line
    assert len(line) > len("segment-000001.parquet: ")
    judgement = judge(Recording.open(recorded))
    assert judgement.left_out == left_out
    assert judgement.exit_status == 4


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ([1], ["segment 1 is missing"]),
        ([2], ["segment 2 is missing"]),
        ([1, 2], ["segments 1 to 2 are missing"]),
        ([3], ["segment 3 is missing"]),
        ([2, 3], ["segments 2 to 3 are missing"]),
        ([1, 2, 3], ["segments 1 to 3 are missing"]),
        ([1, 3], ["segment 1 is missing", "segment 3 is missing"]),
    ],
)
def test_missing_segments_are_named(recorded: Path, gone: list[int], said: list[str]) -> None:
    """The last ones too: a recording that ended cleanly says how many it has."""
    for number in gone:
        segment(recorded, number).unlink()
    lengths, left_out = read(recorded)
    assert left_out == said
    assert lengths.count(None) == len(said)
    assert lengths.count(23) == SEGMENTS - len(gone)
    assert judge(Recording.open(recorded)).exit_status == 4


@pytest.mark.parametrize(
    ("untried", "events", "status"),
    [(None, 0, 0), ("/dev/kvm is missing", 0, 4), ("/dev/kvm is missing", 23, 0)],
)
def test_an_empty_recording_without_a_canary_is_no_all_clear(
    tmp_path: Path, untried: str | None, events: int, status: int
) -> None:
    """Hooks that see nothing leave the same: an event, whoever's, shows that they see."""
    writer = Writer(tmp_path / "recording", {**META, "untried": untried})
    writer.segment(events_of(1, events) if events else np.zeros(0, EVENT), Loss(), 1_999_999)
    writer.update(ended_ns=9_000_000, segments=writer.segments)
    assert judge(Recording.open(writer.path)).exit_status == status


@pytest.mark.parametrize("name", ["web01:tue", "~", "bad\udcff", "file:x", "s3:", "%41", "a\nb"])
def test_any_name_of_a_directory_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No library takes it for a URI, a home, or a text that it must be able to encode."""
    monkeypatch.chdir(tmp_path)
    writer = Writer(Path(name), META)
    writer.segment(events_of(1), Loss(), 1)
    assert writer.bytes == (tmp_path / name / "segment-000001.parquet").stat().st_size
    assert read(Path(name)) == ([23], [])
    assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [os.fsencode(name)]


@pytest.mark.parametrize(
    ("produced", "ended_ns", "unaccounted", "status"),
    [(23, 9_000_000, 0, 0), (31, 9_000_000, 8, 4), (23, None, 0, 4)],
)
def test_what_was_produced_is_in_it_or_it_is_no_all_clear(
    tmp_path: Path, produced: int, ended_ns: int | None, unaccounted: int, status: int
) -> None:
    """Nor is a recording without an end: what came after its last segment, nobody knows."""
    writer = Writer(tmp_path / "recording", META)
    writer.segment(events_of(1), Loss(), 1_999_999)
    writer.update(ended_ns=ended_ns, segments=writer.segments, counters={"produced": produced})
    judgement = judge(Recording.open(writer.path))
    assert (judgement.unaccounted, judgement.exit_status) == (unaccounted, status)
    assert judgement.until_ns == 1_999_999


def test_vcpus_that_did_not_answer_are_a_loss(tmp_path: Path) -> None:
    """No verdict hangs on them, for they are in none."""
    loss = Loss(unanswered=3)
    writer = Writer(tmp_path / "recording", META)
    writer.segment(events_of(1), loss, 1_999_999)
    writer.update(ended_ns=9_000_000, segments=writer.segments)
    judgement = judge(Recording.open(writer.path))
    assert (judgement.exit_status, judgement.loss, loss.blind) == (4, loss, 0)


def test_a_temporary_file_of_a_crash_is_no_segment(recorded: Path) -> None:
    """Nor is anything else that lies there."""
    (recorded / ".segment-000004.parquet.tmp").write_bytes(b"half a segm")
    (recorded / "report.html").write_text("")
    assert read(recorded) == ([23] * SEGMENTS, [])


def test_every_flipped_bit_is_found_or_harmless(recorded: Path) -> None:
    """At random places: the segment is left out and named, or it reads as it was written. Never an exception."""
    whole = [one for one in Recording.open(recorded).segments() if one]
    path = segment(recorded, 2)
    raw = path.read_bytes()
    chance = random.Random(23)
    found = 0
    for _ in range(400):
        damaged = bytearray(raw)
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            damaged[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        recording = Recording.open(recorded)
        first, second, third = recording.segments()
        assert first and third
        if second is None:
            found += 1
            assert [line.partition(":")[0] for line in recording.left_out] == [path.name]
        else:
            assert recording.left_out == []
            assert second.events.tobytes() == whole[1].events.tobytes()
            assert (second.loss, second.until_ns) == (whole[1].loss, whole[1].until_ns)
    assert found > 200


def test_a_segment_that_is_cut_anywhere_is_found(recorded: Path) -> None:
    """As a disk that filled up or a copy that broke off leaves it."""
    path = segment(recorded, 2)
    raw = path.read_bytes()
    for length in range(0, len(raw), 97):
        path.write_bytes(raw[:length])
        assert read(recorded)[0] == [23, None, 23]


def _bad_meta(text: str | bytes) -> Callable[[Path], None]:
    def damage(recording: Path) -> None:
        (recording / "meta.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "meta.json").unlink(), "no recording: it has no meta.json"),
        (_bad_meta(""), "is damaged"),
        (_bad_meta('{"schema": 1, "ho'), "is damaged"),
        (_bad_meta(b"\xff\xfe\x00"), "is damaged"),
        (_bad_meta("[" * 100_000), "is damaged"),
        (_bad_meta("[]"), "names no schema"),
        (_bad_meta("{}"), "names no schema"),
        (_bad_meta('{"schema": "1"}'), "names no schema"),
        (_bad_meta('{"schema": 1}'), "missing required field `host`"),
        (_bad_meta(json.dumps({**META, "requests_by_bit": []})), r"got `array` - at `\$\.requests_by_bit`"),
        (_bad_meta(json.dumps({**META, "started_ns": "x"})), r"got `str` - at `\$\.started_ns`"),
        (_bad_meta('{"schema": 999}'), f"has schema 999, this kvmreq reads up to {SCHEMA_VERSION}"),
    ],
)
def test_a_bad_meta_is_one_error(recorded: Path, damage: Callable[[Path], None], said: str) -> None:
    """What, why, and what to do."""
    damage(recorded)
    with pytest.raises(BadRecording, match=said) as failure:
        Recording.open(recorded)
    assert str(failure.value).endswith(")")
    assert str(recorded) in str(failure.value)


def test_what_is_no_recording_is_one_error(tmp_path: Path) -> None:
    """Nothing there, a file, a directory of another kind."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRecording, match="no recording at"):
        Recording.open(tmp_path / "nothing")
    with pytest.raises(BadRecording, match="is a file, a recording is a directory"):
        Recording.open(tmp_path / "file")
    with pytest.raises(BadRecording, match=r"it has no meta\.json"):
        Recording.open(tmp_path)


# --- disks --------------------------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return what mounts a tmpfs with some options; it is gone after the test."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        path = tmp_path / f"tmpfs{len(mounted)}"
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "kvmreq-test", path], check=True)
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", path], check=True)


@needs_root
def test_a_disk_that_fills_up_leaves_what_was_written(mount: Callable[[str], Path]) -> None:
    """One error that says so; the rest is whole and no rubbish lies about."""
    writer = Writer(mount("size=256k") / "r", META)
    noise = np.random.default_rng(23)
    written = 0
    with pytest.raises(BadRecording, match=r"No space left on device \(make room.*; what was written before is whole"):
        while written < 1000:
            raw = noise.integers(0, 256, 500 * EVENT.itemsize, dtype=np.uint8).view(EVENT)
            writer.segment(raw, Loss(), written)
            written += 1
    assert 2 < written < 20
    assert read(writer.path) == ([500] * written, [])
    assert not Recording.open(writer.path).clean
    assert not list(writer.path.glob(".*"))


@needs_root
def test_a_disk_that_is_full_from_the_start_is_one_error(mount: Callable[[str], Path]) -> None:
    """There is no recording then, and nothing in the way of the next one."""
    full = mount("size=64k")
    with pytest.raises(OSError, match="No space left"), (full / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()
    with pytest.raises(BadRecording, match="No space left on device"):
        Writer(full / "r", META)
    assert not (full / "r").exists()


@needs_root
def test_where_nothing_can_be_written_is_one_error(mount: Callable[[str], Path]) -> None:
    """Before anything is traced."""
    with pytest.raises(BadRecording, match=r"cannot be created: Read-only file system \(.*-o\)"):
        Writer(mount("ro") / "r", META)


def test_a_directory_in_nowhere_is_one_error(tmp_path: Path) -> None:
    """Parents are not made: a typing error would become a directory."""
    with pytest.raises(BadRecording, match="cannot be created: No such file or directory"):
        Writer(tmp_path / "no" / "where", META)


def test_a_directory_that_vanishes_is_one_error(recorded: Path) -> None:
    """While it is being recorded into."""
    writer = Writer(recorded.with_name("gone"), META)
    shutil.rmtree(writer.path)
    with pytest.raises(BadRecording, match="cannot be written: No such file or directory"):
        writer.segment(events_of(1), Loss(), 1)
