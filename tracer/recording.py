"""Recordings: a directory of numbered Parquet segments and a meta.json.

Every file is written under another name, synced and renamed, so that a crash of the tracer or of the host costs at
most the open interval. Losses travel with each segment, as totals since the recording began. Only the owner can read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from probes.schema import EVENT, SCHEMA_VERSION, arrow_schema
from tracer import meta
from tracer.errors import BadRecording
from tracer.files import sync_directory
from tracer.loss import Loss

if TYPE_CHECKING:
    import pyarrow as pa

_META = "meta.json"
_SEGMENT = re.compile(r"segment-(\d{6,})\.parquet")
# Written whole, so that page checksums and the rename decide together whether a segment counts.
_DELTA = {"time_ns": "DELTA_BINARY_PACKED", "since_ns": "DELTA_BINARY_PACKED", "seq": "DELTA_BINARY_PACKED"}
_KEY_VERSION, _KEY_LOSS, _KEY_UNTIL = b"kvmreq.schema", b"kvmreq.loss", b"kvmreq.until_ns"
_KEY_IDENTITY = b"kvmreq.identity"
_KEYS = (_KEY_VERSION, _KEY_LOSS, _KEY_UNTIL, _KEY_IDENTITY)  # the last one came later than the others
# Of what the page checksums do not cover: the footer's own words.
_KEY_SUM = b"kvmreq.crc32"
# Of so many events every field is filled in before the next ones: a field at a time, each would fetch all memory again.
_IN_CACHE = 1 << 14


def to_arrow(events: npt.NDArray[np.void]) -> pa.Table:
    """Return events as the Arrow table that a segment holds."""
    import pyarrow as pa

    schema = arrow_schema()
    # From buffers: to convert an array, pyarrow imports pandas, and a tracer needs none of it.
    arrays: list[Any] = [np.ascontiguousarray(events[name]) for name in schema.names]
    columns = [
        pa.Array.from_buffers(field.type, len(events), [None, pa.py_buffer(array)])
        for field, array in zip(schema, arrays, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def columns(table: pa.Table) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of an event: views of the table where it holds a column in one piece."""
    return {name: table[name].to_numpy() for name in EVENT.names or ()}


def records(table: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.void]:
    """Return the events of these columns, as records."""
    made = np.empty(len(table["kind"]), EVENT)
    for begin in range(0, len(made), _IN_CACHE):
        part = made[begin : begin + _IN_CACHE]
        for name in EVENT.names or ():
            part[name] = table[name][begin : begin + _IN_CACHE]
    return made


def from_arrow(table: pa.Table) -> npt.NDArray[np.void]:
    """Return the events of a table that :func:`to_arrow` made."""
    return records(columns(table))


def _checksum(*words: str | int) -> str:
    return f"{zlib.crc32(json.dumps(words).encode()):08x}"


def _damaged(path: Path, error: Exception) -> BadRecording:
    return BadRecording(f"{path}/{_META} is damaged: {error}", hint="restore it from a copy")


