"""bootstrap, on machines made up of a folder and a few commands: what it says, what it installs, where it stops.

Nothing of this machine is changed: apt-get and dpkg-query are replaced by scripts that note what was asked for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.matrix import HOST_PACKAGES

CHECKOUT = Path(__file__).resolve().parents[2]
DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_ID="12"\nID=debian\n'
FEDORA = 'PRETTY_NAME="Fedora Linux 43"\nVERSION_ID=43\nID=fedora\n'
LOAD_KVM = "load kvm_intel or kvm_amd (a virtual machine needs nested virtualisation)"
# Without root's rights, but able to reach pytest's folders, which are root's alone.
AS_NOBODY = (
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="bootstrap wants root: sudo make test")


@dataclass
class Machine:
    """A checkout of its own, a root folder for bootstrap to look at, and commands that stand before the real ones."""

    checkout: Path
    root: Path
    commands: Path

    def command(self, name: str, body: str) -> None:
        """Put a command before the machine's own."""
        path = self.commands / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def bootstrap(self, level: str, *, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run bootstrap as make does."""
        return subprocess.run(
            [*before, self.checkout / "bootstrap", level, f"make {level}"],
            env={
                **os.environ,
                "PATH": f"{self.commands}:{os.environ.get('PATH', os.defpath)}",
                "KVMREQ_SYSROOT": str(self.root),
                "PIP_NO_INDEX": "1",
            },
            check=False,
            capture_output=True,
            text=True,
        )

    def lines(self, level: str) -> list[str]:
        """Run bootstrap where it works, and return the steps that it took."""
        done = self.bootstrap(level)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        return done.stderr.splitlines()

    def refusal(self, level: str, *, before: tuple[str, ...] = ()) -> str:
        """Run bootstrap where it cannot work, and return the one line that it says."""
        done = self.bootstrap(level, before=before)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert not (self.checkout / ".venv").exists()
        return line

    def apt(self) -> list[str]:
        """Return what was asked of apt-get."""
        log = self.root / "apt"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A Debian 12 that has every package, and a checkout that was never set up and requires nothing."""
    new = Machine(tmp_path / "checkout", tmp_path / "root", tmp_path / "commands")
    for folder in (new.checkout, new.commands, *(new.root / name for name in ("etc", "dev", "usr/bin"))):
        folder.mkdir(parents=True)
    shutil.copy2(CHECKOUT / "bootstrap", new.checkout)
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-mutants.txt", "requirements-matrix.txt"):
        (new.checkout / name).write_text("# nothing\n")
    (new.checkout / "command").mkdir()
    (new.checkout / "command/main.py").write_text(
        "import sys\ndef main():\n    print(*sys.argv[1:], __file__)\n    return 3\n",
    )
    (new.root / "etc/os-release").write_text(DEBIAN)
    (new.root / "dev/kvm").touch()
    (new.root / "usr/bin/python3").symlink_to("/usr/bin/python3")
    new.command("uname", "echo x86_64")
    new.command("dpkg-query", "printf installed")
    new.command("apt-get", f'printf "%s\\n" "$*" >>{new.root}/apt')
    return new


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .venv as bootstrap makes it: it outlives a move, and so a copy of it is as good."""
    path = tmp_path_factory.mktemp("made") / ".venv"
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--system-site-packages", path], check=True)
    return path


@pytest.fixture
def ready(machine: Machine, made: Path) -> Machine:
    """The same machine, with a .venv that nothing was installed into: to make one takes two seconds."""
    shutil.copytree(made, machine.checkout / ".venv", symlinks=True)
    return machine


@needs_root
def test_without_root_one_line_says_so(machine: Machine) -> None:
    """A /dev/kvm that refuses is not reported: root opens it."""
    (machine.root / "dev/kvm").chmod(0o600)
    assert machine.refusal("demo", before=AS_NOBODY) == ("make demo cannot work here: not root: use sudo make demo")


@needs_root
@pytest.mark.parametrize("level", ["demo", "test"])
def test_without_kvm_one_line_says_so(machine: Machine, level: str) -> None:
    """The tests need /dev/kvm as the demo does."""
    (machine.root / "dev/kvm").unlink()
    assert machine.refusal(level) == f"make {level} cannot work here: no /dev/kvm: {LOAD_KVM}"


@needs_root
def test_a_dev_kvm_without_kvm_behind_it_is_told_from_none(machine: Machine) -> None:
    """udev makes the node before the module is there; to open it is the proof."""
    (machine.root / "dev/kvm").unlink()
    (machine.root / "dev/kvm").mkdir()
    assert machine.refusal("demo") == f"make demo cannot work here: /dev/kvm cannot be opened: {LOAD_KVM}"


@needs_root
def test_another_machine_is_named(machine: Machine) -> None:
    """KVM's requests are those of x86."""
    machine.command("uname", "echo aarch64")
    assert machine.refusal("demo") == "make demo cannot work here: this machine is aarch64, not x86-64"


@needs_root
def test_another_distribution_is_told_the_packages_by_name(machine: Machine) -> None:
    """Only what is missing is named, and apt-get is never called."""
    (machine.root / "etc/os-release").write_text(FEDORA)
    (machine.root / "usr/bin/python3").unlink()
    assert machine.refusal("demo") == (
        "make demo cannot work here: this is Fedora Linux 43, not Debian 12: "
        "install what Debian calls python3-bpfcc python3-venv yourself"
    )
    assert machine.apt() == []


@needs_root
def test_another_distribution_that_has_everything_works(ready: Machine) -> None:
    """Otherwise there would be no use in naming packages; apt-get is left alone."""
    (ready.root / "etc/os-release").write_text(FEDORA)
    pytest.importorskip("bcc", reason="needs python3-bpfcc: make test")
    assert ready.lines("demo")[0] == (
        "this is Fedora Linux 43, not Debian 12: goes on with its own python3-bpfcc python3-venv"
    )
    assert ready.apt() == []


@needs_root
def test_all_that_is_missing_is_in_one_line(machine: Machine) -> None:
    """Nobody should have to mend one thing to be told the next."""
    (machine.root / "etc/os-release").unlink()
    (machine.root / "dev/kvm").unlink()
    (machine.root / "usr/bin/python3").unlink()
    assert machine.refusal("demo", before=AS_NOBODY) == (
        "make demo cannot work here: this is unknown, not Debian 12: "
        "install what Debian calls python3-bpfcc python3-venv yourself; "
        f"not root: use sudo make demo; no /dev/kvm: {LOAD_KVM}"
    )


def test_an_unknown_level_is_a_usage_error(machine: Machine) -> None:
    """Status 2, as for the command."""
    done = machine.bootstrap("everything")
    assert done.returncode == 2
    assert done.stderr == f"usage: {machine.checkout}/bootstrap demo|test|mutants|matrix [WHAT]\n"


@needs_root
def test_only_missing_packages_are_installed(machine: Machine) -> None:
    """apt-get runs when something is missing, and asks for that alone."""
    machine.command(
        "dpkg-query", "[[ ${!#} == gcc || ${!#} == python3-bpfcc ]] && printf not-installed || printf installed"
    )
    machine.command(
        "apt-get", f'printf "%s\\n" "$*" >>{machine.root}/apt; [[ $* != *install* ]] || {{ echo why; exit 100; }}'
    )
    done = machine.bootstrap("test")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "apt-get update",
        "apt-get install python3-bpfcc gcc",
        "why",
        "apt-get could not install python3-bpfcc gcc (above): install by name, then run make test again",
    ]
    options = "-q -o DPkg::Lock::Timeout=120"
    assert machine.apt() == [
        f"{options} update",
        f"{options.replace('-q', '-q -y')} --no-install-recommends install python3-bpfcc gcc",
    ]


