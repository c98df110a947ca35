"""The BPF ring buffer, mapped and read by numpy.

BCC's own reader calls back once for each record. Here every record has the same size, so that all that are pending are
one array: cut at the first one that is still being written, copied, and the consumer's position stored. The layout of
the mapping and of a record is the kernel's ABI: Linux commit 457f44363a88 ("bpf: Implement BPF ring buffer and verifier
support for it") (in v5.8).
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_BUSY = np.uint32(1 << 31)
_HEADER = 8  # u32 length and flags, u32 page offset

# x86 does not reorder loads with loads nor stores with stores, so the barriers that libbpf uses on this ring
# (smp_load_acquire, smp_store_release) are plain 8-byte accesses, which numpy's scalar access to an aligned array is.


class _Filled(NamedTuple):
    start: int
    records: int


class Ring:
    """All events of one BPF ring buffer, in the order in which they were reserved.

    ``event`` is the dtype of the payload. Do not open BCC's own reader on the same map: both store the position.
    """

    def __init__(self, descriptor: int, size: int, event: np.dtype[np.void]) -> None:
        page = mmap.PAGESIZE
        self.size = size
        self.descriptor = descriptor
        self._consumer_page = mmap.mmap(descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        # The producer's page, then the data twice in a row: no record is ever split.
        self._data_pages = mmap.mmap(descriptor, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumer: npt.NDArray[np.uint64] = np.frombuffer(self._consumer_page, np.uint64, 1)
        self._producer: npt.NDArray[np.uint64] = np.frombuffer(self._data_pages, np.uint64, 1)
        self._data: npt.NDArray[np.uint8] = np.frombuffer(self._data_pages, np.uint8, 2 * size, offset=page)
        self._stride = _HEADER + -(-event.itemsize // 8) * 8
        self._record = np.dtype(
            {
                "names": ["length", "event"],
                "formats": ["u4", event],
                "offsets": [0, _HEADER],
                "itemsize": self._stride,
            }
        )
        if event.itemsize % 8:
            raise ValueError("the payload of a record must be a multiple of 8 bytes")

    @property
    def pending(self) -> int:
        """Return how many records are waiting, finished or not."""
        return int(self._producer[0] - self._consumer[0]) // self._stride

    def drain(self, most: int = 1 << 20) -> npt.NDArray[np.void]:
        """Take all finished events from the ring, ``most`` at the most, and return them as one array of its own."""
        position = int(self._consumer[0])
        waiting = min((int(self._producer[0]) - position) // self._stride, most)
        if not waiting:
            return np.empty(0, self._record["event"])
        records = np.frombuffer(self._data, self._record, waiting, offset=position & (self.size - 1))
        unfinished = (records["length"] & _BUSY) != 0
        if unfinished.any():
            waiting = int(unfinished.argmax())
            records = records[:waiting]
        events = records["event"].copy()
        self._consumer[0] = position + waiting * self._stride
        return events

    def close(self) -> None:
        """Unmap the ring. Arrays that :meth:`drain` gave stay valid."""
        del self._consumer, self._producer, self._data
        self._consumer_page.close()
        self._data_pages.close()
