"""One kernel booted in QEMU, one command run in it.

The kernel sees a root of the host read-only, with memory over what it writes. Only ``OUT`` is shared for
writing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.matrix import CHECKOUT, MatrixError, cache
from tests.matrix.kernels import Kernel

# Where the guest sees the folder of results. In a folder that every Debian has and virtme-ng makes writable.
OUT = "/srv/matrix"
BOOT_S = 180  # 13 to 30 s on two idle cores
LEEWAY_S = 30  # for a guest to power down after its command
KILL_S = 10  # from SIGTERM to SIGKILL of a command that takes too long
TIMED_OUT = 124  # exit status of a command that took too long, as timeout(1) gives it
TAIL_LINES = 40
# One thread for all CPUs: with a thread for each, a CPU may run what the kernel has patched since, and dies
# of a stale int3. KVM patches the scheduler for each first and last VM: 300 of them killed 7.3 on QEMU 7.2.
QEMU = "-cpu max -accel tcg,thread=single"
POLL_S = 0.25
STOP = threading.Event()  # set: every boot, of whatever thread, is ended

# What runs in the guest. Its own files, not virtme-ng's ports, carry output and status: they survive a panic.
GUEST_SCRIPT = """\
exec </dev/null >>{out}/output 2>&1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
for mount in "tracefs /sys/kernel/tracing" "debugfs /sys/kernel/debug" "bpf /sys/fs/bpf"; do
    set -- $mount
    mountpoint -q $2 || mount -t $1 $1 $2
done
modprobe kvm_amd nested=1 || {{ echo "kvm_amd does not load in $(uname -r)"; exit; }}
mkdir -p /run/checkout/upper /run/checkout/work
over=upperdir=/run/checkout/upper,workdir=/run/checkout/work
mount -t overlay -o lowerdir={checkout},$over checkout {checkout} || exit
cd {cwd} || exit
cut -d' ' -f1 /proc/uptime >{out}/booted
timeout --kill-after={kill_s} {limit_s} env {environment} {command}
status=$?
sync
echo $status >{out}/status
"""


class BootError(MatrixError):
    """A kernel that did not come up, or died before its command ended; ends in the console's last lines."""


@dataclass(frozen=True)
class Outcome:
    """What became of a command in a kernel."""

    kernel: Kernel
    status: int  # the command's; TIMED_OUT if it took too long
    output: str  # stdout and stderr together
    boot_s: float
    seconds: float  # boot, command and power down
    folder: Path  # what the command wrote to $MATRIX_OUT; also output and console.log


