"""A map that is stored to says what a dictionary says, whatever its budget, and writes out exactly what changed."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.cache.slicemap import SliceCache, SliceMap
from cowslice.errors import InternalError
from cowslice.storage.memory import MemoryStorage
from cowslice.testing.l2tables import L2Tables, make_tables

Token = tuple[int, int]


@dataclass
class Play:
    """A map and what it must answer: the tables of the start, changed by `stored`; `moved` are tables set since."""

    tables: L2Tables
    budget: int
    unit: int
    dice: random.Random
    stored: dict[int, bytes] = field(default_factory=dict)
    moved: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache = SliceCache(self.budget)
        self.storage = MemoryStorage(self.tables.content)
        self.map = SliceMap(
            self.cache, cluster_bits=self.tables.cluster_bits, extended_l2=self.tables.extended, l1=self.tables.l1,
            clusters=self.tables.clusters, entry_bytes=self.unit, storage=self.storage)
        self.taken: list[tuple[int, bytes, Token]] = []

    def table(self, cluster: int) -> int:
        index = cluster // self.tables.table_entries
        return self.moved.get(index, self.tables.table(cluster))

    def entry(self, cluster: int) -> bytes:
        if cluster in self.stored:
            return self.stored[cluster]
        if cluster // self.tables.table_entries in self.moved:
            return bytes(self.tables.entry_size)
        return struct.pack(">QQ", *self.tables.entry(cluster))[: self.tables.entry_size]

    def span(self) -> tuple[int, int]:
        first = self.dice.randrange(self.tables.clusters)
        return first, self.dice.randint(1, min(self.dice.choice((1, 3, 700)), self.tables.clusters - first))

    def ask(self) -> None:
        first, count = self.span()
        assert self.map.entries(first, count) == b"".join(map(self.entry, range(first, first + count)))

    def look_up(self) -> None:
        first, _ = self.span()
        word, bitmap, run = self.map.lookup(first)
        assert struct.pack(">QQ", word, bitmap)[: self.tables.entry_size] == self.entry(first)
        if word and not word >> 62 & 1:
            last = min(first + run, self.tables.clusters) - 1
            step = (last - first) << self.tables.cluster_bits if word & ~(1 << 63 | 1) else 0
            assert self.entry(last) == struct.pack(">QQ", word + step, bitmap)[: self.tables.entry_size]

    def store(self) -> None:
        first, count = self.span()
        size = self.tables.entry_size
        new = self.dice.randbytes(count * size) if self.dice.random() < 0.3 else self.plain(count)
        if not all(map(self.table, range(first, first + count))):
            with pytest.raises(InternalError):
                self.map.store(first, new)
            return
        self.map.store(first, new)
        self.stored.update((first + n, new[n * size : (n + 1) * size]) for n in range(count))

    def plain(self, count: int) -> bytes:
        start = self.dice.randrange(1 << 20)
        tail = struct.pack(">Q", 0xFFFFFFFF) if self.tables.extended else b""
        words = (1 << 63 | (start + n) << self.tables.cluster_bits for n in range(count))
        return b"".join(struct.pack(">Q", word) + tail for word in words)

    def move_table(self) -> None:
        """A new table of zeros, at the end of the file."""
        index = self.dice.randrange(self.tables.clusters // self.tables.table_entries or 1)
        size = 1 << self.tables.cluster_bits
        host = -(-self.storage.length() // size) * size
        self.storage.pwrite(host, bytes(size))
        self.map.set_l1(index, host)
        self.moved[index] = host
        entries = self.tables.table_entries
        self.stored = {cluster: raw for cluster, raw in self.stored.items() if cluster // entries != index}
        self.taken = []  # a commit holds the lock that exchanges tables
        assert self.map.l1_offset_of(index) == host

    def take(self) -> None:
        """Copies go to the disk at once; they may be called clean much later."""
        self.taken = self.map.take_dirty()
        assert [host for host, *_ in self.taken] == sorted(host for host, *_ in self.taken)
        for host, content, _ in self.taken:
            self.storage.pwrite(host, content)

    def clean(self) -> None:
        self.map.clean([token for *_, token in self.taken])

    def forget(self) -> None:
        self.cache.trim()
        self.map.warm()

    def check(self) -> None:
        self.take()
        self.clean()
        assert self.map.dirty_bytes == 0
        assert self.map.take_dirty() == []
        size, entries = self.tables.entry_size, self.tables.table_entries
        for cluster in {*self.stored, *(self.dice.randrange(self.tables.clusters) for _ in range(50))}:
            table = self.table(cluster)
            if table:
                assert self.storage.read(table + cluster % entries * size, size) == self.entry(cluster)


@st.composite
def plays(draw: st.DrawFn) -> Play:
    bits = draw(st.sampled_from([9, 10, 12, 16]))
    tables = make_tables(draw(st.integers(0, 1 << 32)), cluster_bits=bits, extended=draw(st.booleans()),
                         tables=draw(st.integers(1, 6)))
    budget = draw(st.sampled_from([0, 2000, 20_000, 1 << 24]))
    return Play(tables, budget, 1 << draw(st.integers(9, bits)), random.Random(draw(st.integers(0, 1 << 32))))


@given(plays())
def test_a_map_says_what_was_stored_last_and_so_does_the_disk(play: Play) -> None:
    moves = [play.ask, play.ask, play.look_up, play.look_up, play.store, play.store, play.move_table, play.take,
             play.clean, play.forget]
    for _ in range(50):
        play.dice.choice(moves)()
    play.check()


@given(plays())
def test_memory_is_what_it_was_once_all_is_clean(play: Play) -> None:
    fixed = play.cache.statistics()["bytes_used"]
    for _ in range(20):
        play.dice.choice([play.store, play.ask, play.take, play.clean])()
        assert play.cache.statistics()["dirty_bytes"] == play.map.dirty_bytes
    play.take()
    play.clean()
    play.cache.trim()
    play.cache.trim()
    found = play.cache.statistics()
    assert found["bytes_used"] - found["policy_bytes"] <= fixed
