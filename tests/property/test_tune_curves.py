"""The compiled LRU stack counts as a plain LRU of every size does, in all its ways of keeping slices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.format.geometry import Geometry
from cowslice.testing.stackmodel import LruTwin, touched_slices
from cowslice.tune.advise import curves_with
from cowslice.tune.curve import misses_of, sampling_error, slice_curves
from cowslice.tune.curvestack import Stack
from cowslice.tune.requests import Requests

SPAN_BITS = 22
SPAN = 1 << SPAN_BITS
PLACES = 40

requests = st.lists(
    st.tuples(st.integers(0, PLACES * SPAN - 1), st.integers(1, 3 * SPAN), st.booleans()), max_size=200)


def columns(asked, base=0):
    """First bytes, last bytes, writes."""
    first = [offset + base for offset, _, _ in asked]
    last = [min(offset + length, PLACES * SPAN) - 1 + base for offset, length, _ in asked]
    return (np.array(first, dtype=np.uint64), np.array(last, dtype=np.uint64),
            np.array([write for _, _, write in asked], dtype=np.uint8))


def plain_misses(spans, room, weigh=lambda number: 1):
    """Misses of reads and of writes in a plain LRU."""
    cache, counts = LruTwin(room, weigh), [0, 0]
    for slices, write in zip(touched_slices(spans[0].tolist(), spans[1].tolist(), SPAN), spans[2], strict=True):
        counts[write] += sum([cache.misses(number) for number in slices])
    return counts


def misses_at(stack, room):
    sizes, misses = misses_of(stack)
    at = np.searchsorted(sizes, room, side="right") - 1
    return [int(misses[0][at]), int(misses[1][at])]


def fed(stack, spans, pieces=3):
    """The stack after all requests, given to it in a few chunks."""
    for piece in np.array_split(np.arange(len(spans[0])), pieces):
        stack.add(*(column[piece] for column in spans))
    return stack


@given(requests)
def test_misses_are_those_of_a_plain_lru_at_every_size(asked):
    spans = columns(asked)
    stack = fed(Stack(SPAN_BITS, slices=PLACES), spans)
    for room in range(PLACES + 2):
        assert misses_at(stack, room) == plain_misses(spans, room)


@given(requests, st.sampled_from([(14, False), (18, False), (20, False), (16, True)]))
def test_a_curve_told_for_other_clusters_is_the_one_that_they_would_have(asked, other):
    other, size = Geometry(*other), 2 * PLACES * SPAN
    chunk = Requests(np.zeros(len(asked)), np.array([write for *_, write in asked], np.uint8),
                     np.array([offset for offset, *_ in asked], np.uint64),
                     np.array([length for _, length, _ in asked], np.uint64))
    found = curves_with(slice_curves([chunk], Geometry(16), disk_size=size), other)
    assert found
    for entry, exact in slice_curves([chunk], other, disk_size=size).by_entry_bytes.items():
        if entry in found:
            told = found[entry]
            assert (told.entry_bytes, told.slice_span, told.touched) == (entry, exact.slice_span, exact.touched)
            assert (told.entries.tolist(), told.misses.tolist()) == (exact.entries.tolist(), exact.misses.tolist())


@given(requests)
def test_misses_are_the_same_where_slices_are_too_many_to_be_found_by_number(asked):
    base = (1 << 40) * SPAN
    spans = columns(asked, base)
    stack = fed(Stack(SPAN_BITS, slices=(1 << 40) + PLACES), spans)
    for room in (0, 1, 2, 3, 10, PLACES - 1, PLACES):
        assert misses_at(stack, room) == plain_misses(spans, room)


@given(requests, st.lists(st.sampled_from([0, 0, 1, 2, 5, 83, 259]), min_size=PLACES, max_size=PLACES))
def test_weighed_misses_are_those_of_a_plain_lru_by_weight(asked, weights):
    spans = columns(asked)
    stack = fed(Stack(SPAN_BITS, slices=PLACES, weights=np.array(weights, dtype=np.uint16)), spans)
    for room in (0, 1, 3, 5, 60, 83, 84, 300, 1000, sum(weights)):
        assert misses_at(stack, room) == plain_misses(spans, room, weights.__getitem__)


@pytest.mark.parametrize("slices", [300, 1 << 33], ids=["by number", "by hash"])
def test_a_long_trace_wears_out_time_many_times_and_counts_on(slices):
    """Thousands of moves to the top: slots run out, are closed up, and the window grows with the slices."""
    dice = np.random.default_rng(5)
    numbers = np.concatenate([dice.integers(0, 300, 12_000), dice.zipf(1.3, 12_000) % 300]).astype(np.uint64)
    first = numbers << np.uint64(SPAN_BITS)
    spans = first, first, np.zeros(len(first), dtype=np.uint8)
    stack = fed(Stack(SPAN_BITS, slices=slices), spans, pieces=7)
    assert stack.reads_and_writes == (24_000, 0)
    assert stack.cold == (300, 0)
    for room in (1, 10, 100, 299, 300):
        assert misses_at(stack, room) == plain_misses(spans, room)


@given(requests)
def test_every_access_is_counted_once(asked):
    spans = columns(asked)
    stack = fed(Stack(SPAN_BITS, slices=PLACES), spans)
    every = sum(len(slices) for slices in touched_slices(spans[0].tolist(), spans[1].tolist(), SPAN))
    counted = sum(int(stack.distances(write)[1].sum()) + stack.cold[write] for write in (0, 1))
    assert counted == sum(stack.reads_and_writes) == every


# -- sampling ----------------------------------------------------------------------------------------------------------

KINDS = {
    "uniform": lambda dice: dice.integers(0, 20_000, 200_000),
    "zipf": lambda dice: dice.permutation(20_000)[np.minimum(dice.zipf(1.2, 200_000), 20_000) - 1],
    "loop": lambda dice: np.arange(200_000) % 15_000,
    "mixed": lambda dice: np.where(
        np.arange(200_000) % 50_000 < 35_000, dice.permutation(20_000)[dice.zipf(1.4, 200_000) % 20_000],
        np.arange(200_000) % 20_000),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slices", [20_000, 1 << 33], ids=["by number", "by hash"])
def test_a_sampled_curve_is_as_near_the_exact_one_as_it_says(kind, slices):
    first = KINDS[kind](np.random.default_rng(11)).astype(np.uint64) << np.uint64(SPAN_BITS)
    spans = first, first, (np.arange(len(first)) % 3 == 0).astype(np.uint8)
    exact = fed(Stack(SPAN_BITS, slices=20_000), spans)
    sampled = fed(Stack(SPAN_BITS, slices=slices, limit=4096), spans)
    assert exact.rate == 1.0 > sampled.rate
    assert sampled.followed <= 4096
    error = sampling_error(sampled)
    nearby, spread = round(error * sum(exact.cold)), error * len(first)
    for room in range(0, 20_000, 371):
        guess = sum(misses_at(sampled, room))
        assert sum(misses_at(exact, room + nearby)) - spread <= guess, room
        assert guess <= sum(misses_at(exact, max(0, room - nearby))) + spread, room
    assert sampled.reads_and_writes == exact.reads_and_writes


def test_a_sample_begins_only_above_the_limit():
    first = np.arange(1001, dtype=np.uint64) << np.uint64(SPAN_BITS)
    reads = np.zeros(1001, dtype=np.uint8)
    stack = fed(Stack(SPAN_BITS, slices=5000, limit=1000), (first[:1000], first[:1000], reads[:1000]))
    assert (stack.rate, stack.followed) == (1.0, 1000)
    stack.add(first[1000:], first[1000:], reads[1000:])
    assert stack.rate == 0.5
