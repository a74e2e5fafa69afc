"""One bitmap of an image that is open for writing: what the file says of it, and the marks on top of that.

It does not know when marks are made, nor when it is written. What must hold: a bit that either of the two has is there,
until it is cleared or lies behind the end of the disk.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowslice.errors import CorruptImage
from cowslice.format.bitmaps import Bitmap, BitmapFlags, bitmap_table_entries, dirty_ranges
from cowslice.format.findings import escaped
from cowslice.image.bitmaps import cluster_bits_of
from cowslice.image.dirtybits import DirtyBits
from cowslice.units import div_ceil

if TYPE_CHECKING:
    from cowslice.image.qcow2 import Qcow2Layer

NOWHERE = -1  # the place of a record that is not on disk yet


@dataclass(slots=True)
class MarkedBitmap:
    """A bitmap of `layer`. `record` is what a reader is told; the file has its record `at`, with `flags`.

    Its bits are those of the table `words` and those of `bits`. `stored` is the table as it stands on disk. Both tables
    are None where they cannot be trusted. A cluster of bits has the size of a cluster and is counted from 0.
    """

    layer: Qcow2Layer
    record: Bitmap
    at: int
    flags: BitmapFlags
    stored: array[int] | None
    words: array[int] | None
    bits: DirtyBits | None = None

    @property
    def sound(self) -> bool:
        """Whether its bits can be used."""
        lost = self.bits is not None and self.bits.lost
        return not self.record.fault and not self.record.in_use and self.words is not None and not lost

    @property
    def enabled(self) -> bool:
        """Whether it notes changes."""
        return self.sound and bool(self.record.flags & BitmapFlags.AUTO)

    @property
    def entries(self) -> int:
        """How many clusters of bits describe the disk as it is now."""
        return bitmap_table_entries(self.layer.size, self.record.granularity_bits, self.layer.geometry)

    @property
    def flags_to_store(self) -> BitmapFlags:
        """As they stand on disk when nobody writes any more."""
        if self.sound:
            return self.record.flags
        lost = self.bits is not None and self.bits.lost
        return self.flags | BitmapFlags.IN_USE if lost else self.flags

    def check_sound(self) -> None:
        """Raise CorruptImage where its bits cannot be used."""
        if not self.sound:
            reason = self.record.fault or "a writer did not finish it"
            raise CorruptImage(f"bitmap '{escaped(self.record.name)}' cannot be used: {reason}",
                               structure="bitmap directory", hint="It can only be removed.")

    def marks(self) -> DirtyBits:
        """What is marked from now on."""
        if self.bits is None:
            self.bits = DirtyBits(self.layer.size, self.record.granularity_bits)
        return self.bits

    def clear(self) -> None:
        """Mark nothing."""
        self.words = array("Q")
        if self.bits is not None:
            self.bits.clear()

    # -- reading ----------------------------------------------------------------------------------------------------

    def pieces(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield guest (start, end) of what is marked, ascending, as far as the clusters of bits of the span tell."""
        size, granularity = self.layer.size, self.record.granularity
        bits = self.layer.geometry.cluster_size * 8
        for index in range(offset // (bits * granularity), min(div_ceil(end, bits * granularity), self.entries)):
            if not self.word(index) and not self.is_touched(index):
                continue
            for start, length in dirty_ranges(self.content(index), index * bits, granularity, size):
                if start + length > offset:
                    yield start, start + length

    def content(self, index: int) -> bytes:
        """One cluster of bits, whole. Raises CorruptImage, StorageError."""
        size = self.layer.geometry.cluster_size
        old = cluster_bits_of(self.layer.storage, self.layer.geometry, self.word(index))
        if self.bits is None or not self.is_touched(index):
            return old
        new = self.bits.read(index * size, size)
        return (int.from_bytes(old, "little") | int.from_bytes(new, "little")).to_bytes(size, "little")

    def word(self, index: int) -> int:
        """What the table says of one cluster of bits."""
        assert self.words is not None
        return self.words[index] if index < len(self.words) else 0

    def is_touched(self, index: int) -> bool:
        """Whether one cluster of bits may have marks that the table does not know."""
        size = self.layer.geometry.cluster_size
        return self.bits is not None and self.bits.touched(index * size, size)

    @property
    def as_stored(self) -> bool:
        """Whether the table on disk says what the bitmap says."""
        if not self.sound:
            return True
        same = self.words == self.stored and self.words is not None and len(self.words) == self.entries
        return same and not any(self.is_touched(index) for index in range(self.entries))

    # -- another size -----------------------------------------------------------------------------------------------

    def resize(self, size: int) -> None:
        """Describe a disk of `size` bytes: bits behind that are forgotten, those that are new are not set."""
        self._cut(size)
        self.marks().resize(size)

    def _cut(self, size: int) -> None:
        """Take the bits of the last cluster into memory, so that those behind the end are not stored again."""
        assert self.words is not None
        geometry = self.layer.geometry
        entries = bitmap_table_entries(size, self.record.granularity_bits, geometry)
        self.words = self.words[:entries]
        if not self.words or len(self.words) < entries or not self.words[-1]:
            return
        content = cluster_bits_of(self.layer.storage, geometry, self.words[-1])
        marks = self.marks()
        for start, length in dirty_ranges(content, (entries - 1) * geometry.cluster_size * 8,
                                          self.record.granularity, size):
            marks.mark_span(start, length)
        self.words[-1] = 0
