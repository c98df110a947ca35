"""Names of requests, kernel by kernel."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from probes.requests import BITS, STATE, STATELESS, TRIPLE_FAULT, UnknownRequest, doubt, names, selected, stateless
from tracer.recorder import doubts

RELEASES = {
    release: requests
    for release, requests in json.loads(files("probes").joinpath("kvm-requests.json").read_text()).items()
    if not release.startswith("_")
}
EVERY = {
    request["name"].removeprefix("KVM_REQ_").lower()
    for requests in RELEASES.values()
    for bit, request in requests.items()
    if bit.isdigit()
}


@pytest.mark.parametrize(
    "release",
    [
        "5.10.0-33-amd64",
        "6.1.0-25-amd64",
        "6.12.9-rc3+",
        "6.12.48+deb13-cloud-amd64",
        "6.1.0-0.deb11.21-rt-amd64",
        "6.8",
    ],
)
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
    assert list(selected(["nmi", "Triple_Fault"], known).values()) == sorted(
        ["nmi", "triple_fault"], key=lambda name: next(bit for bit, one in known.by_bit.items() if one == name)
    )


def test_all_has_the_bits_without_a_name_too() -> None:
    """A kernel can be newer than the table: a request that it does not know is watched, and shown by its bit."""
    known = names("6.12")
    every = selected(["all"], known)
    assert list(every) == list(range(BITS))
    assert {bit: name for bit, name in every.items() if bit in known.by_bit} == dict(known.by_bit)
    assert all(every[bit] == f"bit_{bit}" for bit in range(BITS) if bit not in known.by_bit)
    assert BITS - 1 not in known.by_bit
    assert selected([f"bit_{BITS - 1}"], known) == {BITS - 1: f"bit_{BITS - 1}"}


def test_a_bit_that_has_a_name_goes_by_it() -> None:
    """One request, one name: no bit is watched twice."""
    with pytest.raises(UnknownRequest):
        selected([f"bit_{TRIPLE_FAULT}"], names("6.12"))


@pytest.mark.parametrize("release", sorted(RELEASES))
def test_each_request_has_the_flags_of_its_release(release: str) -> None:
    """Flags of the same request differ between releases; pseudo requests are no bits."""
    known = names(release)
    assert set(known.flags) == set(known.by_bit.values())
    for bit, name in known.by_bit.items():
        assert known.flags[name] == set(RELEASES[release][str(bit)]["flags"])
    assert known.flags["tlb_flush"] == {"NO_WAKEUP", "WAIT"}
    assert known.flags["triple_fault"] == frozenset()


@pytest.mark.parametrize(
    ("release", "table"),
    [
        ("5.14.0-503.11.1.el9_5.x86_64", "5.10"),
        ("6.12.0-124.8.1.el10_1.x86_64", "6.12"),
        ("6.8.0-45-generic", "6.8"),
        ("5.15.0-1015-aws", "5.15"),
        ("6.1.112-122.189.amzn2023.x86_64", "6.1"),
    ],
)
def test_a_vendor_s_kernel_is_not_known_by_its_number(release: str, table: str) -> None:
    """Its KVM may be a newer one's."""
    known = names(release)
    assert (known.table, known.exact) == (table, False)
    assert "msr_filter_changed" in known.doubt(known.flags)


def test_intercepts_have_had_their_name_since_6_18() -> None:
    """Linux commit 6057497336bb took the bit of MSR filters for it."""
    assert {release: names(release).by_bit[37] for release in ("6.17.1", "6.18.44", "7.1")} == {
        "6.17.1": "msr_filter_changed", "6.18.44": "recalc_intercepts", "7.1": "recalc_intercepts",
    }  # fmt: skip


def test_a_name_is_doubted_where_it_is_shown_and_may_be_wrong() -> None:
    """Between releases of the table only what differs in them can be; of a newer kernel all but the triple fault."""
    assert names("6.1.0-25-amd64").doubt(EVERY) == ""
    ubuntu = names("6.8.0-45-generic")
    assert ubuntu.doubt(["triple_fault", "nmi", "tlb_flush", "bit_43"]) == ""
    assert ubuntu.doubt(["nmi", "vm_dead"]) == doubt("6.8", ["vm_dead"])
    assert "6.8" in doubt("6.8", ["vm_dead"])
    assert "vm_dead may be another request" in doubt("6.8", ["vm_dead"])
    newer = names("999.0")
    assert newer.doubt(["triple_fault", "bit_43"]) == ""
    assert "nmi, vm_dead may be others" in newer.doubt(["vm_dead", "nmi"])
    assert f"and {len(newer.flags) - 6} more may be others" in newer.doubt(newer.flags)
    assert doubt("999.0", ["nmi"]), "a recording of a newer kvmreq"


