"""The cache's memory ends with it, whichever way Python lets it go."""

from __future__ import annotations

import gc
import weakref

import cowslice
from cowslice.ops.layout import write_populated_image
from cowslice.storage import MemoryStorage
from cowslice.units import KiB, MiB


class _Loop:
    """Refers to itself, so that only the collector ends it."""

    def __init__(self, held: object) -> None:
        self.held = held
        self.me = self


def test_a_cache_full_of_slices_survives_being_collected_in_a_cycle() -> None:
    storage = MemoryStorage()
    write_populated_image(storage, size=8 * MiB, cluster_bits=12, layout="random")
    with cowslice.open(storage, l2_cache_size=512 * KiB, warmup="off") as disk:
        disk.read(0, disk.size)
        assert disk.cache.statistics()["bytes_used"] > 0
        loop = _Loop(disk.cache)  # younger than the cache, which the collector therefore clears first
        ended = weakref.ref(loop)
    del disk, loop
    gc.collect()
    assert ended() is None
