"""How small the map of one image packs, slice by slice, and the LRU curve by bytes that follows from it.

It opens nothing: the image is given, and only its L2 tables are read. Sizes are those that the metadata cache charges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cowslice.errors import BadOption
from cowslice.format.entries import L1_OFFSET_MASK
from cowslice.format.geometry import Geometry
from cowslice.format.words import unpack_words
from cowslice.image.image import Image
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.tune.curve import Columns, Counted, misses_of, touched_spans
from cowslice.tune.curvestack import Stack
from cowslice.tune.simulatereplay import directory_bytes, weigh
from cowslice.units import div_ceil

if TYPE_CHECKING:
    from numpy.typing import NDArray

SLICE_BYTES = 4096  # the most that the cache packs as one slice


@dataclass(frozen=True, slots=True, eq=False)
class PackedMap:
    """The map of one image as the metadata cache would hold it, read in units of `entry_bytes`.

    A slice has `slice_bytes` on disk and maps `slice_span` guest bytes. `sizes` are the bytes that each takes in
    memory, multiples of 16; 0 where it lives in its directory word, or where there is no L2 table at all: then `mapped`
    is False. `directory_bytes` is what the directory takes when every slice was looked at.
    """

    geometry: Geometry
    disk_size: int
    entry_bytes: int
    slice_bytes: int
    sizes: NDArray[np.uint16]
    mapped: NDArray[np.bool_]
    directory_bytes: int

    @property
    def slice_span(self) -> int:
        """Guest bytes that one slice maps."""
        return self.slice_bytes // self.geometry.l2_entry_size << self.geometry.cluster_bits

    @property
    def raw_bytes(self) -> int:
        """Bytes of all L2 slices on disk."""
        return int(self.mapped.sum()) * self.slice_bytes

    @property
    def packed_bytes(self) -> int:
        """Bytes that the whole map takes in memory, directory included."""
        return int(self.sizes.sum(dtype=np.int64)) + self.directory_bytes


@dataclass(frozen=True, slots=True, eq=False)
class PackedCurve(Counted):
    """How often a packed map under an LRU of each size in bytes would have missed.

    `sizes` are bytes for slices, ascending from 0; the directory's `directory_bytes` come on top. Misses include the
    cold ones, as in `Curve`.
    """

    reads: int
    writes: int
    cold_reads: int
    cold_writes: int
    directory_bytes: int
    sizes: NDArray[np.int64]
    read_misses: NDArray[np.int64]
    write_misses: NDArray[np.int64]

    @property
    def full_bytes(self) -> int:
        """The smallest cache that holds all that was touched."""
        return int(self.sizes[-1]) + self.directory_bytes

    def misses_at(self, cache_bytes: int) -> int:
        """Misses of a cache of so many bytes, directory included; all accesses where the directory does not fit."""
        at = int(np.searchsorted(self.sizes, cache_bytes - self.directory_bytes, side="right")) - 1
        return int(self.read_misses[at] + self.write_misses[at]) if at >= 0 else self.accesses

    def miss_ratio(self, cache_bytes: int, *, warm: bool = False) -> float:
        """Misses per access; `warm` leaves first touches out. 0.0 without any access."""
        misses = self.misses_at(cache_bytes) - (self.cold if warm else 0)
        return max(0, misses) / self.accesses if self.accesses else 0.0


def packed_map(image: Image, *, entry_bytes: int = SLICE_BYTES) -> PackedMap:
    """Measure the map of the top file of `image`, one L2 table at a time, with the packing of the metadata cache.

    `entry_bytes` is `l2-cache-entry-size`. Raises BadOption for a raw image, CorruptImage, StorageError, Closed.
    """
    layer = image.layers[0]
    if not isinstance(layer, Qcow2Layer):
        raise BadOption(f"'{image.path}' is a raw disk: it has no map to pack")
    geometry = layer.geometry
    slice_bytes = min(entry_bytes, SLICE_BYTES)
    per_table = geometry.cluster_size // slice_bytes
    slices = div_ceil(image.size, slice_bytes // geometry.l2_entry_size << geometry.cluster_bits)
    sizes = np.zeros(slices, dtype=np.uint16)
    mapped = np.zeros(slices, dtype=np.bool_)
    buffer = bytearray(geometry.cluster_size)
    for number, word in enumerate(unpack_words(layer.l1)):
        table = word & L1_OFFSET_MASK
        if not table:
            continue
        layer.storage.read_into(table, memoryview(buffer))
        mine = slice(number * per_table, (number + 1) * per_table)  # the last table may reach beyond the disk
        mapped[mine] = True
        weigh(buffer, slice_bytes, geometry.cluster_bits, geometry.extended_l2, sizes[mine])
    return PackedMap(geometry, image.size, entry_bytes, slice_bytes, sizes, mapped, directory_bytes(slices))


def packed_curve(requests: Iterable[Columns], packed: PackedMap) -> PackedCurve:
    """Compute the curve by bytes of a trace on that image in one pass. Raises OutOfRange and what the trace raises."""
    unit = 16
    weights = (packed.sizes // unit).astype(np.uint16)
    stack = Stack(packed.slice_span.bit_length() - 1, slices=len(weights), weights=weights)
    for chunk in requests:
        stack.add(*touched_spans(chunk, packed.geometry, packed.disk_size))
    sizes, misses = misses_of(stack)
    reads, writes = stack.reads_and_writes
    return PackedCurve(
        reads=reads, writes=writes, cold_reads=stack.cold[0], cold_writes=stack.cold[1],
        directory_bytes=packed.directory_bytes, sizes=sizes * unit, read_misses=misses[0], write_misses=misses[1])
