"""A walk of fixed stride that an LRU cache sees as it sees uniform random reads.

The peer's benchmark can only add a constant to the offset, modulo the disk. Nearly every constant visits the disk
evenly and out of order, but how soon it comes back to a slice differs: one stride never hits a small LRU cache,
another always does. Uniform random reads hit as often as the cache covers the map. So the stride is searched for which
an LRU cache of this very size hits just as often; where none does, the nearest with *more* hits is taken, which favours
the peer.
"""

from __future__ import annotations

import random
from collections import OrderedDict

from cowslice.ops.bench.cells import Cell

BLOCK = 4096
MOST = (1 << 31) - 1  # the peer takes a step of 31 bits
CLOSE = 0.01  # hit ratios this near are called equal
_TRIES = 600


def lru_hit_ratio(stride: int, *, size: int, span: int, entries: int, requests: int) -> float:
    """Hit ratio of an LRU cache of `entries` slices of `span` guest bytes under the walk, once it is warm."""
    held: OrderedDict[int, None] = OrderedDict()
    warm = max(requests // 3, 1)
    hits = offset = 0
    for number in range(warm + requests):
        slice_number = offset // span
        offset = (offset + stride) % size
        if slice_number in held:
            held.move_to_end(slice_number)
            hits += number >= warm
            continue
        held[slice_number] = None
        if len(held) > entries:
            held.popitem(last=False)
    return hits / requests


def covered(cell: Cell, size: int) -> float:
    """The share of the map that QEMU's cache holds: its hit ratio under uniform random reads."""
    return min(1.0, _entries(cell) / _slices(cell, size))


def choose_stride(cell: Cell, size: int, *, seed: int = 1) -> tuple[int, float]:
    """(stride in bytes, LRU hit ratio of the walk). The walk meets every block before it repeats one."""
    wanted = covered(cell, size)
    dice = random.Random(seed)
    best = (2.0, 0, 0.0)
    for _ in range(_TRIES):
        stride = _candidate(dice, size)
        ratio = lru_hit_ratio(stride, size=size, span=_span(cell), entries=_entries(cell), requests=_enough(cell, size))
        best = min(best, (_distance(ratio, wanted), stride, ratio))
        if best[0] <= CLOSE / 2:
            break
    return best[1], best[2]


def _distance(ratio: float, wanted: float) -> float:
    """How far off; a walk that hits less often than it should counts as worse than any that hits more often."""
    miss = abs(ratio - wanted)
    return miss if ratio >= wanted or miss <= CLOSE else 1 + miss


def _candidate(dice: random.Random, size: int) -> int:
    """A random multiple of the block size whose walk over a disk of `size` bytes has full length."""
    blocks = size // BLOCK
    while True:
        step = dice.randrange(1, min(MOST // BLOCK, max(blocks, 2)))
        if _coprime(step, blocks):
            return step * BLOCK


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def _span(cell: Cell) -> int:
    """Guest bytes of one cache entry."""
    return cell.entry_bytes // 8 << cell.cluster_bits


def _slices(cell: Cell, size: int) -> int:
    return -(-size // _span(cell))


def _entries(cell: Cell) -> int:
    """QEMU's rule: whole entries, at least two."""
    return max(2, cell.cache_bytes // cell.entry_bytes)


def _enough(cell: Cell, size: int) -> int:
    return max(4 * _slices(cell, size), 2000)
