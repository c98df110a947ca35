"""A soak: whenever a request was lost while `record` ran, `report` ends with 3 or 4, or `record` had ended with 1.

Under a random mix of faults. ``python -m tests.live.soak [RUNS [SEED]]``; a run that fails tells its seed, and
``python -m tests.live.soak 1 SEED`` is that run again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .session import COMMAND, PATIENCE_S, lab, run

_SIGNALS = tuple(
    signal.Signals[f"SIG{name}"]
    for name in ("INT", "TERM", "HUP", "KILL", "SEGV", "ABRT", "USR1", "PIPE", "XFSZ", "QUIT")
)
_CAPABILITIES = ("dac_read_search", "sys_ptrace", "perfmon", "bpf", "sys_admin", "syslog", "dac_override")
_TGKILL = 234  # x86-64
# By the options of prlimit.
_LIMITS = {"as": (200 << 20, 1200 << 20), "nofile": (8, 96), "fsize": (0, 60_000)}
#: How the shell makes a stream that is no use.
_STREAMS = (">&-", "2>&-", "<&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "| true")


@dataclass
class Faults:
    """What befalls one `record`."""

    words: list[str] = field(default_factory=list)  # what was chosen, to be told
    before: list[str] = field(default_factory=list)  # what runs the command
    streams: str = ""
    follow: bool = False
    limit: tuple[str, int] | None = None
    later: Callable[[subprocess.Popen[bytes], Path], None] | None = None
    command: bool = False


def _signal_to_a_thread(chance: random.Random) -> Callable[[subprocess.Popen[bytes], Path], None]:
    number, place = chance.choice(_SIGNALS), chance.random()

    def later(process: subprocess.Popen[bytes], _: Path) -> None:
        with contextlib.suppress(OSError):
            threads = sorted(int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir())
            ctypes.CDLL(None).syscall(_TGKILL, process.pid, threads[int(place * len(threads))], number)

    later.__name__ = number.name
    return later


def _kill_the_child(process: subprocess.Popen[bytes], _: Path) -> None:
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)


def _take_the_directory_away(_: subprocess.Popen[bytes], path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rename(path.with_name("away"))


def _chosen(chance: random.Random) -> Faults:
    faults = Faults()
    for kind in chance.sample(
        ("signal", "stream", "limit", "capability", "child", "directory"), chance.choice((1, 1, 2, 3))
    ):
        match kind:
            case "signal":
                faults.later = _signal_to_a_thread(chance)
            case "child":
                faults.command, faults.later = True, _kill_the_child
            case "directory":
                faults.later = _take_the_directory_away
            case "stream":
                faults.streams, faults.follow = chance.choice(_STREAMS), chance.random() < 0.5
            case "limit":
                which = chance.choice(list(_LIMITS))
                faults.limit = (which, chance.randint(*_LIMITS[which]))
            case _:
                dropped = [f"-{name}" for name in chance.sample(_CAPABILITIES, chance.randint(1, 3))]
                faults.before = ["setpriv", "--bounding-set", ",".join(dropped), "--inh-caps=-all"]
    told = (faults.later and faults.later.__name__, faults.streams, faults.limit, *faults.before[2:3])
    faults.words = [str(each) for each in told if each]
    return faults


def _started(path: Path, faults: Faults, errors: Path) -> subprocess.Popen[bytes]:
    limits = [] if faults.limit is None else ["prlimit", f"--{faults.limit[0]}={faults.limit[1]}"]
    words = [*faults.before, *limits, *COMMAND, "record", "-o", str(path), *(["--follow"] if faults.follow else [])]
    line = shlex.join([*words, *(["--", "sleep", "60"] if faults.command else [])])
    # Where there is a pipe the shell stays, and its status is that of the command.
    piped = faults.streams.startswith("|")
    line = f"set -o pipefail; {line} {faults.streams}" if piped else f"exec {line} {faults.streams}"

    with errors.open("wb") as told:
        return subprocess.Popen(["bash", "-c", line], stdout=subprocess.DEVNULL, stderr=told, start_new_session=True)


def _recorder(process: subprocess.Popen[bytes], piped: bool) -> int:
    # The process of the command itself: the shell's first child where there is a pipe.
    if piped:
        with contextlib.suppress(OSError, IndexError):
            return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    return process.pid


def one(seed: int, directory: Path) -> tuple[str, str | None]:
    """Return what came of one run, and what is wrong with that, if anything is."""
    chance = random.Random(seed)
    faults = _chosen(chance)
    path, errors = directory / "r", directory / "errors"
    process = _started(path, faults, errors)
    piped = faults.streams.startswith("|")
    try:
        end = time.monotonic() + PATIENCE_S
        while not (path / "meta.json").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        recording = (path / "meta.json").exists()
        if process.poll() is None:
            with lab("lost", "--repeat", "3"):
                pass
        # What is lost once the hooks are set and before the recorder is told to end is lost while it runs.
        lost = recording and process.poll() is None
        time.sleep(chance.choice((0, 0, 0.3, 1.3)))
        with contextlib.ExitStack() as stack:
            if chance.random() < 0.5:
                stack.enter_context(lab("lost", "--repeat", "50"))
            if faults.later is not None:
                target = process
                if piped:
                    target = subprocess.Popen(["true"])  # a Popen to hold the number of a process
                    target.wait()
                    target.pid = _recorder(process, piped)
                faults.later(target, path)
        time.sleep(chance.choice((0, 0.2, 1.2)))
        if process.poll() is None:
            with contextlib.suppress(OSError):
                os.kill(_recorder(process, piped), signal.SIGINT)
        try:
            status = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            return "hung", "it does not end"
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = errors.read_text(errors="replace")
    if "Traceback" in said:
        return "traceback", said
    if not lost:
        return "nothing lost meanwhile", None
    if status == 1:
        return "record ended with 1", None
    judged = run("report", path).returncode
    return f"report ended with {judged}", None if judged in (3, 4) else f"record ended with {status}: {said}"


def runs(count: int, seed: int) -> Iterator[tuple[int, Faults, str, str | None]]:
    """Yield of each run its seed, its faults, what came of it, and what is wrong with that."""
    for number in range(seed, seed + count):
        directory = Path(tempfile.mkdtemp(prefix="kvmreq-soak-"))
        try:
            came, wrong = one(number, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        yield number, _chosen(random.Random(number)), came, wrong


def main(words: list[str]) -> int:
    """Run the soak; return 1 if the invariant was broken."""
    count = int(words[0]) if words else 1000
    seed = int(words[1]) if words[1:] else random.SystemRandom().randrange(1 << 30)
    came: Counter[str] = Counter()
    broken = 0
    for number, faults, what, wrong in runs(count, seed):
        came[what] += 1
        if wrong is not None:
            broken += 1
            print(f"seed {number}, {', '.join(faults.words)}: {what}: {wrong}", flush=True)
    print(
        f"{count} runs from seed {seed}: {', '.join(f'{n} {what}' for what, n in came.most_common())}; {broken} wrong"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
