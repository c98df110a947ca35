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


def directory(prefix: str) -> Path:
    """Return where to record when nobody says where."""
    return Path(f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def power_of_two(text: str) -> int:
    """A power of two."""
    value = int(text)
    if value < 1 or value & (value - 1):
        raise argparse.ArgumentTypeError(f"{text} is not a power of two")
    return value


def seconds(text: str) -> float:
    """A time, of any length but none and for ever."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def file_or_output(text: str) -> Path | None:
    """A file; None for ``-``, standard output."""
    return None if text == "-" else Path(text)
