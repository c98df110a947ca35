"""Lifecycles by pandas alone, as one writes them who has the events in a DataFrame: the core is measured against it.

The word of each vCPU's event is compared with that of the one before: a bit that is set has been raised, one that is
clear has ended. Between both the returns to user space and the saves are counted. That is all: no losses, no damaged
parts, no kicks, nobody who raised it, and no batches.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from probes.schema import KVM_EXIT_SHUTDOWN, PAYLOAD_PENDING, VALID_TRIPLE_FAULT, Kind

_TAKEN = ["vcpu", "kind", "seq", "time_ns", "since_ns", "requests", "arg", "detail"]
_COUNTS = ["userspace_exits", "saves", "blind_saves"]
_SAVED = VALID_TRIPLE_FAULT | PAYLOAD_PENDING


def lifecycles(events: pd.DataFrame, names: Mapping[int, str]) -> pd.DataFrame:
    """Return a row for each request that was raised; ``ended_ns`` is missing where it is still pending.

    ``names``: of the bits that are looked for. Columns: ``vcpu``, ``request``, ``raised_after_ns``, ``raised_ns``,
    ``end``, ``ended_after_ns``, ``ended_ns``, ``userspace_exits``, ``saves``, ``blind_saves``.
    """
    own = events.loc[events["seq"] != 0, _TAKEN].sort_values("vcpu", kind="stable", ignore_index=True)
    before = own.groupby("vcpu", sort=False)["requests"].shift(fill_value=0).to_numpy()
    now = own["requests"].to_numpy()
    found = [
        _of_bit(own, before >> np.uint64(bit) & np.uint64(1) != 0, now >> np.uint64(bit) & np.uint64(1) != 0, name)
        for bit, name in names.items()
        if (now >> np.uint64(bit) & np.uint64(1)).any()
    ]
    return pd.concat(found, ignore_index=True)


def _of_bit(own: pd.DataFrame, had: npt.NDArray[np.bool_], has: npt.NDArray[np.bool_], name: str) -> pd.DataFrame:
    # Rows are by vCPU: one that counts raises numbers the instances of all of them, each with rows of its own vCPU.
    number = (has & ~had).cumsum()
    rises = own.loc[has & ~had, ["vcpu", "since_ns", "time_ns"]].set_axis(number[has & ~had])
    rises = rises.rename(columns={"since_ns": "raised_after_ns", "time_ns": "raised_ns"})
    gone = own.loc[had & ~has, ["since_ns", "time_ns", "kind", "arg"]].set_axis(number[had & ~has])
    shutdown = (gone["kind"] == Kind.RUN_EXIT) & (gone["arg"] & 0xFFFFFFFF == KVM_EXIT_SHUTDOWN)
    ends = pd.DataFrame(
        {
            "end": np.where(shutdown, "delivered", "serviced"),
            "ended_after_ns": gone["since_ns"],
            "ended_ns": gone["time_ns"],
        }
    )
    during = own.loc[has, ["kind", "detail"]]
    save = during["kind"] == Kind.SAVE
    counted = pd.DataFrame(
        {
            "userspace_exits": during["kind"] == Kind.RUN_EXIT,
            "saves": save & (during["detail"] & _SAVED == _SAVED),
            "blind_saves": save & (during["detail"] & _SAVED != _SAVED),
        }
    )
    counts = counted.groupby(number[has], sort=False).sum()
    told = rises.join(ends).join(counts)
    told[_COUNTS] = told[_COUNTS].fillna(0).astype("int64")
    return told.assign(request=name, end=told["end"].fillna("open"))
