"""The page on compatibility says what the matrix has seen, and nothing else."""

from __future__ import annotations

import json

from tests.matrix.compatibility import DATA, PAGE, condensed, page


def test_the_page_is_what_its_data_give() -> None:
    """Nobody has edited it by hand."""
    assert PAGE.read_text() == page(json.loads(DATA.read_text()))


def _engine(name: str, **results: list[str]) -> dict[str, object]:
    return {
        "engine": name,
        "refused": None,
        "left_behind": [],
        "left_behind_by_kill": [],
        "unseen": [{"fact": "a thing", "hook": None, "unseen": "who did it"}],
        "scenarios": {scenario: {"result": one[0], "reasons": one[1:]} for scenario, one in results.items()},
        "witnesses": {},
    }


RESULT = {
    "series": "6.1",
    "release": "6.1.0-1-amd64",
    "version": "6.1.1-1",
    "date": "2026-11-25",
    "userspaces": {
        "debian12": {
            "bcc": "0.26",
            "engines": [
                {"engine": "fentry", "refused": "no BTF"},
                _engine("kprobe", lost=["exact"], rsm=["declared", "raised_by is kvm_run, not rsm"]),
            ],
        },
        "debian13": {"bcc": "0.31", "engines": [_engine("kprobe", lost=["wrong", "it is open"], rsm=["exact"])]},
    },
}


def test_user_spaces_that_differ_are_told_apart() -> None:
    """A verdict that is wrong in one of them is not hidden by the other."""
    text = page(condensed([RESULT]))
    assert "| lost | exact (debian12), wrong (debian13) |" in text
    assert "1 exact + 1 declared (debian12), 1 exact + 1 wrong (debian13)" in text


def test_what_is_unseen_and_refused_is_told_with_its_reason() -> None:
    """Once, with the kernels that it holds for."""
    older = {**RESULT, "series": "5.10", "release": "5.10.0-1-amd64"}
    text = page(condensed([RESULT, older]))
    assert "- a thing: who did it (5.10, 6.1)\n" in text
    assert "- fentry: no BTF (5.10 debian12, 6.1 debian12)\n" in text
    assert "- declared in rsm: raised_by is kvm_run, not rsm (5.10, 6.1)\n" in text
    assert text.index("## 5.10.0-1-amd64") < text.index("## 6.1.0-1-amd64")


def test_what_was_left_behind_is_told() -> None:
    """A page that is silent on it says that there was nothing."""
    boot = RESULT["userspaces"]["debian13"]  # type: ignore[index]
    left = {**_engine("ftrace", lost=["exact"]), "left_behind_by_kill": ["tracing instance kvmreq"]}
    userspaces = {"debian13": {**boot, "engines": [left]}}
    assert "- ftrace: tracing instance kvmreq (6.1 debian13)\n" in page(
        condensed([{**RESULT, "userspaces": userspaces}])
    )
    assert "Left behind" not in page(condensed([RESULT]))


def test_two_engines_at_the_same_time_are_told_of() -> None:
    """In both details, each with what differs, if anything."""
    both = {"engines": ["kprobe", "ftrace"], "scenarios": 40, "lifecycles": 41, "differences": []}
    full = {"engines": ["kprobe", "ftrace"], "transitions": 7, "differences": []}
    boot = RESULT["userspaces"]["debian13"]  # type: ignore[index]
    text = page(condensed([{**RESULT, "userspaces": {"debian13": {**boot, "together": both, "full": full}}}]))
    assert "- kprobe and ftrace: 40 scenarios, the same 41 lifecycles (6.1 debian13)\n" in text
    same = "kprobe and ftrace in detail full, beside tracefs: the same entries, exits and transitions of every request"
    assert f"- {same} (6.1 debian13)\n" in text
    full["differences"] = ["an exit"]
    text = page(condensed([{**RESULT, "userspaces": {"debian13": {**boot, "together": both, "full": full}}}]))
    assert "- kprobe and ftrace in detail full, beside tracefs: an exit (6.1 debian13)\n" in text
