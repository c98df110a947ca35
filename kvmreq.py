"""The command: a parser, and one short function for each verb. Results go to stdout, notes to stderr."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from reports.stat_help import HELP as STAT_HELP
from tracer.errors import CommandFailed, KvmreqError

EXIT_ERROR = 1

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
_ENVIRONMENT = dict(os.environ)  # as we were given it, and as a COMMAND gets it

_DESCRIPTION = "Proves on a live KVM host which vCPU requests were lost, above all pending shutdowns of guests."
_STATUS = "exit status: 0 nothing lost, 1 error, 2 usage, 3 something was lost, 4 something is undecided"


def note(text: str) -> None:
    """Say something that is not a result."""
    print(f"kvmreq: {text}", file=sys.stderr, flush=True)


class Progress:
    """One line on a terminal that tells how far a long wait has come; nothing where there is no terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty() and sys.stdout.isatty()
        self._last = time.monotonic()
        self._width = 0

    def show(self, text: str) -> None:
        """Show a state, at most twice a second and never within the first second."""
        now = time.monotonic()
        if self._shown and now - self._last >= (0.5 if self._width else 1.0):
            self._last = now
            text = text[:78]
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)

    def clear(self) -> None:
        """Take the line away."""
        if self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width = 0


class Stop:
    """SIGINT and SIGTERM ask for the end; the work in hand is finished first."""

    def __init__(self) -> None:
        self.wanted = False
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
            # Python's own end gives a handler's signal its default back: one that comes then would kill what has
            # succeeded.
            atexit.register(signal.signal, number, signal.SIG_IGN)

    def _note(self, number: int, _frame: object) -> None:
        self.wanted = True
        self.number = number


def _default_directory(prefix: str) -> Path:
    return Path(f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}")


def _wish(arguments: argparse.Namespace) -> Any:
    from tracer.recorder import Wish

    return Wish(
        engine=arguments.engine,
        requests=[name for part in arguments.requests for name in part.split(",")],
        full=arguments.detail == "full",
        pids=arguments.pid,
        ring_bytes=arguments.ring << 20,
    )


def _start_command(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, env=_ENVIRONMENT)
    except OSError as error:
        raise CommandFailed(
            f"{shlex.join(command)} cannot be run: {os.strerror(error.errno or 0)}", hint="check the command after --"
        ) from error


def _follower(style: str, full: bool, names: Callable[[], dict[int, str]]) -> tuple[Any, Callable[[Any], None]]:
    """Return what prints each lifecycle as it ends, and what prints those that are open when the recording ends."""
    from analysis.lifecycle import Lifecycles
    from reports import document, judged, text, words
    from tracer import host

    core = Lifecycles(names(), full=full)
    clock = words.Clock(host.clock_pair())
    if style == "text":
        print(text.live_heading(), flush=True)

    def show(table: Any, guests: Any) -> None:
        for row in document.records(table):
            if style == "json":
                print(json.dumps(document.one_lifecycle(row)), flush=True)
            else:
                guest = guests.get(row["vm"])
                known = judged.Guest(
                    pid=row["pid"],
                    name=words.guest(guest.name if guest else None, row["pid"]),
                    vmm=judged.vmm(guest.vmm if guest else None),
                    cap=None,
                    vcpus=0,
                )
                print(text.live(row, known, clock), flush=True)

    last: dict[str, Any] = {"guests": {}, "blind": 0}

    def follow(batch: Any, loss: Any, guests: Any) -> None:
        last["guests"] = guests
        if len(batch):
            show(core.feed(batch, blind=loss.blind > last["blind"], loss=loss).lifecycles, guests)
            last["blind"] = loss.blind

    def finish(loss: Any) -> None:
        show(core.finish(loss).lifecycles, last["guests"])

    return follow, finish


