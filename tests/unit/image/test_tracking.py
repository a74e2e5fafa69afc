"""Bitmaps of an image that is written: what they note, what stands on disk meanwhile, what is carried on."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import cowslice
from cowslice.errors import BadOption, CorruptImage, NoSpace, ReadOnly, UnsupportedImage
from cowslice.format.extensions import ExtensionType, with_extension
from cowslice.format.first_cluster import FirstCluster, decode_first_cluster, encode_first_cluster
from cowslice.format.header import Autoclear
from cowslice.image.bitmaps import load_bitmaps
from cowslice.image.headerswitch import rearranged
from cowslice.ops.check import check
from cowslice.serve.exports import Export
from cowslice.storage import LimitedStorage, MemoryStorage, Storage
from cowslice.units import KiB, MiB

SIZE = 8 * MiB
G = 64 * KiB


def image(*bitmaps: str, cluster_size: int = 64 * KiB, size: int = SIZE) -> MemoryStorage:
    storage = MemoryStorage()
    cowslice.create(storage, size, format="qcow2", cluster_size=cluster_size)
    with writing(storage) as disk:
        for name in bitmaps:
            disk.add_bitmap(name, granularity=G)
    return storage


def writing(storage: Storage) -> cowslice.Image:
    return cowslice.open(storage, "r+", format="qcow2", warmup="off")


def marked(storage: Storage, name: str = "b") -> list[tuple[int, int]]:
    with cowslice.open(storage, format="qcow2", warmup="off") as disk:
        return list(disk.dirty_extents(name))


def on_disk(storage: Storage) -> dict[bytes, int]:
    """Flags by name, as they stand in the file now."""
    return {one.name: int(one.flags) for one in load_bitmaps(storage, first_of(storage))}


def first_of(storage: Storage) -> FirstCluster:
    return decode_first_cluster(storage.read(0, 64 * KiB))


def change_first(storage: Storage, **changes: object) -> None:
    storage.pwrite(0, encode_first_cluster(rearranged(first_of(storage), **changes)).ljust(4 * KiB, b"\0"))


def put_flags(storage: Storage, number: int, flags: int) -> None:
    pointer = first_of(storage).bitmaps
    assert pointer is not None
    at = pointer.directory_offset + sum(one.encoded_length for one in load_bitmaps(storage, first_of(storage))[:number])
    storage.pwrite(at + 12, struct.pack(">I", flags))


def faults_of(storage: Storage) -> tuple[int, int, int]:
    found = check(storage)
    return found.corruptions, found.leaks, found.check_errors


CHANGES = {
    "write": lambda disk: disk.write(3 * G + 5, b"x"),
    "write_many": lambda disk: disk.write_many([3 * G, 3 * G + 512], 512, bytes(1024)),
    "zero": lambda disk: disk.zero(3 * G, G),
    "discard": lambda disk: disk.discard(3 * G, G),
    "write_compressed": lambda disk: disk.write_compressed(3 * G, bytes(G)),
}


@pytest.mark.parametrize("allocated", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_every_kind_of_change_is_noted(name: str, allocated: bool) -> None:
    storage = image()
    with writing(storage) as disk:
        if allocated:
            disk.write(0, b"d" * MiB)
        disk.add_bitmap("b", granularity=G)
        CHANGES[name](disk)
        assert list(disk.dirty_extents("b")) == [(3 * G, G)]
    assert marked(storage) == [(3 * G, G)]


def test_vacating_marks_all_of_the_disk() -> None:
    storage = image("b")
    with writing(storage) as disk:
        disk.vacate()
    assert marked(storage) == [(0, SIZE)]


def test_a_bitmap_is_in_use_on_disk_while_it_notes_changes_and_never_after() -> None:
    storage = image("b", "off")
    with writing(storage) as disk:
        disk.disable_bitmap("off")
    with writing(storage) as disk:
        assert on_disk(storage) == {b"b": 3, b"off": 0}
        assert [int(one.flags) for one in disk.bitmaps] == [2, 0]
        disk.enable_bitmap("off")
        assert on_disk(storage) == {b"b": 3, b"off": 1}
    assert on_disk(storage) == {b"b": 2, b"off": 2}


def test_an_image_that_is_only_opened_keeps_its_bitmaps_where_they_are() -> None:
    storage = image("b")
    before = storage.read(0, storage.length())
    writing(storage).close()
    assert storage.read(0, storage.length()) == before


def test_bits_of_earlier_sessions_stay_and_new_ones_are_added() -> None:
    storage = image("b")
    for offset in (0, 5 * G, 9 * G):
        with writing(storage) as disk:
            disk.write(offset, b"x")
    assert marked(storage) == [(0, G), (5 * G, G), (9 * G, G)]
    assert faults_of(storage) == (0, 0, 0)


def test_a_disabled_bitmap_notes_nothing() -> None:
    storage = image("b")
    with writing(storage) as disk:
        disk.write(0, b"x")
        disk.disable_bitmap("b")
        disk.write(2 * G, b"x")
    assert marked(storage) == [(0, G)]


def test_a_cleared_bitmap_marks_nothing_and_goes_on() -> None:
    storage = image("b")
    with writing(storage) as disk:
        disk.write(0, b"x")
    with writing(storage) as disk:
        disk.clear_bitmap("b")
        disk.write(2 * G, b"x")
    assert marked(storage) == [(2 * G, G)]
    assert faults_of(storage) == (0, 0, 0)


def test_a_removed_bitmap_leaves_nothing_behind() -> None:
    storage = image("b", "other")
    with writing(storage) as disk:
        disk.write(0, b"x")
    for name in ("b", "other"):
        with writing(storage) as disk:
            disk.remove_bitmap(name)
            assert name.encode() not in [one.name for one in disk.bitmaps]
    assert first_of(storage).bitmaps is None
    assert faults_of(storage) == (0, 0, 0)


def test_bitmaps_of_different_granularity_and_of_other_disks_are_merged() -> None:
    storage, other = image("b"), image("b")
    with writing(other) as disk:
        disk.write(7 * G, b"x")
    with writing(storage) as disk, cowslice.open(other, format="qcow2") as source:
        disk.add_bitmap("fine", granularity=512)
        disk.write(1000, b"x")
        disk.merge_bitmap("fine", "b")
        disk.merge_bitmap("b", "b", source)
    assert marked(storage) == [(0, G), (7 * G, G)]
    assert marked(storage, "fine") == [(0, G)]


def test_what_a_snapshot_brings_back_is_marked_whole() -> None:
    storage = image("b")
    with writing(storage) as disk:
        disk.snapshot("s")
        disk.apply_snapshot("s")
    assert marked(storage) == [(0, SIZE)]


@pytest.mark.parametrize("size", [SIZE * 5, SIZE + 512, SIZE // 2, 512])
@pytest.mark.parametrize("enabled", [True, False])
def test_bitmaps_have_the_size_of_their_disk(size: int, enabled: bool) -> None:
    storage = image("b", cluster_size=512)
    with writing(storage) as disk:
        disk.write(0, b"x")
        disk.write(SIZE - 1, b"x")
        if not enabled:
            disk.disable_bitmap("b")
    with writing(storage) as disk:
        disk.resize(size, shrink=True)
    found = marked(storage)
    assert found[0] == (0, min(G, size))
    assert size <= SIZE or any(start <= SIZE - 1 < start + length for start, length in found)
    with writing(storage) as disk:
        disk.resize(SIZE * 6)
    assert on_disk(storage) == {b"b": 2 * enabled}
    assert faults_of(storage) == (0, 0, 0)
    assert size > SIZE or enabled or marked(storage) == [(0, G)]  # what was cut off is forgotten


def test_a_bitmap_that_a_writer_did_not_finish_is_carried_on_and_can_only_be_removed() -> None:
    storage = image("b", "good")
    put_flags(storage, 0, 3)
    with writing(storage) as disk:
        disk.write(0, b"x")
        assert disk.bitmaps[0].in_use
        for act in (disk.clear_bitmap, disk.enable_bitmap, disk.disable_bitmap, disk.dirty_extents):
            with pytest.raises(CorruptImage, match="did not finish"):
                act("b")
        with pytest.raises(CorruptImage):
            disk.merge_bitmap("good", "b")
    assert on_disk(storage) == {b"b": 3, b"good": 2}
    with writing(storage) as disk:
        disk.remove_bitmap("b")
    assert on_disk(storage) == {b"good": 2}
    assert faults_of(storage) == (0, 0, 0)


@pytest.mark.parametrize("flags, expected", [(0x10, 0x10), (0x12, 0x13)])
def test_a_bitmap_that_is_not_understood_is_kept_and_never_looks_true_after_a_write(flags: int, expected: int) -> None:
    storage = image("b", "good")
    put_flags(storage, 0, flags)
    with writing(storage) as disk:
        disk.write(0, b"x")
    assert on_disk(storage) == {b"b": expected, b"good": 2}
    assert marked(storage, "good") == [(0, G)]
    assert check(storage).leaks == 0


@pytest.mark.parametrize("payload", [
    b"short", struct.pack(">IIQQ", 1, 0, 32, 0), struct.pack(">IIQQ", 1, 0, 32, 1 << 40),
    struct.pack(">IIQQ", 1, 0, 32, 64 * KiB),
    struct.pack(">IIQQ", 9, 0, 32, 5 << 16),
])
def test_a_directory_that_is_not_understood_is_given_up_and_said(payload: bytes) -> None:
    storage = image("b")
    change_first(storage, extensions=with_extension(first_of(storage).extensions, ExtensionType.BITMAPS, payload))
    said: list[str] = []
    with cowslice.open(storage, "r+", format="qcow2", on_warning=said.append) as disk:
        disk.write(0, b"x")
        assert disk.bitmaps == ()
    assert "cannot be understood" in said[0]
    assert not first_of(storage).header.autoclear & Autoclear.BITMAPS
    assert check(storage).corruptions == 0


def test_bitmaps_that_are_out_of_date_are_ignored_and_replaced() -> None:
    storage = image("b")
    change_first(storage, header=replace(first_of(storage).header, autoclear=Autoclear(0)))
    said: list[str] = []
    with cowslice.open(storage, "r+", format="qcow2", on_warning=said.append) as disk:
        disk.write(0, b"x")
    assert "out of date" in said[0]
    assert not first_of(storage).header.autoclear & Autoclear.BITMAPS
    with writing(storage) as disk:
        disk.add_bitmap("new", granularity=G)
        disk.write(G, b"x")
    assert marked(storage, "new") == [(G, G)]
    assert check(storage).corruptions == 0


def test_a_table_that_lies_on_other_metadata_is_never_written_nor_freed() -> None:
    storage = image("b", "good")
    header = first_of(storage).header
    pointer = first_of(storage).bitmaps
    assert pointer is not None
    storage.pwrite(pointer.directory_offset, struct.pack(">Q", header.l1_table_offset))
    with writing(storage) as disk:
        disk.write(0, b"x")
        assert "lies on the L1 table" in disk.bitmaps[0].fault
        disk.remove_bitmap("b")
    with cowslice.open(storage, format="qcow2") as disk:
        assert disk.read(0, 1) == b"x"
    assert marked(storage, "good") == [(0, G)]
    assert check(storage).corruptions == 0


def test_without_room_for_it_a_bitmap_stays_in_use_and_the_image_is_sound() -> None:
    storage = image("b")
    limited = LimitedStorage(storage, storage.length() + 3 * 64 * KiB)
    disk = writing(limited)
    disk.write(0, b"x" * (2 * 64 * KiB))
    with pytest.raises(NoSpace):
        disk.close()
    assert on_disk(storage) == {b"b": 3}
    assert check(storage).corruptions == 0
    with cowslice.open(storage, format="qcow2") as after:
        assert after.read(0, 2) == b"xx"


def test_threads_lose_no_mark() -> None:
    storage = image("b", cluster_size=4096)
    with writing(storage) as disk:
        disk.write(0, b"d" * (SIZE // 2))
        disk.add_bitmap("fine", granularity=512)

        def write(first: int) -> None:
            for at in range(first * 512, SIZE, 8 * 1024):
                disk.write(at, b"x")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(0, 16, 2)))
    assert marked(storage, "fine") == [(at, 512) for at in range(0, SIZE, 1024)]


@pytest.mark.parametrize("options, match", [
    ({"granularity": 500}, "power of two"), ({"granularity": 256}, "power of two"),
    ({"granularity": 1 << 32}, "power of two"), ({}, "exists already"),
])
def test_a_bitmap_that_cannot_be_is_refused(options: dict, match: str) -> None:
    with writing(image("b")) as disk, pytest.raises(BadOption, match=match):
        disk.add_bitmap("b", **options)


@pytest.mark.parametrize("name", ["", "n" * 1024])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    with writing(image()) as disk, pytest.raises(BadOption, match="name has"):
        disk.add_bitmap(name)


def test_bitmaps_change_only_where_they_can_be() -> None:
    storage = image("b")
    with cowslice.open(storage, format="qcow2") as disk, pytest.raises(ReadOnly):
        disk.clear_bitmap("b")
    old = MemoryStorage()
    cowslice.create(old, SIZE, format="qcow2", compat="0.10")
    with writing(old) as disk, pytest.raises(UnsupportedImage):
        disk.add_bitmap("b")
    with cowslice.open(MemoryStorage(bytes(4096)), "r+", format="raw") as disk, pytest.raises(UnsupportedImage):
        disk.add_bitmap("b")


def test_an_image_opened_for_its_metadata_has_bitmaps_that_change_and_data_that_does_not() -> None:
    storage = image("b")
    with cowslice.open(storage, "r+", format="qcow2", metadata_only=True) as disk:
        disk.add_bitmap("new")
        for change in (lambda: disk.write(0, b"x"), lambda: disk.zero(0, G), lambda: disk.resize(2 * SIZE)):
            with pytest.raises(cowslice.RequestError, match="metadata only"):
                change()
    assert on_disk(storage) == {b"b": 2, b"new": 2}
    assert marked(storage) == []


def test_an_unknown_bitmap_is_refused_with_the_known_ones() -> None:
    with writing(image("b")) as disk, pytest.raises(BadOption, match="expected one of 'b'"):
        disk.clear_bitmap("c")


def test_a_bitmap_that_changes_is_served_to_those_who_may_write_only() -> None:
    with writing(image("b")) as disk:
        with pytest.raises(BadOption, match="changes while"):
            Export(disk, bitmaps=["b"])
        export = Export(disk, bitmaps=["b"], writable=True)
        disk.write(G, b"x")
        assert export.states("qemu:dirty-bitmap:b", 0, 3 * G, most=9) == [(G, 0), (G, 1), (G, 0)]
        disk.disable_bitmap("b")
        assert Export(disk, bitmaps=["b"]).states("qemu:dirty-bitmap:b", G, G, most=9) == [(G, 1)]
