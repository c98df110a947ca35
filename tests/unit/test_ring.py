"""The ring reader, over a mapping that a test writes as the kernel would."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.schema import EVENT
from tests.examples import examples
from tracer.ring import Ring

PAGE = mmap.PAGESIZE
HEADER, BUSY = 8, 1 << 31
STRIDE = HEADER + EVENT.itemsize


class Kernel:
    """The producer's side of a BPF ring buffer, in a memfd; and a slow, obvious reader of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptor = os.memfd_create("ring")
        os.ftruncate(self.descriptor, 2 * PAGE + 2 * size)
        self._memory = mmap.mmap(self.descriptor, 2 * PAGE + 2 * size)
        self._busy: list[int] = []
        self._numbers = itertools.count(1)

    def close(self) -> None:
        """Give everything back."""
        self._memory.close()
        os.close(self.descriptor)

    def _position(self, page: int) -> int:
        return int.from_bytes(self._memory[page * PAGE : page * PAGE + 8], "little")

    @property
    def consumer(self) -> int:
        """Return the position that the reader has stored."""
        return self._position(0)

    @property
    def producer(self) -> int:
        """Return where the next record goes."""
        return self._position(1)

    def start_at(self, position: int) -> None:
        """Pretend that the ring has been used before."""
        self._memory[0:8] = self._memory[PAGE : PAGE + 8] = position.to_bytes(8, "little")

    def _put(self, position: int, data: bytes) -> None:
        # The kernel maps the data twice in a row; here each byte is written twice.
        for offset, byte in enumerate(data):
            place = 2 * PAGE + (position + offset) % self.size
            self._memory[place] = self._memory[place + self.size] = byte

    def reserve(self) -> bool:
        """Begin a record; returns False when the ring is full."""
        position = self.producer
        if position + STRIDE - self.consumer > self.size:
            return False
        self._put(position, (EVENT.itemsize | BUSY).to_bytes(4, "little") + b"\0\0\0\0")
        self._memory[PAGE : PAGE + 8] = (position + STRIDE).to_bytes(8, "little")
        self._busy.append(position)
        return True

    def commit(self, place: int = 0) -> int:
        """Finish one of the records that were begun; return its number."""
        position = self._busy.pop(place)
        number = next(self._numbers)
        event = np.zeros(1, EVENT)
        for name in EVENT.names or ():
            event[name] = number % 200
        event["time_ns"] = number
        self._put(position + HEADER, event.tobytes())
        self._put(position, EVENT.itemsize.to_bytes(4, "little"))
        return number

    def emit(self) -> int:
        """Write a whole record; return its number, 0 when the ring is full."""
        return self.commit(-1) if self.reserve() else 0

    @property
    def busy(self) -> int:
        """Return how many records have been begun and not finished."""
        return len(self._busy)

    def read(self, most: int) -> list[bytes]:
        """Return what a reader must get now, record by record."""
        got: list[bytes] = []
        position = self.consumer
        while position < self.producer and len(got) < most:
            record = bytes(self._memory[2 * PAGE + (position + at) % self.size] for at in range(STRIDE))
            if int.from_bytes(record[:4], "little") & BUSY:
                break
            got.append(record[HEADER:])
            position += STRIDE
        return got


