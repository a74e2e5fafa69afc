"""Gives out host clusters and takes them back; grows the refcount structures when it must.

It does not know guest offsets. All methods are called with the image's allocation lock held and speak in cluster
numbers. What must hold: a cluster that is given out counts 1 in memory, was free, and lies behind no fence.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable, Sequence

from cowslice.errors import CorruptImage, InternalError, NoSpace, StorageError
from cowslice.format.geometry import Geometry
from cowslice.format.limits import MAX_HOST_OFFSET
from cowslice.image.freespace import FreeSpace
from cowslice.image.refcounts import Fences, Refcounts, Run
from cowslice.image.structures import Structure
from cowslice.image.supply import Supply
from cowslice.storage.base import Storage
from cowslice.units import round_up


class Allocator:
    """Clusters of one image, from its free space, counted and checked against its fences.

    Clusters from `fresh_from` on were never in the file nor written: they read as zeros. `supply` is what compiled
    writers take from without asking; it is withdrawn before counts are copied, and where room is short. What is taken
    here never lies behind it at the end of the file, which so grows no longer than its use.
    """

    def __init__(self, refcounts: Refcounts, space: FreeSpace, fences: Fences, geometry: Geometry,
                 storage: Storage) -> None:
        self.refcounts = refcounts
        self.space = space
        self.supply = Supply()
        self._fences = fences
        self._storage = storage
        self._geometry = geometry
        self._bits = geometry.cluster_bits
        self._unused_from = round_up(storage.length(), 1 << self._bits) >> self._bits
        self._packing = -1  # byte offset behind the last compressed stream, -1 or a cluster's start: pack no more

    @property
    def fresh_from(self) -> int:
        """The first of the clusters that were never used, as far as that is known."""
        return self.supply.fresh_from(self._unused_from)

    @property
    def used_end(self) -> int:
        """One past the last cluster in use, as far as that is known without reading."""
        return self.space.end

    def take(self, count: int, *, near: int = -1, below: int = MAX_HOST_OFFSET + 1) -> Run:
        """Take 1 to `count` clusters that follow each other, best behind cluster `near`; returns (first, clusters).

        They count 1 and may hold any bytes. `below` bounds their last byte. Raises NoSpace, StorageError, and
        CorruptImage where metadata lies on them.
        """
        try:
            return self._claimed(*self._take(count, near), below)
        except NoSpace:
            if not self.withdraw():
                raise
        return self._claimed(*self._take(count, near), below)

    def take_run(self, count: int) -> int:
        """Take exactly `count` clusters that follow each other; returns the first. Raises as `take` does."""
        return self._claimed(self._take_whole(count), count, MAX_HOST_OFFSET + 1)[0]

    def stock(self, count: int) -> None:
        """Fill the supply with up to `count` clusters, unless some are left in it. Raises as `take` does."""
        if not self.supply:
            fresh_from = self.fresh_from
            start, got = self.take(count)
            self.supply.stock(start, got, fresh=start >= fresh_from)

    def withdraw(self) -> bool:
        """Let what is in the supply, and what was given back to it, be free again; whether there was any."""
        (start, count, fresh), runs = self.supply.withdraw()
        if count:
            runs.append((start, count))
            if fresh and self._unused_from == start + count:
                self._unused_from = start
        for run in runs:
            try:
                self.give_back(*run)
            except StorageError:
                self.supply.put_back(*run)  # counts that cannot be read now: the next commit tries again
        return bool(runs)

    def give_back(self, start: int, count: int) -> None:
        """Let clusters that were taken and that nothing ever pointed to be free at once."""
        self.free(self.lower([(start, count)]))

    def lower(self, runs: Iterable[Run]) -> list[Run]:
        """Take one reference off clusters; returns the runs that have none left, which wait for free().

        Raises CorruptImage where one has none already, StorageError; then nothing has changed.
        """
        return self._hold(self.refcounts.lower(runs))

    def adjust(self, clusters: Sequence[int] | array[int], delta: int) -> list[Run]:
        """Add `delta`, 1 or -1, references to many clusters; returns runs like `lower`. See Refcounts.adjust."""
        return self._hold(self.refcounts.adjust(clusters, delta))

    def free(self, runs: list[Run]) -> None:
        """Let clusters be handed out again that `lower` returned and that no request can know any more."""
        self.space.add(runs)

    def take_bytes(self, length: int, *, below: int = MAX_HOST_OFFSET + 1) -> int:
        """Take room for a compressed stream of at most a cluster; returns its host byte offset.

        Streams lie back to back and share clusters as far as counts allow. `below` and errors are those of `take`.
        """
        size = 1 << self._bits
        if not 0 < length <= size:
            raise InternalError(f"a compressed stream has {length} bytes, expected 1 to {size}")
        at = self._packing
        left = -at % size if at >= 0 else 0
        start = -1
        if left and self.refcounts.get(at >> self._bits) == self._geometry.max_refcount:
            left = 0
        if left < length:
            start = self.take(1, near=at >> self._bits if left else -1, below=below)[0]
            if not left or start != (at >> self._bits) + 1:
                at, left = start << self._bits, 0
        if left:
            self._share(at >> self._bits, start)
        self._packing = at + length
        return at

    def drop_empty_blocks(self) -> list[Run]:
        """Give up the last refcount blocks that count nothing but themselves; their clusters wait for free()."""
        self.space.lower_end()
        runs: list[Run] = []
        while (cluster := self.refcounts.drop_empty_block()) is not None:
            self._hold([(cluster, 1)])
            runs.append((cluster, 1))
        return runs

    def truncate_to_used(self) -> int:
        """Cut free clusters off the end of the file; returns its length in bytes. Raises StorageError."""
        length = self.space.lower_end() << self._bits
        if self._storage.length() > length:
            self._storage.truncate(length)
        return self._storage.length()

    def _take(self, count: int, near: int) -> Run:
        """Up to `count` clusters: of the supply if right behind `near`, of a hole, of the supply, of the end."""
        space = self.space
        start, got = self.supply.draw(count, near + 1) if near >= 0 else (-1, 0)
        if not got and not space.only_end and near + 1 != space.end:
            start, got = space.take_hole(count, near=near)
        if not got:
            start, got = self.supply.draw(count)
        return (start, got) if got else self._take_end(1, count)

    def _take_whole(self, count: int) -> int:
        """`count` clusters that follow each other: of a hole, of the supply, or of the end without a supply there."""
        start, got = self._take_hole_of(count)
        if not got:
            start, got = self.supply.draw(count, whole=True)
        if not got and self.withdraw():
            start, got = self._take_hole_of(count)
        return start if got else self._take_end(count, count)[0]

    def _take_hole_of(self, count: int) -> Run:
        return (-1, 0) if self.space.only_end else self.space.take_hole(count, whole=True)

    def _share(self, cluster: int, taken: int) -> None:
        """Let a stream begin in a cluster that others share; `taken` is the one that it goes on in, or -1."""
        try:
            self.refcounts.raise_([(cluster, 1)])
        except BaseException:
            if taken >= 0:
                self.give_back(taken, 1)
            raise

    def _claimed(self, start: int, count: int, below: int) -> Run:
        """Count clusters that were taken from the free space; those that must not be used are put back."""
        self.refcounts.claim(start, count)
        self._unused_from = max(self._unused_from, start + count)
        end = start + count << self._bits
        found = self._fences.hit(start << self._bits, end - (start << self._bits))
        if found is None and start and end <= below:
            return start, count
        self.give_back(start, count)
        if found is None and start:
            raise _no_room(f"cluster {start} is the next free one, expected one below byte {below:#x}")
        kind = Structure(found[2]) if found else Structure.HEADER
        raise CorruptImage(
            f"host cluster {start} has the refcount 0, but {kind.label} lies there", structure=kind.label,
            offset=found[0] if found else 0, hint="Repair it with `cowslice check -r all`.")

    def _take_end(self, least: int, most: int) -> Run:
        """Take clusters from the end of what is in use, with new refcount structures where they are needed."""
        space = self.space
        if least == 1 and space.room > 0 and self.refcounts.has_block(self._block_of(space.end)):
            got = min(most, space.room)
            return space.take_end(got), got
        self._make_room(least)
        got = max(least, min(most, space.room))
        return space.take_end(got), got

    def _make_room(self, count: int) -> None:
        """Make refcount blocks, and a larger table, so that `count` clusters from the end on are counted.

        All that can fail is done before anything changes: blocks and table are placed by arithmetic alone.
        """
        space, table = self.space, self.refcounts.table
        blocks, moved, end = self._plan_growth(count)
        if end > space.limit:
            raise _no_room(f"{end} clusters would be in use, expected at most {space.limit}")
        found = self._fences.hit(space.end << self._bits, end - space.end << self._bits)
        if found is not None:
            raise CorruptImage(
                f"{Structure(found[2]).label} lies at {found[0]:#x}, behind the last cluster with a refcount",
                structure=Structure(found[2]).label, offset=found[0], hint="Repair it with `cowslice check -r all`.")
        if moved:
            table.widen(moved[1])
        for index, cluster in blocks:
            self.refcounts.add_block(index, cluster)
        if moved:
            self.refcounts.move_table(*moved)
        space.take_end(end - count - space.end)

    def _plan_growth(self, count: int) -> tuple[list[Run], Run | None, int]:
        """Where new blocks (index, cluster) and a new table (start, clusters) go, and where `count` behind them end."""
        table, first = self.refcounts.table, self.space.end
        blocks = 0
        clusters = 0
        while True:
            end = first + blocks + clusters + count
            missing = [index for index in range(self._block_of(first), self._block_of(end - 1) + 1)
                       if not self.refcounts.has_block(index)]
            wanted = clusters
            if self._block_of(end - 1) >= len(table):
                wanted = max(table.clusters_for(self._block_of(end - 1) + 1), clusters)
            if len(missing) == blocks and wanted == clusters:
                places = [(index, first + n) for n, index in enumerate(missing)]
                return places, (first + blocks, clusters) if clusters else None, end
            blocks, clusters = max(len(missing), blocks), wanted

    def _block_of(self, cluster: int) -> int:
        return cluster // self._geometry.refblock_entries

    def _hold(self, runs: list[Run]) -> list[Run]:
        """Keep clusters without references apart until free(); no stream is packed into one."""
        if runs:
            self.space.hold(runs)
            packed = self._packing >> self._bits
            if self._packing >= 0 and any(start <= packed < start + count for start, count in runs):
                self._packing = -1
        return runs


def _no_room(message: str) -> NoSpace:
    return NoSpace(f"the image cannot grow: {message}", errno=errno.EFBIG)
