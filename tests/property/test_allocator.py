"""Allocation against a dictionary of counts: any order of requests, any widths and cluster sizes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.format.first_cluster import decode_first_cluster
from cowslice.format.header import Header
from cowslice.image.allocator import Allocator
from cowslice.image.freespace import FreeSpace
from cowslice.image.refcounts import RefcountOverflow, Refcounts
from cowslice.image.structures import Structure
from cowslice.storage import FileStorage
from cowslice.storage.base import Storage
from cowslice.storage.memory import MemoryStorage
from cowslice.testing import peers
from cowslice.testing.fencemodel import ListFences


def small_image(cluster_bits: int, order: int) -> tuple[MemoryStorage, Header]:
    """Header, refcount table, one block that counts these three."""
    size = 1 << cluster_bits
    header = Header(cluster_bits=cluster_bits, refcount_order=order, refcount_table_offset=size,
                    refcount_table_clusters=1)
    block = bytearray(size)
    ones = sum(1 << (n << order) for n in range(3)) if order < 3 else 0
    if order < 3:
        block[:2] = ones.to_bytes(2, "little")
    else:
        width = 1 << order >> 3
        block[: 3 * width] = (bytes(width - 1) + b"\1") * 3
    storage = MemoryStorage(bytes(size) + (2 * size).to_bytes(8, "big").ljust(size, b"\0") + bytes(block))
    return storage, header


def opened(storage: Storage, header: Header, *, budget: int = 1 << 20) -> Allocator:
    fences = ListFences()
    fences.add(0, header.geometry.cluster_size, Structure.HEADER)
    refcounts = Refcounts(storage, header, header.geometry, budget_bytes=budget, fences=fences)
    return Allocator(refcounts, FreeSpace(refcounts, storage, header.geometry), fences, header.geometry, storage)


def committed(storage: Storage, allocator: Allocator, header: Header) -> Header:
    """Write all that changed; former tables are freed in memory only. Returns the header as it is then."""
    stage = allocator.refcounts.stage()
    for offset, content in (*stage.new_blocks, *stage.blocks, *stage.table_writes):
        storage.pwrite(offset, content)
    if stage.new_table is not None:
        storage.pwrite(stage.new_table.offset, stage.new_table.content)
        header = replace(header, refcount_table_offset=stage.new_table.offset,
                         refcount_table_clusters=stage.new_table.clusters)
    allocator.free(allocator.lower(allocator.refcounts.settle(stage)))
    return header


class Play:
    """Random requests, and what the counts must then be. Structures are whatever counts one more than we hold."""

    def __init__(self, cluster_bits: int, order: int, seed: int, budget: int) -> None:
        self.storage, self.header = small_image(cluster_bits, order)
        self.budget = budget
        self.allocator = opened(self.storage, self.header, budget=budget)
        self.held: Counter[int] = Counter()
        self.waiting: list[tuple[int, int]] = []
        self.dice = random.Random(seed)

    def take(self) -> None:
        wanted = self.dice.choice((1, 1, 1, 2, 7, 40))
        near = self.dice.choice([-1, *list(self.held)[-3:]])
        start, got = self.allocator.take(wanted, near=near)
        assert 1 <= got <= wanted
        self.hold(start, got)

    def take_run(self) -> None:
        wanted = self.dice.choice((1, 3, 90))
        self.hold(self.allocator.take_run(wanted), wanted)

    def hold(self, start: int, count: int) -> None:
        for cluster in range(start, start + count):
            assert self.held[cluster] == 0
            assert not any(first <= cluster < first + n for first, n in self.waiting)
            self.held[cluster] = 1

    def share(self) -> None:
        chosen = sorted(self.some())
        if any(self.held[cluster] >= self.header.geometry.max_refcount for cluster in chosen):
            with pytest.raises(RefcountOverflow):
                self.allocator.adjust(chosen, 1)
            return
        self.allocator.adjust(chosen, 1)
        self.held.update(chosen)

    def drop(self) -> None:
        chosen = sorted(self.some())
        zero = self.allocator.adjust(chosen, -1)
        self.held.subtract(chosen)
        gone = [cluster for cluster in chosen if not self.held[cluster]]
        self.held = +self.held
        assert sorted(c for start, n in zero for c in range(start, start + n)) == gone
        self.waiting += zero

    def drain(self) -> None:
        self.allocator.free(self.waiting)
        self.waiting = []

    def some(self) -> list[int]:
        return self.dice.sample(sorted(self.held), min(len(self.held), self.dice.choice((1, 5, 100))))

    def commit(self) -> None:
        self.header = committed(self.storage, self.allocator, self.header)

    def reopen(self) -> None:
        self.commit()
        self.commit()
        self.drain()
        self.allocator = opened(self.storage, self.header, budget=self.budget)

    def check(self) -> None:
        fences = self.allocator._fences
        assert isinstance(fences, ListFences)
        bits = self.header.cluster_bits
        expected = Counter(self.held)
        for start, length, _ in fences.spans:
            expected.update(range(start >> bits, start + length >> bits))
        end = max(expected) + 1
        counts = self.allocator.refcounts.counts(0, end + 100)
        assert {n: count for n, count in enumerate(counts) if count} == dict(expected)
        assert self.allocator.used_end >= end


@given(st.integers(9, 12), st.integers(0, 6), st.integers(0, 1 << 32), st.sampled_from((0, 1 << 20)))
def test_the_counts_are_what_was_asked_for(cluster_bits: int, order: int, seed: int, budget: int) -> None:
    play = Play(cluster_bits, order, seed, budget)
    moves = (play.take, play.take, play.take, play.take_run, play.share, play.drop, play.drop, play.drain, play.commit,
             play.reopen)
    for _ in range(60):
        play.dice.choice(moves)()
    play.check()
    play.reopen()
    play.check()


@peers.needs("qemu-img")
@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
@pytest.mark.parametrize("bits", [1, 2, 16, 64])
def test_qemu_finds_leaks_and_nothing_else_in_a_grown_image(cluster_bits: int, bits: int, tmp_path: Path) -> None:
    path = tmp_path / "grown.qcow2"
    options = f"cluster_size={1 << cluster_bits},refcount_bits={bits}"
    peers.qemu_img("create", "-f", "qcow2", "-o", options, path, "1M")
    with FileStorage(path, "r+") as storage:
        header = decode_first_cluster(storage.read(0, 4096)).header
        fences = ListFences()
        fences.add(0, 1 << cluster_bits, Structure.HEADER)
        refcounts = Refcounts(storage, header, header.geometry, budget_bytes=0, fences=fences)
        space = FreeSpace(refcounts, storage, header.geometry)
        allocator = Allocator(refcounts, space, fences, header.geometry, storage)
        wanted = min(3 * header.geometry.refblock_entries, 20000)
        while wanted > 0:
            wanted -= allocator.take(wanted)[1]
        stage = refcounts.stage()
        for offset, content in (*stage.new_blocks, *stage.blocks, *stage.table_writes):
            storage.pwrite(offset, content)
        if stage.new_table is not None:
            storage.pwrite(stage.new_table.offset, stage.new_table.content)
            storage.pwrite(*stage.new_table.header_write)
        storage.truncate(allocator.used_end << cluster_bits)  # qemu-img looks for leaks up to the end of the file
    peers.qemu_img("check", path, expect=3)
