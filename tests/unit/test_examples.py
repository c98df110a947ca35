"""How many examples a property test takes: as many as it says, and a fifth of that in `make check`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
# A test that says how many, and one that does not, and how often each ran.
TEST = """
from hypothesis import given, settings, strategies as st
from tests.examples import examples

ran = [0, 0]

@settings(max_examples=examples(200))
@given(st.integers())
def test_that_says(number):
    ran[0] += 1

@given(st.integers())
def test_that_does_not(number):
    ran[1] += 1

def test_how_often():
    print("ran", *ran)
"""


@pytest.mark.parametrize(("options", "ran"), [([], "ran 200 100"), (["--hypothesis-profile", "quick"], "ran 40 20")])
def test_a_profile_is_for_all_of_them(options: list[str], ran: str, tmp_path: Path) -> None:
    """The thorough numbers are what `make test` takes."""
    (tmp_path / "test_it.py").write_text(TEST)
    own = f"-m pytest -q -s -c {CHECKOUT}/setup.cfg --override-ini=testpaths= -p tests.conftest".split()
    done = subprocess.run(
        [sys.executable, *own, *options, str(tmp_path)], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ran in done.stdout
