"""The version. It is written once, in setup.cfg: a checkout reads it there, what is installed has it as metadata."""

from __future__ import annotations

from pathlib import Path

_NAME = "kvmreq"


def version() -> str:
    """Return the version of the code that runs."""
    # First, since another version may well be installed beside a checkout.
    written = Path(__file__).resolve().parents[1] / "setup.cfg"
    if written.is_file():
        from configparser import ConfigParser

        settings = ConfigParser()
        settings.read(written, encoding="utf-8")
        if settings.get("metadata", "name", fallback=None) == _NAME:
            return settings.get("metadata", "version")
    from importlib import metadata

    return metadata.version(_NAME)
