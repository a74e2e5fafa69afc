"""A new refcount table and its blocks, appended to a file: for structures that are beyond use.

It does not count. Nothing refers to what it writes before the header does, in one sector and last.
"""

from __future__ import annotations

from cowslice.errors import UnsupportedImage
from cowslice.format.limits import MAX_REFTABLE_BYTES
from cowslice.format.refcounts import encode_reftable_entry, set_refcount
from cowslice.ops.overlay import Overlay, Stage
from cowslice.ops.refcheck import Tally
from cowslice.ops.tables import Tables
from cowslice.units import div_ceil

_WHERE = 48  # the header's refcount_table_offset and refcount_table_clusters (spec: Header)


class NewCounts:
    """Refcount structures under construction; `first` is the host cluster at which they begin."""

    def __init__(self, tables: Tables, overlay: Overlay) -> None:
        self.geometry = tables.geometry
        self.overlay = overlay
        # A span that begins in an incomplete last cluster ends in the one behind it.
        self.first = tables.clusters + bool(tables.file_length % tables.geometry.cluster_size)
        self._places: dict[int, int] = {}

    def take(self, tally: Tally) -> None:
        """Write the blocks of one window that count anything."""
        entries = self.geometry.refblock_entries
        for index in range(tally.first // entries, (tally.first + tally.clusters - 1) // entries + 1):
            block = self._block(index)
            if tally.put(index * entries, block, self.geometry.refcount_order, fresh=True)[0]:
                self._write(index, block)

    def finish(self) -> None:
        """Count the new structures themselves, write the table and let the header name it."""
        size, bits, entries = self.geometry.cluster_size, self.geometry.cluster_bits, self.geometry.refblock_entries
        while True:
            length = (max(self._places, default=0) + 1) * 8
            total = len(self._places) + div_ceil(length, size)
            own = range(self.first // entries, (self.first + total - 1) // entries + 1)
            missing = [index for index in own if index not in self._places]
            if not missing:
                break
            for index in missing:
                self._places[index] = self.first + len(self._places)
        if div_ceil(length, size) * size > MAX_REFTABLE_BYTES:
            raise UnsupportedImage(f"a refcount table of {length} bytes is needed, expected at most "
                                   f"{MAX_REFTABLE_BYTES}", features=("huge file",))
        for index in own:
            self._count_own(index, total)
        table = bytearray(div_ceil(length, size) * size)
        for index, place in self._places.items():
            table[index * 8 : index * 8 + 8] = encode_reftable_entry(place << bits).to_bytes(8, "big")
        at = self.first + len(self._places) << bits
        self.overlay.change(Stage.RAISE, at, bytes(table), "a new refcount table")
        where = at.to_bytes(8, "big") + (len(table) >> bits).to_bytes(4, "big")
        self.overlay.change(Stage.SWITCH, _WHERE, where, "the header names the new refcount table")

    def _count_own(self, index: int, total: int) -> None:
        entries = self.geometry.refblock_entries
        block = self._block(index)
        for cluster in range(max(self.first, index * entries), min(self.first + total, (index + 1) * entries)):
            set_refcount(block, cluster - index * entries, self.geometry.refcount_order, 1)
        self._write(index, block)

    def _block(self, index: int) -> bytearray:
        size = self.geometry.cluster_size
        place = self._places.get(index)
        return bytearray(size if place is None else self.overlay.read(place << self.geometry.cluster_bits, size))

    def _write(self, index: int, block: bytearray) -> None:
        place = self._places.setdefault(index, self.first + len(self._places))
        entries = self.geometry.refblock_entries
        self.overlay.change(Stage.RAISE, place << self.geometry.cluster_bits, bytes(block),
                            f"a new block for the refcounts of clusters {index * entries} to "
                            f"{(index + 1) * entries - 1}")
