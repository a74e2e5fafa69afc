"""What the header of an open image points at: its L1 table and snapshot table, changed by one who is alone inside.

It does not know why they change. What must hold: what the header is switched to is complete and stable, with its counts
(I4, I5); COPIED is off on disk before a count rises, and on again only after it has fallen (I6).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice

from cowslice.errors import CorruptImage, CowsliceError, StorageError
from cowslice.format.entries import COPIED, L1_OFFSET_MASK
from cowslice.format.words import pack_words, unpack_words
from cowslice.image.counting import first_zero
from cowslice.image.headerswitch import switch_header
from cowslice.image.hosttree import Tree
from cowslice.image.punching import Cause
from cowslice.image.refcounts import Run
from cowslice.image.structures import Structure
from cowslice.image.writing import Writer
from cowslice.units import div_ceil

Words = Sequence[int]
_MOST_COMMITS = 8  # a commit frees clusters, the next counts them down; a table that moved takes one more


@contextmanager
def alone(writer: Writer, *, cause: Cause = Cause.OTHER) -> Iterator[Roots]:
    """Be alone inside the image for the block: no request, no other commit. `cause`: why clusters become free.

    Raises what forbids writing.
    """
    tables, commits = writer.tables, writer.commits
    with tables.passage.exclusive(), commits.alone(), tables.lock:
        commits.check()
        tables.allocator.withdraw()
        yield Roots(writer, cause)


class Roots:
    """The changes; only inside `alone`. Offsets and lengths are host bytes, words are L1 entries."""

    def __init__(self, writer: Writer, cause: Cause) -> None:
        self.writer = writer
        self._cause = cause
        self.tables = writer.tables
        self.layer = writer.layer
        self.storage = writer.layer.storage
        self.geometry = writer.layer.geometry
        self._bits = self.geometry.cluster_bits
        self._data_file = writer.layer.first.header.has_data_file

    def commit(self) -> None:
        """Make all that was changed so far stable, counts too."""
        self.writer.commits.flush()

    def settle(self) -> None:
        """Let nothing be left for later commits: counts that fall when one is stable, and those that follow from it."""
        for _ in range(_MOST_COMMITS):
            self.commit()
            if not (self.tables.drops or self.tables.refcounts.dirty_bytes):
                return
        raise StorageError(f"'{self.layer.name}' has counts that could not be written, expected none after "
                           f"{_MOST_COMMITS} commits")

    def sync(self) -> None:
        """One barrier."""
        self.writer.commits.sync()

    def switch(self, undo: ExitStack | None = None, **fields: object) -> None:
        """Change fields of the header on disk, stably (I5). `undo` forgets what it has, unless nothing has changed.

        When that fails and nobody knows whether it has, no more is written (I9).
        """
        try:
            self.writer.commits.switch(lambda: switch_header(self.layer, **fields))
        except BaseException:
            if undo is not None and self.writer.commits.fault is not None:
                undo.pop_all()
            raise
        if undo is not None:
            undo.pop_all()

    # -- tables of their own ----------------------------------------------------------------------------------------

    def place(self, content: bytes, kind: Structure) -> int:
        """Put a table into host clusters of its own, which commit() makes stable; returns where."""
        count = self._clusters(len(content))
        self.writer.commits.release()
        start = self.tables.allocator.take_run(count)
        host = start << self._bits
        try:
            self.storage.pwrite(host, content.ljust(count << self._bits, b"\0"))
        except BaseException:
            self.tables.allocator.give_back(start, count)
            raise
        self.tables.fences.add(host, count << self._bits, kind)
        return host

    def forget(self, offset: int, length: int) -> None:
        """A table has no reference any more, on disk neither: its clusters are free."""
        count = self._clusters(length)
        if count:
            self.tables.fences.remove(offset, count << self._bits)
            self.free(self.tables.allocator.lower([(offset >> self._bits, count)]))

    def free(self, runs: list[Run]) -> None:
        """Nobody refers to these clusters, nobody is inside: they can be used again, and may give space back."""
        for start, count in runs if self.tables.punching.covers(self._cause) else ():
            with suppress(StorageError):  # then it only takes space
                self.storage.discard(start << self._bits, count << self._bits)
        self.layer.compressed.forget()
        self.tables.allocator.free(runs)

    def _clusters(self, length: int) -> int:
        return div_ceil(length, self.geometry.cluster_size)

    # -- trees of tables --------------------------------------------------------------------------------------------

    def tree(self, words: Words | Tree) -> Tree:
        """What these words refer to, as it stands in the file from now on until it is changed here."""
        return words if isinstance(words, Tree) else Tree(self.storage, self.geometry, words)

    def on_file(self) -> array[int]:
        """All words of the active L1 table, those behind the end of the disk too."""
        header = self.layer.first.header
        return unpack_words(self.storage.read(header.l1_table_offset, header.l1_size * 8))

    def check(self, words: Words | Tree) -> None:
        """Raise CorruptImage unless all that the tree refers to is counted."""
        for clusters in self._clusters_of(words):
            lost = first_zero(self.tables.refcounts.counts_of(clusters))
            if lost >= 0:
                cluster = clusters[lost]
                raise CorruptImage(f"host cluster {cluster} is in use and its refcount is 0, expected at least 1",
                                   structure="refcount block", hint="Repair it with `cowslice check -r all`.")

    def raise_tree(self, words: Words | Tree) -> None:
        """One more reference to everything in the tree, or to nothing. Raises RefcountOverflow, CorruptImage."""
        done = 0
        try:
            for some in self._clusters_of(words):
                self.tables.allocator.adjust(some, 1)
                done += 1
        except BaseException:
            for some in islice(self._clusters_of(words), done):
                self.tables.allocator.adjust(some, -1)
            raise

    def lower_tree(self, words: Words | Tree) -> None:
        """One reference less, which is gone from disk already; what has none left is free."""
        for some in self.tree(words):
            runs = [run for clusters in some.clusters(data_file=self._data_file)
                    for run in self.tables.allocator.adjust(clusters, -1)]
            for offset in set(some.offsets):
                if self.tables.refcounts.get(offset >> self._bits) == 0 and self._is_fenced(offset):
                    self.tables.fences.remove(offset, self.geometry.cluster_size)
            self.free(runs)

    def take_back(self, words: Words | Tree) -> None:
        """Undo raise_tree, which may have reached the disk, and set COPIED again as far as that works."""
        for some in self._clusters_of(words):
            self.tables.allocator.adjust(some, -1)
        with suppress(CowsliceError):
            self.commit()
            self.set_copied()

    def _clusters_of(self, words: Words | Tree) -> Iterator[array[int]]:
        for some in self.tree(words):
            yield from some.clusters(data_file=self._data_file)

    # -- COPIED -----------------------------------------------------------------------------------------------------

    def clear_copied(self, tree: Tree) -> None:
        """Let nothing of the active tree be changed in place any more, on disk and stably (I6)."""
        tables = self.tables
        tables.l1 = array("Q", without_copied(tables.l1))
        try:
            self.clear_copied_below(tree)
            self.storage.pwrite(self.layer.first.header.l1_table_offset, pack_words(tables.l1))
            self.sync()
        finally:
            self.show(tables.l1, self.layer.size)

    def clear_copied_below(self, words: Words | Tree) -> None:
        """The same for the L2 tables of any tree, not stably."""
        for some in self.tree(words):
            self._write_all(some.without_copied())

    def set_copied(self, known: Tree | None = None) -> None:
        """Set COPIED in the active tree exactly where the count is 1. All counts are stable on disk.

        `known` is a tree that was read already; it is not read again where the active one has the same tables.
        """
        tables, words = self.tables, self.on_file()
        same = known is not None and _offsets(known.l1) == _offsets(words)
        for some in known if known is not None and same else self.tree(words):
            self._write_all(some.with_copied(tables.refcounts.counts_of))
            for index, offset in zip(some.indexes, some.offsets, strict=True):
                ours = tables.refcounts.get(offset >> self._bits) == 1
                words[index] = offset | COPIED if ours else offset
        if len(words):
            self.storage.pwrite(self.layer.first.header.l1_table_offset, pack_words(words))
        self.sync()
        self.show(words[: len(tables.l1)], self.layer.size)

    def _write_all(self, writes: Iterable[tuple[int, bytes]]) -> None:
        for offset, content in writes:
            self.storage.pwrite(offset, content)

    # -- in memory --------------------------------------------------------------------------------------------------

    def show(self, words: Words, size: int) -> None:
        """Let the disk be what this L1 table, which the header names, maps of `size` guest bytes."""
        tables, layer = self.tables, self.layer
        tables.l1 = array("Q", words)
        layer.l1 = pack_words(words)
        layer.size = size
        tables.slices.replace_l1(layer.l1, self.geometry.clusters(size),
                                 l1_offset=layer.first.header.l1_table_offset)

    def fence_tables(self, words: Words) -> None:
        """These tables belong to the active tree from now on. A fence falls when its table is free."""
        for word in words:
            offset = word & L1_OFFSET_MASK
            if offset and not self._is_fenced(offset):
                self.tables.fences.add(offset, self.geometry.cluster_size, Structure.L2_TABLE)

    def _is_fenced(self, offset: int) -> bool:
        """Whether a fence is around this L2 table. Raises CorruptImage where another structure lies there."""
        found = self.tables.fences.hit(offset, self.geometry.cluster_size)
        if found is not None and found != (offset, self.geometry.cluster_size, Structure.L2_TABLE):
            raise CorruptImage(f"an L1 table points at {offset:#x}, where {Structure(found[2]).label} lies",
                               structure="L1 table", offset=offset)
        return found is not None


def without_copied(words: Words) -> list[int]:
    """The words as they stand in the L1 table of a snapshot."""
    return [word & ~COPIED for word in words]


def _offsets(words: Words) -> list[int]:
    return [word & L1_OFFSET_MASK for word in words]
