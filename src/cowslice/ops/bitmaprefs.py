"""What persistent bitmaps refer to: their directory, their tables and the clusters of their bits, with how often.

It does not read the bits. Imported only for images that have bitmaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cowslice.errors import CorruptImage, StorageError
from cowslice.format.bitmaps import Bitmap, BitmapCluster, decode_bitmap_directory, decode_bitmap_entry
from cowslice.format.findings import escaped
from cowslice.format.limits import MAX_BITMAP_TABLE_ENTRIES
from cowslice.format.words import unpack_words
from cowslice.ops.dataruns import DataRuns
from cowslice.ops.sweep import sweep
from cowslice.ops.tables import Area
from cowslice.units import KiB

if TYPE_CHECKING:
    from cowslice.format.extensions import BitmapsPointer
    from cowslice.ops.tables import Tables

# A bitmap of a 1 TiB disk takes 32 clusters: only a hostile image has so many.
MAX_CLUSTERS = 1 << 18
_PIECE = 64 * KiB


def take_bitmaps(tables: Tables, pointer: BitmapsPointer) -> None:
    """Add the areas of all bitmaps; whatever is wrong with a bitmap is a fault of its own and hides no other."""
    tables.areas.append(Area(pointer.directory_offset, pointer.directory_size, "the bitmap directory"))
    length = min(pointer.directory_size, max(0, tables.file_length - pointer.directory_offset))
    try:
        data = tables.storage.read(pointer.directory_offset, length)
    except StorageError as error:
        tables.errors.append(str(error))
        return
    directory = decode_bitmap_directory(
        data, pointer.count, tables.geometry, tables.header.size, at=pointer.directory_offset
    )
    for finding in directory.findings:
        tables.fault(finding.message)
    _take_tables(tables, directory.bitmaps)


def _take_tables(tables: Tables, bitmaps: Sequence[Bitmap]) -> None:
    """Take the tables of all bitmaps. What several of them share is read once and counts as often as it is named."""
    names: list[str] = []
    spans: list[tuple[int, int, int]] = []
    for bitmap in bitmaps:
        name, length = f"bitmap '{escaped(bitmap.name)}'", bitmap.table_size * 8
        tables.areas.append(Area(bitmap.table_offset, length, f"the table of {name}"))
        if (length and bitmap.table_size <= MAX_BITMAP_TABLE_ENTRIES and tables.geometry.is_aligned(bitmap.table_offset)
                and bitmap.table_offset + length <= tables.file_length):
            names.append(name)
            spans.append((bitmap.table_offset, bitmap.table_offset + length, 1))
    clusters = _Clusters(tables)
    runs = DataRuns(tables.storage)
    for segment in sweep(spans):
        try:
            for start, end in runs.within(segment.start, segment.end):
                for at in range(start, end, _PIECE):
                    words = unpack_words(tables.storage.read(at, min(_PIECE, end - at)))
                    clusters.take(words, at, segment.times, names[segment.member])
        except StorageError as error:
            tables.errors.append(str(error))
    tables.areas.extend(clusters.areas())


class _Clusters:
    """The clusters with the bits of bitmaps, each with how often it is named, and what is wrong with the entries."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._times: dict[int, int] = {}
        self._names: dict[int, str] = {}

    def take(self, words: Sequence[int], at: int, times: int, name: str) -> None:
        """Take a piece of a table at a host offset that is named some times."""
        for index, word in enumerate(words):
            if not word:
                continue
            try:
                kind, offset = decode_bitmap_entry(word, self.tables.geometry, at=at + index * 8)
            except CorruptImage as error:
                self.tables.fault(f"an entry of {name}: {error}", times)
                continue
            if kind is BitmapCluster.DATA:
                self._count(offset, times, name)

    def areas(self) -> Iterator[Area]:
        size = self.tables.geometry.cluster_size
        for offset, times in self._times.items():
            yield Area(offset, size, f"the bits of {self._names[offset]}", times)

    def _count(self, offset: int, times: int, name: str) -> None:
        if offset not in self._times:
            if len(self._times) == MAX_CLUSTERS:
                self.tables.errors.append(f"{name} is not checked to its end: there are more than {MAX_CLUSTERS} "
                                          "clusters of bitmaps")
            if len(self._times) >= MAX_CLUSTERS:
                return
            self._names[offset] = name
        self._times[offset] = self._times.get(offset, 0) + times
