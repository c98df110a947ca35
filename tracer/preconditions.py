"""What must be so before anything is traced: one list, asked by whatever traces and by the doctor alike.

Where one of these is not met hooks may be set all the same, and a trace through them would be empty, or about others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tracer import host

#: By name: says of an engine why it cannot be trusted here, and what to do about it, if so.
PRECONDITIONS: Mapping[str, Callable[[str], str | None]] = {
    "process numbers": lambda _: host.foreign_pids(),
    "privileges": host.not_allowed,
}


def unmet(engine: str) -> str | None:
    """Return the first reason why an engine cannot be trusted here, if there is one."""
    return next((reason for check in PRECONDITIONS.values() if (reason := check(engine)) is not None), None)