@needs_root
def test_set_up_is_done_once_and_outlives_a_move(machine: Machine, tmp_path: Path) -> None:
    """A second run says nothing; what changed is done again, and nothing else."""
    assert machine.lines("demo") == [
        f"making .venv with {machine.root}/usr/bin/python3",
        "pip install -r requirements.txt",
        "writing .venv/bin/kvmreq",
    ]
    assert machine.apt() == []

    machine.checkout = machine.checkout.rename(tmp_path / "moved to a place with spaces")
    started_ns = time.monotonic_ns()
    assert machine.lines("demo") == []
    assert time.monotonic_ns() - started_ns < 1_000_000_000
    assert machine.lines("test") == ["pip install -r requirements-dev.txt"]
    assert machine.lines("demo") == []
    assert machine.lines("test") == []

    os.utime(machine.checkout / "requirements.txt")
    assert machine.lines("demo") == []
    (machine.checkout / "requirements.txt").write_text("# something else\n")
    assert machine.lines("demo") == ["pip install -r requirements.txt"]

    (machine.checkout / ".venv/bin/kvmreq").write_text("#!/bin/sh\n")
    assert machine.lines("demo") == ["writing .venv/bin/kvmreq"]


@needs_root
@pytest.mark.parametrize("level", ["demo", "test", "matrix"])
def test_the_analysis_is_compiled_when_its_source_has_changed(ready: Machine, level: str) -> None:
    """Or a constant that it copies has, or numba; a second run says nothing."""
    for folder in ("analysis", "probes", "tests/matrix"):
        (ready.checkout / folder).mkdir(parents=True)
    (ready.checkout / "probes/schema.py").touch()
    (ready.checkout / "tests/matrix/__main__.py").touch()  # asks for no packages
    core = ready.checkout / "analysis/compiled.py"
    core.write_text("import sys; sys.exit('numba is not well')\n")
    done = ready.bootstrap(level)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-3:] == [
        "compiling the analysis",
        "numba is not well",
        "the analysis cannot be compiled (above): was all of requirements.txt installed?",
    ]
    core.write_text("")
    assert ready.lines(level) == ["compiling the analysis", "writing .venv/bin/kvmreq"]
    for name in ("analysis/rules.py", "probes/schema.py", "requirements.txt"):
        assert ready.lines(level) == []
        (ready.checkout / name).write_text("# another\n")
        assert ready.lines(level)[-1] == "compiling the analysis"


