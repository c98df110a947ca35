"""The end of a command that fails."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from command.notes import beside, note
from tracer.errors import KvmreqError
from tracer.files import STANDARD_OUTPUT

EXIT_ERROR = 1


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Whatever goes wrong, in whichever thread, ends in one line and status 1, and never in a traceback."""
    elsewhere: list[BaseException] = []

    def ask_for_the_end(died: threading.ExceptHookArgs) -> None:
        # As Ctrl-C does: what waits is woken, what works finishes and does not go on without that thread.
        elsewhere.append(died.exc_value or died.exc_type())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def wake(_number: int, _frame: object) -> None:
        if elsewhere:
            raise KeyboardInterrupt

    # A shell that starts a command in the background has it ignore SIGINT: nothing would be woken.
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, wake)
    before, threading.excepthook = threading.excepthook, ask_for_the_end
    try:
        yield
    except BrokenPipeError:
        # The reader of our output has gone: nothing to say, and nobody to say it to.
        _fail("")
    except Exception as error:
        _fail(_told(elsewhere[0] if elsewhere else error))
    except KeyboardInterrupt as error:
        _fail(_told(elsewhere[0] if elsewhere else error))
    finally:
        threading.excepthook = before
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    if elsewhere:
        _fail(_told(elsewhere[0]))


def _told(error: BaseException) -> str:
    from lab.kvm import LabError

    match error:
        case KvmreqError() | LabError():
            return str(error)
        case KeyboardInterrupt():
            return "interrupted"
        case MemoryError():
            return "there is no memory left (give it more, see ulimit -v, or less to do)"
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            cut = error.filename == STANDARD_OUTPUT
            hint = "the result is not whole" if cut else "check that it exists and that you may use it"
            return f"{where}{error.strerror or error} ({hint})"
    at = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(at[-1].filename).name}:{at[-1].lineno}" if at else ""
    return f"{type(error).__name__}{place}: {error} (this was not foreseen: whoever reports this line helps)"


def _fail(text: str) -> NoReturn:
    if text:
        with beside():
            note(" ".join(text.split()))
    try:
        sys.stdout.flush()
    except OSError:  # or Python would try it again at its end, and say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(EXIT_ERROR)
