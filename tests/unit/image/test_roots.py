"""The storage is full in the middle of a snapshot operation or a resize: nothing breaks, and work goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

import cowslice
from cowslice.ops.check import check
from cowslice.storage import MemoryStorage, WrappedStorage
from cowslice.units import KiB

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ACTS: dict[str, Callable[[cowslice.Image], object]] = {
    "create": lambda disk: disk.snapshot("made"),
    "apply": lambda disk: disk.apply_snapshot("kept"),
    "delete": lambda disk: disk.delete_snapshot("kept"),
    "grow": lambda disk: disk.resize(400 * KiB, preallocation="metadata"),
    "shrink": lambda disk: disk.resize(40 * KiB, shrink=True),
}


class Filling(WrappedStorage):
    """Has room for `room` more writes; None for any number."""

    room: int | None = None

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        if self.room is not None:
            self.room -= 1
            if self.room < 0:
                raise cowslice.NoSpace("the storage is full")
        self.inner.pwrite(offset, data)


def attempt(act: Callable[[cowslice.Image], object], room: int) -> bool:
    """Act with so much room, then go on with enough; whether the room sufficed."""
    memory = MemoryStorage()
    cowslice.create(memory, 200 * KiB, format="qcow2", cluster_size=512)
    storage = Filling(memory)
    disk = cowslice.open(storage, "r+", format="qcow2", warmup="off")
    disk.write(0, b"a" * (100 * KiB))
    disk.snapshot("kept")
    disk.write(0, b"b" * (60 * KiB))
    disk.flush()
    storage.room = room
    with suppress(cowslice.NoSpace):
        act(disk)
    enough, storage.room = storage.room >= 0, None
    assert len(disk.read(0, disk.size)) == disk.size
    try:
        disk.write(0, b"c" * (30 * KiB))
        disk.close()
    except cowslice.StorageError as error:
        assert "opened again" in str(error)  # a header that is half written allows nothing else
        return enough
    found = check(memory)
    assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0), found.findings[:3]
    return enough


@pytest.mark.parametrize("name", ACTS)
def test_no_room_for_any_one_write_breaks_nothing(name: str) -> None:
    room = 0
    while not attempt(ACTS[name], room):
        room += 1
    assert room > 3


class Undiscardable(WrappedStorage):
    """Cannot give space back."""

    def discard(self, offset: int, length: int) -> None:
        raise cowslice.StorageError("no space is given back")


def test_a_snapshot_is_deleted_although_its_space_cannot_be_given_back() -> None:
    storage = Undiscardable(MemoryStorage())
    cowslice.create(storage, 200 * KiB, format="qcow2", cluster_size=512)
    with cowslice.open(storage, "r+", format="qcow2", warmup="off") as disk:
        disk.write(0, b"a" * KiB)
        disk.snapshot("kept")
        disk.write(0, b"b" * KiB)
        disk.delete_snapshot("kept")
        assert not disk.snapshots
