"""analysis.compiled, as its users meet it: in processes of their own, on a checkout with a core of two functions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCHEMA = "STEP = 2\n"
RULES = """
from analysis.compiled import compiled
from probes.schema import STEP

@compiled
def cost(record):
    if record.kind == 1:
        return STEP
    return 0
"""
WALK = """
import numpy as np
from analysis.compiled import compiled
from analysis.rules import cost

EVENT = np.dtype((np.record, [("kind", "u4"), ("arg", "u8")]))

@compiled
def count(events):
    total = 0
    for index in range(len(events)):
        total += cost(events[index])
    return total

def warm():
    events = np.zeros(3, EVENT)
    events["kind"] = 1
    return int(count(events))
"""
# What the core came to, and where from.
RUN = """
from analysis import compiled, walk
compiled.start()
total = walk.warm()
print(total, "plain" if not hasattr(walk.count, "stats") else "kept" if walk.count.stats.cache_hits else "compiled")
"""
# Whom nothing of root's lets in, but who can reach pytest's folders.
AS_NOBODY = (
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: sudo make test")


@dataclass
class Checkout:
    """A checkout, and the home of the user who runs it."""

    root: Path
    home: Path

    @property
    def beside(self) -> list[Path]:
        """What is kept beside the code."""
        return sorted((self.root / "analysis/__pycache__").glob("*.compiled"))

    @property
    def at_home(self) -> list[Path]:
        """What is kept in the user's folder."""
        return sorted(self.home.glob(".cache/kvmreq/*/*.compiled"))

    def start(
        self, code: str = RUN, *, env: Mapping[str, str | None] = {}, before: Sequence[str] = (), options: str = ""
    ) -> subprocess.Popen[str]:
        """Run code in a process of its own; None takes a variable away."""
        wanted = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.home), **env}
        return subprocess.Popen(
            [*before, sys.executable, "-W", "error", *options.split(), "-c", code],
            cwd=self.root,
            env={name: value for name, value in wanted.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, code: str = RUN, *, env: Mapping[str, str | None] = {}, before: Sequence[str] = (), options: str = ""
    ) -> str:
        """Return what a run that works prints; it has nothing to say besides."""
        return told(self.start(code, env=env, before=before, options=options))


def told(process: subprocess.Popen[str]) -> str:
    """Return what a process that works prints."""
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    return out.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """Never run, so that nothing is kept."""
    new = Checkout(tmp_path / "checkout", tmp_path / "home")
    for folder in ("analysis", "probes", "tracer"):
        (new.root / folder).mkdir(parents=True)
    for name in (
        "analysis/__init__.py",
        "analysis/compiled.py",
        "analysis/kept.py",
        "analysis/sources.py",
        "tracer/__init__.py",
        "tracer/errors.py",
    ):
        shutil.copy(CHECKOUT / name, new.root / name)
    (new.root / "probes/schema.py").write_text(SCHEMA)
    (new.root / "analysis/rules.py").write_text(RULES)
    (new.root / "analysis/walk.py").write_text(WALK)
    (new.root / "analysis/passes.py").write_text("from analysis import walk\n\ndef warm():\n    walk.warm()\n")
    new.home.mkdir()
    return new


def test_the_next_start_loads_what_this_one_compiled(checkout: Checkout) -> None:
    """Beside the code, and wherever the checkout is moved to; for any x86-64, unless numba was told which."""
    assert checkout.run("from analysis.compiled import warm; warm()") == ""
    assert [path.name.split("-")[1] for path in checkout.beside] == ["rules.cost", "walk.count"]
    assert checkout.at_home == []
    checkout.root = checkout.root.rename(checkout.root.with_name("moved to a place with spaces"))
    assert checkout.run() == "6 kept"
    assert checkout.run(env={"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": ""}) == "6 compiled"
    assert checkout.run(env={"NUMBA_BOUNDSCHECK": "1"}) == "6 compiled"
    assert checkout.run() == "6 kept"


def test_plain_python_gives_the_same_and_needs_no_numba(checkout: Checkout) -> None:
    """numba's own switch: for those who look for an error, and for mutation tests."""
    without = f"import sys; sys.modules['numba'] = None\n{RUN}"
    assert checkout.run(without, env={"NUMBA_DISABLE_JIT": "1"}) == "6 plain"
    assert checkout.beside == []


@pytest.mark.parametrize(
    ("file", "old", "new", "total"),
    [("analysis/rules.py", "kind == 1", "kind != 1", "0"), ("probes/schema.py", "2", "5", "15")],
)
def test_what_a_caller_holds_of_another_file_is_compiled_again(
    checkout: Checkout, file: str, old: str, new: str, total: str
) -> None:
    """numba's own cache would look at walk.py alone, and go on with the rule or the constant of before."""
    # -B: of two changes in one second Python itself keeps the bytecode of the first.
    assert checkout.run(options="-B") == "6 compiled"
    before = checkout.at_home
    path = checkout.root / file
    path.write_text(path.read_text().replace(old, new))
    assert checkout.run(options="-B") == f"{total} compiled"
    assert len(before) == len(checkout.at_home) == 2
    assert not set(before) & set(checkout.at_home)


def test_source_that_changes_while_it_runs_is_not_kept(checkout: Checkout) -> None:
    """It would be the old rule under the new one's name."""
    change = "from pathlib import Path\nfile = Path('analysis/rules.py')\nfile.write_text(file.read_text() + '#')\n"
    assert checkout.run(f"from analysis import walk\n{change}{RUN}") == "6 compiled"
    assert checkout.beside == checkout.at_home == []


def test_a_damaged_file_is_replaced(checkout: Checkout) -> None:
    """Also where only machine code is another, which LLVM would run."""
    checkout.run()
    whole = {path: path.read_bytes() for path in checkout.beside}
    middle = max(map(len, whole.values())) // 4
    for damage in (
        lambda data: b"no machine code",
        lambda data: data[: len(data) // 2],
        lambda data: data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
    ):
        for path, data in whole.items():
            path.write_bytes(damage(data))
        assert checkout.run() == "6 compiled"
        assert {path: path.read_bytes() for path in checkout.beside}.keys() == whole.keys()
    assert checkout.run() == "6 kept"


def test_starts_at_once_do_no_harm(checkout: Checkout) -> None:
    """Each compiles, and whoever writes last writes the same."""
    assert {told(process) for process in [checkout.start() for _ in range(2)]} <= {"6 compiled", "6 kept"}
    assert [path.name.split("-")[1] for path in checkout.beside] == ["rules.cost", "walk.count"]
    assert checkout.run() == "6 kept"


def test_without_bytecode_the_source_stays_clean(checkout: Checkout) -> None:
    """The user's own folder is no source; what is beside the code is used, and not added to."""
    assert checkout.run(env={"PYTHONDONTWRITEBYTECODE": "1"}) == "6 compiled"
    assert not (checkout.root / "analysis/__pycache__").exists()
    assert checkout.run(options="-B") == "6 kept"
    shutil.rmtree(checkout.home / ".cache")
    checkout.run()
    assert checkout.run(options="-B") == "6 kept"
    assert checkout.at_home == []


def test_a_full_disk_leaves_nothing_half_written(checkout: Checkout) -> None:
    """A file that may have no bytes is as good as a disk without any; Python's own bytecode is not written either."""
    assert checkout.run(before=("prlimit", "--fsize=0")) == "6 compiled"
    assert checkout.beside == checkout.at_home == []


@needs_root
def test_another_user_uses_what_root_compiled_and_keeps_the_rest_at_home(checkout: Checkout) -> None:
    """Whose home it is matters: sudo may keep HOME, and what lies there is code that would run as root."""
    assert checkout.run(before=AS_NOBODY) == "6 compiled"  # HOME is root's
    os.chown(checkout.home, 65534, 65534)
    assert checkout.run(before=AS_NOBODY) == "6 compiled"
    assert checkout.run(before=AS_NOBODY) == "6 kept"
    assert checkout.beside == []
    assert len(checkout.at_home) == 2
    assert checkout.run() == "6 compiled"  # by root, whom nobody's home serves nothing
    shutil.rmtree(checkout.home / ".cache")
    assert checkout.run(before=AS_NOBODY) == "6 kept"
    assert not (checkout.home / ".cache").exists()


@needs_root
def test_with_no_place_to_keep_it_all_works(checkout: Checkout) -> None:
    """HOME may be unset, or not exist, in which case it is not made; or hold a folder that another user fills."""
    nowhere, shared = checkout.home.with_name("nowhere"), checkout.home.with_name("shared")
    (shared / ".cache/kvmreq").mkdir(parents=True)
    os.chown(shared, 65534, 65534)
    homes = (None, str(nowhere), str(shared))
    starts = [checkout.start(before=AS_NOBODY, env={"HOME": home}) for home in homes]
    assert {told(process) for process in starts} == {"6 compiled"}
    assert not nowhere.exists()
    assert list(checkout.root.parent.rglob("*.compiled")) == []


@needs_root
def test_a_file_system_that_is_read_only_is_no_error(checkout: Checkout) -> None:
    """Not for root either, whom no mode of a folder stops."""
    readonly = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'
    before = ("unshare", "--mount", "sh", "-c", readonly, str(checkout.root))
    if subprocess.run([*before, "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounts nothing here: needs CAP_SYS_ADMIN")
    starts = [checkout.start(before=before), checkout.start(before=before, env={"HOME": "/proc"})]
    assert [told(process) for process in starts] == ["6 compiled", "6 compiled"]
    assert checkout.run(before=before) == "6 kept"
    assert checkout.beside == []


def test_a_numba_that_has_become_another_compiles_each_time(checkout: Checkout) -> None:
    """What is kept is made of parts that numba does not promise to keep."""
    change = "from numba.core.compiler import CompileResult\ndel CompileResult._reduce, CompileResult._rebuild\n"
    checkout.run()
    assert checkout.run(f"{change}{RUN}") == "6 compiled"
    assert checkout.run() == "6 kept"


def test_numba_warns_no_user(checkout: Checkout) -> None:
    """-W error would make an error of it."""
    warn = "import warnings\nfrom numba.core.errors import NumbaPerformanceWarning\n"
    warn += "warnings.warn('slow', NumbaPerformanceWarning)\nprint('quiet')"
    assert checkout.run(f"from analysis import kept\n{warn}") == "quiet"


def command(code: str, *, numba: str) -> tuple[int, str, str]:
    """Run code as the command does, in this checkout, with something in numba's place."""
    lines = f"import sys\nsys.modules['numba'] = {numba}\n"
    lines += f"from command.failure import one_line\nwith one_line():\n    {code}"
    done = subprocess.run([sys.executable, "-c", lines], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_without_numba_a_judge_says_what_to_install() -> None:
    """One line and status 1, as for all that a user can mend."""
    status, out, err = command("from analysis import kept", numba="None")
    assert (status, out) == (1, "")
    assert err == (
        "kvmreq: to judge a recording takes numba, which cannot be imported: "
        "import of numba halted; None in sys.modules (pip install numba)\n"
    )


def test_without_numba_a_live_view_goes_on_plain() -> None:
    """record --follow loses nothing for it; a report is refused at once, before it has read anything."""
    live = "from analysis import compiled; compiled.warm(); print(len(compiled._functions))"
    assert command(live, numba="None") == (0, "0\n", "")
    status, out, err = command("from analysis import compiled; compiled.require()", numba="None")
    assert (status, out) == (1, "")
    assert err == "kvmreq: to judge a recording takes numba, which is not there (pip install numba)\n"


def test_what_traces_needs_no_numba() -> None:
    """record, doctor, lab and a live stat run where nothing is judged."""
    modules = [
        ".".join(path.relative_to(CHECKOUT).with_suffix("").parts)
        for folder in ("probes", "tracer", "lab")
        for path in sorted((CHECKOUT / folder).glob("*.py"))
        if path.name
        not in ("__init__.py", "__main__.py", "bpf.py", "fentry.py")  # these import bcc, which may be absent
    ]
    code = f"import importlib; [importlib.import_module(name) for name in {[*modules, 'analysis.stat']}]"
    assert command(f"{code}; print('traces')", numba="None") == (0, "traces\n", "")