def _owners(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _made(path: Path, *spare: Path) -> Path:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if spare:
            return _made(*spare)
        raise BadRecording(
            f"{path} exists already", hint="a recording is never written over: name another directory with -o"
        ) from None
    except OSError as error:
        raise BadRecording(
            f"{path} cannot be created: {_reason(error)}", hint="name a directory that can be written with -o"
        ) from error
    return path


class Writer:
    """A recording that is being made.

    Raises :class:`BadRecording` when the directory exists or cannot be written. ``meta`` is written at once and again
    whenever it changes. ``spare``: directories to take instead, in their order, where the one before exists.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any], spare: Sequence[Path] = ()) -> None:
        self.path = _made(path, *spare)
        self._meta = {"identity": uuid.uuid4().hex, **meta}
        self.segments = 0
        self.bytes = 0
        try:
            self.update()
        except BadRecording:
            self.path.rmdir()
            raise

    def update(self, **changes: Any) -> None:
        """Change the recording's meta.json."""
        self._meta |= changes
        text = json.dumps(self._meta, indent=1) + "\n"
        self._write(_META, lambda file: file.write(text.encode()))

    def _write(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        # Who fills it is given an open file: to a library a user's path may be a URI, a home, or no text.
        temporary = self.path / f".{name}.tmp"
        try:
            with open(temporary, "wb", opener=_owners) as file:  # Path.open takes no opener
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.path / name)
            sync_directory(self.path)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise BadRecording(
                f"{self.path}/{name} cannot be written: {_reason(error)}",
                hint="make room or name another directory with -o; what was written before is whole"
                if full
                else "what was written before is whole",
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def segment(self, events: npt.NDArray[np.void], loss: Loss, until_ns: int) -> None:
        """Add a segment: all events until ``until_ns`` that no segment before it holds."""
        import pyarrow.parquet as pq

        table = to_arrow(events)
        words = (str(SCHEMA_VERSION), json.dumps(loss.as_json()), str(until_ns), self._meta["identity"])
        table = table.replace_schema_metadata(
            {**dict(zip(_KEYS, words, strict=True)), _KEY_SUM: _checksum(*words, len(events))}
        )
        dictionary: Any = [name for name in table.column_names if name not in _DELTA]

        def fill(file: BinaryIO) -> None:
            pq.write_table(
                table,
                file,
                compression="zstd",
                use_dictionary=dictionary,
                column_encoding=_DELTA,
                write_page_checksum=True,
                write_statistics=False,
            )
            self.bytes += file.tell()

        self._write(f"segment-{self.segments + 1:06d}.parquet", fill)
        self.segments += 1


@contextlib.contextmanager
def _given_back() -> Iterator[None]:
    """At the end give back the memory that segments were read into: pyarrow and the C library keep much of it."""
    import ctypes

    import pyarrow as pa

    try:
        yield
    finally:
        pa.default_memory_pool().release_unused()
        with contextlib.suppress(OSError, AttributeError):  # a C library that is not glibc
            ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Segment:
    """A part of a recording: its events, and what had been lost when it ended."""

    name: str
    columns: Mapping[str, npt.NDArray[Any]]  # by the names of EVENT
    loss: Loss
    until_ns: int

    @cached_property
    def events(self) -> npt.NDArray[np.void]:
        """The events as records, for those who want them whole."""
        return records(self.columns)


@dataclass
class Recording:
    """A recording that is being read. ``left_out`` names each segment that could not be, and why."""

    path: Path
    meta: meta.Meta
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> Recording:
        """Open a recording.

        Raises :class:`BadRecording` when there is none, or when it was made by a newer kvmreq.
        """
        hint = "name a directory that `kvmreq record` made"
        try:
            parsed = meta.parse((path / _META).read_bytes())
        except FileNotFoundError:
            what = f"{path} is no recording: it has no {_META}" if path.is_dir() else f"no recording at {path}"
            raise BadRecording(what, hint=hint) from None
        except NotADirectoryError:
            raise BadRecording(f"{path} is a file, a recording is a directory", hint=hint) from None
        except OSError as error:
            raise BadRecording(f"{path}/{_META} cannot be read: {_reason(error)}", hint="run as its owner") from error
        except (ValueError, RecursionError) as error:
            raise _damaged(path, error) from error
        if not isinstance(parsed, dict) or type(parsed.get("schema")) is not int:
            raise BadRecording(f"{path}/{_META} is not kvmreq's: it names no schema", hint=hint)
        if parsed["schema"] > SCHEMA_VERSION:
            raise BadRecording(
                f"{path} has schema {parsed['schema']}, this kvmreq reads up to {SCHEMA_VERSION}",
                hint="read it with the kvmreq that made it, or a newer one",
            )
        try:
            return cls(path, meta.checked(parsed))
        except ValueError as error:
            raise _damaged(path, error) from error

    @property
    def clean(self) -> bool:
        """Tell whether the recorder came to its end; if not, what happened after the last segment is unknown."""
        return self.meta.get("ended_ns") is not None

    def segments(self) -> Iterator[Segment | None]:
        """Yield the segments in order, and None where one is missing or cannot be read."""
        self.left_out.clear()
        numbered = sorted(
            (int(found[1]), path) for path in self.path.iterdir() if (found := _SEGMENT.fullmatch(path.name))
        )
        expected = 1
        # The next one is read while this one is being analysed.
        with _given_back(), ThreadPoolExecutor(1) as ahead:
            coming = deque(ahead.submit(self._segment, path) for _, path in numbered[:1])
            for place, (number, path) in enumerate(numbered):
                if number != expected:
                    self._miss(expected, number - 1)
                    yield None
                expected = number + 1
                coming.extend(ahead.submit(self._segment, after) for _, after in numbered[place + 1 : place + 2])
                try:
                    segment = coming.popleft().result()
                except Exception as error:
                    # A damaged file can make pyarrow raise anything, NotImplementedError too; the first line says it.
                    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                    self.left_out.append(f"{path.name}: {reason}")
                    yield None
                else:
                    yield segment
        written = self.meta.get("segments")
        if isinstance(written, int) and written >= expected:
            self._miss(expected, written)
            yield None

    def _miss(self, first: int, last: int) -> None:
        which = f"segment {first} is" if first == last else f"segments {first} to {last} are"
        self.left_out.append(f"{which} missing")

    def _segment(self, path: Path) -> Segment:
        import pyarrow.parquet as pq

        if not path.stat().st_size:
            raise ValueError("the file is empty")
        with path.open("rb") as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            if _KEY_VERSION not in metadata:
                raise ValueError("not a segment of kvmreq")
            if int(metadata[_KEY_VERSION]) > SCHEMA_VERSION:
                raise ValueError(f"it has schema {int(metadata[_KEY_VERSION])}, this kvmreq reads {SCHEMA_VERSION}")
            if not file.schema_arrow.remove_metadata().equals(arrow_schema().remove_metadata()):
                raise ValueError("its columns are not those of an event")
            table = file.read()
        words = [metadata[key].decode() for key in _KEYS if key in metadata]
        if metadata.get(_KEY_SUM, b"").decode() != _checksum(*words, table.num_rows) or len(words) < len(_KEYS) - 1:
            raise ValueError("its footer is damaged")
        _, lost, until, *identity = words
        if identity != [self.meta["identity"]] if "identity" in self.meta else identity:
            raise ValueError("it is of another recording")
        loss = Loss.from_json(json.loads(lost))
        return Segment(path.name, columns(table), loss, int(until))
