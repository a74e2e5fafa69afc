"""What L2 entries refer to and what becomes of their counts, in a few obvious lines: the twin of image/counting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cowslice.format.entries import COMPRESSED, COPIED, L2_OFFSET_MASK
from cowslice.units import SECTOR


def referred(words: Sequence[int], cluster_bits: int) -> tuple[list[int], list[int]]:
    """The host clusters of plain entries in their order, and those that compressed streams touch."""
    plain: list[int] = []
    packed: list[int] = []
    place = 70 - cluster_bits
    for word in words:
        if word & COMPRESSED:
            at = word & ((1 << place) - 1)
            sectors = ((word & ~(COMPRESSED | COPIED)) >> place) + 1
            end = at // SECTOR * SECTOR + sectors * SECTOR
            packed += range(at >> cluster_bits, (end - 1 >> cluster_bits) + 1)
        elif word & L2_OFFSET_MASK:
            plain.append((word & L2_OFFSET_MASK) >> cluster_bits)
    return plain, packed


def marked(word: int, count: int) -> int:
    """An entry as COPIED must stand in it; `count` is that of its cluster."""
    if word & COMPRESSED:
        return word
    return word & ~COPIED | (COPIED if word & L2_OFFSET_MASK and count == 1 else 0)


def changed(counts: Mapping[int, int], clusters: Sequence[int], delta: int, limit: int) -> dict[int, int] | int:
    """The counts after one change for each cluster, or the first cluster that cannot change."""
    after = dict(counts)
    for cluster in clusters:
        count = after.get(cluster, 0)
        if not count or (delta > 0 and count == limit):
            return cluster
        after[cluster] = count + delta
    return after
