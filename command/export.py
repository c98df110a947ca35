"""kvmreq export: a recording as a file for other tools."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from command.arguments import file_or_output
from command.failure import EXIT_ERROR
from command.notes import note
from command.recordings import whole
from command.verb import Verb


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    parser.add_argument("recording", type=Path, metavar="DIR", help="a recording")
    parser.add_argument(
        "--to",
        choices=("perfetto", "parquet", "csv", "json"),
        required=True,
        help="perfetto: a trace; parquet, csv, json (one object a line): the events",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=file_or_output,
        metavar="FILE",
        help="a new file, for its owner alone (default for csv and json, or -: standard output)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write a recording as one file for other tools."""
    from reports import export as exports
    from tracer.recording import Recording

    path = arguments.output
    if path is None and not exports.FORMATS[arguments.to]:
        arguments.wrong(f"--to {arguments.to} needs -o FILE")
    recording = Recording.open(arguments.recording)
    if path is None:
        exports.export(recording, arguments.to, sys.stdout.buffer)
    else:
        with exports.new_file(path) as file:
            exports.export(recording, arguments.to, file)
        note(f"{path} written")
    return 0 if whole([recording]) else EXIT_ERROR


VERB = Verb(
    run,
    arguments,
    (
        "kvmreq export DIR --to perfetto -o DIR.pftrace    # for ui.perfetto.dev",
        "kvmreq export DIR --to parquet -o DIR.parquet     # all segments, meta.json",
        "kvmreq export DIR --to csv > events.csv",
        "kvmreq export DIR --to json | jq 'select(.kind == \"save\")'",
    ),
)
