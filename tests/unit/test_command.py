"""The command: its verbs, what each says of itself, and what it costs to ask."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import command
from command.main import VERBS, main, parse, parser, verb
from command.verb import Verb

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = Path(command.__file__).parent
# What would make a start slow: it is imported when a verb runs.
HEAVY = {"numpy", "pandas", "pyarrow", "numba", "matplotlib", "rich", "jinja2", "bcc", "dataclasses", "inspect"}
# Modules that some modules bring in, each asked for in an interpreter of its own.
IMPORTED = """
import json, sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported(*names: str) -> set[str]:
    """Return the top-level modules that an interpreter has once it has imported some."""
    done = subprocess.run([sys.executable, "-c", IMPORTED, *names], cwd=CHECKOUT, capture_output=True, check=True)
    return set(json.loads(done.stdout))


def commands(example: str) -> list[list[str]]:
    """Return what an example has kvmreq do, as words, without the shell's parts of the line."""
    lexer = shlex.shlex(example, posix=True, punctuation_chars="|>")
    lexer.whitespace_split = True
    words = list(lexer)
    cut = next((at for at, word in enumerate(words) if word in ("|", ">")), len(words))
    assert words[0] == "kvmreq"
    found = [words[1:cut]]
    if "--" in found[0]:
        inner = found[0][found[0].index("--") + 1 :]
        found += [inner[1:]] if inner[0] == "kvmreq" else []
    return found


def test_every_module_with_a_verb_is_in_the_list_and_the_other_way_round() -> None:
    """A verb is one file and one line: a file without its line would be dead."""
    with_a_verb = {path.stem for path in FOLDER.glob("*.py") if "\nVERB = " in path.read_text()}
    assert with_a_verb == set(VERBS)
    assert len(VERBS) == len(set(VERBS)) > 6


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_has_words_and_examples_that_parse(name: str) -> None:
    """The examples of its help are what it takes, to the last word."""
    one = verb(name)
    assert isinstance(one, Verb)
    assert (one.run.__doc__ or "").splitlines()[0].endswith(".")
    assert one.examples
    for example in one.examples:
        asked = commands(example)
        assert any(words[0] == name for words in asked), example
        for words in asked:
            arguments = parse(words)
            assert arguments.run is verb(words[0]).run


def test_examples_that_would_not_parse_are_found() -> None:
    """The test above, on an example that is wrong."""
    (words,) = commands("kvmreq export DIR --to nothing > file  # none")
    assert words == ["export", "DIR", "--to", "nothing"]
    with pytest.raises(SystemExit) as end:
        parse(words)
    assert end.value.code == 2


