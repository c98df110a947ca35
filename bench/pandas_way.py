"""Lifecycles by pandas alone, as one writes them plainly who has the events in a DataFrame; set beside the core.

Each event of a vCPU is compared with the one before it: a bit of the word that is set now and was not has been raised,
one that was and is not has ended, and the events between both are those of one instance. The table is the core's.

It does less than the core: it takes all events at once, and knows nothing of the end of a process, of saves of other
requests than a triple fault, of registers that are read after a save, of what the tracer has counted as lost, of a
request that came or went while events were lost, or of clocks of two CPUs that differ.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.events import CREATED, NESTED, READ, SYNC
from analysis.words import IOCTLS, SITES, By
from probes.schema import KVM_EXIT_SHUTDOWN, PAYLOAD_PENDING, REQUEST_MASK, VALID_TRIPLE_FAULT, Kind

#: Columns of analysis.lifecycle.LIFECYCLE that it tells, each as the core does.
COLUMNS = (
    *("vm", "pid", "vcpu", "vcpu_number", "request", "raised_by", "raised_in", "raised_after_ns", "raised_ns"),
    *("end", "ended_after_ns", "ended_ns", "userspace_exits", "saves", "blind_saves", "nested", "stale", "exposed"),
    *("requester_tid", "requester_cpu", "kicked_ns", "left_guest_ns", "reentered_ns"),
)
_TRIPLE_FAULT = "triple_fault"
_LOW = 0xFFFFFFFF
_BY_IOCTL, _BY_SITE = ({int(number): By(by).name.lower() for number, by in table.tolist()} for table in (IOCTLS, SITES))
_RUN = [Kind.SITE, Kind.RUN_EXIT, Kind.GUEST_ENTRY, Kind.GUEST_EXIT]
_IOCTL = [Kind.IOCTL_EXIT, Kind.SAVE, Kind.RESTORE, Kind.VCPU_NEW]

_Words = npt.NDArray[np.str_]


def lifecycles(events: pd.DataFrame, names: Mapping[int, str], *, full: bool) -> pd.DataFrame:
    """Return a row for each request that was raised, in :data:`COLUMNS`.

    ``names``: of the bits that are looked for; ``full``: the events are of detail full.
    """
    own = events[events["seq"] != 0].sort_values(["vcpu", "seq"], ignore_index=True)
    by_vcpu = own.groupby("vcpu")
    own["last_word"] = by_vcpu["requests"].shift(fill_value=0)
    own["last_kind"] = by_vcpu["kind"].shift(fill_value=0)
    own["missing"] = own["seq"] != by_vcpu["seq"].shift(fill_value=0) + 1
    new = own.loc[own["kind"] == Kind.VCPU_NEW, ["vcpu", "detail", "arg"]]
    new.columns = ["vcpu_number", "vm", "vcpu"]
    kicks = _kicks(events, new)
    seen = int(np.bitwise_or.reduce(own["requests"]))
    told = [_of_bit(own, kicks, bit, name, full) for bit, name in names.items() if seen & 1 << bit]
    joined = pd.concat(told, ignore_index=True).merge(new, on="vcpu_number", how="left")
    ordered: pd.DataFrame = joined.sort_values(["raised_ns", "request", "vcpu_number"], ignore_index=True)[[*COLUMNS]]
    return ordered


def _kicks(events: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Return what others did: to which vCPU, when, for which requests, and whether these had been raised by then."""
    kicks = events.loc[events["kind"] == Kind.KICK, ["vcpu", "time_ns", "tid", "cpu", "requests"]]
    kicks = kicks.rename(columns={"vcpu": "vcpu_number"}).assign(seen=True)
    asks = events.loc[events["kind"] == Kind.REQUEST_ALL, ["detail", "time_ns", "tid", "cpu", "requests", "arg"]]
    asks = asks.rename(columns={"detail": "vm", "requests": "mask"}).merge(new, on="vm")
    asks = asks[(asks["mask"].to_numpy() >> asks["vcpu"].to_numpy()) & 1 != 0]
    asks["requests"] = np.uint64(1) << (asks["arg"] & REQUEST_MASK).to_numpy()
    both = pd.concat([kicks, asks[["vcpu_number", "time_ns", "tid", "cpu", "requests"]].assign(seen=False)])
    named: pd.DataFrame = both.rename(columns={"time_ns": "kicked_ns", "tid": "kick_tid", "cpu": "kick_cpu"})
    return named.sort_values("kicked_ns")


