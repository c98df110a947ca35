"""kvmreq stat against slow and obvious oracles: numpy's quantiles on the times themselves, and a loop over events."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import exit_rules, stat
from probes.exits import Kind
from probes.schema import EVENT
from probes.schema import Kind as EventKind
from probes.stat import BITS, BUCKETS, ERROR, KEY, VALUE, WORDS, Counts

TIMES = st.one_of(st.integers(0, 64), st.integers(0, 1 << 20), st.integers(0, (1 << 40) - 1))


def c_bucket(ns: int) -> int:
    """Return what stat_bucket() of probes/programs/stat.c returns."""
    if ns < 1 << BITS:
        return ns
    above = ns.bit_length() - 1 - BITS
    return min((above << BITS) + (ns >> above), BUCKETS - 1)


def histogram(times: list[int]) -> npt.NDArray[Any]:
    """Return times as the kernel counts them."""
    return np.bincount([c_bucket(ns) for ns in times], minlength=BUCKETS).astype("u8")


@settings(deadline=None)
@given(st.lists(st.integers(0, 1 << 62), min_size=1))
def test_python_and_c_choose_the_same_bucket(times: list[int]) -> None:
    """Also for what is beyond the last one."""
    assert [exit_rules.bucket(ns) for ns in times] == [c_bucket(ns) for ns in times]


@given(st.lists(TIMES, min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_as_near_to_the_truth_as_help_says(times: list[int], q: float) -> None:
    """Numpy's inverted_cdf is the smallest time that a share q of all does not exceed."""
    truth = int(np.quantile(times, q, method="inverted_cdf"))
    told = stat.quantile(histogram(times), q, max(times))
    assert told is not None
    assert abs(told - truth) <= ERROR * truth
    assert told <= max(times)


def test_an_empty_histogram_has_no_quantile() -> None:
    """And an empty count no rows."""
    assert stat.quantile(np.zeros(BUCKETS, "u8"), 0.5, 0) is None
    assert stat.exits(Counts(), lambda kind, number, variant: "") == []
    assert stat.requests(Counts(), {}) == []


# Exits of a few vCPUs, reasons and times.
EXITS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from(Kind), st.integers(0, 2), TIMES), max_size=40)


def counted(exits: list[tuple[int, Kind, int, int]]) -> Counts:
    """Return what the kernel would hold after some exits."""
    rows = sorted({exit_[:3] for exit_ in exits})
    keys, values = np.zeros(len(rows), KEY), np.zeros(len(rows), VALUE)
    for place, row in enumerate(rows):
        times = [exit_[3] for exit_ in exits if exit_[:3] == row]
        keys[place] = (*row, 0)
        values[place] = (len(times), sum(times), max(times), histogram(times))
    vcpus = np.unique(keys["vcpu"])
    words = np.zeros(len(vcpus), WORDS)
    for place, vcpu in enumerate(vcpus.tolist()):
        words["raised"][place][10] = sum(exit_[0] == vcpu for exit_ in exits)
    return Counts(keys, values, vcpus, words)


@given(st.lists(EXITS, max_size=4), st.sampled_from([None, {1}, {2, 3}]))
def test_intervals_add_up_to_the_whole(parts: list[list[tuple[int, Kind, int, int]]], only: set[int] | None) -> None:
    """For every vCPU, reason and request; and no interval holds more than what came in it."""
    tally = stat.Tally()
    so_far: list[tuple[int, Kind, int, int]] = []
    name = "{0.name} {1}".format
    for part in parts:
        so_far += part
        new = tally.feed(counted(so_far), (), only)
        mine = [exit_ for exit_ in part if only is None or exit_[0] in only]
        assert {row.reason: row.count for row in stat.exits(new, lambda k, n, v: name(k, n))} == Counter(
            name(kind, number) for _, kind, number, _ in mine
        )
        for row in stat.exits(new, lambda k, n, v: name(k, n)):
            longest = max(ns for _, kind, number, ns in mine if name(kind, number) == row.reason)
            assert row.max_ns is not None
            assert longest <= row.max_ns <= longest * (1 + 2 * ERROR)
    mine = [exit_ for exit_ in so_far if only is None or exit_[0] in only]
    for row in stat.exits(tally.total, lambda k, n, v: name(k, n)):
        times = [ns for _, kind, number, ns in mine if name(kind, number) == row.reason]
        assert (row.count, row.timed, row.time_ns, row.max_ns) == (len(times), len(times), sum(times), max(times))
    assert sum(row.raised for row in stat.requests(tally.total, {})) == len(mine)
    for kind in Kind:
        shares = [row.share for row in stat.exits(tally.total, lambda k, n, v: "") if row.kind is kind]
        assert not shares or abs(sum(shares) - 1) < 1e-9 or not any(shares)


@given(EXITS, EXITS)
def test_a_vcpu_that_the_kernel_forgot_is_not_taken_away_again(
    first: list[tuple[int, Kind, int, int]], later: list[tuple[int, Kind, int, int]]
) -> None:
    """Its counts are told once, in the interval of its end."""
    tally = stat.Tally()
    tally.feed(counted(first), {1}, None)
    left = [exit_ for exit_ in first if exit_[0] != 1] + [exit_ for exit_ in later if exit_[0] != 1]
    tally.feed(counted(left), (), None)
    total = stat.exits(tally.total, lambda k, n, v: "")
    assert sum(row.count for row in total) == len(left) + sum(exit_[0] == 1 for exit_ in first)


