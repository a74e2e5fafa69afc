"""How many references each host cluster has, and the bytes that say so on disk.

It does not know whose the references are, nor which free cluster is best. All methods are called with the image's
allocation lock held and speak in cluster numbers. What must hold: a count changes only as a whole request does, and
nothing that points at a new block or table is given out before what it points at (invariant I4).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cowslice.format.geometry import Geometry
from cowslice.format.header import Header
from cowslice.format.refcounts import zero_counts
from cowslice.image import refbulk
from cowslice.image.refblocks import BlockChange, Refblock, Refblocks, RefcountOverflow
from cowslice.image.reftable import Fences, NewTable, Reftable, Run, TableChanges
from cowslice.storage.base import Storage

__all__ = ["Fences", "NewTable", "RefcountOverflow", "RefcountStage", "Refcounts", "Run"]

_BULK = 64  # clusters from which a pass over all of them pays
_BLOCKS_BACK = 64  # blocks without any count that are read to find the last one in use


_NOTHING = TableChanges()


@dataclass(frozen=True, slots=True)
class RefcountStage:
    """Copies of what changed; every write is (host offset, bytes).

    First `new_blocks` and the content of `new_table` are written and made stable, then `table_writes`, or the header's
    `new_table.header_write`. `blocks` may go along with either, before anything points at what they count. Where
    something grew, every changed block is among `new_blocks`, because it may count the new ones.
    """

    new_blocks: tuple[tuple[int, bytes], ...] = ()
    blocks: tuple[tuple[int, bytes], ...] = ()
    table_writes: tuple[tuple[int, bytes], ...] = ()
    new_table: NewTable | None = None
    changes: tuple[BlockChange, ...] = ()
    table_changes: TableChanges = _NOTHING

    def __bool__(self) -> bool:
        return bool(self.changes or self.table_writes)


class Refcounts:
    """The counts of one image. Raises MalformedImage, CorruptImage, StorageError when its table is loaded.

    `budget_bytes` bounds the memory of unchanged blocks. `fences` gets the table and its blocks.
    """

    def __init__(self, storage: Storage, header: Header, geometry: Geometry, *, budget_bytes: int,
                 fences: Fences) -> None:
        self.table = Reftable(storage, header, geometry, fences)
        self.blocks = Refblocks(storage, self.table, geometry, budget=budget_bytes)
        self._bits = geometry.cluster_bits
        self._limit = geometry.max_refcount
        self._order = geometry.refcount_order
        self._shift = geometry.refblock_entries.bit_length() - 1
        self._mask = geometry.refblock_entries - 1
        self._claimed: list[list[int]] = []  # [start, end] of clusters that count 1 though their block says 0

    @property
    def dirty_bytes(self) -> int:
        """Memory of changed blocks, which stay until they are stable."""
        return self.blocks.changed_bytes

    def get(self, cluster: int) -> int:
        """The count of a cluster, 0 where nothing counts it. Raises StorageError."""
        self._apply_claims()
        block = self.blocks.get(cluster >> self._shift)
        return 0 if block is None else block.counts[cluster & self._mask]

    def counts(self, start: int, count: int) -> array[int]:
        """The counts of clusters that follow each other, as a native array of the narrowest type."""
        self._apply_claims()
        found = self.blocks.zeros(0)
        for index, low, high in self._parts(start, count):
            block = self.blocks.get(index)
            found.extend(self.blocks.zeros(high - low) if block is None else block.counts[low:high])
        return found

    def raise_(self, runs: Iterable[Run]) -> None:
        """Add one reference to every cluster of the runs, or to none.

        Raises RefcountOverflow, CorruptImage where a count is 0 although there is a reference, StorageError.
        """
        self._change_all(runs, 1)

    def lower(self, runs: Iterable[Run]) -> list[Run]:
        """Take one reference off every cluster of the runs, or off none; returns the runs that have none left.

        Raises CorruptImage where a count is 0 already, StorageError.
        """
        return self._change_all(runs, -1)

    def adjust(self, clusters: Sequence[int] | array[int], delta: int) -> list[Run]:
        """Add `delta`, 1 or -1, to the counts of many clusters, once for each time that one occurs.

        Returns the runs whose count became 0. All or nothing; raises like raise_ and lower.
        """
        if len(clusters) < _BULK:
            return self._change_all([(int(cluster), 1) for cluster in clusters], delta)
        self._apply_claims()
        return refbulk.adjust(self.blocks, clusters, delta)

    def counts_of(self, clusters: Sequence[int] | array[int]) -> array[int]:
        """The counts of clusters in any order, in that order; 0 where nothing counts one. Raises StorageError.

        An array('Q'). Clusters are best given as an array('q').
        """
        self._apply_claims()
        return refbulk.counts_of(self.blocks, clusters)

    def claim(self, start: int, count: int) -> None:
        """Let clusters that are known to be free, or counted ahead, count 1 from now on. Does no I/O."""
        claimed = self._claimed
        if claimed and claimed[-1][1] == start:
            claimed[-1][1] = start + count
        else:
            claimed.append([start, start + count])

    def has_block(self, index: int) -> bool:
        """Whether the table has a block of this index."""
        return self.table.block_offset(index) != 0

    def drop_empty_block(self) -> int | None:
        """Give up the last block if it counts nothing but itself; returns its cluster, which then counts 0, or None."""
        self._apply_claims()
        index = next(self.table.blocks_backwards(), 0)
        block = self.blocks.get(index) if index else None
        if block is None:
            return None
        cluster = block.offset >> self._bits
        inside = cluster >> self._shift == index
        if len(block.counts) - block.counts.count(0) != inside or self.get(cluster) != 1:
            return None
        if not inside:
            self.lower([(cluster, 1)])
        self.table.drop_block(index)
        self.blocks.drop(index)
        return cluster

    def add_block(self, index: int, cluster: int) -> None:
        """Make an empty block for entry `index` in a free host cluster, which then counts 1. Does no I/O."""
        self.blocks.create(index, cluster)
        self.claim(cluster, 1)

    def move_table(self, start: int, clusters: int) -> None:
        """Continue with a larger table in free host clusters, which then count 1. Does no I/O."""
        self.table.move(start, clusters)
        self.claim(start, clusters)

    def free_runs(self, first: int, end: int) -> list[Run]:
        """The runs that count 0 among clusters [first, end) of one block, both ends multiples of 8 clusters."""
        self._apply_claims()
        raw, order = self.blocks.packed(first >> self._shift, first & self._mask, ((end - 1) & self._mask) + 1)
        return [(first + at, count) for at, count in zero_counts(raw, order)]

    def used_end(self) -> int:
        """One past the last cluster that is counted; more when only free ones were met in many blocks before it."""
        self._apply_claims()
        for met, index in enumerate(self.table.blocks_backwards()):
            if met == _BLOCKS_BACK:
                return (index + 1) << self._shift
            last = self.blocks.last_used(index)
            if last >= 0:
                return (index << self._shift) + last + 1
        return 0

    def stage(self, *, counts: bool = True) -> RefcountStage:
        """Copy all that is not stable yet. Without `counts` (they are written late) only when memory is short."""
        self._apply_claims()
        if not counts and not self.blocks.over_budget:
            return RefcountStage()
        changes = self.blocks.changes()
        table = self.table.changes()
        writes = tuple((change.offset, change.content) for change in changes)
        grown = table.table is not None or bool(table.writes)
        return RefcountStage(
            new_blocks=writes if grown else (), blocks=() if grown else writes, table_writes=table.writes,
            new_table=table.table, changes=tuple(changes), table_changes=table)

    def settle(self, stage: RefcountStage) -> list[Run]:
        """Take note that all of a stage is stable; returns clusters of former tables, which lost their reference."""
        self.blocks.settle(stage.changes)
        return self.table.settle(stage.table_changes)

    def _change_all(self, runs: Iterable[Run], delta: int) -> list[Run]:
        self._apply_claims()
        zeros: list[Run] = []
        done: list[tuple[int, Refblock, int, int]] = []
        try:
            for start, count in runs:
                for index, low, high in self._parts(start, count):
                    block = self.blocks.needed(index)
                    self._change(index, block, low, high, delta, zeros)
                    done.append((index, block, low, high))
        except BaseException:
            for _, block, low, high in done:
                block.counts[low:high] = array(block.counts.typecode, [n - delta for n in block.counts[low:high]])
            raise
        return zeros

    def _change(self, index: int, block: Refblock, low: int, high: int, delta: int, zeros: list[Run]) -> None:
        """Change part of a block or raise; adds to `zeros` what became 0."""
        before = block.counts[low:high]
        base = index << self._shift
        if min(before) == 0:
            raise self.blocks.uncounted(base + low + before.index(0))
        most = max(before)
        if delta > 0 and most == self._limit:
            raise self.blocks.overflow(base + low + before.index(most))
        after = array(before.typecode, [n + delta for n in before])
        block.counts[low:high] = after
        self.blocks.touch(index, block, low, high)
        if delta < 0:
            for at, count in zero_counts(after.tobytes(), max(self._order, 3)):
                _append(zeros, base + low + at, count)

    def _apply_claims(self) -> None:
        """Write claims into their blocks. What fails to load stays claimed. Raises StorageError."""
        while self._claimed:
            start, end = self._claimed[0]
            for index, low, high in self._parts(start, end - start):
                block = self.blocks.needed(index)
                block.counts[low:high] = array(block.counts.typecode, (1,)) * (high - low)
                self.blocks.touch(index, block, low, high)
                self._claimed[0][0] = (index << self._shift) + high
            del self._claimed[0]

    def _parts(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Cut a run into (block index, first entry, end entry)."""
        end = start + count
        while start < end:
            index, low = start >> self._shift, start & self._mask
            high = min(low + end - start, self._mask + 1)
            yield index, low, high
            start += high - low


def _append(runs: list[Run], start: int, count: int) -> None:
    """Add a run behind ascending ones, joined with the last where it follows on it."""
    if runs and runs[-1][0] + runs[-1][1] == start:
        runs[-1] = (runs[-1][0], runs[-1][1] + count)
    else:
        runs.append((start, count))
