"""What is said on stderr, beside the results; and what is said while work goes on that waits for no reader."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

from tracer.files import Whole

_MOST_BYTES = 16 << 20  # that wait for a reader
_PATIENCE_S = 2.0  # with a reader that takes nothing at all


class Aside(threading.Thread):
    """Writes to a stream in a thread of its own: who tells something waits for nobody, and nobody makes it fail.

    What the reader leaves no room for, or does not want, is left out and counted.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(name=f"kvmreq, {name}", daemon=True)
        # Of its own: what becomes of the number meanwhile is another matter.
        self._out = Whole(os.dup(descriptor), name)
        self._change = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._held = self._written = 0
        self._over = False
        self._left_out = 0
        self._error: OSError | None = None
        self.start()

    def run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._over)
                if not self._waiting:
                    return
                part = self._waiting[0]
            error = None
            try:
                if self._error is None:
                    self._out.write(part)
            except OSError as caught:
                error = caught
            with self._change:
                self._error = self._error or error
                self._left_out += self._error is not None
                self._waiting.popleft()
                self._held -= len(part)
                self._written += 1

    @property
    def idle(self) -> bool:
        """Tell whether all that was told is written."""
        return not self._waiting

    def tell(self, text: str) -> None:
        """Have it written when there is room."""
        part = text.encode(errors="backslashreplace")
        with self._change:
            if self._error is not None or self._held + len(part) > _MOST_BYTES:
                self._left_out += 1
                return
            self._waiting.append(part)
            self._held += len(part)
            self._change.notify()

    def finish(self) -> str | None:
        """Wait for the reader as long as it takes something; say how much was left out, and why, if any was."""
        with self._change:
            self._over = True
            self._change.notify()
        before = -1
        while self.is_alive() and before != self._written:
            before = self._written
            self.join(_PATIENCE_S)
        left_out = self._left_out + len(self._waiting)
        if not left_out:
            return None
        why = self._error.strerror if self._error is not None else "nobody reads it"
        return f"{left_out} lines could not be written to {self._out.name}: {why}"


_BESIDE: list[Aside] = []  # none, or the one that says the notes


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """Notes of this block are told beside its work, which waits for no terminal."""
    with contextlib.suppress(OSError, ValueError):
        if not _BESIDE and sys.stderr.fileno() == 2:
            _BESIDE.append(Aside(2, "standard error"))
    try:
        yield
    finally:
        while _BESIDE:
            _BESIDE.pop().finish()


def _say(text: str) -> None:
    for aside in _BESIDE:
        return aside.tell(text)
    with contextlib.suppress(OSError, ValueError):  # there is nobody to say that to
        print(text, end="", file=sys.stderr, flush=True)
    return None


def note(text: str) -> None:
    """Say something that is not a result, to whom it may concern: it never fails."""
    _say(f"kvmreq: {text}\n")


class Progress:
    """One line on a terminal that tells how far a long wait has come; nothing where there is no terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty() and sys.stdout.isatty()
        self._last = time.monotonic()
        self._width = 0

    def show(self, text: str) -> None:
        """Show a state, at most twice a second and never within the first second."""
        now = time.monotonic()
        if self._shown and now - self._last >= (0.5 if self._width else 1.0) and all(aside.idle for aside in _BESIDE):
            self._last = now
            text = text[:78]
            _say(f"\r{text:<{self._width}}")
            self._width = len(text)

    def clear(self) -> None:
        """Take the line away."""
        if self._width:
            _say(f"\r{'':<{self._width}}\r")
            self._width = 0
