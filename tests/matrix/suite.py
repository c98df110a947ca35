"""The kernel matrix: every engine on stock kernels, each verdict compared with the truth. ``make matrix`` runs it.

One boot for each kernel and user space; inside.py records there, verdicts.py judges here. Results are kept as one JSON
file for each kernel, from which compatibility.py writes docs/compatibility.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.matrix import CHECKOUT, MatrixError, cache, debian13, kernels, missing_packages, vendors, verdicts, witnesses
from tests.matrix.boot import STOP, TIMED_OUT, BootError, Machine, Outcome, virtme_ng

SCHEMA = "kvmreq.matrix/1"
ENGINES = ("fentry", "kprobe", "tracepoint", "ftrace")
USERSPACES = ("debian12", "debian13")
AT_ONCE = 4  # boots, on a machine that has the CPUs: each takes one of them, and 3 GiB
TOGETHER = ("kprobe", "ftrace")  # with BPF and without it: what one gets wrong the other does not
LIMIT_S = 1200  # for one kernel and user space: a tenth of it on an idle machine

EPILOG = """\
Prints a line for each step and, last, how many scenarios and tests passed and failed.
Exit status: 0 all passed, 1 not, 2 usage.

examples:
  python3 -m tests.matrix.suite
  python3 -m tests.matrix.suite 5.10 7.3 --engines kprobe fentry --debian12 kprobe
"""


def offered() -> list[str]:
    """Return the engines that this kvmreq offers."""
    command = [sys.executable, "-m", "command", "record", "--help"]
    text = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    choices = re.search(r"--engine \{(.*?)\}", text)
    if choices is None:
        raise MatrixError("kvmreq record --help does not tell its engines")
    return choices[1].split(",")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        "python3 -m tests.matrix.suite",
        description=(__doc__ or "").partition("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    known = f"{', '.join(kernels.SERIES)}, or a number such as 7.3"
    add("kernels", nargs="*", metavar="KERNEL", help=f"{known}; by default {' '.join(kernels.DEFAULT)}")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="by default all")
    for name in USERSPACES:
        add(f"--{name}", nargs="*", choices=ENGINES, metavar="ENGINE", help=f"in {name} only these of the engines")
    add(
        "--witnesses",
        nargs="*",
        metavar="KERNEL",
        help="only on these kernels: KVM's own tests, kvm_amd loaded again, counts beside tracefs's, and two engines "
        "at the same time (default: all)",
    )
    add("--out", type=Path, help="where recordings and consoles are left (by default matrix in the cache)")
    add("--results", type=Path, help="where results are left (by default results in the cache)")
    add("--limit", type=int, default=LIMIT_S, metavar="S", help="seconds for each kernel and user space (%(default)s)")
    arguments = parser.parse_args(words)
    chosen = {name: getattr(arguments, name) for name in USERSPACES}
    arguments.userspaces = {
        name: [one for one in arguments.engines if engines is None or one in engines]
        for name, engines in chosen.items()
    }
    return arguments


def say(text: str) -> None:
    """Show progress: a line, as soon as it is known; in one piece, whichever thread it comes from."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class _Lines:
    """What a guest prints, shown line by line as it comes."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._rest = ""

    def __call__(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            say(f"{self._prefix}: {line}")


@dataclass
class Tally:
    """What is counted over all kernels."""

    passed: int = 0
    failed: int = 0

    def fail(self, failure: object) -> None:
        """Count something that is not as it must be, and say so."""
        self.failed += 1
        say(f"FAILED {failure}")


@dataclass(frozen=True)
class Wanted:
    """What is to be run on every kernel."""

    userspaces: Mapping[str, Sequence[str]]  # the engines to try in each
    unknown: Mapping[str, str]  # those that this kvmreq does not have, and why they may be refused
    witnesses: Sequence[Path]
    witnesses_on: Sequence[str] | None
    out: Path
    limit_s: int

    def wholly(self, series: str) -> bool:
        """Tell whether what takes long is wanted there, too: see --witnesses."""
        return self.witnesses_on is None or series in self.witnesses_on

    def machine(self, series: str, userspace: str) -> Machine:
        """Return the machine to boot."""
        given = self.witnesses if self.wholly(series) else ()
        root = Path("/") if userspace == "debian12" else debian13.root(lambda text: say(text.strip()))
        return Machine(root=root, limit_s=self.limit_s, given=given)


@dataclass(frozen=True)
class Job:
    """One boot, and the results of its kernel, among which its own belong."""

    series: str
    kernel: kernels.Kernel
    userspace: str
    engines: Sequence[str]
    result: dict[str, Any]


def run_kernels(names: Sequence[str], wanted: Wanted, tally: Tally) -> list[dict[str, Any]]:
    """Run everything on every kernel, as many boots at a time as there are CPUs, and return each kernel's results."""
    results, jobs = [], []
    for series in names:
        say(f"{series}: fetching")
        try:
            kernel = kernels.fetch(series)
        except MatrixError as error:
            tally.fail(f"{series}: {error}")
            continue
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "series": series,
            "release": kernel.release,
            "version": kernel.version,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "vendors": {module: vendors.functions(kernel, module) for module in ("kvm_amd", "kvm_intel")},
            "userspaces": {},
        }
        results.append(result)
        jobs += [Job(series, kernel, userspace, engines, result) for userspace, engines in wanted.userspaces.items()]
    # The longest first, so that none of them is alone at the end.
    jobs.sort(key=lambda job: -len(job.engines))
    with ThreadPoolExecutor(min(AT_ONCE, len(os.sched_getaffinity(0)))) as boots:
        for _ in boots.map(lambda job: run_boot(job, wanted, tally), jobs):
            pass
    return results