def _of_bit(own: pd.DataFrame, kicks: pd.DataFrame, bit: int, name: str, full: bool) -> pd.DataFrame:
    has = own["requests"] & (1 << bit) != 0
    had = own["last_word"] & (1 << bit) != 0
    pending = own[has | had].assign(has=has, had=had)
    pending["instance"] = (pending["has"] & ~pending["had"]).cumsum()

    raised = pending[pending["has"] & ~pending["had"]]
    told = pd.DataFrame(
        {
            "instance": raised["instance"],
            "vcpu_number": raised["vcpu"],
            "pid": raised["pid"],
            "request": name,
            "raised_by": _raised_by(raised, name),
            "raised_in": _raised_in(raised, full),
            "raised_after_ns": raised["since_ns"].astype("int64"),
            "raised_ns": raised["time_ns"].astype("int64"),
            "own_tid": raised["tid"],
            "own_cpu": raised["cpu"],
        }
    ).set_index("instance")
    ended = pending[~pending["has"] | (pending["kind"] == Kind.VCPU_END)].set_index("instance")
    ended = ended[["has", "kind", "arg", "since_ns", "time_ns"]]
    told = told.join(_meanwhile(pending, name)).join(ended)

    told["end"] = _end(told, name)
    told["exposed"] = (told["end"] == "open") & (told["last_save"] == "blind")
    restored = (told["raised_by"] == "set_vcpu_events") & ~told["restored_without"]
    told["stale"] = (told["end"] == "delivered") & (told["last_reset"] == "reset") & ~restored
    told["ended_after_ns"] = told["since_ns"].fillna(told["last_ns"]).astype("int64")
    told["ended_ns"] = told["time_ns"].fillna(-1).astype("int64")
    told["left_guest_ns"] = told["raised_ns"].where(told["raised_in"] == "guest", -1)
    told["reentered_ns"] = told["ended_ns"].where(told["kind"] == Kind.GUEST_ENTRY, -1)
    return _kicked(told, kicks[kicks["requests"] & (1 << bit) != 0], name)


