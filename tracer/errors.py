"""Every error that the command turns into one line and status 1.

    KvmreqError
    ├── BadRecording     a recording cannot be read, or not written
    ├── CannotTrace      this host, or this engine on it, cannot trace KVM
    ├── NoSuchGuest      a process is no VMM, or has gone
    ├── CannotExport     a recording cannot be written as another file
    ├── CannotJudge      what compiles the analysis of a recording is not there
    └── CommandFailed    the command to be traced could not be run

The library raises; only the command prints and exits.
"""

from __future__ import annotations


class KvmreqError(Exception):
    """Base of every error that the command turns into one line and status 1."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message  # without the hint: to be told among others


class BadRecording(KvmreqError):
    """A recording cannot be read, or not written."""


class CannotTrace(KvmreqError):
    """This host, or this engine on it, cannot trace KVM."""


class CannotExport(KvmreqError):
    """A recording cannot be written as another file."""


class CannotJudge(KvmreqError):
    """What compiles the analysis of a recording is not there."""


class NoSuchGuest(KvmreqError):
    """A process is no VMM, or has gone."""


class CommandFailed(KvmreqError):
    """The command to be traced could not be run."""
