"""Names of KVM's requests: which bit of ``vcpu->requests`` is which, on which kernel.

The numbers are macros, so BTF does not hold them; the table comes from the kernels' sources. Most bits never moved:
KVM_REQ_TRIPLE_FAULT is bit 10 in every release of the table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

#: The bit of KVM_REQ_TRIPLE_FAULT. Linux's arch/x86/include/asm/kvm_host.h: KVM_ARCH_REQ(2), on every kernel checked.
TRIPLE_FAULT = 10


class UnknownRequest(LookupError):
    """No request of this kernel has such a name."""


class Names(NamedTuple):
    """The requests of one kernel: bit -> name, in lower case and without KVM_REQ_; and how they were chosen."""

    by_bit: Mapping[int, str]
    table: str  # the release whose table was taken
    exact: bool  # whether that is the kernel's own release


@cache
def _tables() -> dict[tuple[int, int], dict[int, str]]:
    document = json.loads(files("probes").joinpath("kvm-requests.json").read_text())
    return {
        _version(release): {
            int(bit): request["name"].removeprefix("KVM_REQ_").lower()
            for bit, request in requests.items()
            if bit.isdigit()
        }
        for release, requests in document.items()
        if not release.startswith("_")
    }


def _version(release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def names(release: str) -> Names:
    """Return the requests of a kernel release such as ``6.1.0-25-amd64``.

    A release that the table does not know gets the names of the newest one before it, and ``exact`` is false.
    """
    tables = _tables()
    wanted = _version(release)
    known = max((version for version in tables if version <= wanted), default=min(tables))
    return Names(tables[known], f"{known[0]}.{known[1]}", known == wanted)


def selected(wanted: Iterable[str], known: Names) -> dict[int, str]:
    """Return bit -> name of the requests asked for: ``all``, or names in any case, with or without KVM_REQ_.

    Raises :class:`UnknownRequest`, with the names that exist.
    """
    bits = {name: bit for bit, name in known.by_bit.items()}
    chosen: dict[int, str] = {}
    for word in wanted:
        name = word.strip().lower().removeprefix("kvm_req_")
        if name == "all":
            chosen |= known.by_bit
        elif name in bits:
            chosen[bits[name]] = name
        else:
            raise UnknownRequest(f"unknown request {word!r}: this kernel has {', '.join(sorted(bits))}, or all")
    return dict(sorted(chosen.items()))
