"""The slice map under many threads, failing reads, hostile numbers, and the memory that it says it takes."""

import ctypes
import gc
import random
import struct
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from cowslice.cache.slicemap import SliceCache, SliceMap
from cowslice.errors import BadOption, CorruptImage, InternalError, StorageError
from cowslice.storage.file import FileStorage
from cowslice.storage.memory import MemoryStorage
from cowslice.testing.faults import CountingStorage, Fault, FaultyStorage, HeldStorage
from cowslice.testing.l2tables import make_tables

BITS = 16
SLICE = 512  # entries of a 4 KiB slice


@pytest.fixture(scope="module")
def shuffled():
    """Four whole L2 tables of single clusters in random order: nothing is a run, everything is packed."""
    return full_tables(4, shuffle=True)


@pytest.fixture(scope="module")
def in_order():
    """The same with the clusters in order: every slice is one run."""
    return full_tables(4, shuffle=False)


class Tables:
    def __init__(self, count, words):
        self.clusters = len(words)
        self.words = words
        self.l1 = struct.pack(f">{count}Q", *((i + 1) << BITS for i in range(count)))
        self.content = bytes(1 << BITS) + struct.pack(f">{len(words)}Q", *words)


def full_tables(count, *, shuffle):
    words = [1 << 63 | (i + 100) << BITS for i in range(count << (BITS - 3))]
    if shuffle:
        random.Random(1).shuffle(words)
    return Tables(count, words)


def open_map(cache, tables, storage, *, entry_bytes=4096, readahead=False, **changes):
    options = {"cluster_bits": BITS, "extended_l2": False, "l1": tables.l1, "clusters": tables.clusters, **changes}
    return SliceMap(cache, entry_bytes=entry_bytes, storage=storage, readahead=readahead, **options)


def in_threads(number, work):
    """Futures of `work(i)` for each i, all begun in threads of their own."""
    pool = ThreadPoolExecutor(number)
    futures = [pool.submit(work, i) for i in range(number)]
    pool.shutdown(wait=False)
    return futures


def until_joined(cache, number):
    """Wait until so many lookups stand behind a read of somebody else."""
    patience = threading.Event()
    for _ in range(60_000):
        if cache.statistics()["joined_loads"] >= number:
            return
        patience.wait(0.001)
    raise AssertionError(f"{number} lookups expected to wait: {cache.statistics()}")


# -- loads side by side --------------------------------------------------------------------------------------------


def test_misses_of_one_slice_make_one_read(shuffled):
    held = HeldStorage(MemoryStorage(shuffled.content))
    counted = CountingStorage(held)
    cache = SliceCache(1 << 20)
    slices = open_map(cache, shuffled, counted)
    futures = in_threads(8, lambda i: slices.lookup(i * 3))
    held.wait_for(1)
    until_joined(cache, 7)
    held.release()
    assert [future.result(60)[0] for future in futures] == [shuffled.words[i * 3] for i in range(8)]
    assert counted.counts().reads == 1
    assert cache.statistics()["misses"] == 1


def test_different_slices_load_side_by_side(shuffled):
    held = HeldStorage(MemoryStorage(shuffled.content))
    slices = open_map(SliceCache(1 << 20), shuffled, held)
    futures = in_threads(12, lambda i: slices.lookup(i * SLICE))
    held.wait_for(12)
    held.release()
    assert [future.result(60)[0] for future in futures] == [shuffled.words[i * SLICE] for i in range(12)]


def test_a_hit_does_not_wait_for_a_load(shuffled):
    held = HeldStorage(MemoryStorage(shuffled.content))
    slices = open_map(SliceCache(1 << 20), shuffled, held)
    held.release()
    slices.lookup(0)
    held.hold()
    (future,) = in_threads(1, lambda _: slices.lookup(SLICE))
    held.wait_for(1)
    assert slices.lookup(7)[0] == shuffled.words[7]
    assert not future.done()
    held.release()
    future.result(60)


def test_a_failed_read_fails_its_own_lookup_and_leaves_the_slice_absent(shuffled):
    faulty = FaultyStorage(MemoryStorage(shuffled.content), Fault("pread", offset=1 << BITS, end=2 << BITS))
    cache = SliceCache(1 << 20)
    slices = open_map(cache, shuffled, faulty)
    with pytest.raises(StorageError, match="65536"):
        slices.lookup(5)
    assert not slices.resident(5)
    assert slices.lookup(3 << 13)[0] == shuffled.words[3 << 13]
    faulty.heal()
    assert slices.lookup(5)[0] == shuffled.words[5]
    assert cache.statistics()["failed_loads"] == 1