def _meanwhile(pending: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return what happened while each instance was pending."""
    kind, detail, success = pending["kind"], pending["detail"], pending["arg"] < 1 << 32
    flag, payload = detail & VALID_TRIPLE_FAULT != 0, detail & PAYLOAD_PENDING != 0
    read = pending["flags"] & READ != 0
    saved = (kind == Kind.SAVE) & success & read & pending["has"] & (name == _TRIPLE_FAULT)
    restored = (kind == Kind.RESTORE) & success & pending["had"] & (name == _TRIPLE_FAULT)
    reset = (kind == Kind.RESET) & pending["had"] & (name == _TRIPLE_FAULT)
    noted = pending[["instance", "time_ns"]].assign(
        exit=(kind == Kind.RUN_EXIT) & pending["has"],
        carried=saved & flag & payload,
        blind=saved & ~(flag & payload),
        nested=pending["flags"] & NESTED != 0,
        gap=pending["missing"] & pending["had"],
        restored_without=restored & ~flag,
    )
    meanwhile = noted.groupby("instance").agg(
        userspace_exits=("exit", "sum"),
        saves=("carried", "sum"),
        blind_saves=("blind", "sum"),
        nested=("nested", "any"),
        gap=("gap", "any"),
        restored_without=("restored_without", "any"),
        last_ns=("time_ns", "last"),
    )
    save = pd.Series(np.where(noted["blind"], "blind", "carried"), pending["instance"])[saved.to_numpy()]
    set_again = restored & flag & payload
    resets = pd.Series(np.where(reset, "reset", "set"), pending["instance"])[(reset | set_again).to_numpy()]
    meanwhile["last_save"] = save.groupby(level=0).last()
    meanwhile["last_reset"] = resets.groupby(level=0).last()
    return meanwhile


def _raised_by(raised: pd.DataFrame, name: str) -> _Words:
    kind, low = raised["kind"], raised["arg"] & _LOW
    site = low.map(_BY_SITE).fillna("kvm_run") if name == _TRIPLE_FAULT else "kvm_run"
    return np.select(
        [
            (kind == Kind.VCPU_NEW) & (raised["flags"] & CREATED != 0),
            kind == Kind.VCPU_NEW,
            kind == Kind.RESTORE,
            kind == Kind.IOCTL_EXIT,
            kind == Kind.SITE,
            kind.isin(_RUN),
        ],
        ["ioctl", "unknown", "set_vcpu_events", low.map(_BY_IOCTL).fillna("ioctl"), site, "kvm_run"],
        "remote",
    )


def _raised_in(raised: pd.DataFrame, full: bool) -> _Words:
    kind, sync = raised["kind"], raised["flags"] & SYNC != 0
    last = raised["last_kind"].astype("int64").where(~raised["missing"] & full, -1)
    inside = kind.isin(_RUN) | sync
    return np.select(
        [
            kind.isin([Kind.RUN_ENTER, Kind.IOCTL_ENTER]) | (kind == Kind.RESET) & (raised["arg"] & _LOW != 0),
            kind.isin(_IOCTL) & ~sync | (kind == Kind.SITE) & (last == Kind.IOCTL_ENTER),
            (kind == Kind.WAKEUP) & (raised["detail"] != 0),
            kind == Kind.WAKEUP,
            inside & (last == -1),
            inside & (last != Kind.GUEST_ENTRY),
            kind == Kind.GUEST_EXIT,
            inside,
        ],
        ["user_space", "ioctl", "halted", "kernel", "kvm_run", "kernel", "guest", "kvm_run"],
        "unknown",
    )


def _end(told: pd.DataFrame, name: str) -> _Words:
    kind = told["kind"]
    with_vcpu = (kind == Kind.VCPU_END) & told["has"].eq(True)
    cleared = kind.isin(_IOCTL) & ((kind != Kind.SAVE) | (name == _TRIPLE_FAULT))
    conditions = [
        told["gap"],
        kind.isna(),
        with_vcpu & (told["last_save"] == "blind"),  # the last save decides
        with_vcpu & (told["last_save"] == "carried"),
        with_vcpu & (told["raised_by"] == "unknown") & (name == _TRIPLE_FAULT),
        with_vcpu,
        cleared,
    ]
    ends = ["undecided", "open", "lost", "handed_over", "undecided", "abandoned", "cleared"]
    if name != _TRIPLE_FAULT:
        return np.select(conditions, ends, "serviced")
    conditions += [(kind == Kind.RUN_EXIT) & (told["arg"] == KVM_EXIT_SHUTDOWN), kind.isin(_RUN) & told["nested"]]
    return np.select(conditions, [*ends, "delivered", "reflected"], "undecided")


def _kicked(told: pd.DataFrame, kicks: pd.DataFrame, name: str) -> pd.DataFrame:
    """Tell by whom the vCPU was kicked first while the request was pending, and what that says of who raised it."""
    told = pd.merge_asof(
        told.sort_values("raised_after_ns"),
        kicks.astype({"kicked_ns": "int64"}),
        left_on="raised_after_ns",
        right_on="kicked_ns",
        by="vcpu_number",
        direction="forward",
        allow_exact_matches=False,
    )
    kick_ns = told["kicked_ns"]
    kicked = kick_ns.notna() & ((told["ended_ns"] < 0) | (kick_ns <= told["ended_ns"]))
    meanwhile = kicked & (kick_ns <= told["raised_ns"])
    elsewhere = told["raised_in"].isin(["guest", "halted"]) | told["seen"].eq(False)
    another = meanwhile & elsewhere & (told["kick_tid"] != told["own_tid"]) & (name != _TRIPLE_FAULT)
    told["raised_by"] = told["raised_by"].mask(another & (told["raised_by"] == "kvm_run"), "remote")
    remote = told["raised_by"] == "remote"
    own = ~remote & (told["raised_by"] != "unknown") & ((told["raised_by"] != "kvm_run") | (name == _TRIPLE_FAULT))
    for column, nobody in (("tid", 0), ("cpu", -1)):
        others = told[f"kick_{column}"].where(kicked & remote, nobody)
        told[f"requester_{column}"] = told[f"own_{column}"].where(own, others).astype("int64")
    told["raised_ns"] = told["raised_ns"].mask(meanwhile & told["seen"].eq(True), kick_ns).astype("int64")
    told["kicked_ns"] = kick_ns.where(kicked, -1).astype("int64")
    return told
