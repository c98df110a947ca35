"""``python3 -m lab``: scenarios on their own, to be traced from elsewhere."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from lab.child import HELD, READY
from lab.kvm import LabError
from lab.runner import Run, run_and_tell, runnable
from lab.scenarios import SCENARIOS
from lab.stage import in_words


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 for an error."""
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.verb == "list":
            _list()
        else:
            _run(parsed)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m lab",
        description="Work on KVM virtual machines whose outcome for a pending triple fault is known.",
        epilog="example: python3 -m lab run lost --repeat 23",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="every scenario, what becomes of the request, and what this host lacks for it")
    one = verbs.add_parser("run", help="run scenarios, one after the other")
    one.add_argument("names", nargs="+", metavar="NAME", help="a scenario, as listed")
    one.add_argument("--repeat", type=int, default=1, metavar="N", help="run it N times in a row")
    one.add_argument("--vms", type=int, default=1, metavar="N", help="run N of it at once, in threads")
    one.add_argument(
        "--hold",
        type=float,
        metavar="SECONDS",
        help=f"where it can, stand still for so long; print '{HELD}' there",
    )
    one.add_argument("--json", action="store_true", help="tell of each as a lab.runner.Run, one a line")
    one.add_argument("--wait", action="store_true", help=f"print '{READY}', then begin at the end of standard input")
    return parser


def _list() -> None:
    for scenario, reason in runnable():
        print(f"{scenario.name:<21} {scenario.title}")
        print(f"{'':<21} -> {scenario.outcome if reason is None else f'cannot run here: {reason}'}")


def _run(parsed: argparse.Namespace) -> None:
    def hold() -> None:
        if parsed.hold:
            print(HELD, flush=True)
            time.sleep(parsed.hold)

    restless = [name for name in parsed.names if name in SCENARIOS and not SCENARIOS[name].held]
    if parsed.hold and restless:
        can = ", ".join(scenario.name for scenario in SCENARIOS.values() if scenario.held)
        raise LabError(f"{restless[0]} has no place to stand still in", hint=f"{can} have")
    if parsed.wait:
        print(READY, flush=True)
        sys.stdin.read()
    for name in parsed.names:
        done = run_and_tell(name, parsed.repeat, parsed.vms, hold)
        print(done.as_json() if parsed.json else _words(done), flush=True)


def _words(run: Run) -> str:
    truth = run.truth()
    ends = [in_words(one) for one in truth.lifecycles]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends)) or "no request"
    milliseconds = (run.end_ns - run.begin_ns) / 1_000_000
    return f"{run.scenario}: {counts}; {len(truth.shutdowns)} shutdown exits; {milliseconds:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