@pytest.mark.parametrize("words", [[], *([name] for name in VERBS), ["lab", "run"], ["lab", "list"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It ends in examples and the exit statuses."""
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert said.startswith(f"usage: {shlex.join(['kvmreq', *words])} ")
    if len(words) < 2:
        examples = said[said.index("\nexamples:\n") :].splitlines()[2:-2]
        assert all(line.startswith("  kvmreq ") for line in examples)
        assert said.splitlines()[-1].startswith("exit status: 0 ")


def test_the_help_of_all_lists_every_verb_in_its_order() -> None:
    """With the first words that its function is documented with."""
    said = [line.split() for line in parser().format_help().splitlines()]
    listed = [line[0] for line in said if line and line[0] in VERBS]
    assert listed == list(VERBS)


@pytest.mark.parametrize("words", [[], ["nonsense"], ["recor"], ["record", "--dur", "1"], ["--nonsense", "record"]])
def test_wrong_usage_is_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is abbreviated: a script would break with the next option."""
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert "error: " in said.err.splitlines()[-1]


def test_a_verb_that_is_wrong_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Also those whose modules were not asked for."""
    with pytest.raises(SystemExit):
        main(["nonsense"])
    said = capsys.readouterr().err
    assert all(name in said for name in VERBS)


def test_what_comes_after_the_dashes_is_the_command() -> None:
    """Of stat a word before them is a recording, and options after them are the command's own."""
    assert parse(["stat", "--", "sleep", "--count", "3"]).command == ["sleep", "--count", "3"]
    assert parse(["stat", "DIR"]).command == []
    assert parse(["record", "--", "sleep", "-p", "3"]).command == ["sleep", "-p", "3"]
    assert parse(["record", "-p", "3", "echo", "--", "hi"]).command == ["echo", "--", "hi"]
    assert parse(["record", "--", "--", "hi"]).command == ["--", "hi"]
    assert parse(["record"]).command == []
    assert (parse(["stat", "--count", "3"]).count, parse(["stat", "--", "--count", "3"]).count) == (3, None)


def test_a_verb_is_imported_when_it_is_asked_for() -> None:
    """So that a verb more costs the others nothing."""
    code = "import sys; from command.main import parse; parse(['lab', 'list']); print('command.record' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_no_verb_waits_for_libraries_before_it_runs() -> None:
    """They take longer than all else at a start; the one control is that they would be seen."""
    assert not imported("command.main", *(f"command.{name}" for name in VERBS)) & HEAVY
    assert imported("reports.events") & HEAVY


def test_recording_and_the_lab_never_need_pandas() -> None:
    """What record, doctor and lab import when they run."""
    modules = ("tracer.recorder", "tracer.doctor", "reports.doctor", "lab.runner")
    assert not imported("command.main", *modules) & {"pandas", "numba", "matplotlib"}


def test_what_is_written_in_words_needs_nothing_to_draw() -> None:
    """Figures are for those who ask for them."""
    assert not imported("reports.text", "reports.document", "reports.table", "reports.source") & {"matplotlib"}


def test_a_command_gets_the_environment_that_was_given() -> None:
    """Not what this process sets for itself before numpy is imported."""
    code = """
import os, sys
from command import environment
from command.child import start_command
environment.prepare()
assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
child = start_command(["sh", "-c", 'echo "${OPENBLAS_NUM_THREADS-not set}"'])
sys.exit(child.wait())
"""
    given = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    for environment, said in ((given, "not set\n"), ({**given, "OPENBLAS_NUM_THREADS": "7"}, "7\n")):
        if said != "not set\n":
            code = code.replace('== "1"', '== "7"')
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == said


def test_usage_of_a_verb_is_told_by_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """What argparse cannot know is wrong ends as what it knows."""
    with pytest.raises(SystemExit) as end:
        main(["stat", "DIR", "--", "true"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "kvmreq stat: error: it takes a recording or a command, not both"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["record", "-p", "0"], "'0' is not a whole number from 1 on"),
        (["record", "--duration", "nan"], "'nan' is not a number of seconds, more than 0"),
        (["stat", "--interval", "0"], "'0' is not a number of seconds, more than 0"),
        (["record", "--duration", "soon"], "'soon' is not a number of seconds, more than 0"),
        (["record", "--ring", "3"], "'3' is not a power of two from 1 to 1024"),
        (["record", "--ring", "2048"], "'2048' is not a power of two from 1 to 1024"),
        (["record", "--ring", "²"], "'²' is not a power of two from 1 to 1024"),
        (["stat", "--vcpu", "-1"], "'-1' is not a whole number from 0 on"),
        (["lab", "run", "lost", "--vms", "x"], "'x'"),
    ],
)
def test_arguments_of_a_wrong_kind(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The word that is wrong is named."""
    with pytest.raises(SystemExit) as end:
        parse(words)
    assert end.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["record", "--format", "json"], "--format json is of what --follow prints: add --follow"),
        (["stat", "DIR", "--count", "3", "--engine", "kprobe"], "--count and --engine: a recording is counted as a"),
        (["report", "DIR", "--figures", "-"], "--figures are several files: name a directory"),
        (
            ["report", "DIR", "--html", "-", "--format", "csv"],
            "--html - and --format csv cannot both have standard output",
        ),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that was asked for is left out in silence."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", VERBS)
def test_help_names_the_exit_statuses_that_the_verb_has(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Only a judgement has those of what was lost."""
    with pytest.raises(SystemExit) as end:
        parse([name, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert ("3 something was lost" in told) is (name == "report")


def test_a_result_has_an_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a verb returns is what the process ends with, and its arguments are those that were given."""
    seen: list[argparse.Namespace] = []

    def run(arguments: argparse.Namespace) -> int:
        """Do nothing."""
        seen.append(arguments)
        return 3

    import command.doctor

    monkeypatch.setattr(command.doctor, "VERB", command.doctor.VERB._replace(run=run))
    assert main(["doctor", "--json"]) == 3
    assert seen[0].json is True
