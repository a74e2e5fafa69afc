"""One reference more or less for hundreds of thousands of clusters at once, as snapshots need it.

It does not know free space. What must hold: the counts afterwards are those that one change after the other would have
left, or, when it raises, those from before.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from cowslice.image.refblocks import Refblocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[Any]


def adjust(blocks: Refblocks, clusters: Sequence[int] | array[int] | Numbers, delta: int) -> list[tuple[int, int]]:
    """Refcounts.adjust for many clusters: returns the runs (first cluster, clusters) whose count became 0."""
    import numpy as np

    numbers, times = _counted(np.asarray(clusters, dtype=np.int64))
    undo: list[tuple[Numbers, Numbers, Numbers]] = []
    zeros: list[Numbers] = []
    try:
        for index, piece in _by_block(numbers, blocks.shift):
            block = blocks.needed(index)
            counts = np.frombuffer(block.counts, dtype=block.counts.typecode)
            entries = numbers[piece] & ((1 << blocks.shift) - 1)
            before = counts[entries]
            _check(blocks, numbers[piece], before, times[piece], delta)
            change = times[piece].astype(before.dtype)
            after = before + change if delta > 0 else before - change
            undo.append((counts, entries, before))
            counts[entries] = after
            blocks.touch(index, block, int(entries[0]), int(entries[-1]) + 1)
            zeros.append(numbers[piece][after == 0])
    except BaseException:
        for counts, entries, before in undo:
            counts[entries] = before
        raise
    return _runs(np.concatenate(zeros)) if zeros else []


def counts_of(blocks: Refblocks, clusters: Numbers) -> Numbers:
    """Refcounts.counts_of: the count of each cluster."""
    import numpy as np

    wanted = np.asarray(clusters, dtype=np.int64)
    if not _is_ascending(wanted) and _is_dense(wanted):
        first, last = int(wanted.min()) >> blocks.shift, int(wanted.max()) >> blocks.shift
        known = [blocks.get(index) for index in range(first, last + 1)]
        dense = b"".join([(blocks.zeros(1 << blocks.shift) if block is None else block.counts).tobytes()
                          for block in known])
        return np.frombuffer(dense, dtype=blocks.zeros(0).typecode)[wanted - (first << blocks.shift)]
    numbers, places = (wanted, slice(None)) if _is_ascending(wanted) else np.unique(wanted, return_inverse=True)
    found = np.zeros(len(numbers), dtype=np.uint64)
    for index, piece in _by_block(numbers, blocks.shift):
        block = blocks.get(index)
        if block is not None:
            counts = np.frombuffer(block.counts, dtype=block.counts.typecode)
            found[piece] = counts[numbers[piece] & ((1 << blocks.shift) - 1)]
    return found[places]


def _counted(clusters: Numbers) -> tuple[Numbers, Numbers]:
    """The different ones ascending, and how often each occurs; what lies close together is not sorted for it."""
    import numpy as np

    if _is_ascending(clusters):
        return clusters, np.broadcast_to(np.int64(1), clusters.shape)
    if not _is_dense(clusters):
        return np.unique(clusters, return_counts=True)
    first = int(clusters.min())
    times = np.bincount(clusters - first)
    numbers = np.flatnonzero(times)
    return numbers + first, times[numbers]


def _is_ascending(clusters: Numbers) -> bool:
    return bool((clusters[1:] > clusters[:-1]).all())


def _is_dense(clusters: Numbers) -> bool:
    """Whether an array over the whole range is not much larger than the clusters."""
    return len(clusters) > 0 and int(clusters.max()) - int(clusters.min()) < max(8 * len(clusters), 1 << 16)


def _check(blocks: Refblocks, clusters: Numbers, before: Numbers, times: Numbers, delta: int) -> None:
    least = 1 if delta > 0 else times
    if (before < least).any():
        raise blocks.uncounted(int(clusters[(before < least).argmax()]))
    if delta > 0:
        import numpy as np

        kind = np.uint64 if blocks.limit >> 63 else np.int64
        full = before.astype(kind) > kind(blocks.limit) - times.astype(kind)
        if full.any():
            raise blocks.overflow(int(clusters[full.argmax()]))


def _by_block(numbers: Numbers, shift: int) -> Iterator[tuple[int, slice]]:
    """Cut ascending clusters into (block index, slice of those it counts)."""
    import numpy as np

    if not len(numbers):
        return
    indexes = numbers >> shift
    borders = [0, *(np.flatnonzero(indexes[1:] != indexes[:-1]) + 1).tolist(), len(numbers)]
    for first, end in pairwise(borders):
        yield int(indexes[first]), slice(first, end)


def _runs(numbers: Numbers) -> list[tuple[int, int]]:
    import numpy as np

    if not len(numbers):
        return []
    starts = np.flatnonzero(np.concatenate(([True], numbers[1:] != numbers[:-1] + 1)))
    lengths = np.diff(np.concatenate((starts, [len(numbers)])))
    return list(zip(numbers[starts].tolist(), lengths.tolist(), strict=True))
