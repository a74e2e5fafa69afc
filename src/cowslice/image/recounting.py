"""Another refcount width for an image that is open for writing: a new table and its blocks, behind all that is in use.

It does not know what clusters are for. What must hold: nothing of the old structures changes, and the new ones are
complete and stable, counting themselves and the old ones too, before the header names them in one sector (I4, I5).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cowslice.errors import BadOption, CorruptImage, NoSpace
from cowslice.format.limits import MAX_REFTABLE_BYTES
from cowslice.format.refcounts import encode_reftable_entry, pack_refblock, unpack_refblock
from cowslice.format.words import WORD, pack_words
from cowslice.image.refblocks import RefcountOverflow
from cowslice.image.roots import alone
from cowslice.image.structures import Structure
from cowslice.units import div_ceil

if TYPE_CHECKING:
    from cowslice.format.geometry import Geometry
    from cowslice.image.reftable import Run
    from cowslice.image.roots import Roots
    from cowslice.image.writing import Writer

Progress = Callable[[int, int], None]
_STEP = 1 << 15  # counts in memory at once


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the new structures lie, in host clusters: blocks by their index, and behind them the table."""

    start: int
    blocks: dict[int, int]
    table: int
    table_clusters: int

    @property
    def end(self) -> int:
        return self.table + self.table_clusters


def change_width(writer: Writer, bits: int, progress: Progress | None = None) -> list[Run]:
    """Let refcounts be `bits` wide, stably; returns the host clusters of the old structures, which still count 1.

    The writer goes by the old width: close it then, and give those clusters to forget_structures of another one.
    Raises RefcountOverflow where a count does not fit, BadOption, CorruptImage, NoSpace, StorageError; then the image
    counts as before.
    """
    with alone(writer) as roots:
        roots.settle()
        work = _Recounting(roots, replace(roots.geometry, refcount_order=bits.bit_length() - 1))
        layout = work.plan()
        work.write(layout, progress)
        roots.sync()
        roots.switch(refcount_table_offset=layout.table << roots.geometry.cluster_bits,
                     refcount_table_clusters=layout.table_clusters, refcount_order=work.new.refcount_order)
        return work.old_structures()


def forget_structures(writer: Writer, runs: list[Run]) -> None:
    """Free the host clusters of refcount structures that the header names no more, stably."""
    with alone(writer) as roots:
        roots.free(roots.tables.allocator.lower(runs))
        roots.commit()


class _Recounting:
    """The counts of one image, read by the old width and written by the `new` one."""

    def __init__(self, roots: Roots, new: Geometry) -> None:
        self.new = new
        self._roots = roots
        self._refcounts = roots.tables.refcounts
        self._bits = new.cluster_bits
        self._old_entries = roots.geometry.refblock_entries
        self._typecode = unpack_refblock(b"", new.refcount_order).typecode

    def old_structures(self) -> list[Run]:
        """The clusters of the old table and its blocks."""
        table = self._refcounts.table
        blocks = ((table.block_offset(index) >> self._bits, 1) for index in table.blocks_backwards())
        return [(table.start, table.clusters), *blocks]

    def plan(self) -> _Layout:
        """Look at every count, and place what is needed behind the last cluster in use."""
        start = self._roots.tables.allocator.used_end
        blocks, entries = self._needed(), self.new.refblock_entries
        while True:
            table_clusters = div_ceil((max(blocks, default=0) + 1) * WORD, self.new.cluster_size)
            own = range(start // entries, (start + len(blocks) + table_clusters - 1) // entries + 1)
            if blocks.issuperset(own):
                break
            blocks.update(own)
        places = {index: start + number for number, index in enumerate(sorted(blocks))}
        layout = _Layout(start, places, start + len(places), table_clusters)
        self._check(layout)
        return layout

    def write(self, layout: _Layout, progress: Progress | None) -> None:
        """Write all blocks, then the table, not stably."""
        storage = self._roots.storage
        table = array("Q", bytes(layout.table_clusters << self._bits))
        for number, (index, place) in enumerate(layout.blocks.items()):
            if progress is not None:
                progress(number, len(layout.blocks))
            at = place << self._bits
            for content in self._packed(index, layout):
                storage.pwrite(at, content)
                at += len(content)
            table[index] = encode_reftable_entry(place << self._bits)
        storage.pwrite(layout.table << self._bits, pack_words(table))
        if progress is not None:
            progress(len(layout.blocks), len(layout.blocks))

    def _needed(self) -> set[int]:
        """The new blocks that count anything. Raises RefcountOverflow."""
        import numpy as np

        needed: set[int] = set()
        limit = self.new.max_refcount
        step = min(self._old_entries, self.new.refblock_entries, _STEP)
        for index in self._refcounts.table.blocks_backwards():
            for first in range(index * self._old_entries, (index + 1) * self._old_entries, step):
                counts = self._refcounts.counts(first, step)
                numbers = np.frombuffer(counts, dtype=counts.typecode)
                most = int(numbers.max())
                if most > limit:
                    raise _too_many(first + int(numbers.argmax()), most, self.new)
                if most:
                    needed.add(first // self.new.refblock_entries)
        return needed

    def _packed(self, index: int, layout: _Layout) -> Iterator[bytes]:
        """The bytes of one new block, in parts; what is laid out here counts 1."""
        import numpy as np

        entries = self.new.refblock_entries
        step = min(entries, _STEP)
        for first in range(index * entries, (index + 1) * entries, step):
            counts = self._refcounts.counts(first, step)
            for cluster in range(max(first, layout.start), min(first + step, layout.end)):
                counts[cluster - first] = 1
            wide = np.frombuffer(counts, dtype=counts.typecode).astype(self._typecode)
            yield pack_refblock(array(self._typecode, wide.tobytes()), self.new.refcount_order)

    def _check(self, layout: _Layout) -> None:
        """Raise where the new structures cannot lie."""
        if layout.table_clusters << self._bits > MAX_REFTABLE_BYTES:
            raise BadOption(f"refcounts of {self.new.refcount_bits} bits need a table of {layout.table_clusters} "
                            f"clusters, expected at most {MAX_REFTABLE_BYTES >> self._bits}")
        if layout.end > self._roots.tables.allocator.space.limit:
            raise NoSpace(f"{layout.end} clusters would be in use, expected at most "
                          f"{self._roots.tables.allocator.space.limit}")
        found = self._roots.tables.fences.hit(layout.start << self._bits, layout.end - layout.start << self._bits)
        if found is not None:
            raise CorruptImage(
                f"{Structure(found[2]).label} lies at {found[0]:#x}, behind the last cluster with a refcount",
                structure=Structure(found[2]).label, offset=found[0], hint="Repair it with `cowslice check -r all`.")


def _too_many(cluster: int, count: int, geometry: Geometry) -> RefcountOverflow:
    return RefcountOverflow(f"host cluster {cluster} has {count} references, expected at most {geometry.max_refcount}, "
                            f"the most that {geometry.refcount_bits} bits can say",
                            hint="Choose wider refcounts, or delete snapshots.")
