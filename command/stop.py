"""Signals that ask for the end."""

from __future__ import annotations

import atexit
import signal


class Stop:
    """SIGINT, SIGTERM and SIGHUP (a terminal that goes away) ask for the end; the work in hand is finished first.

    SIGHUP keeps being ignored where it was when we were started: nohup means it.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, self._note)
            # Python's own end gives a handler's signal its default back: one that comes then would kill what has
            # succeeded.
            atexit.register(signal.signal, number, signal.SIG_IGN)

    def _note(self, number: int, _frame: object) -> None:
        self.wanted = True
        self.number = number
