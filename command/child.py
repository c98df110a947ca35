"""A COMMAND that runs while record or stat works: checked, started, and ended with them."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence

from command.environment import GIVEN
from command.stop import Stop
from tracer.errors import CommandFailed

_PATIENCE_S = 5


def check_command(command: Sequence[str]) -> None:
    """Raise :class:`CommandFailed` if there is no such command, before anything is done for it."""
    if command and not shutil.which(command[0]):
        raise CommandFailed(f"{command[0]}: command not found", hint="check the command after --")


def start_command(command: Sequence[str]) -> subprocess.Popen[bytes] | None:
    """Start a command in the environment that we were given; None where there is no command."""
    if not command:
        return None
    try:
        return subprocess.Popen(command, env=GIVEN)
    except OSError as error:
        raise CommandFailed(
            f"{shlex.join(command)} cannot be run: {os.strerror(error.errno or 0)}", hint="check the command after --"
        ) from error


def end_command(child: subprocess.Popen[bytes] | None, stop: Stop) -> None:
    """When the work is told to end, so is the command; Ctrl-C on a terminal has reached it already."""
    if child is None or child.poll() is not None:
        return
    child.send_signal(stop.number or signal.SIGTERM)
    try:
        child.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
