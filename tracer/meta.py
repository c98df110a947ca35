"""What a recording's meta.json holds: each entry once, with its type, and the check of one that comes from outside.

A recording is copied about, kept for years and edited by hand. Whatever reads one goes by these types, so what does not
fit them is refused where it is opened, and nowhere later.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

# Times since 1970 reach the year 2262, others as far after it: dates of either are no problem to Python.
_Ns = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Pid = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Name = Annotated[str, msgspec.Meta(min_length=1)]
_Bit = Annotated[str, msgspec.Meta(pattern=r"^([0-9]|[1-5][0-9]|6[0-3])\Z")]
_Number = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,10}\Z")]


class Clock(TypedDict):
    """Two clocks that were read at the same moment."""

    monotonic_ns: _Ns
    utc_ns: _Ns


class PlanLine(TypedDict):
    """What is known of the host through a hook, or what is not seen without one."""

    fact: str
    hook: str | None
    unseen: str | None


class Guest(TypedDict):
    """What a guest is called."""

    pid: _Pid
    name: str
    vmm: str | None
    uuid: NotRequired[str | None]


class Meta(TypedDict):
    """meta.json. What is not required came with a later schema, or with the end of the recording."""

    schema: Annotated[int, msgspec.Meta(ge=1)]
    #: Unlike that of any other recording; its segments carry it, too.
    identity: NotRequired[str]
    host: str
    boot_id: NotRequired[str | None]
    kernel: str
    kvm_module: NotRequired[str | None]
    kvm_parameters: NotRequired[dict[str, str]]
    engine: str
    engine_why: NotRequired[str | None]
    detail: Literal["boundary", "full"]
    requests: list[_Name]
    requests_by_bit: dict[_Bit, _Name]
    requests_flags: NotRequired[dict[str, list[str]]]
    requests_table: NotRequired[str]
    requests_table_exact: NotRequired[bool]
    pids: NotRequired[list[_Pid]]
    started_ns: _Ns
    ended_ns: NotRequired[_Ns | None]
    clock: Clock
    #: Read after one of them was set, or the host was asleep.
    clocks: NotRequired[list[Clock]]
    plan: list[PlanLine]
    untried: NotRequired[str | None]
    formats: NotRequired[dict[str, str]]
    guests: NotRequired[dict[_Number, Guest]]
    counters: NotRequired[dict[str, _Count]]
    segments: NotRequired[_Count]


def parse(text: bytes) -> Any:
    """Return the JSON of a meta.json, in which every text can be printed. Raises ValueError or RecursionError."""
    # Half of a surrogate pair is no character, though JSON and Python let it pass.
    return json.loads(json.dumps(json.loads(text), ensure_ascii=False).encode(errors="replace"))


def checked(parsed: Any) -> Meta:
    """Return what :func:`parse` gave, if it is a meta.json. Raises ValueError, which says where it is not."""
    try:
        meta = msgspec.convert(parsed, Meta)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    names = list(meta["requests_by_bit"].values())
    if len(set(names)) < len(names):
        raise ValueError("Two bits have the same name - at `$.requests_by_bit`")
    if not meta.get("requests_table_exact", True) and "requests_table" not in meta:
        raise ValueError("Object missing field `requests_table`, which is not exact")
    return meta
