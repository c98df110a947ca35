"""What a verb is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Verb(NamedTuple):
    """A verb of the command. What it is for is the first line of what ``run`` is documented with.

    ``arguments`` adds what it takes to its parser; the one that ``run`` is given also has ``wrong``, which ends the
    command as wrong usage. ``examples`` are lines that its help ends with. ``dashes``: what comes after ``--`` is a
    COMMAND, apart from all other words, and in ``arguments.command``. ``judges``: its exit status tells what was lost.
    """

    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None]
    examples: tuple[str, ...]
    dashes: bool = False
    judges: bool = False