def test_a_fault_that_passes_is_not_seen(shuffled):
    faulty = FaultyStorage(MemoryStorage(shuffled.content), Fault("pread", times=1))
    assert open_map(SliceCache(1 << 20), shuffled, faulty).lookup(5)[0] == shuffled.words[5]


def test_all_who_wait_for_a_failing_read_hear_of_it_and_others_go_on(shuffled):
    held = HeldStorage(FaultyStorage(MemoryStorage(shuffled.content), Fault("pread", end=(1 << BITS) + 4096)))
    cache = SliceCache(1 << 20)
    slices = open_map(cache, shuffled, held)
    failing = in_threads(5, slices.lookup)
    held.wait_for(1)
    until_joined(cache, 4)
    fine = in_threads(3, lambda i: slices.lookup((i + 1) * SLICE))
    held.wait_for(4)
    held.release()
    assert all(isinstance(future.exception(60), StorageError) for future in failing)
    assert [future.result(60)[0] for future in fine] == [shuffled.words[(i + 1) * SLICE] for i in range(3)]


def test_a_descriptor_that_cannot_be_read_raises_what_the_storage_says(tmp_path, shuffled):
    class NoDescriptor(FaultyStorage):
        def fileno(self):
            return 1 << 20  # not open: pread says EBADF

    faulty = NoDescriptor(MemoryStorage(shuffled.content), Fault("pread"))
    with pytest.raises(StorageError):
        open_map(SliceCache(1 << 20), shuffled, faulty).lookup(0)
    faulty.heal()
    with pytest.raises(StorageError, match="by turns"):
        open_map(SliceCache(1 << 20), shuffled, faulty).lookup(0)


def test_an_interrupt_while_reading_is_not_lost(shuffled):
    class Interrupted(MemoryStorage):
        def read_into(self, offset, buffer):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_map(SliceCache(1 << 20), shuffled, Interrupted()).lookup(0)


@pytest.mark.parametrize("policy", ["clock2q+", "lru"])
@pytest.mark.parametrize("budget", [0, 2000, 6000, 40_000])
@pytest.mark.parametrize("with_descriptor", [True, False])
def test_many_threads_read_the_truth_through_a_tiny_cache(tmp_path, budget, policy, with_descriptor):
    tables = make_tables(budget, cluster_bits=12, tables=30, longest=3)
    path = tmp_path / "tables"
    path.write_bytes(tables.content)
    cache = SliceCache(budget, policy)
    with FileStorage(path) as file:
        slices = SliceMap(
            cache, cluster_bits=12, extended_l2=False, l1=tables.l1, clusters=tables.clusters, entry_bytes=512,
            storage=file if with_descriptor else CountingStorage(MemoryStorage(tables.content)))
        begin = threading.Barrier(8)

        def read(seed):
            rng = random.Random(seed)
            begin.wait()
            for _ in range(300):
                cluster = rng.randrange(tables.clusters)
                assert slices.lookup(cluster)[:2] == tables.entry(cluster)

        def disturb(_):
            begin.wait()
            for _ in range(20):
                cache.trim()
                cache.statistics()
                slices.warm()

        futures = in_threads(7, read) + in_threads(1, disturb)
        for future in futures:
            future.result(120)
    fixed = (cache.trim(), cache.trim()) and cache.statistics()["bytes_used"]
    assert fixed <= max(budget, 1000)


def test_the_budget_holds_again_after_many_loads_at_once(shuffled):
    held = HeldStorage(MemoryStorage(shuffled.content))
    cache = SliceCache(4000)
    slices = open_map(cache, shuffled, held)
    futures = in_threads(16, lambda i: slices.lookup(i * 4 * SLICE))
    held.wait_for(16)
    held.release()
    for future in futures:
        future.result(60)
    assert cache.statistics()["bytes_used"] <= 4000


# -- warm-up and read-ahead ----------------------------------------------------------------------------------------


def test_a_warm_up_reads_every_table_in_few_large_reads(shuffled):
    counted = CountingStorage(MemoryStorage(shuffled.content))
    slices = open_map(SliceCache(1 << 20), shuffled, counted)
    assert slices.warm() == 4 * 16
    assert counted.counts().reads == 4
    assert slices.lookup(12345)[0] == shuffled.words[12345]
    assert counted.counts().reads == 4


