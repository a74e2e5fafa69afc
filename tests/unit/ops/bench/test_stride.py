"""The walk treats an LRU cache as uniform random reads would."""

import random
from collections import OrderedDict

import pytest

from cowslice.ops.bench.cells import CELLS, DISK, Cell
from cowslice.ops.bench.engine import walk
from cowslice.ops.bench.stride import BLOCK, CLOSE, MOST, choose_stride, covered, lru_hit_ratio


def uniform_hit_ratio(*, slices: int, entries: int, requests: int) -> float:
    """What an LRU cache hits under uniform random reads, by trying it."""
    dice = random.Random(3)
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in range(2 * requests):
        one = dice.randrange(slices)
        hits += one in held and number >= requests
        held[one] = None
        held.move_to_end(one)
        if len(held) > entries:
            held.popitem(last=False)
    return hits / requests


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.covers(DISK)])
def test_a_partial_cell_hits_as_often_as_its_cache_covers_or_more(cell: Cell) -> None:
    stride, ratio = choose_stride(cell, DISK)
    wanted = covered(cell, DISK)
    assert ratio >= wanted - CLOSE
    if cell.cache_bytes // cell.entry_bytes > 2:
        assert ratio <= wanted + 2 * CLOSE
    assert stride % BLOCK == 0
    assert 0 < stride <= MOST


@pytest.mark.parametrize("entries", [16, 256, 768])
def test_coverage_is_what_uniform_reads_hit(entries: int) -> None:
    assert uniform_hit_ratio(slices=1280, entries=entries, requests=40_000) == pytest.approx(entries / 1280, abs=0.01)


def test_a_cell_that_covers_the_disk_always_hits() -> None:
    cell = next(cell for cell in CELLS if cell.covers(DISK))
    assert choose_stride(cell, DISK)[1] == 1.0


def test_a_walk_meets_every_block_once_before_it_repeats() -> None:
    cell, size = CELLS[0], 1 << 30
    stride, _ = choose_stride(cell, size)
    offsets = walk(stride, size=size, start=0, requests=size // BLOCK, length=BLOCK)
    assert len(set(offsets.tolist())) == size // BLOCK


def test_a_ring_just_larger_than_the_cache_never_hits() -> None:
    assert lru_hit_ratio(BLOCK, size=8 * BLOCK, span=BLOCK, entries=7, requests=100) == 0.0
    assert lru_hit_ratio(BLOCK, size=8 * BLOCK, span=BLOCK, entries=8, requests=100) == 1.0
