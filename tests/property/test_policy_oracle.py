"""The compiled policies beside those of libCacheSim, whose Clock2Q+ is its authors' own.

LRU is one thing and must agree to the last miss. Clock2Q+ is a description: ours measures queues in bytes rather than
in objects, remembers the gone by fingerprints in a table of a power of two, and has a time floor (switched off here).
"""

import random

import numpy as np
import pytest

from cowslice.cache.policy import Rehearsal
from cowslice.tune.curve import misses_of
from cowslice.tune.curvestack import Stack

libcachesim = pytest.importorskip("libcachesim", reason="libcachesim has no wheel for this Python or system")

WEIGHT = 1328  # so that no slice is cheap enough for extra laps, which the description does not have
SLICES = 1280
LENGTH = 30_000
ROOMS = (64, 128, 256, 512, 768)


def zipf(rng):
    return rng.choices(rng.sample(range(SLICES), SLICES), [1 / (i + 1) for i in range(SLICES)], k=LENGTH)


def uniform(rng):
    return rng.choices(range(SLICES), k=LENGTH)


def sequential(rng):
    return [i % SLICES for i in range(LENGTH)]


def loop(rng):
    return [i % 320 for i in range(LENGTH)]


def bursts(rng):
    return [start for start in rng.choices(range(SLICES), k=LENGTH // 10) for _ in range(10)]


def mixed(rng):
    hot = zipf(rng)
    return [hot[i] if i % 1000 < 700 else i % SLICES for i in range(LENGTH)]


def phases(rng):
    return [i // 10_000 * 240 + rng.randrange(240) for i in range(LENGTH)]


STREAMS = [zipf, uniform, sequential, loop, bursts, mixed, phases]
streams = pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.__name__)


def oracle_misses(kind, room, keys):
    cache, request, misses = kind(room, hashpower=12), libcachesim.Request(), 0
    request.obj_size = 1
    for key in keys:
        request.obj_id = key + 1
        misses += not cache.get(request)
    return misses


def our_misses(policy, room, keys):
    cache = Rehearsal(policy, room * WEIGHT)
    return sum(not cache.access(key, WEIGHT) for key in keys)


@streams
def test_the_exact_curve_and_lru_itself_miss_as_libcachesims_lru(stream):
    keys = stream(random.Random(1))
    first = np.array(keys, dtype=np.uint64) << np.uint64(22)
    stack = Stack(22, slices=SLICES)
    stack.add(first, first, np.zeros(len(first), dtype=np.uint8))
    sizes, misses = misses_of(stack)
    for room in ROOMS:
        expected = oracle_misses(libcachesim.LRU, room, keys)
        assert int(misses[0][np.searchsorted(sizes, room, side="right") - 1]) == expected
        assert our_misses("lru", room, keys) == expected


@streams
@pytest.mark.parametrize("room", ROOMS)
def test_clock2q_plus_misses_at_most_one_reference_in_a_hundred_more_than_its_authors_own(stream, room):
    keys = stream(random.Random(2))
    more = our_misses("clock2q+", room, keys) - oracle_misses(libcachesim.Clock2QPlus, room, keys)
    assert more <= LENGTH / 100


@pytest.mark.parametrize("stream", [zipf, uniform, bursts, phases], ids=lambda stream: stream.__name__)
@pytest.mark.parametrize("room", ROOMS)
def test_clock2q_plus_is_as_its_authors_own_where_nothing_goes_round(stream, room):
    """Where a stream goes round, ours misses less: what comes back just after it left is still remembered."""
    keys = stream(random.Random(3))
    ours, theirs = our_misses("clock2q+", room, keys), oracle_misses(libcachesim.Clock2QPlus, room, keys)
    assert ours == pytest.approx(theirs, abs=LENGTH * 1.5 / 100)
