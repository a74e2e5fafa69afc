"""The slice map says what the tables say, whatever its budget, and never takes more memory than it was given."""

import random
import struct
import tempfile

from hypothesis import given
from hypothesis import strategies as st

from cowslice.cache.slicemap import SliceCache, SliceMap
from cowslice.errors import CowsliceError
from cowslice.storage.file import FileStorage
from cowslice.storage.memory import MemoryStorage
from cowslice.testing.l2tables import make_tables

budgets = st.one_of(st.integers(0, 3000), st.integers(3000, 100_000), st.just(1 << 24))


@st.composite
def tables_and_units(draw):
    """Tables of any geometry, the unit of a metadata read, a seed."""
    bits = draw(st.sampled_from([9, 10, 12, 14, 16, 16, 18, 21]))
    tables = make_tables(
        draw(st.integers(0, 1 << 32)), cluster_bits=bits, extended=draw(st.booleans()),
        tables=draw(st.integers(1, 40 if bits < 12 else 6 if bits < 18 else 2)),
        kinds="".join(draw(st.lists(st.sampled_from("nnnzhcpr"), min_size=1, max_size=5))),
        longest=draw(st.sampled_from([1, 3, 40, 6000])))
    return tables, 1 << draw(st.integers(9, bits)), random.Random(draw(st.integers(0, 1 << 32)))


def open_map(cache, tables, entry_bytes, storage, **options):
    return SliceMap(
        cache, cluster_bits=tables.cluster_bits, extended_l2=tables.extended, l1=tables.l1, clusters=tables.clusters,
        entry_bytes=entry_bytes, storage=storage, **options)