def record(arguments: argparse.Namespace) -> int:
    """Trace this host into a recording."""
    stop = Stop()
    command = arguments.command
    if command and not shutil.which(command[0]):
        raise CommandFailed(f"{command[0]}: command not found", hint="check the command after --")

    from tracer.recorder import Recorder, watched

    path = arguments.output or _default_directory("kvmreq")
    wish = _wish(arguments)
    recorder = Recorder(path, wish)
    recorder.start()
    child: subprocess.Popen[bytes] | None = None
    finish = None
    try:
        if arguments.follow:
            recorder.follower, finish = _follower(arguments.format, wish.full, partial(watched, wish))
        _notes_of(recorder)
        until = "until Ctrl-C" if not command and arguments.duration is None else "live"
        note(f"recording into {path} with the {recorder.plan.engine} engine, {until}")
        child = _start_command(command) if command else None
        _wait(recorder, child, stop, arguments.duration)
        _end_of_command(child, stop)
    finally:
        recorder.stop()
    if finish is not None:
        finish(recorder.loss())
    loss = recorder.loss()
    note(
        f"{recorder.events} events of {len(recorder.guests)} VMs in {path}"
        + (f", {loss.total} LOST: see kvmreq report" if loss.total else "")
    )
    if child is not None and child.returncode:
        told = child.returncode
        if told < 0 and not stop.wanted:
            raise CommandFailed(
                f"{command[0]} was killed by {signal.Signals(-told).name}", hint=f"the recording {path} is whole"
            )
        note(f"{command[0]} ended with status {told}")
    return 0


def _notes_of(recorder: Any) -> None:
    while recorder.notes:
        note(recorder.notes.pop(0))


def _wait(recorder: Any, child: subprocess.Popen[bytes] | None, stop: Stop, duration_s: float | None) -> None:
    progress = Progress()
    began = time.monotonic()
    pids = recorder.wish.pids
    while not stop.wanted:
        recorder.poll()
        _notes_of(recorder)
        passed = time.monotonic() - began
        progress.show(f"recording: {passed:.0f} s, {recorder.events} events, {len(recorder.guests)} VMs")
        if child is not None and child.poll() is not None:
            break
        if duration_s is not None and passed >= duration_s:
            break
        if pids and not any(Path(f"/proc/{pid}").exists() for pid in pids):
            note("every process that was to be traced has ended")
            break
    progress.clear()


def _end_of_command(child: subprocess.Popen[bytes] | None, stop: Stop) -> None:
    """When the recording is told to end, so is the command; Ctrl-C on a terminal has reached it already."""
    if child is None or child.poll() is not None:
        return
    child.send_signal(stop.number or signal.SIGTERM)
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def report(arguments: argparse.Namespace) -> int:
    """Print what became of each request in one or several recordings."""
    from analysis.judge import judge
    from analysis.verdicts import EXIT_LOST, EXIT_NOTHING_LOST, EXIT_UNDECIDED
    from tracer.recording import Recording

    recordings = [Recording.open(path) for path in arguments.recording]
    sources = []
    progress = Progress()
    for recording in recordings:
        progress.show(f"reading {recording.path}")
        sources.append(_source(recording, judge(recording)))
    progress.clear()
    _print_report(arguments.format, sources)
    if arguments.html is not None:
        from reports import html

        html.write(arguments.html, sources)
        note(f"{arguments.html} written")
    if arguments.figures is not None:
        from reports import pictures

        written = pictures.write(arguments.figures, sources)
        note(f"{len(written)} files written to {arguments.figures}: {', '.join(path.name for path in written)}")
    if not _whole(recordings):
        return EXIT_ERROR
    statuses = {source.judgement.exit_status for source in sources}
    return next((status for status in (EXIT_LOST, EXIT_UNDECIDED) if status in statuses), EXIT_NOTHING_LOST)


def _source(recording: Any, judgement: Any) -> Any:
    """Return what the reports of a judged recording are made of."""
    from analysis.judge import story
    from analysis.ordering import timeline
    from reports.source import Source

    names = {int(bit): name for bit, name in recording.meta["requests_by_bit"].items()}
    lived = partial(timeline, recording, names=names)
    return Source(judgement, partial(story, recording), lived, recording.path.resolve().name)


