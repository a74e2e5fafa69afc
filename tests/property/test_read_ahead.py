"""Reading ahead is worth it for whoever reads in order, and costs others next to nothing, whatever the budget holds."""

import numpy as np
import pytest

from cowslice.tune.simulatereplay import MapReplay
from cowslice.units import KiB

REQUESTS = 16_000
SPAN_BITS = 22
SHAPES = {
    "loop": lambda dice, slices: np.arange(REQUESTS) % slices,
    "uniform": lambda dice, slices: dice.integers(0, slices, REQUESTS),
    "zipf": lambda dice, slices: dice.zipf(1.2, REQUESTS) % slices,
    "in order": lambda dice, slices: np.arange(REQUESTS) // 4 % slices,
}


def misses(shape, slices, budget, *, readahead):
    """Misses of our cache from empty, each slice being of random clusters and a table having sixteen."""
    replay = MapReplay(
        SPAN_BITS, budget=budget, policy="clock2q+", sizes=np.full(slices, 1328, dtype=np.uint16),
        mapped=np.ones(slices, dtype=np.uint8), entry_bytes=4 * KiB, group=1, per_table=16, readahead=readahead)
    first = SHAPES[shape](np.random.default_rng(1), slices).astype(np.uint64) << np.uint64(SPAN_BITS)
    replay.add(first, first, np.zeros(REQUESTS, dtype=np.uint8), np.zeros(REQUESTS, dtype=np.uint16))
    return replay.counts[1]


@pytest.mark.parametrize("budget", [32 * KiB, 64 * KiB, 128 * KiB, 256 * KiB])
@pytest.mark.parametrize("slices", [60, 80, 160, 400])
@pytest.mark.parametrize("shape", SHAPES)
def test_reading_ahead_costs_at_most_one_miss_in_twenty(shape, slices, budget):
    without = misses(shape, slices, budget, readahead=False)
    assert misses(shape, slices, budget, readahead=True) <= without * 1.05


@pytest.mark.parametrize("slices", [80, 160, 400])
def test_a_reader_in_order_misses_little_more_than_half_as_often(slices):
    assert misses("in order", slices, 64 * KiB, readahead=True) < 0.65 * misses(
        "in order", slices, 64 * KiB, readahead=False)


def test_a_loop_over_more_than_fits_keeps_a_part_of_it():
    assert misses("loop", 80, 64 * KiB, readahead=False) < REQUESTS / 2
    assert misses("loop", 80, 64 * KiB, readahead=True) < REQUESTS / 2
