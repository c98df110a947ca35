"""The end of a command that fails."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from command.notes import note
from tracer.errors import KvmreqError

EXIT_ERROR = 1


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Whatever a user can cause ends in one line, and never in a traceback."""
    from lab.kvm import LabError

    def fail(text: str) -> NoReturn:
        note(" ".join(text.split()))
        sys.exit(EXIT_ERROR)

    try:
        yield
    except (KvmreqError, LabError) as error:
        fail(str(error))
    except BrokenPipeError:
        # The reader of our output has gone: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        fail("interrupted")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error} (check that it exists and that you may use it)")
