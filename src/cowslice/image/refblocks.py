"""Refcount blocks in memory: loaded when asked for, kept within a budget, changed ones until they are stable.

It does not know which counts are right. What must hold: a changed block leaves memory only after settle() was told that
its last version is stable. Counts are unpacked to native arrays; one block is found in two dictionary look-ups.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from cowslice.errors import CorruptImage, RequestError
from cowslice.format.geometry import Geometry
from cowslice.format.refcounts import last_count, pack_refblock, unpack_refblock
from cowslice.image.reftable import Reftable
from cowslice.storage.base import Storage
from cowslice.units import round_up

_PAGE = 4096  # changed parts of a block are written in pages: less would make the kernel read, more would be in vain


class RefcountOverflow(RequestError):
    """A cluster would have more references than the refcount width of the image can say."""


class Refblock:
    """One block: its counts, where it lies, what changed. `low` and `high` bound the entries that are not stable."""

    __slots__ = ("counts", "high", "low", "new", "offset", "version")

    def __init__(self, counts: array[int], offset: int, *, new: bool) -> None:
        self.counts = counts
        self.offset = offset  # host bytes
        self.new = new  # no table entry on disk points here
        self.version = 0
        self.low = self.high = 0  # equal: nothing changed


@dataclass(frozen=True, slots=True)
class BlockChange:
    """A copy of the changed part of a block: `offset` in host bytes, and the version that it was copied from."""

    index: int
    version: int
    offset: int
    content: bytes
    new: bool


class Refblocks:
    """The blocks of one image. `budget` is bytes of unpacked counts; changed blocks may exceed it."""

    def __init__(self, storage: Storage, reftable: Reftable, geometry: Geometry, *, budget: int) -> None:
        self._storage = storage
        self._reftable = reftable
        self._geometry = geometry
        self._order = geometry.refcount_order
        self._entries = geometry.refblock_entries
        self.limit = geometry.max_refcount
        self.shift = self._entries.bit_length() - 1
        self._empty = unpack_refblock(bytes(geometry.cluster_size), self._order)
        self.width = self._empty.itemsize  # bytes of one count in memory
        self.block_bytes = len(self._empty) * self.width
        self._most = max(budget // self.block_bytes, 1)
        self._clean: OrderedDict[int, Refblock] = OrderedDict()  # least recently used first
        self._changed: dict[int, Refblock] = {}

    @property
    def entries(self) -> int:
        """How many blocks the table could name."""
        return len(self._reftable)

    @property
    def changed_bytes(self) -> int:
        """Memory of the blocks that cannot leave."""
        return len(self._changed) * self.block_bytes

    @property
    def over_budget(self) -> bool:
        """Whether changed blocks alone take more than the budget."""
        return len(self._changed) > self._most

    def resident(self, index: int) -> Refblock | None:
        """The block if it is in memory."""
        return self._changed.get(index) or self._clean.get(index)

    def get(self, index: int) -> Refblock | None:
        """The block, None where the table has none. Raises StorageError."""
        block = self._changed.get(index)
        if block is not None:
            return block
        block = self._clean.get(index)
        if block is not None:
            self._clean.move_to_end(index)
            return block
        offset = self._reftable.block_offset(index)
        return self._load(index, offset) if offset else None

    def needed(self, index: int) -> Refblock:
        """The block of clusters that have a reference. Raises CorruptImage where the table has none, StorageError."""
        block = self.get(index)
        if block is None:
            raise self.uncounted(index << self.shift)
        return block

    def zeros(self, count: int) -> array[int]:
        """That many counts of a block that is not there."""
        return self._empty[:1] * count

    def uncounted(self, cluster: int) -> CorruptImage:
        """What to raise when a cluster with a reference has no count."""
        return CorruptImage(
            f"host cluster {cluster} is in use and its refcount is 0, expected at least 1", structure="refcount block",
            offset=self._reftable.block_offset(cluster >> self.shift) or -1)

    def overflow(self, cluster: int) -> RefcountOverflow:
        """What to raise when a count has no room for one more."""
        bits = self._geometry.refcount_bits
        return RefcountOverflow(
            f"host cluster {cluster} has {self._geometry.max_refcount} references, the most that {bits} bits can say",
            hint="`amend -o refcount_bits=64` makes the refcounts wider.")

    def create(self, index: int, cluster: int) -> None:
        """Put an empty block for entry `index` into a host cluster that is taken."""
        self._reftable.set_block(index, cluster)
        block = Refblock(self._empty[:], cluster << self._geometry.cluster_bits, new=True)
        self._changed[index] = block
        block.high = self._entries

    def drop(self, index: int) -> None:
        """Forget a block that the table does not name any more."""
        self._changed.pop(index, None)
        self._clean.pop(index, None)

    def touch(self, index: int, block: Refblock, low: int, high: int) -> None:
        """Take note that entries [low, high) of a block were changed."""
        block.version += 1
        if block.low == block.high:
            block.low, block.high = low, high
            del self._clean[index]
            self._changed[index] = block
            return
        if low < block.low:
            block.low = low
        if high > block.high:
            block.high = high

    def packed(self, index: int, first: int, end: int) -> tuple[bytes, int]:
        """Entries [first, end), whole bytes, as bytes and the order they are packed by; keeps nothing in memory.

        Native byte order and at least a byte wide when the block is in memory, as on disk otherwise.
        """
        block = self.resident(index)
        if block is not None:
            return block.counts[first:end].tobytes(), max(self._order, 3)
        begin, stop = first << self._order >> 3, end << self._order >> 3
        offset = self._reftable.block_offset(index)
        raw = self._storage.read(offset + begin, stop - begin) if offset else bytes(stop - begin)
        return raw, self._order

    def last_used(self, index: int) -> int:
        """The last entry of a block that is not 0, -1 for none; keeps nothing in memory. Raises StorageError."""
        block = self.resident(index)
        if block is not None:
            size = len(block.counts.tobytes().rstrip(b"\0"))
            return (size - 1) // block.counts.itemsize
        return last_count(self.packed(index, 0, self._entries)[0], self._order)

    def changes(self) -> list[BlockChange]:
        """Copies of all changed parts, ascending by offset."""
        copies = [self._change(index, block) for index, block in self._changed.items()]
        copies.sort(key=lambda change: change.offset)
        return copies

    def settle(self, changes: Iterable[BlockChange]) -> None:
        """Take note that these changes are stable; blocks that did not change since may leave memory."""
        for change in changes:
            block = self._changed.get(change.index)
            if block is None:
                continue
            block.new = block.new and not change.new
            if block.version == change.version:
                block.low = block.high = 0
                self._clean[change.index] = self._changed.pop(change.index)
        self._evict()

    def _change(self, index: int, block: Refblock) -> BlockChange:
        size = self._geometry.cluster_size
        page = min(_PAGE, size)
        begin = (block.low << self._order >> 3) // page * page
        end = round_up((block.high << self._order) + 7 >> 3, page)
        part = block.counts[(begin << 3) >> self._order : (end << 3) >> self._order]
        return BlockChange(index, block.version, block.offset + begin, pack_refblock(part, self._order), block.new)

    def _load(self, index: int, offset: int) -> Refblock:
        raw = self._storage.read(offset, self._geometry.cluster_size)
        block = Refblock(unpack_refblock(raw, self._order), offset, new=False)
        self._clean[index] = block
        self._evict()
        return block

    def _evict(self) -> None:
        """Let the least recently used leave; the last one stays, somebody holds it."""
        clean = self._clean
        while len(clean) > 1 and len(clean) + len(self._changed) > self._most:
            clean.popitem(last=False)
