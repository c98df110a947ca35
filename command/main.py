"""The command line: the parser of all verbs, and one run of one of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from command import environment
from command.failure import one_line
from command.verb import Verb

#: The verbs, as the help lists them: each is a module of this package, with a ``VERB``.
VERBS = (
    "doctor",
    "record",
    "report",
    "export",
    "stat",
    "lab",
    "demo",
)

_DESCRIPTION = "Proves on a live KVM host which vCPU requests were lost, above all pending shutdowns of guests."
_EXAMPLES = ("kvmreq doctor", "kvmreq record -o monday -- sleep 60", "kvmreq report monday")
_STATUS = "exit status: 0 done, 1 error, 2 usage"
_JUDGES = "exit status: 0 nothing lost, 1 error, 2 usage, 3 something was lost, 4 something is undecided"


class _Version(argparse.Action):
    # argparse's own action wants the version at every start, which has to be read.
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from command.version import version

        print(f"{parser.prog} {version()}")
        parser.exit()


def _examples(lines: Sequence[str], *, judges: bool) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines) + f"\n\n{_JUDGES if judges else _STATUS}"


def verb(name: str) -> Verb:
    """Return a verb, by its name."""
    found: Verb = import_module(f"command.{name}").VERB
    return found


def parser(names: Sequence[str] = VERBS) -> argparse.ArgumentParser:
    """Return the parser of the command line, or of those that begin with one of some verbs."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "kvmreq", description=_DESCRIPTION, formatter_class=raw, epilog=_examples(_EXAMPLES, judges=True)
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = top.add_subparsers(required=True, metavar="VERB")
    for name in names:
        one = verb(name)
        words = (one.run.__doc__ or "").splitlines()[0]
        made = verbs.add_parser(
            name,
            help=words,
            description=words,
            formatter_class=raw,
            epilog=_examples(one.examples, judges=one.judges),
            allow_abbrev=False,
        )
        made.set_defaults(run=one.run, wrong=made.error)
        one.arguments(made)
    return top


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for; exits as argparse does where it asks for nothing that there is."""
    asked = [name for name in VERBS if name in words[:1]]
    top = parser(asked or VERBS)
    if not any(verb(name).dashes for name in asked):
        parsed = top.parse_args(words)
        if getattr(parsed, "command", [])[:1] == ["--"]:
            del parsed.command[0]  # all others are the command's own
        return parsed
    # argparse forgets which side of the dashes a word was on.
    dashes = words.index("--") if "--" in words else len(words)
    arguments = top.parse_args(words[:dashes])
    arguments.command = list(words[dashes + 1 :])
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    environment.prepare()
    with one_line():
        try:
            arguments = parse(sys.argv[1:] if words is None else words)
            status: int = arguments.run(arguments)
        finally:
            sys.stdout.flush()
        return status
    raise AssertionError("unreachable")