@dataclass(frozen=True)
class Machine:
    """How kernels are booted: on which root, with how much, for how long."""

    root: Path = Path("/")
    cpus: int = 2
    memory: str = "3G"
    limit_s: int = 600  # for the command
    cwd: Path = CHECKOUT
    environment: Mapping[str, str] = field(default_factory=dict)
    given: Sequence[Path] = ()  # files that the command finds in $MATRIX_OUT/given, whatever root it runs on

    def run(
        self,
        kernel: Kernel,
        command: Sequence[str],
        folder: Path,
        progress: Callable[[str], None] = lambda text: None,
    ) -> Outcome:
        """Boot a kernel, run a command in it, and return what became of it.

        The folder is emptied first. The command sees it as $MATRIX_OUT, the checkout where the host has it
        (writable, but what it writes there is gone afterwards), and no network.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        given = {"HOME": "/root", "LANG": "C.UTF-8", "MATRIX_KERNEL": kernel.series, "MATRIX_OUT": OUT}
        environment = {**given, **self.environment}
        script = GUEST_SCRIPT.format(
            out=OUT,
            checkout=shlex.quote(str(CHECKOUT)),
            cwd=shlex.quote(str(self.cwd)),
            kill_s=KILL_S,
            limit_s=self.limit_s,
            environment=shlex.join(f"{name}={value}" for name, value in environment.items()),
            command=shlex.join(command),
        )
        (folder / "guest.sh").write_text(script)
        if self.given:
            (folder / "given").mkdir()
            for path in self.given:
                shutil.copy2(path, folder / "given")
        (folder / "output").touch()
        started = time.monotonic()
        booted = self._wait(self._vng(kernel, folder), folder, progress)
        seconds = time.monotonic() - started
        output = (folder / "output").read_text(errors="replace")
        if not (folder / "status").exists():
            raise BootError(_story(kernel, folder, output, booted, seconds))
        status = int((folder / "status").read_text())
        return Outcome(kernel, status, output, booted or seconds, seconds, folder)

    def _vng(self, kernel: Kernel, folder: Path) -> list[str]:
        other_root = []
        if self.root != Path("/"):
            _install_modules(kernel, self.root)
            (self.root / CHECKOUT.relative_to("/")).mkdir(parents=True, exist_ok=True)
            other_root = ["--root", str(self.root), "--rodir", f"{CHECKOUT}={CHECKOUT}"]
        return [
            *(virtme_ng(), "-r", str(kernel.image)),
            *("--disable-kvm", "--cpus", str(self.cpus), "--memory", self.memory, f"--qemu-opts={QEMU}"),
            # Debian 12's virtiofsd does not work with virtme-ng, which waits 10 s to find that out.
            *("--force-9p", "--rwdir", f"{OUT}={folder.resolve()}"),
            *other_root,
            *("--append", "kvm_amd.nested=1"),  # udev may load it first
            *("--verbose", "--", "bash", f"{OUT}/guest.sh"),
        ]

    def _wait(self, vng: Sequence[str], folder: Path, progress: Callable[[str], None]) -> float | None:
        """Run vng until it ends or takes too long, and return after how long the command started."""
        started = time.monotonic()
        booted = None
        with tempfile.TemporaryDirectory(prefix="matrix-") as scratch:
            # virtme-ng leaves a configuration in HOME, and files in TMPDIR when it is killed.
            environment = {**os.environ, "HOME": str(cache()), "TMPDIR": scratch}
            # vng runs virtme-run, which lies beside it, by its name.
            search = (str(Path(vng[0]).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")
            environment["PATH"] = ":".join(search)
            # A pipe: QEMU opens /proc/self/fd/2 anew for each port, which would overwrite each other.
            process = subprocess.Popen(
                vng,
                cwd="/",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            assert process.stdout is not None
            console = threading.Thread(target=_copy, args=(process.stdout.fileno(), folder / "console.log"))
            console.start()
            try:
                with (folder / "output").open(errors="replace") as output:
                    while process.poll() is None and not STOP.wait(POLL_S):
                        now = time.monotonic() - started
                        if booted is None and (folder / "booted").exists():
                            booted = now
                        if now > (BOOT_S if booted is None else booted + self.limit_s + KILL_S + LEEWAY_S):
                            break
                        progress(output.read())
                    progress(output.read())
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                console.join(LEEWAY_S)
                process.stdout.close()
        return booted


def _story(kernel: Kernel, folder: Path, output: str, booted: float | None, seconds: float) -> str:
    # Why there is no status, with what the guest said last.
    if booted is None:
        what = f"kernel {kernel.release} did not reach its command within {seconds:.0f} s"
    else:
        what = f"kernel {kernel.release} died {seconds - booted:.0f} s after its command had started"
    console = (folder / "console.log").read_text(errors="replace")
    return f"{what}\n--- output\n{_tail(output)}\n--- console ({folder}/console.log)\n{_tail(console)}"


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-TAIL_LINES:])


def _copy(source: int, path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while data := os.read(source, 65536):
            file.write(data)


def virtme_ng() -> str:
    """Return the path of virtme-ng's program."""
    found = shutil.which("vng", path=f"{sys.prefix}/bin:{os.environ.get('PATH', os.defpath)}")
    if found is None:
        raise MatrixError("virtme-ng is missing: pip install virtme-ng")
    return found


def _install_modules(kernel: Kernel, root: Path) -> None:
    # udev needs them before virtme-ng mounts anything: hard links into the root, which is in the cache too.
    target = root / "usr/lib/modules" / kernel.release
    source = kernel.modules / "modules.dep"
    if target.exists():
        if source.samefile(target / "modules.dep"):
            return
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as scratch:
        copy = Path(scratch, "modules")
        shutil.copytree(kernel.modules, copy, copy_function=os.link, symlinks=True)
        copy.rename(target)