@pytest.fixture(params=[PAGE, 4 * PAGE])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Yield a ring of one page, and one of four."""
    made = Kernel(request.param)
    yield made
    made.close()


@pytest.fixture
def ring(kernel: Kernel) -> Iterator[Ring]:
    """Yield its reader."""
    made = Ring(kernel.descriptor, kernel.size, EVENT)
    yield made
    made.close()


def test_an_empty_ring_gives_nothing(ring: Ring) -> None:
    """As an array of events all the same."""
    assert ring.pending == 0
    events = ring.drain()
    assert (len(events), events.dtype) == (0, EVENT)


def test_events_come_in_order_and_whole(kernel: Kernel, ring: Ring) -> None:
    """And the place that they took is free."""
    numbers = [kernel.emit() for _ in range(23)]
    assert ring.pending == 23
    events = ring.drain()
    assert events["time_ns"].tolist() == numbers
    assert events["flags"].tolist() == numbers
    assert kernel.consumer == kernel.producer
    assert ring.pending == 0


def test_records_that_wrap_around_are_whole(kernel: Kernel, ring: Ring) -> None:
    """The stride does not divide the size, so that in time a record lies on every split."""
    for _ in range(3 * kernel.size // STRIDE):
        numbers = [kernel.emit() for _ in range(5)]
        assert ring.drain()["time_ns"].tolist() == numbers
    assert kernel.consumer > 10 * kernel.size


def test_a_full_ring_is_read_in_one_go(kernel: Kernel, ring: Ring) -> None:
    """Wherever it begins."""
    kernel.start_at((kernel.size - STRIDE // 2) // STRIDE * STRIDE)
    numbers = list(iter(kernel.emit, 0))
    assert len(numbers) == kernel.size // STRIDE
    assert ring.drain()["time_ns"].tolist() == numbers
    assert kernel.emit()


def test_what_is_being_written_is_waited_for(kernel: Kernel, ring: Ring) -> None:
    """It and what comes after it, so that the order stays."""
    first = kernel.emit()
    assert kernel.reserve()
    last = kernel.emit()
    assert ring.pending == 3
    assert ring.drain()["time_ns"].tolist() == [first]
    assert len(ring.drain()) == 0
    assert ring.pending == 2
    late = kernel.commit()
    assert ring.drain()["time_ns"].tolist() == [late, last]


def test_most_bounds_a_batch(kernel: Kernel, ring: Ring) -> None:
    """Nothing is lost by it; 0 takes nothing."""
    numbers = [kernel.emit() for _ in range(23)]
    assert len(ring.drain(0)) == 0
    got = [ring.drain(7)["time_ns"].tolist() for _ in range(4)]
    assert [len(batch) for batch in got] == [7, 7, 7, 2]
    assert [number for batch in got for number in batch] == numbers


def test_batches_stay_valid(kernel: Kernel) -> None:
    """They are copies: the producer writes over the ring, and the ring may be closed."""
    ring = Ring(kernel.descriptor, kernel.size, EVENT)
    numbers = [kernel.emit() for _ in range(5)]
    events = ring.drain()
    while kernel.emit():
        pass
    ring.close()
    assert events["time_ns"].tolist() == numbers


def test_positions_of_a_ring_that_ran_for_years(kernel: Kernel, ring: Ring) -> None:
    """They only grow: beyond 32 bits, beyond what a float holds exactly."""
    kernel.start_at((1 << 60) // STRIDE * STRIDE)
    numbers = [kernel.emit() for _ in range(5)]
    assert ring.drain()["time_ns"].tolist() == numbers


def test_a_payload_that_is_not_whole_words_is_refused(kernel: Kernel) -> None:
    """The kernel would pad the record, and the next one would be misread."""
    with pytest.raises(ValueError, match="multiple of 8"):
        Ring(kernel.descriptor, kernel.size, np.dtype([("a", "u4")]))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(1, 30)),
        st.tuples(st.just("commit"), st.integers(0, 40)),
        st.tuples(st.just("emit"), st.integers(1, 60)),
        st.tuples(st.just("drain"), st.integers(0, 80)),
    ),
    max_size=40,
)


@settings(max_examples=examples(150), deadline=None)
@given(start=st.integers(0, 10_000), steps=STEPS)
def test_it_agrees_with_a_slow_reader(start: int, steps: list[tuple[str, int]]) -> None:
    """Whatever the producer does between two reads."""
    kernel = Kernel(PAGE)
    kernel.start_at(start * STRIDE)
    ring = Ring(kernel.descriptor, PAGE, EVENT)
    act: dict[str, Callable[[int], object]] = {
        "reserve": lambda count: [kernel.reserve() for _ in range(count)],
        "commit": lambda place: kernel.busy and kernel.commit(place % kernel.busy),
        "emit": lambda count: [kernel.emit() for _ in range(count)],
    }
    try:
        for what, count in [*steps, ("drain", 1 << 20)]:
            if what == "drain":
                before = ring.pending
                must = kernel.read(count)
                got = ring.drain(count)
                assert [event.tobytes() for event in got] == must
                assert ring.pending == before - len(must)
            else:
                act[what](count)
    finally:
        ring.close()
        kernel.close()