def test_a_warm_up_stops_where_the_room_ends_and_pushes_nobody_out(shuffled):
    cache = SliceCache(20_000)
    slices = open_map(cache, shuffled, MemoryStorage(shuffled.content))
    slices.lookup(30_000)
    slices.warm()
    assert slices.resident(30_000)
    assert cache.statistics()["evictions"] == 0


def test_slices_of_one_run_are_warmed_even_without_room_for_others(in_order):
    cache = SliceCache(2000)
    slices = open_map(cache, in_order, MemoryStorage(in_order.content))
    assert slices.warm() == 4 * 16
    assert cache.statistics()["slices"]["inline"] == 4 * 16


def test_a_warm_up_that_meets_a_bad_table_goes_on_behind_it(shuffled):
    l1 = shuffled.l1[:8] + struct.pack(">Q", (2 << BITS) + 512) + shuffled.l1[16:]
    slices = open_map(SliceCache(1 << 20), shuffled, MemoryStorage(shuffled.content), l1=l1)
    assert slices.warm() == 3 * 16


def test_a_warm_up_is_stopped_from_another_thread(shuffled):
    held = HeldStorage(MemoryStorage(shuffled.content))
    slices = open_map(SliceCache(1 << 20), shuffled, held)
    (future,) = in_threads(1, lambda _: slices.warm())
    held.wait_for(1)
    slices.stop()
    held.release()
    assert future.result(60) == 16  # the read that was under way


def test_a_warm_up_that_was_stopped_before_it_began_does_not_begin(shuffled):
    counted = CountingStorage(MemoryStorage(shuffled.content))
    slices = open_map(SliceCache(1 << 20), shuffled, counted)
    slices.stop()
    assert slices.warm() == 0
    assert counted.counts().reads == 0


def test_a_sequential_reader_gets_ever_larger_reads(shuffled):
    counted = CountingStorage(MemoryStorage(shuffled.content))
    slices = open_map(SliceCache(1 << 20), shuffled, counted, readahead=True)
    for cluster in range(shuffled.clusters):
        assert slices.lookup(cluster)[0] == shuffled.words[cluster]
    assert counted.counts().reads <= 12  # 64 slices: 1, 2, 4, 8, and then whole tables, each cut at its end


def test_a_random_reader_reads_no_more_than_it_asks_for(shuffled):
    counted = CountingStorage(MemoryStorage(shuffled.content))
    slices = open_map(SliceCache(1 << 20), shuffled, counted, readahead=True)
    for number in (40, 3, 17, 60, 9):
        slices.lookup(number * SLICE)
    assert counted.counts().read_bytes == 5 * 4096


# -- what cannot be ------------------------------------------------------------------------------------------------


def test_an_unaligned_table_raises_corrupt_image_that_says_where(shuffled):
    l1 = struct.pack(">Q", (1 << BITS) + 512) + shuffled.l1[8:]
    slices = open_map(SliceCache(1 << 20), shuffled, MemoryStorage(shuffled.content), l1=l1, l1_offset=0x30000)
    with pytest.raises(CorruptImage, match="0x30000") as caught:
        slices.lookup(0)
    assert caught.value.offset == 0x30000
    assert slices.lookup(1 << 13)[0] == shuffled.words[1 << 13]


def test_reserved_bits_of_an_l1_entry_change_nothing(shuffled):
    l1 = struct.pack(">2Q", 1 << 63 | 0x7F00_0000_0000_01FF | 1 << BITS, 0x7F00_0000_0000_01FF) + shuffled.l1[16:]
    slices = open_map(SliceCache(1 << 20), shuffled, MemoryStorage(shuffled.content), l1=l1)
    assert slices.lookup(0)[0] == shuffled.words[0]
    assert slices.lookup(1 << 13) == (0, 0, 1 << 13)


@pytest.mark.parametrize("entry_bytes", [0, 1, 511, 513, 4095, 1 << 17, 1 << 40])
def test_an_impossible_unit_is_refused(shuffled, entry_bytes):
    with pytest.raises(BadOption, match=str(entry_bytes)):
        open_map(SliceCache(1 << 20), shuffled, MemoryStorage(), entry_bytes=entry_bytes)


