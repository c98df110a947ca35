"""What the core was made of when it was imported: code that was compiled from anything else is not used."""

from __future__ import annotations

import hashlib
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def digest(data: bytes) -> str:
    """Return a short name for some bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def sources() -> str | None:
    """Return the digest of all that compiled code can hold: rules that are called, and constants, which it copies."""
    files = sorted([*_HERE.glob("*.py"), *(_HERE.parent / "probes").glob("*.py")])
    try:
        return digest(repr([(file.name, digest(file.read_bytes())) for file in files]).encode()) if files else None
    except OSError:
        return None


# Before the modules of the core are imported: a change in between is compiled again, and not taken for known.
SOURCES = sources()
