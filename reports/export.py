"""A recording as one file for other tools: Parquet, CSV, JSON lines or a Perfetto trace.

Read and written segment by segment, so memory does not grow with the recording. A file appears under its name when all
of it is on the disk, for its owner alone, and never in place of another one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from probes.schema import SCHEMA_VERSION, arrow_schema
from reports.words import Clock
from tracer import files
from tracer.errors import CannotExport
from tracer.loss import Loss

if TYPE_CHECKING:
    from tracer.recording import Recording, Segment

#: What can be made, and whether it can also go to standard output.
FORMATS = {"perfetto": False, "parquet": False, "csv": True, "json": True}

# Rows of a row group of Parquet: segments of a quiet host are joined until there are so many.
_ROWS = 1 << 20
_PARTS = 256


class _Sink(Protocol):
    def write(self, data: Any, /) -> Any: ...


def export(recording: Recording, style: str, out: _Sink) -> None:
    """Write a recording in one of :data:`FORMATS`. What could not be read is in ``recording.left_out``."""
    if style == "perfetto":
        from reports import perfetto

        for part in perfetto.trace(recording):
            out.write(part)
    elif style == "parquet":
        _write_parquet(recording, out)
    else:
        from reports import events

        names = {int(bit): str(name) for bit, name in recording.meta["requests_by_bit"].items()}
        exits = events.hardware_exits(recording.meta)
        text = {"csv": events.csv, "json": events.jsonl}[style]
        batches = (segment.events for segment in _present(recording))
        for lines in text(batches, names, Clock.of(recording.meta), exits):
            out.write(lines)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that gets its name when the block has ended well, and vanishes otherwise; see tracer.files.new.

    Raises :class:`CannotExport` where there is something of that name already, or the file cannot be written.
    """
    try:
        with files.new(path) as file:
            yield file
    except FileExistsError:
        raise CannotExport(
            f"{path} exists already", hint="nothing is written over: name another file with -o"
        ) from None
    except OSError as error:
        raise CannotExport(
            f"{path} cannot be written: {os.strerror(error.errno) if error.errno else error}",
            hint="nothing was left behind; name a file with -o where there is room and you may write",
        ) from error


def _write_parquet(recording: Recording, out: Any) -> None:
    """Write all events with the columns of a segment.

    The file's key-value metadata hold ``kvmreq.meta`` (the recording's meta.json), ``kvmreq.loss`` (what was lost in
    all), ``kvmreq.losses`` (JSON: ``[until_ns, total so far]`` wherever that grew) and ``kvmreq.left_out``.
    """
    import pyarrow.parquet as pq

    from tracer.recording import to_arrow

    loss = Loss()
    grown: list[list[int]] = []
    held: list[npt.NDArray[np.void]] = []
    delta = ("time_ns", "since_ns", "seq")
    schema = arrow_schema()
    dictionary: Any = [name for name in schema.names if name not in delta]
    with pq.ParquetWriter(
        out,
        schema,
        compression="zstd",
        use_dictionary=dictionary,
        column_encoding=dict.fromkeys(delta, "DELTA_BINARY_PACKED"),
        write_page_checksum=True,
    ) as writer:
        for segment in _present(recording):
            if segment.loss != loss:
                grown.append([segment.until_ns, segment.loss.total])
                loss = segment.loss
            held.append(segment.events)
            rows = sum(map(len, held))
            if rows >= _ROWS or len(held) >= _PARTS:
                held = [np.concatenate(held)]
            if rows >= _ROWS:
                writer.write_table(to_arrow(held.pop()), row_group_size=_ROWS)
        if held:
            writer.write_table(to_arrow(np.concatenate(held)), row_group_size=_ROWS)
        metadata: Any = {
            "kvmreq.schema": str(SCHEMA_VERSION),
            "kvmreq.meta": json.dumps(dict(recording.meta)),
            "kvmreq.loss": json.dumps(loss.as_json()),
            "kvmreq.losses": json.dumps(grown),
            "kvmreq.left_out": json.dumps(recording.left_out),
        }
        writer.add_key_value_metadata(metadata)


def _present(recording: Recording) -> Iterator[Segment]:
    return (segment for segment in recording.segments() if segment is not None)
