"""Allocation: packed streams, limits, growth while a commit is under way, and how little a full image costs."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from cowslice.errors import CorruptImage, InternalError, NoSpace
from cowslice.format.header import Header
from cowslice.image.allocator import Allocator
from cowslice.image.fences import Fences
from cowslice.image.freespace import FreeSpace
from cowslice.image.refcounts import Refcounts, RefcountStage
from cowslice.image.structures import Structure
from cowslice.storage import CountingStorage, FileStorage
from cowslice.storage.base import Storage
from cowslice.testing.faults import Fault, FaultyStorage
from cowslice.testing.fencemodel import ListFences
from tests.property.test_allocator import committed, opened, small_image

BITS = 9
SIZE = 1 << BITS


def made(order: int = 4, *, limit: int | None = None) -> tuple[Allocator, Storage, Header]:
    storage, header = small_image(BITS, order)
    if limit is None:
        return opened(storage, header), storage, header
    fences = ListFences()
    refcounts = Refcounts(storage, header, header.geometry, budget_bytes=0, fences=fences)
    space = FreeSpace(refcounts, storage, header.geometry, limit=limit)
    return Allocator(refcounts, space, fences, header.geometry, storage), storage, header


def write(storage: Storage, stage: RefcountStage) -> None:
    for offset, content in (*stage.new_blocks, *stage.blocks, *stage.table_writes):
        storage.pwrite(offset, content)
    assert stage.new_table is None


def test_streams_lie_back_to_back_and_share_clusters() -> None:
    allocator, _, _ = made()
    places = [allocator.take_bytes(length) for length in (200, 200, 200, 424, 512)]
    first = places[0]
    assert [place - first for place in places] == [0, 200, 400, 600, 1024]
    cluster = first >> BITS
    assert list(allocator.refcounts.counts(cluster, 4)) == [3, 2, 1, 0]


def test_a_stream_goes_elsewhere_when_its_neighbour_cluster_is_taken() -> None:
    allocator, _, _ = made()
    first = allocator.take_bytes(300)
    taken, _ = allocator.take(1)
    other = allocator.take_bytes(300)
    assert taken << BITS == first + SIZE
    assert other == first + 2 * SIZE
    assert list(allocator.refcounts.counts(first >> BITS, 3)) == [1, 1, 1]


@pytest.mark.parametrize("order, most", [(0, 1), (1, 3)])
def test_no_more_streams_share_a_cluster_than_can_be_counted(order: int, most: int) -> None:
    allocator, _, _ = made(order)
    clusters = [allocator.take_bytes(50) >> BITS for _ in range(2 * most + 1)]
    first = clusters[0]
    assert clusters == [first] * most + [first + 1] * most + [first + 2]


def test_a_stream_that_is_given_back_leaves_the_others() -> None:
    allocator, _, _ = made()
    first = allocator.take_bytes(400)
    second = allocator.take_bytes(400)
    allocator.give_back(second >> BITS, 2)
    assert list(allocator.refcounts.counts(first >> BITS, 2)) == [1, 0]
    allocator.give_back(first >> BITS, 1)
    assert list(allocator.refcounts.counts(first >> BITS, 2)) == [0, 0]


def test_nothing_is_packed_into_a_cluster_that_lost_its_last_stream() -> None:
    allocator, _, _ = made()
    first = allocator.take_bytes(100)
    held = allocator.lower([(first >> BITS, 1)])
    assert allocator.take_bytes(100) >> BITS != first >> BITS
    allocator.free(held)
    assert allocator.take(1)[0] == first >> BITS


@pytest.mark.parametrize("length", [0, SIZE + 1])
def test_a_stream_has_at_most_a_cluster(length: int) -> None:
    with pytest.raises(InternalError):
        made()[0].take_bytes(length)


def test_a_cluster_that_an_entry_could_not_name_is_not_taken() -> None:
    allocator, _, _ = made()
    before = allocator.used_end
    with pytest.raises(NoSpace):
        allocator.take(1, below=before << BITS)
    assert allocator.used_end == before
    assert allocator.take(1)[0] == before


def test_what_is_free_at_the_end_is_cut_off() -> None:
    allocator, storage, _ = made()
    start, got = allocator.take(8)
    assert got == 8
    storage.truncate(start + 8 << BITS)
    allocator.give_back(start + 2, 6)
    assert allocator.truncate_to_used() == start + 2 << BITS == storage.length()


def test_the_end_is_found_behind_free_clusters_that_nobody_has_looked_at() -> None:
    allocator, storage, header = made()
    start, _ = allocator.take(8)
    committed(storage, allocator, header)
    storage.truncate(start + 100 << BITS)
    allocator.give_back(start, 8)
    committed(storage, allocator, header)
    again = opened(storage, header)
    assert again.truncate_to_used() == start << BITS


def test_a_storage_that_cannot_grow_is_filled_to_its_last_cluster() -> None:
    allocator, _, _ = made(limit=40)
    taken = [allocator.take(5) for _ in range(8)]
    with pytest.raises(NoSpace):
        allocator.take(5)
    clusters = {cluster for start, count in taken for cluster in range(start, start + count)}
    assert clusters == set(range(3, 40))
    allocator.give_back(17, 1)
    assert allocator.take(5) == (17, 1)
    with pytest.raises(NoSpace):
        allocator.take_run(1)


def test_growth_that_does_not_fit_changes_nothing() -> None:
    allocator, _storage, _ = made(limit=300)
    start = allocator.take_run(allocator.space.room)
    allocator.give_back(start + 10, 1)
    with pytest.raises(NoSpace):
        allocator.take_run(80)
    assert allocator.take(1) == (start + 10, 1)
    assert not allocator.refcounts.stage().table_writes


def test_what_is_taken_while_a_stage_is_written_is_in_the_next() -> None:
    allocator, storage, header = made()
    first = allocator.take_run(300)  # with a new block
    stage = allocator.refcounts.stage()
    second = allocator.take_run(300)  # with another, and in a block of the stage
    write(storage, stage)
    assert allocator.refcounts.settle(stage) == []
    write(storage, allocator.refcounts.stage())
    again = opened(storage, header)
    for start in (first, second):
        assert set(again.refcounts.counts(start, 300)) == {1}
    assert again.used_end == allocator.used_end


def test_a_table_that_grows_while_a_smaller_one_is_written_replaces_both() -> None:
    allocator, storage, header = made(order=6)
    allocator.take_run(64 * 64)
    stage = allocator.refcounts.stage()
    assert stage.new_table is not None
    allocator.take_run(64 * 128)
    for offset, content in stage.new_blocks:
        storage.pwrite(offset, content)
    former = allocator.refcounts.settle(stage)
    assert former == [(1, 1)]
    allocator.free(allocator.lower(former))
    header = committed(storage, allocator, header)
    header = committed(storage, allocator, header)
    again = opened(storage, header)
    end = allocator.used_end
    assert again.refcounts.counts(0, end) == allocator.refcounts.counts(0, end)


def test_a_stage_that_failed_is_staged_again() -> None:
    allocator, storage, header = made()
    start = allocator.take_run(300)
    lost = allocator.refcounts.stage()
    allocator.take_run(10)
    again = allocator.refcounts.stage()
    assert {offset for offset, _ in lost.table_writes} <= {offset for offset, _ in again.table_writes}
    write(storage, again)
    allocator.refcounts.settle(again)
    assert not allocator.refcounts.stage()
    assert set(opened(storage, header).refcounts.counts(start, 310)) == {1}


def test_a_block_that_cannot_be_read_fails_its_request_only() -> None:
    inner, header = small_image(BITS, 4)
    storage = FaultyStorage(inner)
    allocator = opened(storage, header)
    storage.add(Fault("pread"))
    start, _ = allocator.take(1, near=2)  # needs no reading
    with pytest.raises(OSError):
        allocator.lower([(start, 1)])
    storage.heal()
    assert allocator.refcounts.get(start) == 1


def test_a_cluster_with_a_fence_is_not_given_out() -> None:
    allocator, _, _ = made()
    fences = allocator._fences
    fences.add(3 << BITS, SIZE, Structure.L1_TABLE)
    with pytest.raises(CorruptImage, match="L1 table"):
        allocator.take(1)
    assert allocator.refcounts.get(3) == 0


def test_a_reference_that_is_not_counted_cannot_be_dropped() -> None:
    allocator, _, _ = made()
    start, _ = allocator.take(4)
    with pytest.raises(CorruptImage):
        allocator.lower([(start, 2), (start + 4, 1)])
    assert list(allocator.refcounts.counts(start, 4)) == [1, 1, 1, 1]


def full_image(path: Path, cluster_bits: int, blocks: int) -> Header:
    """A sparse file of which all clusters count 1 but the last 100; blocks lie behind the table."""
    size = 1 << cluster_bits
    table = -(-blocks * 8 // size)
    header = Header(cluster_bits=cluster_bits, refcount_table_offset=size, refcount_table_clusters=table)
    entries = header.geometry.refblock_entries
    first = 1 + table
    with path.open("wb") as file:
        file.seek(size)
        file.write(b"".join((first + n << cluster_bits).to_bytes(8, "big") for n in range(blocks)))
        file.seek(first << cluster_bits)
        for _ in range(blocks - 1):
            file.write(b"\0\1" * entries)
        file.write(b"\0\1" * (entries - 100))
        file.truncate((blocks * entries - 100) << cluster_bits)
    return header


def test_room_behind_a_full_image_is_found_without_reading_all_counts(tmp_path: Path) -> None:
    header = full_image(tmp_path / "full", 12, 500)
    with CountingStorage(FileStorage(tmp_path / "full", "r+")) as storage:
        allocator = opened(storage, header)
        assert allocator.take(1)[0] == 500 * header.geometry.refblock_entries - 100
        assert storage.counts().reads <= 70
        for _ in range(50):
            allocator.take(1)
        assert storage.counts().reads <= 510  # each count is read at most once


@pytest.mark.long
def test_room_behind_ten_full_terabytes_costs_little(tmp_path: Path) -> None:
    header = full_image(tmp_path / "full", 16, 5120)
    with CountingStorage(FileStorage(tmp_path / "full", "r+")) as storage:
        tracemalloc.start()
        try:
            fences = Fences()
            refcounts = Refcounts(storage, header, header.geometry, budget_bytes=1 << 20, fences=fences)
            space = FreeSpace(refcounts, storage, header.geometry)
            allocator = Allocator(refcounts, space, fences, header.geometry, storage)
            assert allocator.take(1)[0] == 5120 * header.geometry.refblock_entries - 100
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()
        assert storage.counts().reads <= 70
