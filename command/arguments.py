"""What several verbs take, and the types of arguments."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

ENGINES = ("auto", "fentry", "kprobe", "tracepoint", "ftrace")


def engine(parser: argparse.ArgumentParser, engines: tuple[str, ...] = ENGINES) -> None:
    """Add the choice of what hooks KVM."""
    parser.add_argument(
        "--engine", choices=engines, default="auto", help="how to hook KVM (default: the best that works)"
    )


def directories(given: Path | None, prefix: str) -> list[Path]:
    """Return where to record: there, or in the first of these that does not exist when nobody says where."""
    if given is not None:
        return [given]
    name = f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}"
    return [Path(name), *(Path(f"{name}-{number}") for number in range(2, 100))]


#: The event ring, in MiB: BCC sizes maps in 32 bits, signed.
RING_MIB, MOST_RING_MIB = 32, 1024


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def ring(text: str) -> int:
    """A size of the event ring."""
    value = int(text) if text.isascii() and text.isdecimal() else 0
    if not 0 < value <= MOST_RING_MIB or value & (value - 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a power of two from 1 to {MOST_RING_MIB}")
    return value


def seconds(text: str) -> float:
    """A time, of any length but none and for ever."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, more than 0")
    return value


def file_or_output(text: str) -> Path | None:
    """A file; None for ``-``, standard output."""
    return None if text == "-" else Path(text)
