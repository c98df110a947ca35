"""Columns are written once: the page says what they say, and no two that one record needs share a place."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from analysis import columns
from analysis.lifecycle import LIFECYCLE, SHUTDOWN, empty_lifecycles, empty_shutdowns

PAGE = Path(__file__).resolve().parents[2] / "docs/lifecycle.md"
KINDS = (columns.VCPU, columns.VM, columns.PENDING, columns.KICK, columns.THREAD, columns.BREAK, columns.SHUTDOWN)


def test_the_page_is_that_of_the_columns() -> None:
    """python -m analysis.columns > docs/lifecycle.md."""
    assert PAGE.read_text() == columns.page()


def test_columns_of_one_kind_share_no_place() -> None:
    fields = columns.PLACE.fields
    assert fields is not None
    for kind in KINDS:
        spans = [(fields[name][1], fields[name][1] + fields[name][0].itemsize) for name in (*_names(kind), "next")]
        assert all(one[1] <= other[0] or other[1] <= one[0] for one, other in combinations(spans, 2))
        assert max(end for _, end in spans) <= columns.PLACE.itemsize


def test_places_are_no_larger_than_what_they_hold() -> None:
    """They share: a place is as large as its largest kind, with little to spare."""
    largest = max(sum(columns.PLACE[name].itemsize for name in _names(kind)) for kind in KINDS)
    assert columns.PLACE.itemsize < 1.3 * largest


def test_empty_tables_have_every_column() -> None:
    assert list(empty_lifecycles()) == list(LIFECYCLE) == _names(columns.FINISHED)
    assert list(empty_shutdowns()) == list(SHUTDOWN) == _names(columns.SHUTDOWN)


def _names(kind: tuple[columns.Column, ...]) -> list[str]:
    return [column.name for column in kind]
