"""The warm-up: in the background, cancelled at any time, over when it says so."""

from __future__ import annotations

import struct
import threading

import pytest

from cowslice.cache.slicemap import SliceCache, SliceMap
from cowslice.cache.warming import Warmup
from cowslice.errors import CorruptImage
from cowslice.storage.memory import MemoryStorage
from cowslice.testing.faults import CountingStorage, HeldStorage

PATIENCE = 60


class Map:
    """Counts its warm-ups; `held` ones last until they are stopped."""

    def __init__(self, *, held: bool = False, damaged: bool = False) -> None:
        self.begun, self.stopped = threading.Event(), threading.Event()
        self.warmed = 0
        self._held, self._damaged = held, damaged

    def warm(self) -> int:
        self.warmed += 1
        self.begun.set()
        if self._damaged:
            raise CorruptImage("a table is damaged")
        if self._held:
            assert self.stopped.wait(PATIENCE)
        return 1

    def stop(self) -> None:
        self.stopped.set()


def real_map(storage):
    l1 = struct.pack(">4Q", *((i + 1) << 12 for i in range(4)))
    return SliceMap(SliceCache(1 << 20), cluster_bits=12, extended_l2=False, l1=l1, clusters=2048, entry_bytes=4096,
                    storage=storage)


def test_all_maps_are_warmed_once():
    maps = [Map(), Map(damaged=True), Map()]
    warmup = Warmup(maps)
    warmup.start()
    warmup.start()
    assert warmup.join(PATIENCE)
    assert [one.warmed for one in maps] == [1, 1, 1]


def test_closing_cancels_and_waits():
    first, second = Map(held=True), Map()
    warmup = Warmup([first, second])
    warmup.start()
    assert first.begun.wait(PATIENCE)
    assert not warmup.join(0)
    warmup.close()
    assert warmup.join(0)
    assert second.warmed == 0
    warmup.close()


def test_one_that_was_cancelled_never_begins():
    one = Map()
    warmup = Warmup([one])
    warmup.cancel()
    warmup.start()
    assert warmup.join(0)
    assert one.warmed == 0


def test_one_that_never_began_is_over():
    warmup = Warmup([Map()])
    assert warmup.join(0)
    warmup.close()


def test_after_a_close_nothing_is_read_any_more():
    held = HeldStorage(MemoryStorage(bytes(6 << 12)))
    counted = CountingStorage(held)
    warmup = Warmup([real_map(counted)])
    warmup.start()
    held.wait_for(1)
    warmup.cancel()
    held.release()
    warmup.close()
    assert counted.counts().reads == 1


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_real_maps_are_warm_when_it_is_over(layers):
    maps = [real_map(MemoryStorage(bytes(6 << 12))) for _ in range(layers)]
    warmup = Warmup(maps)
    warmup.start()
    assert warmup.join(PATIENCE)
    assert all(one.resident(2047) for one in maps)
    warmup.close()
