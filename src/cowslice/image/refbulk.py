"""One reference more or less for hundreds of thousands of clusters at once, as snapshots need it.

It does not know free space. What must hold: the counts afterwards are those that one change after the other would have
left, or, when it raises, those from before.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from cowslice.image.counting import Blocks, spread
from cowslice.image.refblocks import Refblocks
from cowslice.units import MiB

_READ_AT_ONCE = 16 * MiB  # of blocks: clusters all over a large file need not all of its counts in memory


def adjust(blocks: Refblocks, clusters: Sequence[int] | array[int], delta: int) -> list[tuple[int, int]]:
    """Refcounts.adjust for many clusters: returns the runs (first cluster, clusters) whose count became 0."""
    numbers = _numbers(clusters)
    places, stranger = spread(numbers, shift=blocks.shift, blocks=blocks.entries)
    if stranger >= 0:
        raise blocks.uncounted(stranger)
    held: list[tuple[int, array[int]]] = []
    for index, low, high in places:
        block = blocks.needed(index)
        blocks.touch(index, block, low, high)  # now: one that nobody changed may leave when the next is read
        held.append((index, block.counts))
    runs, failed = Blocks(held, shift=blocks.shift, width=blocks.width).change(
        numbers, up=delta > 0, limit=blocks.limit)
    if failed >= 0:
        raise blocks.overflow(failed) if counts_of(blocks, (failed,))[0] else blocks.uncounted(failed)
    return runs


def counts_of(blocks: Refblocks, clusters: Sequence[int] | array[int]) -> array[int]:
    """Refcounts.counts_of: the count of each cluster, as array('Q')."""
    numbers = _numbers(clusters)
    counts = array("Q", bytes(8 * len(numbers)))
    places, _ = spread(numbers, shift=blocks.shift, blocks=blocks.entries)
    most = max(_READ_AT_ONCE // blocks.block_bytes, 1)
    for first in range(0, len(places), most):
        held = [(index, block.counts) for index, _, _ in places[first : first + most]
                if (block := blocks.get(index)) is not None]
        Blocks(held, shift=blocks.shift, width=blocks.width).read(numbers, counts)
    return counts


def _numbers(clusters: Sequence[int] | array[int]) -> array[int]:
    return clusters if isinstance(clusters, array) and clusters.typecode == "q" else array("q", clusters)
