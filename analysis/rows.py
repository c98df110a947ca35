"""Batches of events as columns, and the one sort that every analysis needs: by vCPU, in ring order."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


class Events(Protocol):
    """A batch of events: a numpy array of EVENT, a mapping of columns, or a DataFrame."""

    def __getitem__(self, name: str, /) -> Any:
        """Return the column ``name``."""


def column(events: Events, name: str) -> Array:
    """Return one column of a batch as a numpy array, copied only where it must be."""
    return np.asarray(events[name])


def by_key(key: Array) -> Array:
    """Return the order that sorts unsigned 32-bit keys and keeps the ring's order among equals.

    Two passes over 16-bit digits, for which numpy has a radix sort: 5 to 10 times faster than its sort of 32-bit keys.
    One pass is enough where the keys of a batch are close together, and numbers of vCPUs are.
    """
    low = key.min() if key.size else 0
    offset = key - low
    order: Array = np.argsort(offset.astype("u2"), kind="stable")
    high = (offset >> np.uint32(16)).astype("u2")
    if high.any():
        order = order[np.argsort(high[order], kind="stable")]
    return order


def heads(*keys: Array) -> Array:
    """Return the first row of each run of equal rows."""
    if not keys[0].size:
        return np.zeros(0, np.intp)
    differs = np.zeros(keys[0].size, bool)
    differs[0] = True
    for key in keys:
        differs[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(differs)


def find(sorted_keys: Array, wanted: Array) -> tuple[Array, Array]:
    """Return where each wanted key stands (or would stand) among unique sorted keys, and whether it is there."""
    slot = np.searchsorted(sorted_keys, wanted)
    if not sorted_keys.size:
        return slot, np.zeros(wanted.size, bool)
    found = sorted_keys[np.minimum(slot, sorted_keys.size - 1)] == wanted
    return slot, found