def assert_true(tables, cluster, answer):
    """The answer is that of the tables, and its run promises nothing that they do not keep."""
    word, bitmap, run = answer
    assert (word, bitmap) == tables.entry(cluster)
    assert run >= 1
    last = min(cluster + run, tables.clusters)
    ends = {cluster + 1, (cluster + last) // 2, last - 1}
    near = range(cluster + 1, min(last, cluster + 40))
    for after in {*near, *(end for end in ends if cluster < end < last)}:
        assert tables.continues(after - 1, after)


def some_clusters(rng, clusters, count):
    """Clusters in short walks, so that there are hits, streams and jumps."""
    while count > 0:
        at, step = rng.randrange(clusters), rng.choice([0, 1, 1, 64, 512])
        for _ in range(rng.randint(1, 12)):
            yield at % clusters
            at += step
            count -= 1


def poke(rng, cache, maps):
    """What happens to a cache besides lookups."""
    if rng.random() < 0.05:
        assert cache.trim() >= 0
    if rng.random() < 0.05:
        rng.choice(maps).warm()


@given(tables_and_units(), budgets, st.sampled_from(["clock2q+", "lru"]), st.booleans())
def test_a_map_without_a_descriptor_says_what_the_tables_say(drawn, budget, policy, readahead):
    tables, entry_bytes, rng = drawn
    cache = SliceCache(budget, policy)
    slices = open_map(cache, tables, entry_bytes, MemoryStorage(tables.content), readahead=readahead)
    for cluster in some_clusters(rng, tables.clusters, 120):
        assert_true(tables, cluster, slices.lookup(cluster, rng.choice([1, 5, 600, 0x7FFFFFFF])))
        poke(rng, cache, [slices])


@given(tables_and_units(), budgets, st.sampled_from(["clock2q+", "lru"]))
def test_a_map_with_a_descriptor_says_what_the_tables_say(drawn, budget, policy):
    tables, entry_bytes, rng = drawn
    cache = SliceCache(budget, policy)
    with tempfile.NamedTemporaryFile() as file:
        file.write(tables.content)
        file.flush()
        with FileStorage(file.name) as storage:
            slices = open_map(cache, tables, entry_bytes, storage)
            for cluster in some_clusters(rng, tables.clusters, 120):
                assert_true(tables, cluster, slices.lookup(cluster))
                poke(rng, cache, [slices])


@given(tables_and_units(), tables_and_units(), budgets)
def test_maps_that_share_a_cache_do_not_mix(one, other, budget):
    cache = SliceCache(budget)
    drawn = [(tables, unit) for tables, unit, _ in (one, other)]
    layers = [(tables, open_map(cache, tables, unit, MemoryStorage(tables.content))) for tables, unit in drawn]
    rng = one[2]
    for _ in range(80):
        tables, slices = rng.choice(layers)
        cluster = rng.randrange(tables.clusters)
        assert_true(tables, cluster, slices.lookup(cluster))
        poke(rng, cache, [slices for _, slices in layers])
        if rng.random() < 0.02:
            del slices
            tables, _ = layers.pop()
            layers.append((tables, open_map(cache, tables, 512, MemoryStorage(tables.content))))


def without_ghosts(cache):
    """Bytes used but for the policy's own, which come with the first eviction and stay."""
    found = cache.statistics()
    return found["bytes_used"] - found["policy_bytes"]


def resident_slices(tables, slices):
    firsts = range(0, tables.clusters, slices.slice_clusters)
    return sum(slices.resident(first) for first in firsts if tables.table(first))


@given(tables_and_units(), budgets, st.sampled_from(["clock2q+", "lru"]))
def test_the_budget_holds_whenever_nothing_loads(drawn, budget, policy):
    tables, entry_bytes, rng = drawn
    cache = SliceCache(budget, policy)
    slices = open_map(cache, tables, entry_bytes, MemoryStorage(tables.content))
    fixed = without_ghosts(cache)  # the directory: it is there as long as the map is
    for cluster in some_clusters(rng, tables.clusters, 60):
        slices.lookup(cluster)
        assert cache.statistics()["bytes_used"] <= max(budget, fixed + cache.statistics()["policy_bytes"])
        poke(rng, cache, [slices])
        assert cache.statistics()["bytes_used"] <= max(budget, fixed + cache.statistics()["policy_bytes"])


@given(tables_and_units(), budgets)
def test_the_counters_equal_a_recount(drawn, budget):
    tables, entry_bytes, rng = drawn
    cache = SliceCache(budget)
    slices = open_map(cache, tables, entry_bytes, MemoryStorage(tables.content))
    fixed = without_ghosts(cache)
    for cluster in some_clusters(rng, tables.clusters, 60):
        slices.lookup(cluster)
        poke(rng, cache, [slices])
    counted = cache.statistics()
    used = without_ghosts(cache)
    assert sum(counted["slices"].values()) == resident_slices(tables, slices)
    freed = cache.trim() + cache.trim()
    assert freed >= used - fixed
    assert without_ghosts(cache) == fixed
    assert not any(cache.statistics()["slices"].values())


@given(tables_and_units(), st.integers(0, 100_000))
def test_a_map_that_is_dropped_leaves_nothing_behind(drawn, budget):
    tables, entry_bytes, rng = drawn
    cache = SliceCache(budget)
    empty = cache.statistics()["bytes_used"]
    slices = open_map(cache, tables, entry_bytes, MemoryStorage(tables.content))
    for cluster in some_clusters(rng, tables.clusters, 40):
        slices.lookup(cluster)
    del slices
    assert without_ghosts(cache) == empty
    assert not any(cache.statistics()["slices"].values())


@given(tables_and_units())
def test_with_room_for_all_a_warm_map_never_reads_again(drawn):
    tables, entry_bytes, rng = drawn
    cache = SliceCache(1 << 26)
    slices = open_map(cache, tables, entry_bytes, MemoryStorage(tables.content))
    slices.warm()
    before = cache.statistics()["loads"]
    for cluster in some_clusters(rng, tables.clusters, 60):
        assert_true(tables, cluster, slices.lookup(cluster))
    assert cache.statistics()["loads"] == before


@given(
    st.lists(st.integers(0, (1 << 64) - 1), max_size=8), st.integers(9, 21), st.integers(0, 2000),
    st.integers(0, 1 << 32))
def test_a_hostile_l1_table_gives_an_answer_or_a_clear_error(l1, bits, clusters, seed):
    storage = MemoryStorage(random.Random(seed).randbytes(5000))
    slices = SliceMap(
        SliceCache(50_000), cluster_bits=bits, extended_l2=False, l1=struct.pack(f">{len(l1)}Q", *l1),
        clusters=clusters, entry_bytes=512, storage=storage)
    for cluster in range(0, clusters, 61):
        try:
            word, _, run = slices.lookup(cluster)
        except CowsliceError:
            continue
        assert run >= 1
        assert 0 <= word < 1 << 64


@given(tables_and_units(), budgets)
def test_a_direct_file_says_what_the_tables_say(drawn, budget):
    tables, entry_bytes, rng = drawn
    cache = SliceCache(budget)
    with tempfile.NamedTemporaryFile() as file:
        file.write(tables.content)
        file.flush()
        with FileStorage(file.name, direct=True) as storage:
            slices = open_map(cache, tables, entry_bytes, storage)
            for cluster in some_clusters(rng, tables.clusters, 60):
                assert_true(tables, cluster, slices.lookup(cluster))
