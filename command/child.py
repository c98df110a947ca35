"""A COMMAND that runs while record or stat works: checked, started, and ended with them."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from command.environment import GIVEN
from command.stop import Stop
from tracer.errors import CommandFailed

_PATIENCE_S = 5
_LOOK_S = 0.01


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


def end_command(
    child: subprocess.Popen[bytes] | None, stop: Stop, meanwhile: Callable[[], object] = lambda: time.sleep(_LOOK_S)
) -> bool:
    """When the work is told to end, so is the command; tell whether it had to be.

    Ctrl-C on a terminal has reached it already. ``meanwhile``: what is done again and again until it has ended.
    """
    if child is None or child.poll() is not None:
        return False
    child.send_signal(stop.number or signal.SIGTERM)
    end = time.monotonic() + _PATIENCE_S
    while child.poll() is None:
        meanwhile()
        if time.monotonic() > end:
            child.kill()
    return True