def run_boot(job: Job, wanted: Wanted, tally: Tally) -> None:
    """Boot a kernel with one user space, and add what came of it to the results."""
    where = f"{job.series} {job.userspace}"
    folder = wanted.out / job.kernel.release / job.userspace
    try:
        machine = wanted.machine(job.series, job.userspace)
        both = TOGETHER if wanted.wholly(job.series) and set(TOGETHER) <= set(job.engines) else ()
        outcome = _boot(where, job, machine, folder, both, wanted.wholly(job.series))
        boot = verdicts.of_boot(folder)
    except (MatrixError, OSError, ValueError) as error:
        tally.fail(f"{where}: {error}")
        job.result["userspaces"][job.userspace] = {"failed": str(error).splitlines()[0]}
        return
    boot["boot_s"], boot["seconds"] = round(outcome.boot_s), round(outcome.seconds)
    job.result["userspaces"][job.userspace] = boot
    _tell(where, boot, {**verdicts.may_be_refused(boot), **wanted.unknown}, tally)
    if outcome.status:
        what = f"did not end within {machine.limit_s} s" if outcome.status == TIMED_OUT else "failed"
        tally.fail(f"{where}: what runs inside {what}: {outcome.output[-2000:]}")


def _boot(where: str, job: Job, machine: Machine, folder: Path, both: Sequence[str], whole: bool) -> Outcome:
    # The interpreter that has what kvmreq imports: that of this process, or Debian 13's own.
    python = sys.executable if job.userspace == "debian12" else "python3"
    command = [python, "-m", "tests.matrix.inside", *job.engines, *(("--together", *both) if both else ())]
    if whole:
        command += ["--again", "--counts"]
    say(f"{where}: booting {job.kernel.release} ({job.kernel.version})")
    try:
        return machine.run(job.kernel, command, folder, _Lines(where))
    except BootError as error:
        if STOP.is_set():
            raise
        say(f"{error}\n{where}: did not come up, and is tried once more")
        return machine.run(job.kernel, command, folder, _Lines(where))


