"""How small the map of an image packs: its L2 tables through the packing of the metadata cache, within a budget.

It keeps nothing and judges nothing. A map larger than the budget is sampled evenly, and the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cowslice.cache.packing import PackedSlice
from cowslice.format.entries import L1_OFFSET_MASK
from cowslice.format.header import Header
from cowslice.format.limits import MAX_L1_ENTRIES, MAX_OFFSET
from cowslice.format.words import unpack_words
from cowslice.storage.base import Storage

SLICE_ENTRIES = 512  # what the cache packs at once
WORD_BYTES = 8  # each slice also has one word in the directory
# Slices looked at: 1280 are the map of a 40 GiB disk at 64 KiB clusters, and take some 10 ms.
BUDGET = 2048


@dataclass(frozen=True, slots=True)
class MapSize:
    """`tables` L2 tables of `raw` bytes pack into `packed` bytes. `exact` is false where only a part was looked at."""

    tables: int
    raw: int
    packed: int
    exact: bool


def measure_map_size(storage: Storage, header: Header, *, budget: int = BUDGET) -> MapSize:
    """Measure the L2 tables of the active disk. Raises StorageError."""
    geometry = header.geometry
    entries = min(geometry.l1_entries(header.size), header.l1_size, MAX_L1_ENTRIES)
    words = unpack_words(storage.read(header.l1_table_offset, entries * 8))
    tables = [word & L1_OFFSET_MASK for word in words if word & L1_OFFSET_MASK]
    slice_bytes = min(SLICE_ENTRIES, geometry.l2_entries) * geometry.l2_entry_size
    slices = geometry.cluster_size // slice_bytes
    chosen = _evenly(len(tables) * slices, budget)
    packed = _packed_bytes(storage, header, tables, chosen, slice_bytes=slice_bytes)
    total = len(tables) * slices
    scaled = packed if len(chosen) == total else packed * total // max(1, len(chosen))
    return MapSize(len(tables), len(tables) << geometry.cluster_bits, scaled, len(chosen) == total)


def _evenly(count: int, most: int) -> Sequence[int]:
    """At most `most` numbers below `count`, all of them or evenly spread."""
    return range(count) if count <= most else [n * count // most for n in range(most)]


def _packed_bytes(
    storage: Storage, header: Header, tables: Sequence[int], chosen: Sequence[int], *, slice_bytes: int
) -> int:
    """Pack the chosen slices. A table is read whole when all of it is wanted: one read is cheaper than sixteen."""
    slices = header.geometry.cluster_size // slice_bytes
    together = slices if isinstance(chosen, range) else 1
    buffer = memoryview(bytearray(together * slice_bytes))
    packed = 0
    for number in chosen[::together]:
        offset = tables[number // slices] + number % slices * slice_bytes
        if offset + len(buffer) > MAX_OFFSET:
            continue
        storage.read_into(offset, buffer)
        for start in range(0, len(buffer), slice_bytes):
            piece = buffer[start : start + slice_bytes]
            packed += PackedSlice(piece, header.cluster_bits, header.extended_l2).payload_bytes + WORD_BYTES
    return packed
