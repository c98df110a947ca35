"""kvmreq report: what became of each request."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from command.failure import EXIT_ERROR
from command.notes import Progress, note
from command.recordings import source, whole
from command.verb import Verb

if TYPE_CHECKING:
    from reports.source import Source


_OUTPUT = Path("-")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    parser.add_argument("recording", nargs="+", type=Path, metavar="DIR", help="a recording")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text", help="(default: %(default)s)")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a self-contained page with figures; -: that to standard output, and nothing else",
    )
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="OUT",
        help="also write every figure as OUT/NAME.png and OUT/NAME.svg; several recordings get a prefix each",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what became of each request in one or several recordings."""
    from analysis.judge import judge
    from analysis.verdicts import EXIT_LOST, EXIT_NOTHING_LOST, EXIT_UNDECIDED
    from tracer.recording import Recording

    page_alone = arguments.html == _OUTPUT
    if page_alone and arguments.format != "text":
        arguments.wrong(f"--html - and --format {arguments.format} cannot both have standard output")
    if arguments.figures == _OUTPUT:
        arguments.wrong("--figures are several files: name a directory, ./- if that is its name")
    recordings = [Recording.open(path) for path in arguments.recording]
    sources = []
    progress = Progress()
    for recording in recordings:
        progress.show(f"reading {recording.path}")
        sources.append(source(recording, judge(recording)))
    progress.clear()
    if page_alone:
        from reports import html

        sys.stdout.buffer.write(html.content(sources))
    else:
        _print(arguments.format, arguments.recording, sources)
    if arguments.html is not None and not page_alone:
        from reports import html

        html.write(arguments.html, sources)
        note(f"{arguments.html} written")
    if arguments.figures is not None:
        from reports import pictures

        written = pictures.write(arguments.figures, sources)
        note(f"{len(written)} files written to {arguments.figures}: {', '.join(path.name for path in written)}")
    if not whole(recordings):
        return EXIT_ERROR
    statuses = {one.judgement.exit_status for one in sources}
    return next((status for status in (EXIT_LOST, EXIT_UNDECIDED) if status in statuses), EXIT_NOTHING_LOST)


def _print(style: str, paths: Sequence[Path], sources: Sequence[Source]) -> None:
    from reports import document, table, text
    from reports.words import shown

    if style == "json":
        sys.stdout.writelines(document.texts([source.judgement for source in sources]))
    elif style == "csv":
        names = (shown(str(path)) for path in paths)
        lifecycles = (source.judgement.lifecycles for source in sources)
        table.write_lifecycles(zip(names, lifecycles, strict=True), sys.stdout)
    else:
        print("\n".join(text.report(source) for source in sources), end="")


VERB = Verb(
    run,
    arguments,
    (
        "kvmreq report DIR",
        "kvmreq report DIR --html report.html",
        "kvmreq report DIR --figures figures     # figures/latency.png, figures/latency.svg, ...",
        "kvmreq report DIR --format json | jq .summary",
    ),
    judges=True,
)
