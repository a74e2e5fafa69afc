"""The tables of an image that is open for writing: its L1 table in memory, and L2 tables that are ours alone.

It does not know what guest data is. All methods are called with `lock` held. What must hold (numbers as in
docs/invariants.md): an L2 table is complete on the file, as zeros or as a copy, before L1 points at it (I4), and is
changed only while its L1 entry is COPIED (I6).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowslice.errors import CorruptImage, StorageError
from cowslice.format.entries import COPIED, L1_OFFSET_MASK
from cowslice.format.words import unpack_words
from cowslice.image.fences import Fences
from cowslice.image.passage import Passage
from cowslice.image.punching import Cause, Punching
from cowslice.image.structures import Structure
from cowslice.units import SECTOR

if TYPE_CHECKING:
    from cowslice.cache.slicemap import SliceMap
    from cowslice.image.allocator import Allocator
    from cowslice.image.qcow2 import Qcow2Layer
    from cowslice.image.refcounts import Refcounts

_WORDS_PER_SECTOR = SECTOR // 8


@dataclass(frozen=True, slots=True)
class Drop:
    """A run of host clusters that lost one reference, and what took it.

    `table`: an L2 table lies there, whose fence falls with its last reference.
    """

    start: int
    count: int
    cause: Cause = Cause.OTHER
    table: bool = False


class Tables:
    """What changes when metadata changes: one per image open for writing.

    `lock` is the image's one allocation lock (a re-entrant condition). `drops` are references that were removed from
    memory since the last commit began; the commit takes them.
    """

    def __init__(self, layer: Qcow2Layer, slices: SliceMap, refcounts: Refcounts, allocator: Allocator, *,
                 fences: Fences, passage: Passage, punching: Punching) -> None:
        self.layer = layer
        self.slices = slices
        self.refcounts = refcounts
        self.allocator = allocator
        self.fences = fences
        self.passage = passage
        self.punching = punching
        self.lock = threading.Condition(threading.RLock())
        self.l1 = array("Q", unpack_words(layer.l1))
        self.changed_l1: set[int] = set()
        self.drops: list[Drop] = []
        self._bits = layer.geometry.cluster_bits
        self._l2_bits = layer.geometry.l2_bits

    def own_table(self, cluster: int) -> None:
        """Make sure that a guest cluster has an L2 table that is ours alone. Raises StorageError, CorruptImage."""
        index = cluster >> self._l2_bits
        word = self.l1[index]
        if word & COPIED and word & L1_OFFSET_MASK:
            return
        content = b""
        if word & L1_OFFSET_MASK:
            content = self.slices.entries(index << self._l2_bits, 1 << self._l2_bits)
        host = self._write_table(content)
        if word & L1_OFFSET_MASK:
            self.drop(word & L1_OFFSET_MASK, table=True)
        self.slices.set_l1(index, host)
        self.l1[index] = host | COPIED
        self.changed_l1.add(index)

    def drop(self, host: int, *, cause: Cause = Cause.OTHER, count: int = 1, table: bool = False) -> None:
        """One reference to the host cluster at byte `host` (and those behind it) is gone from memory."""
        self.drops.append(Drop(host >> self._bits, count, cause, table))

    def give_back(self, start: int, count: int = 1) -> None:
        """Let clusters be free again that nothing points to: at once, or with a commit if counts cannot be read now."""
        try:
            self.allocator.give_back(start, count)
        except StorageError:
            self.drops.append(Drop(start, count))

    def l1_writes(self) -> list[tuple[int, bytes]]:
        """The changed entries as (host offset, bytes), neighbours within a sector together."""
        at = self.layer.first.header.l1_table_offset
        writes = []
        for first, end in _runs(sorted(self.changed_l1)):
            words = self.l1[first:end]
            writes.append((at + 8 * first, b"".join(word.to_bytes(8, "big") for word in words)))
        return writes

    def _write_table(self, content: bytes) -> int:
        """Put a new table, zeros or a copy, into a cluster of its own; returns its host offset."""
        size = 1 << self._bits
        start = self.allocator.take_run(1)
        host = start << self._bits
        if self.fences.hit(host, size) is not None:
            raise CorruptImage(f"host cluster {start} is counted as free, but a table lies there",
                               structure="refcounts", offset=host)
        try:
            if content:
                self.layer.storage.pwrite(host, content)
            else:
                self.layer.storage.zero(host, size)
        except BaseException:
            self.give_back(start)
            raise
        self.fences.add(host, size, Structure.L2_TABLE)
        return host


def _runs(indexes: list[int]) -> Iterator[tuple[int, int]]:
    """Cut ascending indexes into (first, end) of neighbours that share a sector."""
    first = last = -1
    for index in indexes:
        if index != last + 1 or index % _WORDS_PER_SECTOR == 0 or first < 0:
            if first >= 0:
                yield first, last + 1
            first = index
        last = index
    if first >= 0:
        yield first, last + 1
