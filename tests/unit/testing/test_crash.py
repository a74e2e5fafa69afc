from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.storage import Storage
from cowslice.testing.crash import DISCARDED, SECTOR, CrashRecord, CrashStorage, LyingStorage, crash_state, crash_states

OLD = b"o" * SECTOR
NEW = b"n" * SECTOR
NEWER = b"w" * SECTOR


def begin(content: bytes = OLD) -> tuple[CrashRecord, CrashStorage]:
    record = CrashRecord()
    return record, record.storage(content)


def leavings(record: CrashRecord, **options: int) -> set[bytes]:
    return {state.contents["image"] for state in crash_states(record, **options)}


def test_a_write_without_a_sync_is_there_or_not() -> None:
    record, disk = begin()
    disk.pwrite(0, NEW)
    assert leavings(record) == {OLD, NEW}


def test_what_was_synced_is_there_after_every_later_crash() -> None:
    record, disk = begin()
    disk.pwrite(0, NEW)
    disk.sync()
    record.mark("synced")
    disk.pwrite(0, NEWER)
    assert {state.contents["image"] for state in crash_states(record) if "synced" in state.marks} == {NEW, NEWER}


def test_writes_between_syncs_come_in_any_order() -> None:
    record, disk = begin(OLD * 2)
    disk.pwrite(0, NEW)
    disk.pwrite(SECTOR, NEW)
    assert leavings(record) == {OLD + OLD, NEW + OLD, OLD + NEW, NEW + NEW}


def test_a_write_of_several_sectors_is_torn_between_any_of_them() -> None:
    record, disk = begin(OLD * 3)
    disk.pwrite(0, NEW * 3)
    assert len(leavings(record)) == 8


def test_parts_of_one_sector_never_lose_what_was_written_to_it_before() -> None:
    record, disk = begin()
    disk.pwrite(0, b"1")
    disk.pwrite(1, b"2")
    assert leavings(record) == {OLD, b"1" + OLD[1:], b"12" + OLD[2:]}


def test_an_overwritten_write_may_be_what_stays() -> None:
    record, disk = begin()
    disk.pwrite(0, NEW)
    disk.pwrite(0, NEWER)
    assert leavings(record) == {OLD, NEW, NEWER}


def test_a_file_that_grew_may_have_its_length_before_its_bytes() -> None:
    record, disk = begin(b"")
    disk.pwrite(0, NEW * 2)
    nothing = bytes(SECTOR)
    assert leavings(record) == {b"", NEW, nothing + NEW, NEW + NEW, nothing * 2, NEW + nothing}


def test_a_file_that_was_cut_may_still_be_long() -> None:
    record, disk = begin(OLD * 2)
    disk.truncate(SECTOR)
    assert {OLD, OLD * 2} <= leavings(record) <= {OLD, OLD * 2, OLD + bytes(SECTOR)}


def test_a_discarded_span_reads_as_something_else() -> None:
    record, disk = begin(OLD)
    disk.discard(0, 2 * SECTOR)
    assert leavings(record) == {OLD, bytes([DISCARDED]) * SECTOR}
    assert disk.read(0, SECTOR) == bytes([DISCARDED]) * SECTOR


def test_a_sync_of_one_file_says_nothing_of_another() -> None:
    record, image = begin()
    data = record.storage(OLD, file="data")
    data.pwrite(0, NEW)
    image.pwrite(0, NEW)
    image.sync()
    record.mark("synced")
    after = [state for state in crash_states(record) if "synced" in state.marks]
    assert {(state.contents["image"], state.contents["data"]) for state in after} == {(NEW, OLD), (NEW, NEW)}


def test_a_write_that_a_sync_overtakes_is_not_stable() -> None:
    record, disk = begin()
    under_way, over = threading.Event(), threading.Event()

    def wait() -> None:
        if threading.current_thread() is writer:
            under_way.set()
            assert over.wait(60)

    disk.handover = wait
    writer = threading.Thread(target=disk.pwrite, args=(0, NEW))
    writer.start()
    assert under_way.wait(60)
    disk.sync()
    over.set()
    writer.join()
    assert leavings(record) == {OLD, NEW}


def test_a_record_is_sampled_where_it_is_too_long_and_the_seed_says_how() -> None:
    record, disk = begin(bytes(64 * SECTOR))
    for number in range(64):
        disk.pwrite(number * SECTOR, NEW)
    first, again = ([state.name for state in crash_states(record, seed=3, limit=40)] for _ in range(2))
    assert first == again
    assert len(first) <= 40 < 2**64
    assert leavings(record, seed=3, limit=40) != leavings(record, seed=4, limit=40)
    assert {bytes(64 * SECTOR), NEW * 64} <= leavings(record, seed=3, limit=40)


@given(st.integers(0, 1 << 32), st.sampled_from([4, 10_000]))
def test_every_state_is_found_again_by_its_name(seed: int, limit: int) -> None:
    chooser = random.Random(seed)
    record, disk = begin(chooser.randbytes(3000))
    for _ in range(8):
        change(disk, chooser)
    for state in crash_states(record, seed=seed, limit=limit):
        assert crash_state(record, state.name) == state


@given(st.integers(0, 1 << 32))
def test_after_everything_came_through_the_file_is_as_it_was_written(seed: int) -> None:
    chooser = random.Random(seed)
    record, disk = begin(chooser.randbytes(3000))
    for _ in range(8):
        change(disk, chooser)
    assert disk.read(0, disk.length()) in leavings(record, limit=2)


def change(disk: Storage, chooser: random.Random) -> None:
    step: Callable[[], None] = chooser.choice([
        lambda: disk.pwrite(chooser.randrange(3000), chooser.randbytes(chooser.randrange(1, 1500))),
        lambda: disk.truncate(chooser.randrange(4000)),
        lambda: disk.discard(chooser.randrange(3000), 700),
        lambda: disk.zero(chooser.randrange(3000), 700),
        disk.sync,
    ])
    step()


def append(disk: Storage, payload: bytes) -> None:
    """A journal of one sector's count and the records behind it: a record is stable before it is counted."""
    count = struct.unpack(">I", disk.read(0, 4))[0]
    disk.pwrite((1 + count) * SECTOR, payload * SECTOR)
    disk.sync()
    disk.pwrite(0, struct.pack(">I", count + 1))
    disk.sync()


def is_sound(content: bytes) -> bool:
    count = struct.unpack(">I", content[:4])[0]
    return all(content[(1 + n) * SECTOR : (2 + n) * SECTOR] == bytes([65 + n]) * SECTOR for n in range(count))


@pytest.mark.parametrize("lies, sound", [((), True), ((0,), False), ((2,), False), ((1,), True)])
def test_an_order_without_its_barrier_is_caught(lies: tuple[int, ...], sound: bool) -> None:
    """Lie 1 takes away only the promise that the first record is counted, not the order."""
    record, disk = begin(bytes(SECTOR))
    journal = LyingStorage(disk, *lies)
    append(journal, b"A")
    append(journal, b"B")
    assert all(is_sound(state.contents["image"]) for state in crash_states(record)) is sound