def _tell(where: str, boot: Mapping[str, Any], may_be_refused: Mapping[str, str], tally: Tally) -> None:
    for engine in boot["engines"]:
        name = f"{where} {engine['engine']}"
        if engine["refused"] is not None:
            say(f"{name}: refused: {engine['refused']}")
            continue
        counts = verdicts.counts({"engines": [engine]})
        words = ", ".join(f"{counts[result]} {result}" for result in verdicts.RESULTS if counts[result])
        say(f"{name}: {words or 'nothing judged'}; {round(engine['seconds'])} s")
    counts = verdicts.counts(boot)
    tally.passed += counts[verdicts.EXACT] + counts[verdicts.DECLARED]
    for one in boot.get("counts", ()):
        told = ", ".join(f"{number} {what}" for what, number in sorted(one["counted"].items()))
        differ = "NOT as tracefs" if one["differences"] else "as tracefs"
        say(f"{where} {one['engine']} {one['what']}: {told or 'nothing counted'}: {differ}")
        tally.passed += not one["differences"]
    if both := boot.get("together"):
        differ = f"{len(both['differences'])} differences" if both["differences"] else "no difference"
        say(f"{where} {' and '.join(both['engines'])} at the same time: {both['scenarios']} scenarios, {differ}")
        tally.passed += not both["differences"]
    if full := boot.get("full"):
        differ = f"{len(full['differences'])} differences" if full["differences"] else "no difference"
        if "transitions" in full:
            differ += f" in {full['transitions']} transitions of requests and {full['entries']} entries of the guest"
            differ += f", {full['excused']} seen by one of them only"
        say(f"{where} {' and '.join(full['engines'])} at the same time, in detail full: {differ}")
        tally.passed += not full["differences"]
    for failure in verdicts.failures(where, boot, may_be_refused):
        tally.fail(failure)
    say(f"{where}: boot {boot['boot_s']} s, {boot['seconds']} s in all")


def left_out(arguments: argparse.Namespace) -> list[str]:
    """Return what was not asked for, in words: a restricted run must not look like a whole one."""
    lines = [
        f"{engine} in {userspace}"
        for userspace, engines in arguments.userspaces.items()
        for engine in ENGINES
        if engine not in engines
    ]
    lines += [f"kernel {one}" for one in kernels.DEFAULT if one not in arguments.kernels]
    if arguments.witnesses is not None:
        lines += [
            f"KVM's own tests, kvm_amd loaded again, counts beside tracefs's, and two engines at the same time on {one}"
            for one in arguments.kernels
            if one not in arguments.witnesses
        ]
    return lines


def _end(*_: object) -> None:
    STOP.set()  # every thread ends its QEMU
    sys.exit(143)


def main(words: Sequence[str]) -> int:
    """Run the matrix."""
    signal.signal(signal.SIGTERM, _end)
    arguments = parse(words)
    arguments.kernels = arguments.kernels or list(kernels.DEFAULT)
    began = time.monotonic()
    tally = Tally()
    results = arguments.results or cache() / "results"
    try:
        wanted = _prepare(arguments)
    except MatrixError as error:
        print(error, file=sys.stderr)
        return 1
    results.mkdir(parents=True, exist_ok=True)
    try:
        for result in run_kernels(arguments.kernels, wanted, tally):
            (results / f"{result['release']}.json").write_text(json.dumps(result, indent=1) + "\n")
    finally:
        STOP.set()
    for line in left_out(arguments):
        say(f"left out: {line}")
    say(f"results in {results}, recordings in {wanted.out}; {time.monotonic() - began:.0f} s")
    say(f"{tally.passed} passed, {tally.failed} failed")
    return 1 if tally.failed or not tally.passed else 0


def _prepare(arguments: argparse.Namespace) -> Wanted:
    if missing := missing_packages():
        raise MatrixError(f"Debian packages are missing: make matrix installs {' '.join(missing)}")
    virtme_ng()
    for name in arguments.kernels:
        kernels.series(name)
    built: Sequence[Path] = ()
    if arguments.witnesses is None or arguments.witnesses:
        built = witnesses.programs(lambda text: say(text.strip()))
    known = offered()
    return Wanted(
        userspaces={name: engines for name, engines in arguments.userspaces.items() if engines},
        unknown={engine: "this kvmreq has none of that name" for engine in ENGINES if engine not in known},
        witnesses=built,
        witnesses_on=arguments.witnesses,
        out=arguments.out or cache() / "matrix",
        limit_s=arguments.limit,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