def _whole(recordings: Sequence[Any]) -> bool:
    """Tell whether recordings that have been read were whole, and note what was left out."""
    for recording in recordings:
        if not recording.clean:
            note(f"{recording.path} did not end cleanly: what came after its last segment is not in it")
    damaged = [f"{recording.path}/{part}" for recording in recordings for part in recording.left_out]
    if damaged:
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        note(f"{damaged[0]}{more} (left out: what it held is undecided; restore it from a copy)")
    return not damaged


def export(arguments: argparse.Namespace) -> int:
    """Write a recording as one file for other tools."""
    from reports import export as exports
    from tracer.recording import Recording

    path = arguments.output
    if path is None and not exports.FORMATS[arguments.to]:
        arguments.wrong(f"--to {arguments.to} needs -o FILE")
    recording = Recording.open(arguments.recording)
    if path is None:
        # Of our own: under PYTHONUNBUFFERED what is behind sys.stdout writes a part and says so to nobody.
        with os.fdopen(sys.stdout.fileno(), "wb", closefd=False) as out:
            exports.export(recording, arguments.to, out)
    else:
        with exports.new_file(path) as file:
            exports.export(recording, arguments.to, file)
        note(f"{path} written")
    return 0 if _whole([recording]) else EXIT_ERROR


def _print_report(style: str, sources: Sequence[Any]) -> None:
    from reports import document, table, text

    if style == "json":
        sys.stdout.writelines(document.texts([source.judgement for source in sources]))
    elif style == "csv":
        import pandas as pd

        table.write_lifecycles(pd.concat([source.judgement.lifecycles for source in sources]), sys.stdout)
    else:
        print("\n".join(text.report(source) for source in sources), end="")


def stat(arguments: argparse.Namespace) -> int:
    """Show exits by reason and requests by name, live or of a recording of detail full."""
    if arguments.recording is not None:
        return _stat_recording(arguments)

    from analysis.stat import Tally
    from reports import stat as words
    from reports.words import Clock
    from tracer import host
    from tracer.stat import Only, Statistics

    stop = Stop()
    command = arguments.command
    if command and not shutil.which(command[0]):
        raise CommandFailed(f"{command[0]}: command not found", hint="check the command after --")
    tally, told, begins = Tally(), {}, []
    child: subprocess.Popen[bytes] | None = None
    with (
        Statistics(Only(arguments.pid, arguments.vm, arguments.vcpu), arguments.engine) as live,
        contextlib.ExitStack() as stack,
    ):
        source = words.Source(
            host.hostname(), host.release(), live.plan.engine, Clock(host.clock_pair()), live.name, live.requests
        )
        note(f"counting with the {live.plan.engine} engine{'' if command else ', until Ctrl-C'}")
        show = _stat_printer(arguments.format, stack)
        child = _start_command(command) if command else None
        stack.callback(lambda: _end_of_command(child, stop))
        over = partial(_stat_over, stop, child, arguments.pid, arguments.duration, time.monotonic())
        for reading in live.readings(arguments.interval, over, arguments.count):
            begins.append(reading.begin_ns)
            counts = tally.feed(reading.counts, reading.ended, reading.vcpus if reading.filtered else None)
            rest = (words.vms(reading.vcpus.values()), reading.loss, reading.unseen, tally.total)
            show(source.told(counts, (reading.begin_ns, reading.end_ns), *rest))
            told = source.told(tally.total, (begins[0], reading.end_ns), *rest)
    if len(begins) > 1 and arguments.format == "text":
        print(words.text(told, title="in all, until "), end="")
    if child is not None and child.returncode:
        note(f"{command[0]} ended with status {child.returncode}")
    return 0


def _stat_printer(style: str, stack: contextlib.ExitStack) -> Callable[[dict[str, Any]], None]:
    """Return what shows an interval: as JSON, in the place of the last one on a terminal, or below it."""
    from reports import stat as words

    if style == "json":
        return lambda told: print(json.dumps(told), flush=True)
    if sys.stdout.isatty():
        return stack.enter_context(words.screen())
    return lambda told: print(words.text(told), flush=True)


