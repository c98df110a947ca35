"""Does ``kvmreq stat`` count what the kernel's own tracefs counts, event for event?

``python3 -m tests.matrix.stat_counts [ENGINE ...]``: runs lab scenarios, each in a process of its own, while kvmreq
counts and an instance of tracefs records kvm_exit, kvm_entry and kvm_userspace_exit. Compares, for each process and
vCPU, every exit by its name, and how many of them ended. Exit status 1 says that something differs, or that an
engine that was asked for does not work. Imports no pandas.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from analysis import stat
from lab import runner
from lab.scenarios import SCENARIOS
from probes.exits import Kind
from probes.stat import HOOKS, Counts
from tracer import tracefs
from tracer.engines import choices
from tracer.errors import CannotTrace, KvmreqError
from tracer.loss import Loss
from tracer.stat import Statistics, Vcpu

EVENTS = ("kvm_exit", "kvm_entry", "kvm_userspace_exit")
_BUFFER_KB = 8192

# A line of the instance's `trace` with the option record-tgid: COMM-TID ( TGID) [CPU] FLAGS TIME: EVENT: WORDS
LINE = re.compile(r"-(?P<tid>\d+)\s+\(\s*(?P<pid>\d+|-+)\)\s+\[\d+\].*?: (?P<event>\w+): (?P<words>.*)$")
_EXIT = re.compile(r"vcpu (\d+) reason (.+?) (?:rip|info1) ")
_ENTRY = re.compile(r"vcpu (\d+)\b")
_USER = re.compile(r"reason (\S+) \((\d+)\)")


@dataclass
class Seen:
    """By (process, vCPU or -1, name): exits from the guest, those of them that ended, those to user space, entries."""

    exits: Counter[tuple[int, int, str]] = field(default_factory=Counter)
    ended: Counter[tuple[int, int, str]] = field(default_factory=Counter)
    user: Counter[tuple[int, int, str]] = field(default_factory=Counter)
    entries: Counter[tuple[int, int, str]] = field(default_factory=Counter)  # their name is empty


def parsed(lines: Iterator[str] | Sequence[str]) -> Seen:
    """Return what lines of tracefs tell.

    >>> seen = parsed([" a-7 ( 6) [000] d... 1.0: kvm_exit: vcpu 0 reason PF excp rip 0xfff0 info1 0",
    ...                " a-7 ( 6) [000] d... 1.1: kvm_entry: vcpu 0, rip 0xfff0",
    ...                " a-7 ( 6) [000] .... 1.2: kvm_userspace_exit: reason restart (4)"])
    >>> seen.exits, seen.ended == seen.exits, seen.user
    (Counter({(6, 0, 'PF excp'): 1}), True, Counter({(6, -1, 'EINTR'): 1}))
    """
    seen = Seen()
    inside: dict[tuple[int, int], str] = {}
    for line in lines:
        match = LINE.search(line)
        if not match or match["event"] not in EVENTS:
            continue
        pid, event, words = int(match["pid"]), match["event"], match["words"]
        if event == "kvm_exit" and (told := _EXIT.search(words)):
            seen.exits[pid, int(told[1]), told[2].strip()] += 1
            inside[pid, int(told[1])] = told[2].strip()
        elif event == "kvm_entry" and (told := _ENTRY.search(words)):
            seen.entries[pid, int(told[1]), ""] += 1
            name = inside.pop((pid, int(told[1])), None)
            if name is not None:
                seen.ended[pid, int(told[1]), name] += 1
        elif event == "kvm_userspace_exit" and (told := _USER.search(words)):
            failed = told[1] in ("restart", "error")  # the kernel's words for an errno
            seen.user[pid, -1, errno.errorcode[int(told[2])] if failed else told[1]] += 1
        else:
            raise ValueError(f"tracefs has an unknown line: {line}")
    return seen


@contextlib.contextmanager
def instance(events: Sequence[str] = EVENTS, probes: Mapping[str, str] = MappingProxyType({})) -> Iterator[Path]:
    """Yield an instance of tracefs that records events of KVM, and those of probes.

    These are given by name as kprobe_events has them: ``p`` or ``r``, and what stands behind the name.
    """
    with tracefs.root() as root:
        if root is None:
            raise KvmreqError("tracefs cannot be mounted", hint="run as root, on a kernel with tracefs")
        path = root / "instances" / f"kvmreq-counts-{os.getpid()}"
        group = f"kvmreq_counts_{os.getpid()}"
        path.mkdir()
        made: list[str] = []
        try:
            for name, (kind, rest) in ((name, definition.split(" ", 1)) for name, definition in probes.items()):
                tracefs.command(root, f"{kind}:{group}/{name} {rest}")
                made.append(name)
                (path / "events" / group / name / "enable").write_text("1")
            (path / "buffer_size_kb").write_text(str(_BUFFER_KB))
            (path / "options/record-tgid").write_text("1")
            for name in events:
                (path / "events/kvm" / name / "enable").write_text("1")
            yield path
        finally:
            (path / "events/enable").write_text("0")
            path.rmdir()
            for name in made:
                tracefs.command(root, f"-:{group}/{name}")


def lost(path: Path) -> int:
    """Return how many events the instance could not keep."""
    texts = (one.read_text() for one in path.glob("per_cpu/cpu*/stats"))
    return sum(int(number) for text in texts for number in re.findall(r"(?:overrun|dropped events): (\d+)", text))


def run_apart(name: str) -> int:
    """Run a scenario in a process of its own; return its number."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            runner.run(name)
            status = 0
        except BaseException as error:
            print(f"{name}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status:
        raise KvmreqError(f"the scenario {name} failed", hint=f"python3 -m lab run {name} runs it alone")
    return pid


def of_kvmreq(statistics: Statistics, counts: Counts, vcpus: dict[int, Vcpu]) -> Seen:
    """Return what kvmreq counted, in the same terms."""
    seen = Seen()
    for number, vcpu in vcpus.items():
        for row in stat.exits(stat.of(counts, [number]), statistics.name):
            if row.kind is Kind.GUEST:
                seen.exits[vcpu.guest.pid, vcpu.vcpu, row.reason] += row.count
                seen.ended[vcpu.guest.pid, vcpu.vcpu, row.reason] += row.timed
            else:
                seen.user[vcpu.guest.pid, -1, row.reason] += row.count
    return seen


def compare(engine: str, names: Sequence[str]) -> dict[str, Any]:
    """Run the scenarios under one engine and under tracefs; return the counts and every difference."""
    with instance() as path, Statistics(engine=engine) as statistics:
        runs: dict[int, str] = {}

        def over() -> bool:
            # Asked once before each reading: one scenario for each, so that counts are read while vCPUs come and go.
            if len(runs) < len(names):
                name = names[len(runs)]
                runs[run_apart(name)] = name
            return len(runs) == len(names)

        tally, parts = stat.Tally(), []
        vcpus: dict[int, Vcpu] = {}
        loss = Loss()
        for reading in statistics.readings(0.0, over):
            vcpus |= reading.vcpus
            parts.append(tally.feed(reading.counts, reading.ended, None))
            loss = reading.loss
        kernel = parsed((path / "trace").read_text().splitlines())
        overrun = lost(path)
        ours = of_kvmreq(statistics, stat.together(*parts), vcpus)
        unseen = list(reading.unseen)
        hook = statistics.exit_hook
    found: dict[str, Any] = {"engine": engine, "kvm_exit": hook, "overrun": overrun, "unseen": unseen}
    # A run that the kernel skipped ("missed") may have been about any process of the host: told, and no difference by
    # itself. What it cost these guests may not be more.
    found["loss"] = {"ring_full": loss.ring_full, "map_full": loss.map_full, "missed": loss.missed}
    for what in ("exits", "ended", "user"):
        mine, theirs = ({key: n for key, n in getattr(one, what).items() if key[0] in runs} for one in (ours, kernel))
        by_name: Counter[str] = Counter()
        for key, number in theirs.items():
            by_name[key[2]] += number
        found[what] = dict(by_name.most_common())
        found[f"{what}_differ"] = [
            {"scenario": runs[key[0]], "vcpu": key[1], "reason": key[2], "kvmreq": mine.get(key, 0), "tracefs": n}
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key, 0) != (n := theirs.get(key, 0))
        ]
    differ = [one["tracefs"] - one["kvmreq"] for what in ("exits", "user") for one in found[f"{what}_differ"]]
    # Without an end that was missed a time goes on to the next one.
    ended = sum(abs(one["tracefs"] - one["kvmreq"]) for one in found["ended_differ"])
    found["same"] = not (
        loss.ring_full
        or loss.map_full
        or overrun
        or min(differ, default=0) < 0
        or sum(differ) > loss.missed
        or ended > 2 * loss.missed
        or not found["user"]
    )
    return found


