"""kvmreq record: this host's KVM into a recording."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command.arguments import MOST_RING_MIB, RING_MIB, directories, engine, positive, ring, seconds
from command.child import check_command, end_command, start_command
from command.notes import Aside, Progress, beside, note
from command.stop import Stop
from command.verb import Verb
from tracer.errors import CommandFailed, KvmreqError
from tracer.files import STANDARD_OUTPUT

if TYPE_CHECKING:
    from tracer.recorder import Recorder, Wish

_REQUESTS = ("triple_fault",)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    parser.usage = (
        "kvmreq record [-o DIR] [--engine E] [--requests NAME,...] [--detail D]\n"
        "                     [--duration S] [-p PID]... [--follow [--format F]] [--] [COMMAND ...]"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where to record (default: kvmreq-DATE-TIME)")
    engine(parser)
    parser.add_argument(
        "--requests",
        action="append",
        metavar="NAME,...",
        help="requests to watch, by KVM's names, or all (default: triple_fault)",
    )
    parser.add_argument(
        "--detail",
        choices=("boundary", "full"),
        default="boundary",
        help="full: every ioctl boundary, guest entry, guest exit, wake-up and kick (default: %(default)s)",
    )
    parser.add_argument(
        "--duration", type=seconds, metavar="S", help="end after so many seconds (default: at Ctrl-C, or with COMMAND)"
    )
    parser.add_argument(
        "-p", "--pid", type=positive, action="append", default=[], help="trace only this VMM; repeatable"
    )
    parser.add_argument("--follow", action="store_true", help="print each lifecycle within a second of its end")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of --follow (default: %(default)s)")
    parser.add_argument(
        "--ring",
        type=ring,
        default=RING_MIB,
        metavar="MIB",
        help=f"size of the event ring, a power of two up to {MOST_RING_MIB} (default: %(default)s)",
    )
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="record while this runs; all VMs of the host are traced",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trace this host into a recording."""
    if arguments.format != "text" and not arguments.follow:
        arguments.wrong(f"--format {arguments.format} is of what --follow prints: add --follow")
    stop = Stop()
    check_command(arguments.command)
    with beside():
        return _run(arguments, stop)


def _run(arguments: argparse.Namespace, stop: Stop) -> int:
    from tracer.recorder import Recorder, watched

    command: list[str] = arguments.command
    places = directories(arguments.output, "kvmreq")
    wish = _wish(arguments)
    recorder = Recorder(places[0], wish, spare=places[1:])
    if arguments.follow:
        from analysis import compiled

        compiled.warm()  # before anything has to be drained
    recorder.start()
    path = recorder.path
    child: subprocess.Popen[bytes] | None = None
    finish = None
    told = False
    try:
        if arguments.follow:
            out = Aside(sys.stdout.fileno(), STANDARD_OUTPUT)
            recorder.follower, finish = _follower(out, arguments.format, wish.full, partial(watched, wish))
        _notes_of(recorder)
        until = "until Ctrl-C" if not command and arguments.duration is None else "live"
        note(f"recording into {path} with the {recorder.plan.engine} engine, {until}")
        child = start_command(command)
        _wait(recorder, child, stop, arguments.duration)
        told = end_command(child, stop, recorder.poll)
    finally:
        try:
            recorder.stop()
        finally:
            end_command(child, stop)
    if finish is not None:
        finish(recorder.loss())
    loss = recorder.loss()
    note(
        f"{recorder.events} events of {len(recorder.guests)} VMs in {path}"
        + (f", {loss.total} LOST: see kvmreq report" if loss.total else "")
    )
    if child is not None and child.returncode:
        _tell_of(child, command[0], path, told=told or stop.wanted)
    if finish is not None and (missing := out.finish()):
        raise KvmreqError(missing, hint=f"all of it is in the recording: kvmreq report {path}")
    return 0


def _tell_of(child: subprocess.Popen[bytes], name: str, path: Path, *, told: bool) -> None:
    """Say how a COMMAND has failed; to end when ``told`` to is no failure. Raises CommandFailed if it was killed."""
    status = child.returncode
    if status >= 0:
        note(f"{name} ended with status {status}")
    elif not told:
        raise CommandFailed(
            f"{name} was killed by {signal.Signals(-status).name}", hint=f"what happened until then is in {path}"
        )
    elif status == -signal.SIGKILL:
        note(f"{name} did not end when it was told to, and was killed")


def _wish(arguments: argparse.Namespace) -> Wish:
    from tracer.recorder import Wish

    return Wish(
        engine=arguments.engine,
        requests=[name for part in arguments.requests or _REQUESTS for name in part.split(",")],
        full=arguments.detail == "full",
        pids=arguments.pid,
        ring_bytes=arguments.ring << 20,
    )


def _follower(
    out: Aside, style: str, full: bool, names: Callable[[], dict[int, str]]
) -> tuple[Any, Callable[[Any], None]]:
    """Return what prints each lifecycle as it ends, and what prints those that are open when the recording ends."""
    from analysis.lifecycle import Lifecycles
    from reports import document, judged, text, words
    from tracer import host

    core = Lifecycles(names(), full=full)
    clock = words.Clock(host.clock_pair())
    if style == "text":
        out.tell(f"{text.live_heading()}\n")

    def show(table: Any, guests: Any) -> None:
        for row in document.records(table):
            if style == "json":
                out.tell(f"{json.dumps(document.one_lifecycle(row))}\n")
            else:
                guest = guests.get(row["vm"])
                known = judged.Guest(
                    pid=row["pid"],
                    name=words.guest(guest.name if guest else None, row["pid"]),
                    vmm=judged.vmm(guest.vmm if guest else None),
                    cap=None,
                    vcpus=0,
                )
                out.tell(f"{text.live(row, known, clock)}\n")

    last: dict[str, Any] = {"guests": {}, "blind": 0}

    def follow(batch: Any, loss: Any, guests: Any) -> None:
        last["guests"] = guests
        if len(batch):
            show(core.feed(batch, blind=loss.blind > last["blind"], loss=loss).lifecycles, guests)
            last["blind"] = loss.blind

    def finish(loss: Any) -> None:
        show(core.finish(loss).lifecycles, last["guests"])

    return follow, finish


def _notes_of(recorder: Recorder) -> None:
    while recorder.notes:
        note(recorder.notes.pop(0))


def _wait(recorder: Recorder, child: subprocess.Popen[bytes] | None, stop: Stop, duration_s: float | None) -> None:
    progress = Progress()
    began = time.monotonic()
    while not stop.wanted:
        recorder.poll()
        _notes_of(recorder)
        passed = time.monotonic() - began
        progress.show(f"recording: {passed:.0f} s, {recorder.events} events, {len(recorder.guests)} VMs")
        if child is not None and child.poll() is not None:
            break
        if duration_s is not None and passed >= duration_s:
            break
        if recorder.over:
            note("every process that was to be traced has ended")
            break
    progress.clear()


VERB = Verb(
    run,
    arguments,
    (
        "kvmreq record                          # this host, until Ctrl-C",
        "kvmreq record -o out --duration 60     # for a minute",
        "kvmreq record -p 4711 --follow         # one VMM, each verdict as it falls",
        "kvmreq record -- virsh migrate --live vm1 qemu+ssh://other/system",
    ),
)