def _stat_over(
    stop: Stop, child: subprocess.Popen[bytes] | None, pids: Sequence[int], duration_s: float | None, began: float
) -> bool:
    return (
        stop.wanted
        or (child is not None and child.poll() is not None)
        or (duration_s is not None and time.monotonic() - began >= duration_s)
        or (bool(pids) and not any(Path(f"/proc/{pid}").exists() for pid in pids))
    )


def _stat_recording(arguments: argparse.Namespace) -> int:
    from reports import stat as words
    from tracer.recording import Recording

    recording = Recording.open(arguments.recording)
    told = words.of_recording(recording, arguments.pid, arguments.vm, arguments.vcpu)
    sys.stdout.write(f"{json.dumps(told)}\n" if arguments.format == "json" else words.text(told))
    if recording.left_out:
        note(f"{recording.path}/{recording.left_out[0]} (left out: what it held is not counted)")
        return EXIT_ERROR
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Check everything that tracing needs, report all of it, and prove it on a scratch VM."""
    from reports import doctor as words
    from tracer.doctor import examine

    findings = examine()
    print(json.dumps(findings, indent=1) if arguments.json else words.text(findings))
    return 0 if findings["works"] else EXIT_ERROR


def lab(arguments: argparse.Namespace) -> int:
    """List the scenarios, or run one."""
    from lab import runner

    if arguments.action == "list":
        for scenario, reason in runner.runnable():
            print(f"{scenario.name:<24}{scenario.title}" + (f"\n{'':<24}cannot run here: {reason}" if reason else ""))
        return 0
    runner.run(arguments.scenario, repeat=arguments.repeat, vms=arguments.vms)
    print(f"{arguments.scenario}: ran as KVM should")
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """Trace every scenario that this host can run: verdicts and an HTML report."""
    from analysis.judge import judge
    from lab import check, runner
    from probes.plan import tells
    from reports import document, html, text
    from tracer.recorder import Recorder, Wish
    from tracer.recording import Recording

    stop = Stop()
    path = arguments.output or _default_directory("kvmreq-demo")
    recorder = Recorder(path, Wish(engine=arguments.engine, requests=("all",)))
    recorder.start()
    note(f"tracing with the {recorder.plan.engine} engine into {path}")
    runs: list[runner.Run] = []
    failed = 0
    try:
        recorder.poll(0)
        for scenario, reason in runner.runnable():
            if stop.wanted:
                break
            if reason is not None:
                note(f"{scenario.name}: cannot run here: {reason}")
                continue
            note(f"{scenario.name}: {scenario.title}")
            ran = _traced(scenario.name, recorder)
            if ran is not None:
                runs.append(runner.Run.from_json(ran))
            elif not stop.wanted:  # Ctrl-C on a terminal ends it, too
                failed += 1
                note(f"{scenario.name} failed (kvmreq lab run {scenario.name} runs it alone)")
    finally:
        recorder.stop()
    recording = Recording.open(path)
    judgement = judge(recording)
    source = _source(recording, judgement)
    print(text.report(source), end="")
    page = path / "report.html"
    html.write(page, [source])
    page.chmod(0o600)  # as all of the recording
    seen, told = document.document(judgement), tells(recorder.plan.as_json())
    wrong = {run.scenario: check.differences(seen, run, told) for run in runs}
    right = [name for name, lines in wrong.items() if not lines]
    print()
    played = len(runs) + failed
    print(f"{len(right)} of {played} scenarios got the verdict that they must get; report: {page}")
    for lines in wrong.values():
        for line in lines:
            note(line)
    return 0 if len(right) == played else EXIT_ERROR


def _traced(name: str, recorder: Any) -> str | None:
    """Run a scenario in a process of its own while the recorder works; return what that tells of it.

    None: it failed, and has said why.
    """
    with tempfile.TemporaryFile("w+") as told:
        child = subprocess.Popen(
            [sys.executable, "-m", "lab", "run", name, "--json"],
            stdout=told,
            cwd=Path(__file__).resolve().parent,
        )
        while child.poll() is None:
            recorder.poll(0.01)
        if child.returncode:
            return None
        told.seek(0)
        return told.read()


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines) + f"\n\n{_STATUS}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "kvmreq",
        description=_DESCRIPTION,
        formatter_class=raw,
        epilog=_examples("kvmreq doctor", "kvmreq record -o monday -- sleep 60", "kvmreq report monday"),
    )
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], *examples: str) -> argparse.ArgumentParser:
        words = (run.__doc__ or "").splitlines()[0]
        made = verbs.add_parser(
            name, help=words, description=words, formatter_class=raw, epilog=_examples(*examples), allow_abbrev=False
        )
        made.set_defaults(run=run, wrong=made.error)
        return made

    engines = ("auto", "fentry", "kprobe", "tracepoint", "ftrace")
    one = verb("doctor", doctor, "kvmreq doctor", "kvmreq doctor --json | jq .engines")
    one.add_argument("--json", action="store_true", help="print the findings as JSON")

    one = verb(
        "record",
        record,
        "kvmreq record                          # this host, until Ctrl-C",
        "kvmreq record -o out --duration 60     # for a minute",
        "kvmreq record -p 4711 --follow         # one VMM, each verdict as it falls",
        "kvmreq record -- virsh migrate --live vm1 qemu+ssh://other/system",
    )
    one.usage = (
        "kvmreq record [-o DIR] [--engine E] [--requests NAME,...] [--detail D]\n"
        "                     [--duration S] [-p PID]... [--follow [--format F]] [--] [COMMAND ...]"
    )
    one.add_argument("-o", "--output", type=Path, metavar="DIR", help="where to record (default: kvmreq-DATE-TIME)")
    one.add_argument("--engine", choices=engines, default="auto", help="how to hook KVM (default: the best that works)")
    one.add_argument(
        "--requests",
        action="append",
        metavar="NAME,...",
        help="requests to watch, by KVM's names, or all (default: triple_fault)",
    )
    one.add_argument(
        "--detail",
        choices=("boundary", "full"),
        default="boundary",
        help="full: every ioctl boundary, guest entry, guest exit, wake-up and kick (default: %(default)s)",
    )
    one.add_argument("--duration", type=_seconds, metavar="S", help="end after so many seconds")
    one.add_argument("-p", "--pid", type=_positive, action="append", default=[], help="trace only this VMM; repeatable")
    one.add_argument("--follow", action="store_true", help="print each lifecycle within a second of its end")
    one.add_argument("--format", choices=("text", "json"), default="text", help="of --follow (default: %(default)s)")
    one.add_argument(
        "--ring", type=_ring, default=32, metavar="MIB", help="size of the event ring (default: %(default)s)"
    )
    one.add_argument(
        "command", nargs="*", metavar="COMMAND", help="record while this runs; all VMs of the host are traced"
    )

    one = verb(
        "report",
        report,
        "kvmreq report DIR",
        "kvmreq report DIR --html report.html",
        "kvmreq report DIR --figures figures     # figures/latency.png, figures/latency.svg, ...",
        "kvmreq report DIR --format json | jq .summary",
    )
    one.add_argument("recording", nargs="+", type=Path, metavar="DIR", help="a recording")
    one.add_argument("--format", choices=("text", "json", "csv"), default="text", help="(default: %(default)s)")
    one.add_argument("--html", type=Path, metavar="FILE", help="also write a self-contained page with figures")
    one.add_argument(
        "--figures",
        type=Path,
        metavar="OUT",
        help="also write every figure as OUT/NAME.png and OUT/NAME.svg; several recordings get a prefix each",
    )

    one = verb(
        "export",
        export,
        "kvmreq export DIR --to perfetto -o DIR.pftrace    # for ui.perfetto.dev",
        "kvmreq export DIR --to parquet -o DIR.parquet     # all segments, meta.json",
        "kvmreq export DIR --to csv > events.csv",
        "kvmreq export DIR --to json | jq 'select(.kind == \"save\")'",
    )
    one.add_argument("recording", type=Path, metavar="DIR", help="a recording")
    one.add_argument(
        "--to",
        choices=("perfetto", "parquet", "csv", "json"),
        required=True,
        help="perfetto: a trace; parquet, csv, json (one object a line): the events",
    )
    one.add_argument(
        "-o",
        "--output",
        type=_output,
        metavar="FILE",
        help="a new file, for its owner alone (default for csv and json, or -: standard output)",
    )

    one = verb(
        "stat",
        stat,
        "kvmreq stat                            # this host, every second, until Ctrl-C",
        "kvmreq stat -p 4711 --vcpu 0           # one vCPU of one VMM",
        "kvmreq stat --format json -- sleep 10",
        "kvmreq stat DIR                        # of a recording made with --detail full",
    )
    one.epilog = f"{STAT_HELP}\n\n{one.epilog}"
    one.usage = (
        "kvmreq stat [DIR | --engine E] [-p PID]... [--vm N]... [--vcpu ID]...\n"
        "                   [--interval S] [--count N] [--duration S] [--format F] [-- COMMAND ...]"
    )
    one.add_argument("recording", nargs="?", type=Path, metavar="DIR", help="a recording, instead of this host")
    one.add_argument(
        "--engine",
        choices=("auto", "kprobe", "tracepoint"),
        default="auto",
        help="how to hook KVM (default: the best that works)",
    )
    one.add_argument("-p", "--pid", type=_positive, action="append", default=[], help="only this VMM; repeatable")
    one.add_argument(
        "--vm",
        type=_positive,
        action="append",
        default=[],
        metavar="N",
        help="only this VM, by its number in the output",
    )
    one.add_argument("--vcpu", type=int, action="append", default=[], metavar="ID", help="only vCPUs with this id")
    one.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="show every S seconds (default: 1)")
    one.add_argument("--count", type=_positive, metavar="N", help="end after so many intervals")
    one.add_argument("--duration", type=_seconds, metavar="S", help="end after so many seconds")
    one.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")

    one = verb("lab", lab, "kvmreq lab list", "kvmreq lab run lost", "kvmreq record -- kvmreq lab run lost --repeat 23")
    actions = one.add_subparsers(required=True, dest="action", metavar="list|run")
    actions.add_parser("list", help="list the scenarios")
    run = actions.add_parser("run", help="run a scenario, to be traced from elsewhere")
    run.add_argument("scenario", metavar="SCENARIO")
    run.add_argument("--repeat", type=_positive, default=1, metavar="N", help="so often in a row")
    run.add_argument("--vms", type=_positive, default=1, metavar="N", help="in so many threads at once")

    one = verb("demo", demo, "kvmreq demo", "kvmreq demo -o demo")
    one.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="where to record (default: kvmreq-demo-DATE-TIME)"
    )
    one.add_argument("--engine", choices=engines, default="auto", help="how to hook KVM (default: the best that works)")
    return top


def _output(text: str) -> Path | None:
    return None if text == "-" else Path(text)


def _ring(text: str) -> int:
    value = int(text)
    if value < 1 or value & (value - 1):
        raise argparse.ArgumentTypeError(f"{text} is not a power of two")
    return value


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Whatever a user can cause ends in one line, and never in a traceback."""
    from lab.kvm import LabError

    def fail(text: str) -> NoReturn:
        note(" ".join(text.split()))
        sys.exit(EXIT_ERROR)

    try:
        yield
    except (KvmreqError, LabError) as error:
        fail(str(error))
    except BrokenPipeError:
        # The reader of our output has gone: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        fail("interrupted")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error} (check that it exists and that you may use it)")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    given = list(sys.argv[1:] if words is None else words)
    # `stat DIR` and `stat -- COMMAND`: argparse forgets which side of the dashes a word was on.
    dashes = given.index("--") if given[:1] == ["stat"] and "--" in given else len(given)
    top = parser()
    arguments = top.parse_args(given[:dashes])
    if given[:1] == ["stat"]:
        arguments.command = given[dashes + 1 :]
        if arguments.command and arguments.recording is not None:
            top.error("stat takes a recording or a command, not both")
    # Before numpy is imported: the threads of its linear algebra spin, and nothing here uses them.
    os.environ.setdefault(_BLAS_THREADS, "1")
    if getattr(arguments, "requests", None) is None:
        arguments.requests = ["triple_fault"]
    with _one_line():
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    raise AssertionError("unreachable")


if __name__ == "__main__":
    sys.exit(main())
