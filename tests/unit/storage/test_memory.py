"""Memory as a storage, beyond the contract."""

from __future__ import annotations

import pytest

from cowslice.errors import NoSpace
from cowslice.storage import MemoryStorage


def test_it_keeps_a_copy_of_what_it_was_given() -> None:
    content = bytearray(b"abc")
    storage = MemoryStorage(content)
    content[:] = b"xyz"
    assert storage.read(0, 3) == b"abc"


def test_growing_beyond_memory_is_no_space() -> None:
    storage = MemoryStorage(b"abc")
    with pytest.raises(NoSpace, match=str(1 << 61)):
        storage.truncate(1 << 61)
    assert storage.read(0, 4) == b"abc\0"


def test_all_its_bytes_are_allocated() -> None:
    assert MemoryStorage(bytes(70)).allocated() == 70


def test_appending_copies_each_byte_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    copied = []
    larger = storage._larger
    monkeypatch.setattr(storage, "_larger", lambda array, length: (copied.append(len(array)), larger(array, length))[1])
    for n in range(1000):
        storage.pwrite(n * 512, bytes(512))
    assert sum(copied) < 4 * storage.length()
