"""The host clusters that an L1 table and its L2 tables refer to, read in bulk from the file.

It does not know the cache: what is in memory must be on the file before. Memory is bounded by a batch of tables,
however large the tree is. What must hold: a tree with an entry that cannot be followed raises before it is yielded.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cowslice.errors import CorruptImage
from cowslice.format.entries import l2_table_offset
from cowslice.format.geometry import Geometry
from cowslice.image.counting import marked, referred
from cowslice.storage.base import Storage
from cowslice.units import KiB, MiB

_BATCH = 1024 * KiB  # of L2 tables at once: they and what is made of them stay in the processor's cache
_KEPT = 8 * MiB


@dataclass(frozen=True, slots=True)
class Tables:
    """Some L2 tables: their L1 indexes, their host byte offsets, and their bytes as on the file, table after table.

    `named` are the host clusters that they refer to, the first `plain` of them in the order of plain entries; `crooked`
    is the first offset that lies inside a cluster, 0 for none.
    """

    indexes: list[int]
    offsets: list[int]
    content: bytes
    geometry: Geometry
    named: array[int]
    plain: int
    crooked: int

    def clusters(self, *, data_file: bool) -> Iterator[array[int]]:
        """Yield the host clusters of the tables, then those that they refer to, each as often as it is referred to.

        They are array('q'). Raises CorruptImage for an entry that points inside a cluster.
        """
        yield array("q", [offset >> self.geometry.cluster_bits for offset in self.offsets])
        if data_file:
            return
        if self.crooked:
            raise CorruptImage(
                f"an L2 entry points at {self.crooked:#x}, which is not aligned to clusters of "
                f"{self.geometry.cluster_size:#x} bytes", structure="L2 table", hint="Repair it with `cowslice check`.")
        yield self.named

    def without_copied(self) -> Iterator[tuple[int, bytes]]:
        """Yield (host offset, content) of the tables that change when COPIED is cleared everywhere."""
        return self._marked(None)

    def with_copied(self, counts_of: Callable[[array[int]], array[int]]) -> Iterator[tuple[int, bytes]]:
        """The same when COPIED is set exactly where the count is 1; `counts_of` says those of an array of clusters."""
        return self._marked(counts_of(self.named if self.plain == len(self.named) else self.named[: self.plain]))

    def _marked(self, counts: array[int] | None) -> Iterator[tuple[int, bytes]]:
        for row, content in marked(self.content, counts, step=1 + self.geometry.extended_l2,
                                   table_bytes=self.geometry.cluster_size):
            yield self.offsets[row], content


class Tree:
    """All that some L1 words refer to; read once where that takes little memory, and else each time."""

    def __init__(self, storage: Storage, geometry: Geometry, l1: Sequence[int]) -> None:
        self.l1 = l1
        self._storage = storage
        self._geometry = geometry
        self._whole: list[Tables] | None = None

    def __iter__(self) -> Iterator[Tables]:
        if self._whole is not None:
            return iter(self._whole)
        found = tables_of(self._storage, self._geometry, self.l1)
        if sum(word != 0 for word in self.l1) << self._geometry.cluster_bits > _KEPT:
            return found
        self._whole = list(found)
        return iter(self._whole)


def tables_of(storage: Storage, geometry: Geometry, l1: Sequence[int]) -> Iterator[Tables]:
    """Read the L2 tables that L1 words name, in batches. Raises CorruptImage for an L1 entry, StorageError."""
    tables = [(index, offset) for index, word in enumerate(l1) if (offset := l2_table_offset(word, geometry))]
    size, most = geometry.cluster_size, max(_BATCH >> geometry.cluster_bits, 1)
    for first in range(0, len(tables), most):
        some = tables[first : first + most]
        content = b"".join(storage.read_spans([(offset, size) for _, offset in some]))
        named, plain, crooked = referred(content, step=1 + geometry.extended_l2, cluster_bits=geometry.cluster_bits)
        yield Tables([index for index, _ in some], [offset for _, offset in some], content, geometry, named, plain,
                     crooked)