def scenarios() -> list[str]:
    """Return the scenarios of one VM that this kernel runs: of two in one process tracefs tells no difference.

    Nor does it tell whose vCPU a process runs that is another one than its VMM.
    """
    apart = {"memory_shared"}
    names = (one.name for one, why_not in runner.runnable() if why_not is None)
    return [name for name in names if SCENARIOS[name].vms == 1 and name not in apart]


def keep(what: str, results: Iterable[dict[str, Any]]) -> int:
    """Print the results, and keep them as they come where the matrix looks for them; return the exit status."""
    told: list[dict[str, Any]] = []
    for result in results:
        told.append(result)
        if out := os.environ.get("MATRIX_OUT"):
            (Path(out) / f"{what}.json").write_text(json.dumps(told, indent=1))
    print(json.dumps(told, indent=1))
    compared = [one for one in told if "refused" not in one]
    return 0 if compared and all(one["same"] for one in told) else 1


def _results(asked: Sequence[str]) -> Iterator[dict[str, Any]]:
    for engine in asked or [one.engine for one in choices() if one.why_not is None and one.engine in HOOKS]:
        try:
            yield compare(engine, scenarios())
        except CannotTrace as error:
            yield {"engine": engine, "refused": str(error), "same": not asked}


def main(words: Sequence[str]) -> int:
    """Compare under each engine; print and keep the results."""
    parser = argparse.ArgumentParser("python3 -m tests.matrix.stat_counts", description=__doc__)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="(default: each that works here)")
    return keep("stat", _results(parser.parse_args(words).engines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