# --- recordings ---------------------------------------------------------------------------------------------

_PLAYED = (
    EventKind.VCPU_NEW, EventKind.RUN_ENTER, EventKind.RUN_EXIT, EventKind.GUEST_ENTRY, EventKind.GUEST_EXIT,
    EventKind.IOCTL_ENTER,
)  # fmt: skip
# vCPU, kind, ns since the last event, argument, requests, and whether the event is lost.
STREAM = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(_PLAYED),
        st.integers(0, 5000),
        st.sampled_from([2, 5, 10 | (2**32 - 4) << 32]),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=60,
)


def stream(steps: list[tuple[int, EventKind, int, int, int, bool]], lossy: bool) -> npt.NDArray[np.void]:
    """Return the events that a recording would hold."""
    events, now = [], 1000
    seqs: Counter[int] = Counter()
    words: dict[int, int] = {}
    for vcpu, kind, gap, arg, word, lost in steps:
        now += gap
        seqs[vcpu] += 1
        event = np.zeros((), EVENT)
        event["vcpu"], event["kind"], event["time_ns"], event["arg"] = vcpu, kind, now, arg
        event["seq"] = seqs[vcpu] if vcpu else 0
        event["requests"], event["before"], event["since_ns"] = word, words.get(vcpu, 0), int(vcpu in words)
        words[vcpu] = word
        if not (lossy and lost):
            events.append(event)
    return np.array(events, EVENT)


def oracle(events: npt.NDArray[np.void]) -> tuple[Counter[Any], dict[Any, list[int]], Counter[Any], int]:
    """Return the exits, their times, the changes of requests, and what is missing: one event after the other."""
    begins = {EventKind.GUEST_EXIT: Kind.GUEST, EventKind.RUN_EXIT: Kind.USER}
    ends = {EventKind.GUEST_ENTRY: Kind.GUEST, EventKind.RUN_ENTER: Kind.USER}
    counts: Counter[Any] = Counter()
    times: dict[Any, list[int]] = {}
    changes: Counter[Any] = Counter()
    open_: dict[tuple[int, Kind], tuple[Any, int]] = {}
    seqs: Counter[int] = Counter()
    gaps = 0
    for event in events:
        vcpu, kind, now = int(event["vcpu"]), EventKind(int(event["kind"])), int(event["time_ns"])
        if not vcpu:
            continue
        if event["seq"] != seqs[vcpu] + 1:
            gaps += int(event["seq"]) - seqs[vcpu] - 1
            open_ = {key: value for key, value in open_.items() if key[0] != vcpu}
        seqs[vcpu] = int(event["seq"])
        for bit in range(2):
            was, is_ = int(event["before"]) >> bit & 1, int(event["requests"]) >> bit & 1
            if event["since_ns"] and was != is_:
                changes["raised" if is_ else "serviced", bit] += 1
        if kind in begins:
            which = begins[kind]
            error = (int(event["arg"]) >> 32) - (2**32 if int(event["arg"]) >> 63 else 0)
            # With an error the reason says nothing.
            number = 0 if which is Kind.USER and error < 0 else int(event["arg"]) & 0xFFFFFFFF
            key = (which, number, 7 if which is Kind.GUEST else abs(error))
            counts[key] += 1
            open_[vcpu, which] = key, now
        elif kind in ends and (vcpu, ends[kind]) in open_:
            key, began = open_.pop((vcpu, ends[kind]))
            times.setdefault(key, []).append(now - began)
    return counts, times, changes, gaps


@settings(deadline=None)
@given(STREAM, st.booleans(), st.lists(st.integers(0, 60), max_size=3))
def test_a_recording_is_counted_as_a_loop_would(
    steps: list[tuple[int, EventKind, int, int, int, bool]], lossy: bool, cuts: list[int]
) -> None:
    """However it is cut into segments, with and without losses."""
    events = stream(steps, lossy)
    told = stat.Recorded()
    for part in np.split(events, sorted(min(cut, len(events)) for cut in cuts)):
        told = stat.recorded(part, told, 7)
    counts, times, changes, gaps = oracle(events)
    rows = {(row.kind, row.number, row.variant): row for row in stat.exits(told.counts, lambda k, n, v: "")}
    assert {key: row.count for key, row in rows.items()} == counts
    assert {key: row.timed for key, row in rows.items() if row.timed} == {key: len(ns) for key, ns in times.items()}
    assert {key: row.time_ns for key, row in rows.items() if row.timed} == {key: sum(ns) for key, ns in times.items()}
    assert {key: row.max_ns for key, row in rows.items() if row.timed} == {key: max(ns) for key, ns in times.items()}
    requests = stat.requests(told.counts, {})
    assert (
        Counter({("raised", row.bit): row.raised for row in requests if row.raised})
        + Counter({("serviced", row.bit): row.serviced for row in requests if row.serviced})
        == changes
    )
    assert told.gaps == gaps
    assert len(told.carried) <= 3 * 3, "what is carried over is bounded by the vCPUs"
