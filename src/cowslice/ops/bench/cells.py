"""The two published tables: QEMU 4.0, fully populated 40 GB images, random reads, by slice size and cache size.

Source: QEMU commit af39bd0d9a, "qcow2: Set the default cache entry size to 4KB if the L2 cache is not large enough for
the whole disk". It only lists cells; it does not know how one is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from cowslice.units import GiB, KiB, MiB

DISK = 40 * GiB  # what the published figures were measured on


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting: cluster size, L2 cache entry size and L2 cache size in bytes, and the published rate in reads/s."""

    cluster_bits: int
    entry_bytes: int
    cache_bytes: int
    published: int

    def map_bytes(self, size: int) -> int:
        """What the L2 entries of a disk of `size` bytes take."""
        return (size >> self.cluster_bits) * 8

    def covers(self, size: int) -> bool:
        """Whether the cache holds the whole map of such a disk, unpacked."""
        return self.cache_bytes >= self.map_bytes(size)


def _row(cluster_bits: int, entry: int, caches: tuple[int, int, int], rates: tuple[int, int, int]) -> tuple[Cell, ...]:
    return tuple(Cell(cluster_bits, entry, cache, rate) for cache, rate in zip(caches, rates, strict=True))


_CACHES_64K = (1 * MiB, 3 * MiB, 5 * MiB)
_CACHES_256K = (512 * KiB, 1 * MiB, 1280 * KiB)

CELLS: tuple[Cell, ...] = (
    *_row(16, 4 * KiB, _CACHES_64K, (6545, 12045, 55680)),
    *_row(16, 16 * KiB, _CACHES_64K, (5177, 9798, 56278)),
    *_row(16, 64 * KiB, _CACHES_64K, (2718, 5326, 57355)),
    *_row(18, 4 * KiB, _CACHES_256K, (8539, 21071, 55417)),
    *_row(18, 64 * KiB, _CACHES_256K, (3598, 9772, 57687)),
    *_row(18, 256 * KiB, _CACHES_256K, (1415, 4120, 58001)),
)


def short_cells() -> tuple[Cell, ...]:
    """The rows of 4 KiB slices: what a short run measures."""
    return tuple(cell for cell in CELLS if cell.entry_bytes == 4 * KiB)
