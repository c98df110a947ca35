"""What is said on stderr, beside the results."""

from __future__ import annotations

import sys
import time


def note(text: str) -> None:
    """Say something that is not a result."""
    print(f"kvmreq: {text}", file=sys.stderr, flush=True)


class Progress:
    """One line on a terminal that tells how far a long wait has come; nothing where there is no terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty() and sys.stdout.isatty()
        self._last = time.monotonic()
        self._width = 0

    def show(self, text: str) -> None:
        """Show a state, at most twice a second and never within the first second."""
        now = time.monotonic()
        if self._shown and now - self._last >= (0.5 if self._width else 1.0):
            self._last = now
            text = text[:78]
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)

    def clear(self) -> None:
        """Take the line away."""
        if self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width = 0