@pytest.mark.parametrize("bits", [-1, 0, 8, 22, 64, 300])
def test_impossible_clusters_are_refused(shuffled, bits):
    with pytest.raises(BadOption, match=str(bits)):
        open_map(SliceCache(1 << 20), shuffled, MemoryStorage(), cluster_bits=bits)


@pytest.mark.parametrize("clusters", [(1 << 64) - 1, 1 << 63, 1 << 50])
def test_a_disk_beyond_all_measure_is_refused(shuffled, clusters):
    with pytest.raises(BadOption, match="slices"):
        open_map(SliceCache(1 << 20), shuffled, MemoryStorage(), clusters=clusters)


def test_an_empty_disk_has_a_map(shuffled):
    slices = open_map(SliceCache(1 << 20), shuffled, MemoryStorage(), clusters=0, l1=b"")
    assert slices.warm() == 0
    with pytest.raises(InternalError):
        slices.lookup(0)


@pytest.mark.parametrize("ask", ["lookup", "resident"])
def test_clusters_beyond_the_disk_are_refused(shuffled, ask):
    slices = open_map(SliceCache(1 << 20), shuffled, MemoryStorage(shuffled.content))
    with pytest.raises(InternalError, match=str(shuffled.clusters)):
        getattr(slices, ask)(shuffled.clusters)


def test_an_unknown_policy_is_refused():
    with pytest.raises(BadOption, match="fifo"):
        SliceCache(1 << 20, "fifo")


# -- memory --------------------------------------------------------------------------------------------------------


class MallInfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def allocated():
    """Bytes that the C library has given out now. Freed blocks of which it keeps a few per thread count as well."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("the C library does not tell what it has given out")
    libc.mallinfo2.restype = MallInfo2
    gc.collect()
    told = libc.mallinfo2()
    return told.uordblks + told.hblkhd


@pytest.mark.parametrize("longest", [1, 30])
def test_the_bytes_charged_are_those_that_the_c_library_took(tmp_path, longest):
    tables = make_tables(longest, cluster_bits=12, tables=1500, kinds="np", longest=longest)
    path = tmp_path / "tables"
    path.write_bytes(tables.content)
    with FileStorage(path) as file:
        before = allocated()
        cache = SliceCache(1 << 30)
        slices = SliceMap(cache, cluster_bits=12, extended_l2=False, l1=tables.l1, clusters=tables.clusters,
                          entry_bytes=512, storage=file)
        empty = allocated() - before - cache.statistics()["bytes_used"]  # the L1 table and the objects
        slices.warm()
        took = allocated() - before - empty
    assert sum(cache.statistics()["slices"].values()) > 5000
    assert took == pytest.approx(cache.statistics()["bytes_used"], rel=0.01, abs=40_000)


def test_maps_that_come_and_go_leak_nothing(shuffled):
    def live():
        cache = SliceCache(30_000)
        slices = open_map(cache, shuffled, MemoryStorage(shuffled.content), readahead=True)
        for cluster in range(0, shuffled.clusters, 97):
            slices.lookup(cluster)
        cache.trim()

    live()
    before = allocated()
    for _ in range(30):
        live()
    assert allocated() - before < 30_000


def test_the_collector_may_take_a_map_that_refers_to_itself(shuffled):
    class Storage(MemoryStorage):
        pass

    storage = Storage(shuffled.content)
    storage.slices = open_map(SliceCache(1 << 20), shuffled, storage)
    storage.slices.warm()
    gone = weakref.ref(storage)
    del storage
    gc.collect()
    assert gone() is None


def test_a_slice_lives_on_in_its_cache_when_another_map_is_dropped(shuffled):
    cache = SliceCache(1 << 20)
    kept = open_map(cache, shuffled, MemoryStorage(shuffled.content))
    dropped = open_map(cache, shuffled, MemoryStorage(shuffled.content))
    kept.lookup(0)
    dropped.warm()
    del dropped
    assert kept.resident(0)
    assert sum(cache.statistics()["slices"].values()) == 1


def test_what_nobody_looked_at_between_two_trims_is_given_back(shuffled):
    cache = SliceCache(1 << 20)
    slices = open_map(cache, shuffled, MemoryStorage(shuffled.content))
    slices.lookup(0)
    slices.lookup(SLICE)
    cache.trim()
    slices.lookup(0)
    assert cache.trim() > 1000
    assert slices.resident(0)
    assert not slices.resident(SLICE)
