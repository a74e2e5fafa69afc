"""Stored entries: what becomes of them when reads fail, tables are exchanged, and threads meet."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cowslice.cache.slicemap import SliceCache, SliceMap
from cowslice.errors import InternalError, StorageError
from cowslice.storage import FileStorage
from cowslice.storage.base import Storage
from cowslice.storage.memory import MemoryStorage
from cowslice.testing.faults import Fault, FaultyStorage, HeldStorage

SIZE = 4096
ENTRIES = SIZE // 8
TABLES = 3


def word(number: int) -> bytes:
    return struct.pack(">Q", 1 << 63 | number << 12)


def content() -> bytes:
    """A cluster of nothing, then a table for each L1 entry; entry n of the disk points at cluster n + 1000."""
    return bytes(SIZE) + b"".join(word(n + 1000) for n in range(TABLES * ENTRIES))


def l1() -> bytes:
    return struct.pack(f">{TABLES}Q", *(SIZE * (n + 1) for n in range(TABLES)))


def made(storage: Storage, *, budget: int = 1 << 20) -> SliceMap:
    return SliceMap(SliceCache(budget), cluster_bits=12, extended_l2=False, l1=l1(), clusters=TABLES * ENTRIES,
                    entry_bytes=512, storage=storage)


def test_a_slice_that_was_stored_to_after_it_was_taken_stays_dirty() -> None:
    slices = made(MemoryStorage(content()))
    slices.store(5, word(1))
    (_, before, token), = slices.take_dirty()
    slices.store(5, word(2))
    slices.clean([token])
    (_, after, _), = slices.take_dirty()
    assert (before[40:48], after[40:48]) == (word(1), word(2))
    assert slices.entries(5, 1) == word(2)


def test_a_clean_slice_is_read_from_the_disk_once_it_was_forgotten() -> None:
    storage = MemoryStorage(content())
    slices = made(storage)
    slices.store(5, word(1))
    slices.clean([token for *_, token in slices.take_dirty()])
    slices.cache.trim()
    slices.cache.trim()
    assert slices.entries(5, 1) == word(1005)  # nobody has written it


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_a_dirty_slice_stays_whatever_the_budget(budget: int) -> None:
    slices = made(MemoryStorage(content()), budget=budget)
    slices.store(0, word(7))
    for cluster in range(0, TABLES * ENTRIES, 16):
        slices.lookup(cluster)
    slices.cache.trim()
    slices.cache.trim()
    assert slices.lookup(0, 1)[0] == struct.unpack(">Q", word(7))[0]


@pytest.mark.parametrize("act", [lambda slices: slices.store(70, word(1)), lambda slices: slices.entries(70, 1)])
def test_a_read_that_fails_is_said_and_changes_nothing(act: Callable[[SliceMap], object]) -> None:
    storage = FaultyStorage(MemoryStorage(content()), Fault("pread", offset=SIZE))
    slices = made(storage)
    with pytest.raises(StorageError):
        act(slices)
    assert slices.dirty_bytes == 0
    storage.heal()
    assert slices.entries(70, 1) == word(1070)


def test_a_store_over_two_slices_of_which_one_cannot_be_read_changes_neither() -> None:
    storage = FaultyStorage(MemoryStorage(content()), Fault("pread", offset=SIZE + 512, end=SIZE + 1024))
    slices = made(storage)
    with pytest.raises(StorageError):
        slices.store(63, word(1) + word(2))
    storage.heal()
    assert slices.entries(63, 2) == word(1063) + word(1064)


def test_a_read_that_fails_once_is_not_noticed() -> None:
    slices = made(FaultyStorage(MemoryStorage(content()), Fault("pread", offset=SIZE, times=1)))
    slices.store(70, word(1))
    assert slices.entries(69, 3) == word(1069) + word(1) + word(1071)


def test_nothing_is_stored_where_there_is_no_table() -> None:
    slices = made(MemoryStorage(content()))
    slices.set_l1(1, 0)
    with pytest.raises(InternalError):
        slices.store(ENTRIES - 1, word(1) + word(2))
    assert slices.entries(ENTRIES - 1, 2) == word(1000 + ENTRIES - 1) + bytes(8)


@pytest.mark.parametrize("size", [0, 7, 8 * (TABLES * ENTRIES + 1)])
def test_parts_of_entries_and_too_many_are_refused(size: int) -> None:
    with pytest.raises(InternalError):
        made(MemoryStorage(content())).store(0, bytes(size))


def test_what_was_stored_to_a_table_goes_with_it() -> None:
    slices = made(MemoryStorage(content()))
    slices.store(5, word(1))
    slices.store(ENTRIES + 5, word(2))
    slices.set_l1(0, 2 * SIZE)
    assert [host for host, *_ in slices.take_dirty()] == [2 * SIZE]
    assert slices.entries(5, 1) == word(1000 + ENTRIES + 5)


def test_what_loads_while_its_table_is_exchanged_is_not_answered() -> None:
    storage = HeldStorage(MemoryStorage(content()))
    slices = made(storage)
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(slices.lookup, 5, 1), threads.submit(slices.entries, 5, 1)]
        storage.wait_for(1)
        slices.set_l1(0, 2 * SIZE)
        storage.release()
        (found, *_), raw = (one.result() for one in asked)
    assert struct.pack(">Q", found) == raw == word(1000 + ENTRIES + 5)


def test_a_store_that_loads_while_its_table_is_exchanged_goes_to_the_new_one() -> None:
    storage = HeldStorage(MemoryStorage(content()))
    slices = made(storage)
    with ThreadPoolExecutor(1) as threads:
        stored = threads.submit(slices.store, 5, word(1))
        storage.wait_for(1)
        slices.set_l1(0, 2 * SIZE)
        storage.release()
        stored.result()
    (host, raw, _), = slices.take_dirty()
    assert host == 2 * SIZE
    assert raw[32:56] == word(1000 + ENTRIES + 4) + word(1) + word(1000 + ENTRIES + 6)


def test_another_l1_table_is_not_taken_while_anything_is_dirty() -> None:
    slices = made(MemoryStorage(content()))
    slices.store(5, word(1))
    with pytest.raises(InternalError):
        slices.replace_l1(l1()[8:], ENTRIES)
    slices.clean([token for *_, token in slices.take_dirty()])
    slices.replace_l1(l1()[8:], ENTRIES)
    assert slices.entries(5, 1) == word(1000 + ENTRIES + 5)
    with pytest.raises(InternalError):
        slices.lookup(ENTRIES)


def test_another_l1_table_waits_for_what_loads() -> None:
    storage = HeldStorage(MemoryStorage(content()))
    slices = made(storage)
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(slices.lookup, 5, 1)
        storage.wait_for(1)
        replaced = threads.submit(slices.replace_l1, l1()[8:], 2 * ENTRIES)
        storage.release()
        replaced.result()
        asked.result()
    assert slices.entries(5, 1) == word(1000 + ENTRIES + 5)


@pytest.mark.parametrize("budget", [0, 3000, 1 << 20])
def test_threads_find_what_they_stored_while_others_evict_and_clean(tmp_path: Path, budget: int) -> None:
    """Each thread owns every fourth cluster, so that all meet in every slice."""
    path = tmp_path / "tables"
    path.write_bytes(content())
    over = threading.Event()
    with FileStorage(path, "r+") as storage:
        slices = made(storage, budget=budget)

        def own(number: int) -> dict[int, bytes]:
            dice, mine = random.Random(number), {}
            for step in range(2000):
                cluster = dice.randrange(TABLES * ENTRIES // 4) * 4 + number
                expected = mine.get(cluster, word(1000 + cluster))
                assert slices.entries(cluster, 1) == expected
                assert struct.pack(">Q", slices.lookup(cluster, 1)[0]) == expected
                if step % 2:
                    mine[cluster] = word(dice.randrange(1 << 30))
                    slices.store(cluster, mine[cluster])
            return mine

        def commit() -> None:
            while not over.is_set():
                taken = slices.take_dirty()
                for host, raw, _ in taken:
                    storage.pwrite(host, raw)
                slices.clean([token for *_, token in taken])
                slices.cache.trim()

        with ThreadPoolExecutor(5) as threads:
            committing = threads.submit(commit)
            owners = [threads.submit(own, number) for number in range(4)]
            try:
                stored = {cluster: raw for one in owners for cluster, raw in one.result().items()}
            finally:
                over.set()
            committing.result()
        for host, raw, _ in slices.take_dirty():
            storage.pwrite(host, raw)
        expected = [stored.get(n, word(1000 + n)) for n in range(TABLES * ENTRIES)]
        assert storage.read(SIZE, TABLES * SIZE) == b"".join(expected)