@pytest.mark.parametrize(
    ("name", "is_so"),
    [("tlb_flush", True), ("nmi", False), ("bit_3", True), ("bit_40", True), ("bit_20", False), ("bit_63", False)],
)
def test_a_bit_without_a_name_is_what_it_is_elsewhere(name: str, is_so: bool) -> None:
    """Harmless only if every request that it is on any kernel carries no state."""
    assert stateless(name) is is_so


@pytest.mark.parametrize(
    ("release", "wanted", "noted"),
    [
        ("6.12", ["all"], False),
        ("999.0", ["triple_fault"], False),
        ("999.0", ["nmi"], True),
        ("999.0", ["all"], True),
        ("6.8.0-45-generic", ["nmi"], False),
        ("6.8.0-45-generic", ["all"], True),
    ],
)
def test_a_recording_of_another_release_begins_with_a_note(release: str, wanted: list[str], noted: bool) -> None:
    """Except where only requests are watched whose bits are the same everywhere."""
    known = names(release)
    assert doubts(selected(wanted, known), known) == ([known.doubt(selected(wanted, known).values())] if noted else [])


def test_every_request_is_known_to_carry_state_or_not() -> None:
    """So that a request of a new kernel cannot be judged by default."""
    assert not set(STATE) & set(STATELESS)
    assert set(STATE) | set(STATELESS) == EVERY


def test_the_requests_that_a_save_must_keep() -> None:
    """Which, and by what word: analysis.lifecycle judges by it."""
    assert {name: state.carried_by for name, state in STATE.items()} == {
        "triple_fault": "vcpu_events_flag",
        "nmi": "vcpu_events",
        "smi": "nothing",
        "pmi": "nothing",
        "ioapic_eoi_exit": "nothing",
        "hv_crash": "nothing",
        "hv_reset": "nothing",
        "report_tpr_access": "nothing",
    }
    assert all(state.what and state.source for state in STATE.values())


def test_the_bits_that_carry_state_never_moved() -> None:
    """A release without a table of its own has the names of another one: its losses are of these bits all the same."""
    for name in STATE:
        bits = {
            int(bit)
            for requests in RELEASES.values()
            for bit, request in requests.items()
            if bit.isdigit() and request["name"] == f"KVM_REQ_{name.upper()}"
        }
        assert len(bits) == 1, name


def page_rows(heading: str) -> list[list[str]]:
    """Return the rows of the first table under a heading of docs/requests.md."""
    page = (Path(__file__).parents[2] / "docs" / "requests.md").read_text()
    lines = page.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def test_the_page_tells_of_every_request_as_the_tables_have_it() -> None:
    """Its bit, the releases that have it, its flags, and whether it carries state."""
    rows = {row[0]: row for row in page_rows("All requests")}
    assert set(rows) == EVERY
    order = list(RELEASES)
    for name, (_, bit, releases, flags, *_, state) in rows.items():
        in_force = {
            release: set(requests[bit]["flags"])
            for release, requests in RELEASES.items()
            if requests.get(bit, {}).get("name") == f"KVM_REQ_{name.upper()}"
        }
        first, last = min(in_force, key=order.index), max(in_force, key=order.index)
        assert list(in_force) == order[order.index(first) : order.index(last) + 1]
        since, until = first != order[0], last != order[-1]
        words = {(False, False): "all", (True, False): f"from {first}", (False, True): f"to {last}"}
        assert releases == words[since, until], name
        last_flags = {word.partition(" from ")[0] for word in flags.split(", ") if word}
        assert last_flags == in_force[last], name
        assert state.startswith("yes" if name in STATE else "no:"), name


def test_the_page_has_the_state_of_each_request_that_carries_some() -> None:
    """One row for each, no more."""
    assert [row[0] for row in page_rows("The requests that carry state")] == list(STATE)
    told = {name.strip(): row[0] for row in page_rows("What is lost, and what is not") for name in row[1].split(",")}
    words = {
        "vcpu_events_flag": "a flag of the payload",
        "vcpu_events": "always in the payload",
        "nothing": "in nothing",
    }
    assert {name: told[name] for name in STATE} == {name: words[state.carried_by] for name, state in STATE.items()}


@pytest.mark.parametrize("word", ["no_such", "", "triplefault", "10", "bit_64", "bit_05"])
def test_an_unknown_request_lists_those_that_exist(word: str) -> None:
    """So that the user need not look them up."""
    known = names("6.12")
    with pytest.raises(UnknownRequest) as failure:
        selected(["triple_fault", word], known)
    text = str(failure.value)
    assert repr(word) in text
    assert all(name in text for name in known.by_bit.values())
