"""Names of requests, kernel by kernel."""

from __future__ import annotations

import re

import pytest

from probes.requests import TRIPLE_FAULT, UnknownRequest, names, selected


@pytest.mark.parametrize("release", ["5.10.0-33-amd64", "6.1.0-25-amd64", "6.12.9-rc3+"])
def test_triple_fault_never_moved(release: str) -> None:
    """The table knows these releases themselves."""
    known = names(release)
    assert known.exact
    assert known.table == ".".join(release.split(".")[:2])
    assert known.by_bit[TRIPLE_FAULT] == "triple_fault"


def test_an_unknown_release_takes_the_newest_before_it() -> None:
    """And says that the names are not its own."""
    newest = names("999.0")
    assert not newest.exact
    before = names("6.12.0")
    assert names(f"{newest.table}.5") == newest._replace(exact=True)
    assert tuple(map(int, newest.table.split("."))) >= tuple(map(int, before.table.split(".")))


@pytest.mark.parametrize("release", ["2.6.32", "", "weird"])
def test_a_release_before_the_table_takes_the_oldest(release: str) -> None:
    """Never an exception: the bit of a triple fault is the same everywhere."""
    known = names(release)
    assert not known.exact
    assert known.by_bit[TRIPLE_FAULT] == "triple_fault"


def test_names_are_lower_case_and_unique() -> None:
    """The contract: KVM's name in lower case, without KVM_REQ_."""
    known = names("6.12").by_bit
    assert len(set(known.values())) == len(known) > 20
    assert all(re.fullmatch(r"[a-z0-9_]+", name) and not name.startswith("kvm_req_") for name in known.values())
    assert all(0 <= bit < 64 for bit in known)


def test_requests_are_selected_by_any_spelling() -> None:
    """In the order of their bits."""
    known = names("6.12")
    assert selected(["triple_fault"], known) == {TRIPLE_FAULT: "triple_fault"}
    assert selected([" KVM_REQ_TRIPLE_FAULT "], known) == {TRIPLE_FAULT: "triple_fault"}
    assert selected(["all"], known) == dict(sorted(known.by_bit.items()))
    assert list(selected(["nmi", "Triple_Fault"], known).values()) == sorted(
        ["nmi", "triple_fault"], key=lambda name: next(bit for bit, one in known.by_bit.items() if one == name)
    )


@pytest.mark.parametrize("word", ["no_such", "", "triplefault", "10"])
def test_an_unknown_request_lists_those_that_exist(word: str) -> None:
    """So that the user need not look them up."""
    known = names("6.12")
    with pytest.raises(UnknownRequest) as failure:
        selected(["triple_fault", word], known)
    text = str(failure.value)
    assert repr(word) in text
    assert all(name in text for name in known.by_bit.values())
