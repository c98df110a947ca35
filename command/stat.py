"""kvmreq stat: exits by reason and requests by name, every second."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command.arguments import engine, natural, positive, seconds
from command.child import check_command, end_command, start_command
from command.failure import EXIT_ERROR
from command.notes import Aside, beside, note
from command.stop import Stop
from command.verb import Verb
from reports.stat_help import HELP
from tracer.errors import KvmreqError
from tracer.files import STANDARD_OUTPUT

if TYPE_CHECKING:
    from tracer.stat import Statistics

_INTERVAL_S = 1


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    parser.epilog = f"{HELP}\n\n{parser.epilog}"
    parser.usage = (
        "kvmreq stat [DIR | --engine E] [-p PID]... [--vm N]... [--vcpu ID]...\n"
        "                   [--interval S] [--count N] [--duration S] [--format F] [-- COMMAND ...]"
    )
    parser.add_argument("recording", nargs="?", type=Path, metavar="DIR", help="a recording, instead of this host")
    engine(parser, ("auto", "kprobe", "tracepoint"))
    parser.add_argument("-p", "--pid", type=positive, action="append", default=[], help="only this VMM; repeatable")
    parser.add_argument(
        "--vm",
        type=positive,
        action="append",
        default=[],
        metavar="N",
        help="only this VM, by its number in the output",
    )
    parser.add_argument(
        "--vcpu", type=natural, action="append", default=[], metavar="ID", help="only vCPUs with this id"
    )
    parser.add_argument("--interval", type=seconds, metavar="S", help=f"show every S seconds (default: {_INTERVAL_S})")
    parser.add_argument("--count", type=positive, metavar="N", help="end after so many intervals")
    parser.add_argument("--duration", type=seconds, metavar="S", help="end after so many seconds")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Show exits by reason and requests by name, live or of a recording of detail full."""
    if arguments.recording is not None:
        if arguments.command:
            arguments.wrong("it takes a recording or a command, not both")
        of_live = {"interval": None, "count": None, "duration": None, "engine": "auto"}
        useless = [f"--{name}" for name, usual in of_live.items() if getattr(arguments, name) != usual]
        if useless:
            arguments.wrong(f"{' and '.join(useless)}: a recording is counted as a whole, by what recorded it")
        return _of_recording(arguments)

    from analysis.stat import Tally
    from reports import stat as words
    from reports.words import Clock
    from tracer import host
    from tracer.stat import Only, Statistics

    stop = Stop()
    command = arguments.command
    check_command(command)
    tally, told, begins = Tally(), {}, []
    child: subprocess.Popen[bytes] | None = None
    with (
        beside(),
        Statistics(Only(arguments.pid, arguments.vm, arguments.vcpu), arguments.engine) as live,
        contextlib.ExitStack() as stack,
    ):
        table = "" if live.names.exact else live.names.table
        here = (host.hostname(), host.release(), live.plan.engine, Clock(host.clock_pair()))
        source = words.Source(*here, live.name, live.names.by_bit, table)
        for line in live.notes:
            note(line)
        note(f"counting with the {live.plan.engine} engine{'' if command else ', until Ctrl-C'}")
        out = Aside(sys.stdout.fileno(), STANDARD_OUTPUT)
        show = _printer(arguments.format, stack, out)
        child = start_command(command)
        stack.callback(lambda: end_command(child, stop))
        over = partial(_over, stop, child, live, arguments.duration, time.monotonic())
        for reading in live.readings(arguments.interval or _INTERVAL_S, over, arguments.count):
            begins.append(reading.begin_ns)
            counts = tally.feed(reading.counts, reading.ended, reading.vcpus if reading.filtered else None)
            rest = (words.vms(reading.vcpus.values()), reading.loss, reading.unseen, tally.total)
            show(source.told(counts, (reading.begin_ns, reading.end_ns), *rest))
            told = source.told(tally.total, (begins[0], reading.end_ns), *rest)
    if len(begins) > 1 and arguments.format == "text":
        out.tell(words.text(told, title="in all, until "))
    if missing := out.finish():
        raise KvmreqError(missing, hint="the result is not whole")
    if child is not None and child.returncode:
        note(f"{command[0]} ended with status {child.returncode}")
    return 0


def _printer(style: str, stack: contextlib.ExitStack, out: Aside) -> Callable[[dict[str, Any]], None]:
    """Return what shows an interval: as JSON, in the place of the last one on a terminal, or below it."""
    from reports import stat as words

    if style == "json":
        return lambda told: out.tell(f"{json.dumps(told)}\n")
    if sys.stdout.isatty():
        return stack.enter_context(words.screen())
    return lambda told: out.tell(f"{words.text(told)}\n")


def _over(
    stop: Stop, child: subprocess.Popen[bytes] | None, live: Statistics, duration_s: float | None, began: float
) -> bool:
    return (
        stop.wanted
        or (child is not None and child.poll() is not None)
        or (duration_s is not None and time.monotonic() - began >= duration_s)
        or live.over
    )


def _of_recording(arguments: argparse.Namespace) -> int:
    from reports import stat as words
    from tracer.recording import Recording

    recording = Recording.open(arguments.recording)
    told = words.of_recording(recording, arguments.pid, arguments.vm, arguments.vcpu)
    sys.stdout.write(f"{json.dumps(told)}\n" if arguments.format == "json" else words.text(told))
    if recording.left_out:
        note(f"{recording.path}/{recording.left_out[0]} (left out: what it held is not counted)")
        return EXIT_ERROR
    return 0


VERB = Verb(
    run,
    arguments,
    (
        "kvmreq stat                            # this host, every second, until Ctrl-C",
        "kvmreq stat -p 4711 --vcpu 0           # one vCPU of one VMM",
        "kvmreq stat --format json -- sleep 10",
        "kvmreq stat DIR                        # of a recording made with --detail full",
    ),
    dashes=True,
)
