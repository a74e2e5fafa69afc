"""The host clusters that an L1 table and its L2 tables refer to, read in bulk from the file.

It does not know the cache: what is in memory must be on the file before. Memory is bounded by a batch of tables,
however large the tree is. What must hold: a tree with an entry that cannot be followed raises before it is yielded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cowslice.errors import CorruptImage
from cowslice.format.entries import COMPRESSED, COPIED, L2_OFFSET_MASK, l2_table_offset
from cowslice.format.geometry import Geometry
from cowslice.storage.base import Storage
from cowslice.units import SECTOR, KiB, MiB

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[Any]

_WORD = (1 << 64) - 1
_BATCH = 1024 * KiB  # of L2 tables at once: they and what is made of them stay in the processor's cache
_KEPT = 8 * MiB


@dataclass(frozen=True, slots=True)
class Tables:
    """Some L2 tables: their L1 indexes, host byte offsets, and first words as numbers, one row for each table."""

    indexes: list[int]
    offsets: list[int]
    words: Numbers
    raw: Numbers  # big-endian, as on the file; `words` is made of it

    def clusters(self, geometry: Geometry, *, data_file: bool) -> Iterator[Numbers]:
        """Yield the host clusters of the tables, then those that they refer to, each as often as it is referred to."""
        import numpy as np

        yield np.array(self.offsets, dtype=np.int64) >> geometry.cluster_bits
        if not data_file:
            yield self._referred(geometry).view(np.int64)

    def _referred(self, geometry: Geometry) -> Numbers:
        import numpy as np

        plain, streams = self.words, np.empty(0, dtype=np.uint64)
        if np.bitwise_or.reduce(plain, axis=None) & np.uint64(COMPRESSED):
            packed = (plain & np.uint64(COMPRESSED)) != 0
            plain, streams = plain[~packed], plain[packed]
        plain = plain & np.uint64(L2_OFFSET_MASK)
        plain = plain[plain != 0]
        self._check(plain, geometry)
        plain >>= np.uint64(geometry.cluster_bits)
        return np.concatenate([plain, *_streams(streams, geometry)]) if len(streams) else plain

    def _check(self, offsets: Numbers, geometry: Geometry) -> None:
        import numpy as np

        within = np.uint64(geometry.cluster_size - 1)
        if np.bitwise_or.reduce(offsets) & within:
            crooked = offsets[(offsets & within != 0).argmax()]
            raise CorruptImage(
                f"an L2 entry points at {int(crooked):#x}, which is not aligned to clusters of "
                f"{geometry.cluster_size:#x} bytes", structure="L2 table", hint="Repair it with `cowslice check`.")

    def with_copied(self, wanted: Numbers) -> Iterator[tuple[int, bytes]]:
        """Yield (host offset, content) of the tables that change when COPIED is set where `wanted` says, else not."""
        import numpy as np

        changed = self.words & np.uint64(~COPIED & _WORD)
        changed |= wanted.astype(np.uint64) << np.uint64(63)
        if np.bitwise_or.reduce(self.words, axis=None) & np.uint64(COMPRESSED):
            changed = np.where((self.words & np.uint64(COMPRESSED)) != 0, self.words, changed)
        differs = (changed != self.words).any(axis=1)
        step = self.raw.shape[1] // self.words.shape[1]
        for row in np.flatnonzero(differs).tolist():
            if step == 1:
                yield self.offsets[row], changed[row].astype(">u8").tobytes()
                continue
            table = self.raw[row].copy()
            table[::step] = changed[row]
            yield self.offsets[row], table.tobytes()


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
    import numpy as np

    named = [(index, offset) for index, word in enumerate(l1) if (offset := l2_table_offset(word, geometry))]
    size, most = geometry.cluster_size, max(_BATCH >> geometry.cluster_bits, 1)
    step = 2 if geometry.extended_l2 else 1
    for first in range(0, len(named), most):
        some = named[first : first + most]
        content = b"".join(storage.read_spans([(offset, size) for _, offset in some]))
        raw = np.frombuffer(content, dtype=">u8").reshape(len(some), size // 8)
        yield Tables([index for index, _ in some], [offset for _, offset in some],
                     raw[:, ::step].astype(np.uint64), raw)


def _streams(words: Numbers, geometry: Geometry) -> Iterator[Numbers]:
    """The clusters that compressed streams touch: the first of each, the second of those that have one, and so on."""
    import numpy as np

    if not len(words):
        return
    x = 70 - geometry.cluster_bits
    at = words & np.uint64((1 << x) - 1)
    sectors = (words >> np.uint64(x) & np.uint64((1 << (geometry.cluster_bits - 8)) - 1)) + np.uint64(1)
    bits = np.uint64(geometry.cluster_bits)
    first = at >> bits
    last = (at - at % np.uint64(SECTOR) + sectors * np.uint64(SECTOR) - np.uint64(1)) >> bits
    for step in range(int((last - first).max()) + 1):
        reached = first + np.uint64(step)
        yield reached[reached <= last]
