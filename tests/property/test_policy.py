"""The compiled policies choose as a few obvious lines of Python do, and the default is worth its lines."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.cache.policy import Rehearsal
from cowslice.testing.policymodel import Clock2QPlusModel, LruModel

weights = st.sampled_from([16, 40, 64, 300, 661, 1320, 1328, 4144])
accesses = st.lists(st.integers(0, 60), max_size=400)
budgets = st.integers(0, 60_000)


@given(accesses, weights, budgets)
def test_lru_is_least_recently_used(keys, weight, budget):
    real, model = Rehearsal("lru", budget), LruModel(budget)
    for key in keys:
        assert real.access(key, weight) == model.access(key, weight)
    assert real.resident() == model.resident()


@given(accesses, st.randoms(use_true_random=False), budgets)
def test_lru_weighs_bytes(keys, rng, budget):
    real, model = Rehearsal("lru", budget), LruModel(budget)
    for key in keys:
        weight = rng.choice([16, 64, 1320, 4144])
        assert real.access(key, weight) == model.access(key, weight)
    assert real.resident() == model.resident()


@pytest.mark.parametrize("seed", range(25))
def test_clock2q_plus_follows_its_description_where_nothing_returns(seed):
    """Keys that were pushed out come back under new names, so that only the queues decide, not what is remembered."""
    rng = random.Random(seed)
    budget = rng.choice([500, 6000, 40_000, 150_000])
    real, model = Rehearsal("clock2q+", budget), Clock2QPlusModel(budget, remembered=0)
    names = list(range(80))
    for step in range(1500):
        place = min(int(rng.expovariate(0.05)), 79)
        if names[place] not in model.resident():
            names[place] = 1000 + step
        weight = rng.choice([40, 100, 330, 1320, 4144])
        for _ in range(rng.choice([1, 1, 4])):
            assert real.access(names[place], weight) == model.access(names[place], weight)
        assert real.resident() == model.resident()


@given(
    st.lists(st.integers(0, 500), max_size=300), st.sampled_from(["clock2q+", "lru"]), st.integers(0, 40_000), weights)
def test_what_is_used_is_what_is_held_and_fits(keys, policy, budget, weight):
    real = Rehearsal(policy, budget)
    for key in keys:
        real.access(key, weight)
        assert key in real.resident()
        assert real.used_bytes == len(real.resident()) * ((weight + 15) // 16 * 16)
        assert real.used_bytes <= budget or len(real.resident()) == 1
    for key in sorted(real.resident()):
        real.remove(key)
    assert (real.used_bytes, real.resident()) == (0, set())


# -- what each policy is good for: streams of references to 1280 slices, a cache of 256 -----------------------------

WEIGHT = 1328
SLICES = 1280
ROOM = 256
LENGTH = 40_000


def zipf(rng, exponent):
    keys = rng.sample(range(SLICES), SLICES)
    return rng.choices(keys, [1 / (i + 1) ** exponent for i in range(SLICES)], k=LENGTH)


def uniform(rng):
    return rng.choices(range(SLICES), k=LENGTH)


def loop(rng):
    """Round and round over somewhat more than fits, four references a visit."""
    return [visit % (ROOM * 5 // 4) for visit in range(LENGTH // 4) for _ in range(4)]


def bursts(rng, *, scanned=0.0):
    """Eight streams, each a dozen references at one slice and then elsewhere; a share reads everything once besides."""
    weights = [1 / (i + 1) ** 0.8 for i in range(SLICES)]
    current, left, scan = [0] * 8, [0] * 8, 0
    for _ in range(LENGTH):
        if rng.random() < scanned:
            yield SLICES + scan // 8
            scan += 1
            continue
        stream = rng.randrange(8)
        if not left[stream]:
            current[stream] = rng.choices(range(SLICES), weights)[0]
            left[stream] = 1 + int(rng.expovariate(1 / 11.5))
        left[stream] -= 1
        yield current[stream]


def phases(rng):
    """A working set that nearly fills the cache, replaced by another one now and then."""
    return [i // 10_000 * 240 + rng.randrange(240) for i in range(LENGTH)]


def miss_percent(policy, stream):
    stream = list(stream)
    cache = Rehearsal(policy, ROOM * WEIGHT)
    return 100 * (1 - sum(cache.access(key, WEIGHT) for key in stream) / len(stream))


def both(stream, seed):
    return tuple(miss_percent(policy, stream(random.Random(seed))) for policy in ("lru", "clock2q+"))


seeds = pytest.mark.parametrize("seed", [1, 2, 3])


@seeds
def test_no_policy_gains_on_uniform_references(seed):
    lru, ours = both(uniform, seed)
    assert ours == pytest.approx(lru, abs=1)


@seeds
def test_a_loop_that_just_does_not_fit_costs_a_third_of_what_lru_pays(seed):
    lru, ours = both(loop, seed)
    assert lru == 25
    assert ours < 12


@seeds
def test_scans_beside_bursts_cost_less_than_with_lru(seed):
    lru, ours = both(lambda rng: bursts(rng, scanned=0.2), seed)
    assert ours < 0.95 * lru


@seeds
def test_bursts_alone_cost_no_more_than_with_lru(seed):
    lru, ours = both(bursts, seed)
    assert ours <= lru


@seeds
@pytest.mark.parametrize("exponent", [0.9, 1.2])
def test_skewed_references_cost_less_than_with_lru(seed, exponent):
    lru, ours = both(lambda rng: zipf(rng, exponent), seed)
    assert ours < 0.92 * lru


@seeds
def test_a_change_of_phase_costs_at_most_twice_what_lru_pays(seed):
    lru, ours = both(phases, seed)
    assert ours <= 2 * lru


@seeds
@pytest.mark.parametrize("stream", [uniform, loop, bursts, phases])
def test_fingerprints_remember_nearly_as_well_as_names(seed, stream):
    """The compiled ghosts may collide and forget; that is worth less than a point and a half of misses."""
    small = 64 * WEIGHT
    keys = [key % 320 for key in stream(random.Random(seed))][:8000]
    real, model = Rehearsal("clock2q+", small), Clock2QPlusModel(small, remembered=int(0.9 * small / 1320))
    hits = [sum(cache.access(key, WEIGHT) for key in keys) / len(keys) for cache in (real, model)]
    assert hits[0] == pytest.approx(hits[1], abs=0.015)
