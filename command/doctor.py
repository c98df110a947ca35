"""kvmreq doctor: what works here, and why not."""

from __future__ import annotations

import argparse
import json

from command.failure import EXIT_ERROR
from command.verb import Verb


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Check everything that tracing needs, report all of it, and prove it on a scratch VM."""
    from reports import doctor as words
    from tracer.doctor import examine

    findings = examine()
    print(json.dumps(findings, indent=1) if arguments.json else words.text(findings))
    return 0 if findings["works"] else EXIT_ERROR


VERB = Verb(run, arguments, ("kvmreq doctor", "kvmreq doctor --json | jq .engines"))
