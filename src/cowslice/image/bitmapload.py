"""The bitmaps of an image that is opened for writing: their records and tables, as far as these can be trusted.

It does not know their bits, nor what becomes of them. What must hold: what is not sound is carried on with a reason and
is never written to; what is taken for sound lies in clusters of its own that count exactly one, and is fenced.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

from cowslice.errors import CorruptImage, CowsliceError
from cowslice.format.bitmaps import (
    Bitmap,
    BitmapCluster,
    decode_bitmap_directory,
    decode_bitmap_entry,
    decode_bitmap_table,
)
from cowslice.format.extensions import BitmapsPointer
from cowslice.format.limits import MAX_LOADED_BITMAP_ENTRIES
from cowslice.image.structures import Structure
from cowslice.image.writing import Writer
from cowslice.units import div_ceil

FLAGS_AT = 12  # of a record: its flags, four bytes that never straddle a sector


@dataclass(frozen=True, slots=True)
class LoadedBitmap:
    """A record, the host offset of it, and the words of its table; None where they are not to be trusted."""

    record: Bitmap
    at: int
    words: array[int] | None


class BitmapLoader:
    """Reads the directory and fences what belongs to bitmaps. The image is not shared yet."""

    def __init__(self, writer: Writer) -> None:
        self._tables = writer.tables
        self._storage = writer.layer.storage
        self._geometry = writer.layer.geometry
        self._size = writer.layer.size
        self._bits = self._geometry.cluster_bits
        self._left = MAX_LOADED_BITMAP_ENTRIES

    def load(self, pointer: BitmapsPointer) -> list[LoadedBitmap] | None:
        """All bitmaps, or None where their directory cannot be understood or is not safe to write to."""
        at, length = pointer.directory_offset, pointer.directory_size
        if self._unsound(at, length) or at + length > self._storage.length():
            return None
        directory = decode_bitmap_directory(self._storage.read_exactly(at, length), pointer.count, self._geometry,
                                            self._size, at=at)
        if len(directory.bitmaps) != pointer.count or directory.rest:
            return None
        self._fence(at, length, Structure.BITMAP_DIRECTORY)
        loaded = []
        for record in directory.bitmaps:
            loaded.append(self._with_table(record, at))
            at += record.encoded_length
        return loaded

    def _with_table(self, record: Bitmap, at: int) -> LoadedBitmap:
        try:
            return LoadedBitmap(record, at, None if record.fault else self._table(record))
        except CowsliceError as error:
            return LoadedBitmap(record if record.in_use else replace(record, fault=str(error)), at, None)

    def _table(self, record: Bitmap) -> array[int]:
        """The words of a table whose every cluster is its own; fenced. Raises CorruptImage, StorageError."""
        self._left -= record.table_size
        if self._left < 0:
            raise CorruptImage(f"the bitmaps have more than {MAX_LOADED_BITMAP_ENTRIES} table entries",
                               structure="bitmap table")
        at, length = record.table_offset, record.table_size * 8
        if fault := self._unsound(at, length):
            raise CorruptImage(f"its table {fault}", structure="bitmap table", offset=at)
        words = decode_bitmap_table(self._storage.read_exactly(at, length), self._geometry, at=at)
        places = [offset for kind, offset in map(self._entry, words) if kind is BitmapCluster.DATA]
        size = self._geometry.cluster_size
        if len(set(places)) != len(places) or any(at - size < place < at + length for place in places):
            raise CorruptImage("its bits lie in a cluster that is used twice", structure="bitmap table", offset=at)
        for place in places:
            if fault := self._unsound(place, size):
                raise CorruptImage(f"a cluster of its bits {fault}", structure="bitmap table", offset=at)
        self._fence(at, length, Structure.BITMAP_TABLE)
        for place in places:
            self._fence(place, size, Structure.BITMAP_DATA)
        return words

    def _entry(self, word: int) -> tuple[BitmapCluster, int]:
        return decode_bitmap_entry(word, self._geometry)

    def _unsound(self, offset: int, length: int) -> str:
        """Why these clusters cannot be a structure's own, or ''."""
        start, count = offset >> self._bits, div_ceil(length, self._geometry.cluster_size)
        if offset >= self._storage.length():
            return f"at {offset:#x} lies behind the end of the file"
        found = self._tables.fences.hit(offset, count << self._bits)
        if found is not None:
            return f"at {offset:#x} lies on {Structure(found[2]).label}"
        if any(self._tables.refcounts.get(cluster) != 1 for cluster in range(start, start + count)):
            return f"at {offset:#x} has a cluster whose refcount is not 1"
        return ""

    def _fence(self, offset: int, length: int, kind: Structure) -> None:
        count = div_ceil(length, self._geometry.cluster_size)
        self._tables.fences.add(offset, count << self._bits, kind)
