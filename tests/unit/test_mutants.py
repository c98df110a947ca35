"""What `make mutants` makes of what mutmut says: the copy that it works on, and which mutants fail it."""

from __future__ import annotations

import configparser
import tomllib
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import CHECKOUT, WANTED, Change, change

DIFF = """--- analysis/rules.py
+++ analysis/rules.py
@@ -1,4 +1,4 @@
 def gap(pending: Record, missing: int) -> None:
-    pending.gap_lost += max(missing, 0)
+    pending.gap_lost += max(missing, 1)
"""
DOES = Change("analysis.rules.gap", "pending.gap_lost += max(missing, 0)", "pending.gap_lost += max(missing, 1)")
NAME = "analysis.rules.x_gap__mutmut_16"


def test_the_copy_is_plain_python_and_mutmut_is_told_what_to_do(tmp_path: Path) -> None:
    wanted = tomllib.loads(WANTED.read_text())
    mutants.copy(wanted, tmp_path)
    for module in wanted["modules"]:
        assert "@compiled" in (CHECKOUT / module).read_text()
        assert (tmp_path / module).read_text() == (CHECKOUT / module).read_text().replace("@compiled\n", "")
    assert "@compiled\n" in (tmp_path / "analysis/walk.py").read_text()
    assert not list(tmp_path.glob("**/__pycache__"))
    settings = configparser.ConfigParser()
    settings.read(tmp_path / "setup.cfg")
    told = settings["mutmut"]
    assert told["only_mutate"].split() == wanted["modules"] and told["source_paths"].split() == ["analysis"]
    tests = told["pytest_add_cli_args_test_selection"].split()
    assert tests == wanted["tests"] and all((tmp_path / test).is_file() for test in tests)
    assert "tool:pytest" in settings, "warnings are errors there, too"


@pytest.mark.parametrize(
    ("name", "function"),
    [
        (NAME, "analysis.rules.gap"),
        ("analysis.rules.x__one_of__mutmut_3", "analysis.rules._one_of"),
        ("analysis.passes.xǁPassǁfeed__mutmut_1", "analysis.passes.Pass.feed"),
    ],
)
def test_what_a_mutant_does_is_told_without_its_number(name: str, function: str) -> None:
    """The number is another one as soon as a line is added above."""
    assert change(name, DIFF) == Change(function, DOES.before, DOES.after)


EXPLAINED = f"""
[[equivalent]]
function = "{DOES.function}"
before = "{DOES.before}"
after = "{DOES.after}"
why = "..."
"""


@pytest.mark.parametrize(
    ("statuses", "explained", "names", "failed", "said"),
    [
        ({NAME: "killed"}, "", (), 0, "0 not noticed, 0 of these explained"),
        ({NAME: "timeout"}, "", (), 0, "0 not noticed"),
        ({NAME: "survived"}, "", (), 1, f"analysis.rules.gap: no test notices ({NAME})\n  - {DOES.before}"),
        ({NAME: "no tests"}, "", (), 1, "1 not noticed, 0 of these explained"),
        ({NAME: "survived"}, EXPLAINED, (), 0, "1 not noticed, 1 of these explained"),
        ({NAME: "killed"}, EXPLAINED, (), 1, "analysis.rules.gap: explained in tests/mutants.toml for nothing"),
        ({NAME: "killed"}, EXPLAINED, ("analysis.rules.x_save*",), 0, "0 not noticed"),
    ],
)
def test_a_mutant_that_no_test_notices_fails_unless_it_is_explained(
    statuses: dict[str, str],
    explained: str,
    names: tuple[str, ...],
    failed: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And an explanation that nothing needs fails, where all mutants were tried."""

    def mutmut(place: Path, *words: str, told: bool = False) -> str:
        said = {"results": "\n".join(f"    {name}: {status}" for name, status in statuses.items()), "show": DIFF}
        return said.get(words[0], "")

    (tmp_path / "mutants.toml").write_text(f"modules = []\ntests = []\n{explained}")
    monkeypatch.setattr(mutants, "WANTED", tmp_path / "mutants.toml")
    monkeypatch.setattr(mutants, "copy", lambda wanted, place: None)
    monkeypatch.setattr(mutants, "mutmut", mutmut)
    assert mutants.main(names) == failed
    assert said in capsys.readouterr().out
