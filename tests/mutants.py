"""Mutation tests of the rules: `make mutants`. Each rule is changed a little, and a test must notice.

Runs mutmut on a copy of the checkout, as plain Python. There @compiled is left out, which then does nothing, and for
which mutmut would leave the function alone. tests/mutants.toml names the modules, the tests, and each change that no
test can notice. Prints every other one that none does notice. What a module says outside its functions is not changed.

    python -m tests.mutants [MUTANT]...     names as mutmut has them: 'analysis.rules.x_cost*'
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
WANTED = CHECKOUT / "tests/mutants.toml"
COPIED = ("analysis", "bench", "lab", "probes", "reports", "tests", "tracer", "command", "setup.cfg")
DECORATOR = "@compiled\n"
# Whatever else became of a mutant was noticed: a test failed, or never came to an end.
UNNOTICED = ("survived", "no tests", "skipped", "suspicious")


@dataclass(frozen=True)
class Change:
    """What a mutant does: one line, or a statement of several, of one function."""

    function: str
    before: str
    after: str


def copy(wanted: dict[str, Any], place: Path, source: Path = CHECKOUT) -> None:
    """Make the copy that mutmut works on."""
    unwanted = shutil.ignore_patterns("__pycache__", ".*")
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, place / name, ignore=unwanted)
        else:
            shutil.copy(source / name, place / name)
    for module in wanted["modules"]:
        text = (place / module).read_text()
        (place / module).write_text(text.replace(DECORATOR, ""))
    listed = {
        "source_paths": sorted({module.split("/")[0] for module in wanted["modules"]}),
        "only_mutate": wanted["modules"],
        "also_copy": COPIED,
        "pytest_add_cli_args_test_selection": wanted["tests"],
        # The same examples for each mutant, so that a second run finds the same; few, for each mutant has its own run.
        "pytest_add_cli_args": ["--hypothesis-seed=0", "--hypothesis-profile=quick", "-p", "no:cacheprovider"],
    }
    settings = "".join(f"{key} =\n" + "".join(f"    {value}\n" for value in listed[key]) for key in listed)
    (place / "setup.cfg").write_text(f"{(source / 'setup.cfg').read_text()}\n[mutmut]\n{settings}")


def mutmut(place: Path, *words: str, told: bool = False) -> str:
    """Run mutmut on the copy; return what it prints, or show it."""
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *words],
        cwd=place,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    # It turns a wheel, in Braille, a line for each turn.
    lines = [line for line in done.stdout.splitlines() if line.strip() and not "\u2800" <= line[0] <= "\u28ff"]
    if done.returncode:
        sys.exit("\n".join([*lines, f"mutmut {words[0]} failed (above): do the tests pass?"]))
    if told:
        print(lines[-1])
    return "\n".join(lines)


def change(name: str, diff: str) -> Change:
    """Return what a mutant does, from its name and its diff."""
    module, _, function = name.rpartition("__mutmut_")[0].rpartition(".")
    # x_function, and xǁClassǁmethod
    path = function.removeprefix("x").removeprefix("_" if "ǁ" not in function else "ǁ").split("ǁ")
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++", "# "))]

    def of(sign: str) -> str:
        return "\n".join(line[1:].strip() for line in lines if line.startswith(sign))

    return Change(".".join([module, *path]), of("-"), of("+"))


def unnoticed(place: Path) -> list[tuple[str, Change]]:
    """Return the name of each mutant that no test noticed, and what it does."""
    results = [line.strip().rpartition(": ") for line in mutmut(place, "results").splitlines()]
    names = [name for name, _, status in results if status in UNNOTICED]
    return [(name, change(name, mutmut(place, "show", name))) for name in names]


def main(names: Sequence[str]) -> int:
    """Return 0 if every change of a rule is noticed, or explained."""
    wanted = tomllib.loads(WANTED.read_text())
    explained = {
        Change(each["function"], each["before"], each["after"]): each["why"] for each in wanted.get("equivalent", ())
    }
    with tempfile.TemporaryDirectory(prefix="kvmreq-mutants-") as folder:
        place = Path(folder)
        copy(wanted, place)
        mutmut(place, "run", f"--max-children={len(os.sched_getaffinity(0))}", *names, told=True)
        found = unnoticed(place)
    alive = [(name, does) for name, does in found if does not in explained]
    for name, does in alive:
        print(f"\n{does.function}: no test notices ({name})")
        for sign, text in (("-", does.before), ("+", does.after)):
            print("\n".join(f"  {sign} {line}" for line in text.splitlines()))
    # One that is noticed, or has gone, needs no explanation.
    idle = [] if names else [does for does in explained if does not in {does for _, does in found}]
    for does in idle:
        print(f"\n{does.function}: explained in tests/mutants.toml for nothing\n  + {does.after}")
    print(f"\n{len(found)} not noticed, {len(found) - len(alive)} of these explained")
    return 1 if alive or idle else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
