"""What the doctor found, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from reports.words import shown

_MARKS = {True: "ok   ", False: "FAIL ", None: "     "}


def _wrapped(first: str, text: str) -> str:
    return textwrap.fill(
        text,
        79,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def text(findings: Mapping[str, Any]) -> str:
    """Return the findings for a terminal."""
    lines = [f"kvmreq doctor: {findings['host']}, Linux {findings['kernel']}", ""]
    lines += [_wrapped(f"{_MARKS[check['ok']]}{check['check']}: ", check["detail"]) for check in findings["checks"]]
    lines += ["", "Engines, the best first"]
    for engine in findings["engines"]:
        auto = " (auto takes it)" if engine["engine"] == findings["auto"] else ""
        lines.append(
            _wrapped(
                f"{'ok   ' if engine['works'] else 'no   '}{engine['engine']}: ", engine["why_not"] or f"works{auto}"
            )
        )
    if findings["plan"]:
        lines += ["", f"Plan of engine {findings['auto']}, detail full"]
        for hook in findings["plan"]:
            mark = "ok   " if hook["hook"] else "blind"
            lines.append(_wrapped(f"{mark} " if not hook["hook"] else mark, hook["fact"]))
            lines.append(_wrapped("       ", hook["hook"] or hook["unseen"]))
    lines += ["", "Guests"]
    if not findings["guests"]:
        lines.append("     none runs")
    for guest in findings["guests"]:
        cap = guest["triple_fault_cap"]
        fate = {
            True: "a pending shutdown survives a save",
            False: "a pending shutdown would be LOST by a save",
            None: "whether a pending shutdown survives a save could not be read",
        }[cap]
        pending = "; a shutdown is PENDING now" if guest["pending"] else ""
        name = shown(guest["name"])
        lines.append(
            _wrapped("     ", f"{name} (pid {guest['pid']}, {guest['vmm']}, {guest['vcpus']} vCPUs): {fate}{pending}")
        )
    lines += [
        "",
        "This host can be traced." if findings["works"] else "This host cannot be traced: see what FAILed above.",
    ]
    return "\n".join(lines)
