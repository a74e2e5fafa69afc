"""The refcount table of an image that is open for writing: which block counts which clusters.

It does not know a single count. What must hold: the table and all its blocks lie apart from each other and inside
the file, and changes that are not stable are given out for writing again and again until they are.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Protocol

from cowslice.errors import CorruptImage, MalformedImage, NoSpace
from cowslice.format.geometry import Geometry
from cowslice.format.header import Header
from cowslice.format.limits import MAX_REFTABLE_BYTES
from cowslice.format.refcounts import REFTABLE_OFFSET_MASK, encode_reftable_entry, refblock_offset
from cowslice.format.words import WORD, pack_words, unpack_words
from cowslice.image.structures import Structure
from cowslice.storage.base import Storage
from cowslice.units import SECTOR, div_ceil

_WORDS_PER_SECTOR = SECTOR // WORD
_OFFSET_AND_CLUSTERS = 48  # where the header keeps the table's place (spec: Header)

Run = tuple[int, int]  # first cluster, clusters


class Fences(Protocol):
    """What knows where metadata lies, in host bytes: image.fences.Fences, or a plain list in tests."""

    def add(self, start: int, length: int, kind: int, /) -> None:
        """Fence a span that no other fence touches."""

    def remove(self, start: int, length: int, /) -> None:
        """Take the fence of exactly this span away."""

    def hit(self, start: int, length: int, /) -> tuple[int, int, int] | None:
        """Return (start, length, kind) of a fence that the span touches, or None."""


@dataclass(frozen=True, slots=True)
class NewTable:
    """A table that replaces the one on disk: its place in bytes, its whole content, its clusters."""

    offset: int
    content: bytes
    clusters: int

    @property
    def header_write(self) -> tuple[int, bytes]:
        """Where in the header, and as which 12 bytes, the new place is said."""
        return _OFFSET_AND_CLUSTERS, self.offset.to_bytes(8, "big") + self.clusters.to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class TableChanges:
    """A copy of what changed: sectors of the table on disk as (offset, bytes), or a new table; and which entries."""

    writes: tuple[tuple[int, bytes], ...] = ()
    table: NewTable | None = None
    entries: frozenset[int] = frozenset()


class Reftable:
    """The table in memory, checked. Raises MalformedImage, CorruptImage, StorageError when it is loaded.

    `words` are the entries as on disk, reserved bits too; `start` and `clusters` are its place in host clusters.
    """

    def __init__(self, storage: Storage, header: Header, geometry: Geometry, fences: Fences) -> None:
        self._geometry = geometry
        self._bits = geometry.cluster_bits
        self._fences = fences
        self.start = header.refcount_table_offset >> self._bits
        self.clusters = header.refcount_table_clusters
        self.words = _load_table(storage, header, geometry)
        self._changed: set[int] = set()
        self._former: list[Run] = []  # tables that are no longer this one: on disk the first, until a switch is stable
        self._fence_all(storage.length())

    def __len__(self) -> int:
        return len(self.words)

    def block_offset(self, index: int) -> int:
        """Host offset of a block, 0 where there is none: also behind the end of the table."""
        return self.words[index] & REFTABLE_OFFSET_MASK if index < len(self.words) else 0

    def blocks_backwards(self) -> Iterator[int]:
        """The indexes of the blocks there are, descending."""
        return (index for index in range(len(self.words) - 1, -1, -1) if self.words[index] & REFTABLE_OFFSET_MASK)

    def set_block(self, index: int, cluster: int) -> None:
        """Say that the block of entry `index` lies in a host cluster that is taken."""
        offset = cluster << self._bits
        self._fences.add(offset, 1 << self._bits, Structure.REFBLOCK)
        self.words[index] = encode_reftable_entry(offset)
        self._changed.add(index)

    def drop_block(self, index: int) -> None:
        """Say that nothing is counted there any more."""
        self._fences.remove(self.block_offset(index), 1 << self._bits)
        self.words[index] = 0
        self._changed.add(index)

    def clusters_for(self, entries: int) -> int:
        """Clusters of a new table that shall have at least `entries`: half as many to spare. Raises NoSpace."""
        most = MAX_REFTABLE_BYTES // WORD
        if entries > most:
            raise NoSpace(
                f"the refcount table would need {entries} entries, at most {most} are allowed: the image cannot grow",
                errno=errno.EFBIG)
        return min(div_ceil(min(entries * 3 // 2, most) * WORD, 1 << self._bits), MAX_REFTABLE_BYTES >> self._bits)

    def widen(self, clusters: int) -> None:
        """Have as many entries as fit `clusters`, before move() says where: new blocks count the new table itself."""
        self.words.frombytes(bytes((clusters << self._bits) - len(self.words) * WORD))

    def move(self, start: int, clusters: int) -> None:
        """Continue in a larger table in host clusters that are taken; settle() gives the clusters of this one back."""
        self._former.append((self.start, self.clusters))
        self.start, self.clusters = start, clusters
        self._fences.add(start << self._bits, clusters << self._bits, Structure.REFTABLE)

    def changes(self) -> TableChanges:
        """Copy what settle() was not told yet."""
        entries = frozenset(self._changed)
        if self._former:
            table = NewTable(self.start << self._bits, pack_words(self.words), self.clusters)
            return TableChanges(table=table, entries=entries)
        at = self.start << self._bits
        sectors = sorted({index // _WORDS_PER_SECTOR for index in entries})
        writes = tuple(
            (at + sector * SECTOR, pack_words(self.words[sector * _WORDS_PER_SECTOR :][:_WORDS_PER_SECTOR]))
            for sector in sectors)
        return TableChanges(writes, None, entries)

    def settle(self, changes: TableChanges) -> list[Run]:
        """Take note that the changes are stable, the header too; returns the clusters of tables that are history."""
        self._changed -= changes.entries
        if changes.table is None:
            return []
        place = (changes.table.offset >> self._bits, changes.table.clusters)
        history = self._former[: self._former.index(place)] if place in self._former else self._former
        self._former = self._former[len(history) :]
        for start, clusters in history:
            self._fences.remove(start << self._bits, clusters << self._bits)
        return list(history)

    def _fence_all(self, length: int) -> None:
        """Fence the table and its blocks, and refuse blocks that are not where blocks can be."""
        size = 1 << self._bits
        self._fence(self.start << self._bits, self.clusters << self._bits, Structure.REFTABLE, "the header")
        if reduce(or_, self.words, 0) & REFTABLE_OFFSET_MASK & (size - 1):
            for index, word in enumerate(self.words):
                refblock_offset(word, self._geometry, (self.start << self._bits) + index * WORD)
        offsets = sorted(word & REFTABLE_OFFSET_MASK for word in self.words if word & REFTABLE_OFFSET_MASK)
        if offsets and offsets[-1] >= length:
            raise CorruptImage(
                f"the refcount table points at a block at {offsets[-1]:#x}, expected one inside the file of {length} "
                "bytes", structure="refcount table", offset=self.start << self._bits)
        for offset in offsets:
            self._fence(offset, size, Structure.REFBLOCK, "the refcount table")

    def _fence(self, offset: int, length: int, kind: Structure, by: str) -> None:
        found = self._fences.hit(offset, length)
        if found is not None:
            raise CorruptImage(
                f"{by} points at {kind.label} at {offset:#x}, where {Structure(found[2]).label} lies "
                f"({found[1]} bytes at {found[0]:#x})", structure="refcount table", offset=offset)
        if not offset:
            raise CorruptImage(f"{by} points at {kind.label} at 0, where the header lies", structure="refcount table",
                               offset=0)
        self._fences.add(offset, length, kind)


def _load_table(storage: Storage, header: Header, geometry: Geometry) -> array[int]:
    offset, length = header.refcount_table_offset, header.refcount_table_clusters << geometry.cluster_bits
    if not 0 < length <= MAX_REFTABLE_BYTES:
        raise MalformedImage(
            f"the refcount table has {header.refcount_table_clusters} clusters, expected 1 to "
            f"{MAX_REFTABLE_BYTES >> geometry.cluster_bits}", where="header", field="refcount_table_clusters")
    if not geometry.is_aligned(offset) or not 0 < offset < storage.length():
        raise MalformedImage(
            f"the refcount table lies at {offset:#x}, expected a cluster inside the file of {storage.length()} bytes",
            where="header", field="refcount_table_offset")
    return unpack_words(storage.read(offset, length))
