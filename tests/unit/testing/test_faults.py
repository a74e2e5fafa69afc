"""The storages that misbehave do it exactly where they were told to."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest

from cowslice.errors import NoSpace, StorageError
from cowslice.storage import MemoryStorage
from cowslice.testing.faults import Fault, FaultyStorage, HeldStorage, Operation, SlowStorage

TEXT = b"0123456789"


def test_only_requests_that_touch_the_span_fail() -> None:
    faulty = FaultyStorage(MemoryStorage(TEXT), Fault("pread", offset=4, end=6))
    assert (faulty.read(0, 4), faulty.read(6, 4)) == (TEXT[:4], TEXT[6:])
    for span in ((0, 5), (5, 1), (3, 9)):
        with pytest.raises(StorageError, match=f"cannot pread {span[1]} bytes at offset {span[0]} of 'memory'"):
            faulty.read(*span)


def test_a_fault_comes_after_some_requests_and_goes_after_some() -> None:
    faulty = FaultyStorage(MemoryStorage(TEXT), Fault("pread", skip=2, times=1))
    outcomes = []
    for _ in range(5):
        try:
            outcomes.append(faulty.read(0, 1))
        except StorageError as error:
            outcomes.append(error.errno)
    assert outcomes == [b"0", b"0", errno.EIO, b"0", b"0"]


def test_a_failed_write_changes_nothing() -> None:
    faulty = FaultyStorage(MemoryStorage(TEXT), Fault("pwrite", code=errno.ENOSPC))
    with pytest.raises(NoSpace):
        faulty.pwrite(0, b"abc")
    assert faulty.read(0, 10) == TEXT


def test_a_healed_storage_works() -> None:
    faulty = FaultyStorage(MemoryStorage(TEXT), Fault("sync"))
    faulty.heal()
    faulty.sync()


CHANGES: dict[Operation, Callable[[FaultyStorage], object]] = {
    "pread": lambda storage: storage.read(0, 1),
    "pwrite": lambda storage: storage.pwrite(0, b"x"),
    "truncate": lambda storage: storage.truncate(3),
    "sync": lambda storage: storage.sync(),
    "zero": lambda storage: storage.zero(0, 1),
    "discard": lambda storage: storage.discard(0, 1),
}


@pytest.mark.parametrize("operation", CHANGES)
def test_each_operation_fails_alone(operation: Operation) -> None:
    faulty = FaultyStorage(MemoryStorage(TEXT))
    faulty.add(Fault(operation))
    for other, change in CHANGES.items():
        if other == operation:
            with pytest.raises(StorageError, match=operation):
                change(faulty)
        else:
            change(faulty)


def test_a_slow_storage_reads_and_writes_the_same() -> None:
    slow = SlowStorage(MemoryStorage(TEXT), read_seconds=0.001, write_seconds=0.001)
    slow.pwrite(0, b"ab")
    assert slow.read(0, 3) == b"ab2"


def test_held_reads_wait_together_until_released() -> None:
    held, results = HeldStorage(MemoryStorage(TEXT)), []
    readers = [threading.Thread(target=lambda n=n: results.append(held.read(n, 2))) for n in range(3)]
    for reader in readers:
        reader.start()
    held.wait_for(3)
    assert (results, sorted(held.held)) == ([], [(0, 2), (1, 2), (2, 2)])
    held.release()
    for reader in readers:
        reader.join()
    assert sorted(results) == [b"01", b"12", b"23"]
    assert held.read(0, 1) == b"0"


def test_held_again_it_holds_only_later_reads() -> None:
    held, results = HeldStorage(MemoryStorage(TEXT), patience=30), []
    first = threading.Thread(target=lambda: results.append(held.read(0, 1)))
    first.start()
    held.wait_for(1)
    held.release()
    held.hold()
    first.join()
    second = threading.Thread(target=lambda: results.append(held.read(1, 1)))
    second.start()
    held.wait_for(1)
    assert results == [b"0"]
    held.release()
    second.join()
    assert results == [b"0", b"1"]


def test_a_read_that_nobody_releases_fails_instead_of_hanging() -> None:
    held = HeldStorage(MemoryStorage(TEXT), patience=0.01)
    with pytest.raises(AssertionError, match="2 bytes at offset 5 was never released"):
        held.read(5, 2)
    with pytest.raises(AssertionError, match="1 reads expected to wait together, 0 do"):
        held.wait_for(1)
