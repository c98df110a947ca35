"""The compiled core says what the plain one says: the same source, each in a process of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from analysis import compiled
from analysis.lifecycle import Lifecycles
from analysis.ordering import Ordering
from analysis.periods import Periods
from analysis.stat import Recorded
from bench import busy
from probes import requests
from probes.schema import EVENT
from tests.property import test_ordering as ordering
from tests.property.model import NAMES, played
from tracer.loss import Loss

CHECKOUT = Path(__file__).resolve().parents[2]
STREAMS = 23
BUSY = 4_001


def _told(core: Lifecycles, batches: list[Any], loss: Loss) -> list[str]:
    parts = [part for batch in batches for part in core.feed(batch, loss=loss)]
    return [str(part.to_json()) for part in (*parts, *core.finish(loss))]


def _drawn_and_counted(batches: list[Any]) -> list[str]:
    periods, counts = Periods(), Recorded()
    for batch in batches:
        counts.feed(batch, 1)
    edges = [*map(periods.feed, batches), periods.finish()]
    told = counts.counts
    parts = (told.keys, told.values, told.vcpus, told.words, *(column for each in edges for column in each))
    return [*(str(part.tolist()) for part in parts), str((counts.events, counts.gaps, len(counts.carried)))]


def said() -> list[Any]:
    """Return what the core says of streams with losses, of hosts that keep no rule, and of busy guests."""
    chance, found = random.Random(7), list[Any]()
    for number in range(STREAMS):
        steps = [(chance.randrange(32), chance.randrange(8), chance.randrange(256)) for _ in range(60)]
        machine = played(steps, {chance.randrange(150) for _ in range(7)}, deep=bool(number % 2))
        events = np.array([event.record() for event in machine.events], EVENT)
        found += _told(Lifecycles(NAMES, full=bool(number % 2)), np.array_split(events, 3), machine.loss)
        found += _drawn_and_counted(np.array_split(events, 3))
        hosts = [(chance.randrange(18), chance.randrange(3), chance.randrange(256)) for _ in range(60)]
        rules = Ordering(ordering.NAMES, {}, ordering.PLAN, "full")
        rules.feed(ordering.batch(ordering.played(hosts, [], set())))
        found += [str(table.to_json()) for table in (rules.finish().rules, rules.finish().breaks)]
    names = requests.names(busy.RELEASE).by_bit
    batches = list(busy.busy(BUSY))
    return [*found, *_told(Lifecycles(names, full=True), batches, Loss()), *_drawn_and_counted(batches)]


def test_compiled_and_plain_say_the_same() -> None:
    code = "import json; from tests.property import test_plain as it; print(json.dumps([it.compiled.PLAIN, it.said()]))"
    plain = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    compiled.start()
    here = said()
    assert json.loads(plain.stdout) == [True, here]
    assert len(here) > 200 and any("lost" in part for part in here) and any("starved" in part for part in here)