@needs_root
def test_the_matrix_names_its_own_packages_and_needs_no_kvm(ready: Machine) -> None:
    """They are asked for by name; a second run sets up nothing."""
    (ready.root / "dev/kvm").unlink()
    shutil.copytree(CHECKOUT / "tests/matrix", ready.checkout / "tests/matrix")
    (ready.checkout / "tests/__init__.py").touch()
    installed = ready.root / "installed"
    installed.touch()
    ready.command("dpkg-query", f'grep -qx "${{!#}}" {installed} && printf installed || printf not-installed')
    ready.command(
        "apt-get",
        f'[[ $* != *install* ]] || printf "%s\\n" "${{@:7}}" >>{installed}; printf "%s\\n" "$*" >>{ready.root}/apt',
    )
    steps = ready.lines("matrix")
    assert steps[1] == "apt-get install python3-bpfcc python3-venv"
    assert steps[3] == f"apt-get install {' '.join(HOST_PACKAGES)}"
    assert "pip install -r requirements-matrix.txt" in steps
    assert ready.lines("matrix") == []


@needs_root
def test_the_matrix_boots_from_debian_12(machine: Machine) -> None:
    """Elsewhere it says so, and installs nothing."""
    (machine.root / "etc/os-release").write_text(FEDORA)
    assert machine.refusal("matrix").startswith("make matrix cannot work here: this is Fedora Linux 43, not Debian 12")
    assert machine.apt() == []


@needs_root
def test_a_failed_install_is_tried_again(ready: Machine) -> None:
    """Only what pip has finished counts as done."""
    (ready.checkout / "requirements.txt").write_text("kvmreq-needs-no-such-thing==1\n")
    for _ in range(2):
        done = ready.bootstrap("demo")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == (
            "pip could not install requirements.txt (above): "
            "is there a network, or a package index in pip's configuration?"
        )


@needs_root
def test_the_command_runs_its_own_checkout_from_anywhere(ready: Machine, tmp_path: Path) -> None:
    """Through a symbolic link, beside another command.py, with its status and arguments as they are."""
    ready.lines("demo")
    link = tmp_path / "kvmreq"
    link.symlink_to(ready.checkout / ".venv/bin/kvmreq")
    (tmp_path / "command.py").write_text("raise SystemExit('the wrong one')\n")
    done = subprocess.run([link, "a b", "", "$c"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"a b  $c {ready.checkout}/command/main.py\n", "")


def test_each_requirement_is_pinned_once() -> None:
    """A name without a version would make two machines differ."""
    lines = [
        line
        for name in ("requirements.txt", "requirements-dev.txt", "requirements-mutants.txt", "requirements-matrix.txt")
        for line in (CHECKOUT / name).read_text().splitlines()
        if line and not line.startswith(("#", "-r "))
    ]
    names = [line.partition("==")[0] for line in lines]
    assert all("==" in line and line == line.lower() for line in lines)
    assert len(set(names)) == len(names)
