"""Clusters that are said to be zeros become what version 2 can say: unallocated ones, or clusters full of zeros.

It does not know why. Every L2 table is covered, those of snapshots too, and every disk reads as before at each moment:
new clusters are zeros, counted and stable before an entry names them (I1, I2), and an old one falls after that (I3).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cowslice.format.entries import COMPRESSED, COPIED, L2_OFFSET_MASK, ZERO, l2_table_offset
from cowslice.format.words import unpack_words
from cowslice.image.hosttree import tables_of
from cowslice.image.roots import alone
from cowslice.image.snapshots import check_usable, load_snapshots, read_l1

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cowslice.image.hosttree import Tables
    from cowslice.image.qcow2 import Qcow2Layer
    from cowslice.image.roots import Roots
    from cowslice.image.writing import Writer

    Numbers = NDArray[Any]

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class TableNames:
    """All L2 tables of an image by host byte offset: how many L1 entries name each, where, and the active ones."""

    times: Counter[int] = field(default_factory=Counter)
    indexes: dict[int, int] = field(default_factory=dict)
    active: set[int] = field(default_factory=set)

    def add(self, words: Sequence[int], layer: Qcow2Layer, *, active: bool = False) -> None:
        """Take note of one L1 table. Raises CorruptImage for an entry that cannot be followed."""
        for index, word in enumerate(words):
            if offset := l2_table_offset(word, layer.geometry):
                self.times[offset] += 1
                self.indexes[offset] = index
                if active:
                    self.active.add(offset)


def all_tables(layer: Qcow2Layer) -> TableNames:
    """The L2 tables of the disk and of its snapshots, as the file names them. Raises ImageError, StorageError."""
    header, names = layer.first.header, TableNames()
    names.add(unpack_words(read_l1(layer.storage, header.l1_table_offset, header.l1_size, header.l1_size)), layer,
              active=True)
    for one in load_snapshots(layer.storage, header):
        check_usable(one, header)
        names.add(unpack_words(read_l1(layer.storage, one.l1_offset, one.l1_size, one.l1_size)), layer)
    return names


def has_compressed(layer: Qcow2Layer) -> bool:
    """Whether any table names a compressed cluster. Raises ImageError, StorageError."""
    import numpy as np

    return any((_words(some) & np.uint64(COMPRESSED)).any()
               for some in tables_of(layer.storage, layer.geometry, sorted(all_tables(layer).times)))


def expand_zeros(writer: Writer, progress: Progress | None = None) -> None:
    """Let no L2 entry say zeros, stably. Entries are standard ones, and there is no data file.

    Raises RefcountOverflow, CorruptImage, NoSpace, StorageError; then some say zeros still, and all reads as before.
    """
    with alone(writer) as roots:
        roots.settle()
        names = all_tables(writer.layer)
        work, done = _Expansion(roots, names), 0
        try:
            for some in tables_of(roots.storage, roots.geometry, sorted(names.times)):
                work.expand(some)
                done += len(some.offsets)
                if progress is not None:
                    progress(done, len(names.times))
        finally:
            roots.show(roots.on_file()[: len(roots.tables.l1)], writer.layer.size)
        roots.settle()


class _Expansion:
    """The work on some tables at a time. Without a backing file a cluster of zeros may as well be unallocated."""

    def __init__(self, roots: Roots, names: TableNames) -> None:
        self._roots = roots
        self._names = names
        self._bits = roots.geometry.cluster_bits
        self._allocator = roots.tables.allocator
        self._covered = bool(roots.layer.first.raw_backing_name)

    def expand(self, some: Tables) -> None:
        import numpy as np

        words = _words(some)
        said = (words & np.uint64(ZERO) != 0) & (words & np.uint64(COMPRESSED) == 0)
        if not said.any():
            return
        after = words.copy()
        after[said] = 0
        with ExitStack() as undo:
            if self._covered:
                self._allocate(some, said, after, undo)
            self._roots.commit()
            undo.pop_all()
            for row in np.flatnonzero(said.any(axis=1)).tolist():
                self._roots.storage.pwrite(some.offsets[row], after[row].astype(">u8").tobytes())
            self._roots.sync()
        self._let_go(some, np.where(said, words & np.uint64(L2_OFFSET_MASK), np.uint64(0)))

    def _allocate(self, some: Tables, said: Numbers, after: Numbers, undo: ExitStack) -> None:
        """Give every such entry a cluster of zeros, with as many references as its table has."""
        import numpy as np

        for row, offset in enumerate(some.offsets):
            columns, times = np.flatnonzero(said[row]), self._names.times[offset]
            flag = COPIED if times == 1 and offset in self._names.active else 0
            done = 0
            while done < len(columns):
                start, count = self._allocator.take(len(columns) - done)
                undo.callback(self._lower, np.arange(start, start + count), 1)
                chosen = columns[done : done + count]
                self._fill(start, self._names.indexes[offset] * self._roots.geometry.l2_entries + chosen)
                for _ in range(times - 1):
                    self._allocator.adjust(range(start, start + count), 1)
                    undo.callback(self._lower, np.arange(start, start + count), 1)
                hosts = np.arange(start, start + count, dtype=np.uint64) << np.uint64(self._bits)
                after[row, chosen] = hosts | np.uint64(flag)
                done += count

    def _fill(self, start: int, guests: Numbers) -> None:
        """Let host clusters from `start` on read as zeros, as `guests`, one guest cluster each."""
        layer, size = self._roots.layer, 1 << self._bits
        if layer.cipher is None:
            layer.storage.zero(start << self._bits, len(guests) << self._bits)
            return
        for number, guest in enumerate(guests.tolist()):
            host = start + number << self._bits
            sector = layer.sector_number(host, guest << self._bits)
            layer.storage.pwrite(host, layer.cipher.encrypt(sector, bytes(size)))

    def _let_go(self, some: Tables, hosts: Numbers) -> None:
        """The clusters that such entries had kept, 0 for none, lose the references of their tables."""
        import numpy as np

        for row, offset in enumerate(some.offsets):
            kept = (hosts[row][hosts[row] != 0] >> np.uint64(self._bits)).astype(np.int64)
            if len(kept):
                self._lower(kept, self._names.times[offset])

    def _lower(self, clusters: Numbers, times: int) -> None:
        for _ in range(times):
            self._roots.free(self._allocator.adjust(_numbers(clusters), -1))


def _words(some: Tables) -> Numbers:
    """The first word of each entry, a row for each table."""
    import numpy as np

    words = np.frombuffer(some.content, dtype=">u8").reshape(len(some.offsets), -1)
    return words[:, :: 1 + some.geometry.extended_l2].astype(np.uint64)


def _numbers(clusters: Numbers) -> array[int]:
    return array("q", clusters.astype("q").tobytes())
