"""kvmreq lab: the scenarios."""

from __future__ import annotations

import argparse

from command.arguments import positive
from command.verb import Verb


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    actions = parser.add_subparsers(required=True, dest="action", metavar="list|run")
    actions.add_parser("list", help="list the scenarios")
    one = actions.add_parser("run", help="run a scenario, to be traced from elsewhere")
    one.add_argument("scenario", metavar="SCENARIO")
    one.add_argument("--repeat", type=positive, default=1, metavar="N", help="so often in a row")
    one.add_argument("--vms", type=positive, default=1, metavar="N", help="in so many threads at once")


def run(arguments: argparse.Namespace) -> int:
    """List the scenarios, or run one."""
    from lab import runner

    if arguments.action == "list":
        for scenario, reason in runner.runnable():
            print(f"{scenario.name:<24}{scenario.title}" + (f"\n{'':<24}cannot run here: {reason}" if reason else ""))
        return 0
    runner.run(arguments.scenario, repeat=arguments.repeat, vms=arguments.vms)
    print(f"{arguments.scenario}: ran as KVM should")
    return 0


VERB = Verb(
    run, arguments, ("kvmreq lab list", "kvmreq lab run lost", "kvmreq record -- kvmreq lab run lost --repeat 23")
)
