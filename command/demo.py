"""kvmreq demo: every scenario, traced live and judged."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from command.arguments import directories, engine
from command.failure import EXIT_ERROR
from command.notes import note
from command.recordings import source
from command.stop import Stop
from command.verb import Verb

if TYPE_CHECKING:
    from tracer.recorder import Recorder


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="where to record (default: kvmreq-demo-DATE-TIME)"
    )
    engine(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trace every scenario that this host can run: verdicts and an HTML report."""
    from analysis.judge import judge
    from lab import check, runner
    from probes.plan import tells
    from reports import document, html, text
    from tracer.recorder import Recorder, Wish
    from tracer.recording import Recording

    stop = Stop()
    places = directories(arguments.output, "kvmreq-demo")
    recorder = Recorder(places[0], Wish(engine=arguments.engine, requests=("all",)), spare=places[1:])
    recorder.start()
    path = recorder.path
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
    made = source(recording, judgement)
    print(text.report(made), end="")
    page = path / "report.html"
    html.write(page, [made])
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


def _traced(name: str, recorder: Recorder) -> str | None:
    """Run a scenario in a process of its own while the recorder works; return what that tells of it.

    None: it failed, and has said why.
    """
    with os.fdopen(os.memfd_create("kvmreq"), "w+") as told:
        child = subprocess.Popen(
            [sys.executable, "-m", "lab", "run", name, "--json"],
            stdout=told,
            cwd=Path(__file__).resolve().parents[1],
        )
        while child.poll() is None:
            recorder.poll(0.01)
        if child.returncode:
            return None
        told.seek(0)
        return told.read()


VERB = Verb(run, arguments, ("kvmreq demo", "kvmreq demo -o demo"))
