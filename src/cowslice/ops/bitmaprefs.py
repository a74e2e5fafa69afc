"""What persistent bitmaps refer to: their directory, their tables and the clusters of their bits.

It does not read the bits. Imported only for images that have bitmaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowslice.errors import CorruptImage, StorageError
from cowslice.format.bitmaps import Bitmap, BitmapCluster, decode_bitmap_directory, decode_bitmap_entry
from cowslice.format.findings import escaped
from cowslice.format.limits import MAX_BITMAP_TABLE_ENTRIES
from cowslice.format.words import unpack_words
from cowslice.ops.tables import Area

if TYPE_CHECKING:
    from cowslice.format.extensions import BitmapsPointer
    from cowslice.ops.tables import Tables

# A bitmap of a 1 TiB disk takes 32 clusters: only a hostile image has so many.
MAX_AREAS = 1 << 20


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
    tables.faults.extend(finding.message for finding in directory.findings)
    for bitmap in directory.bitmaps:
        _take_bitmap(tables, bitmap)


def _take_bitmap(tables: Tables, bitmap: Bitmap) -> None:
    name = f"bitmap '{escaped(bitmap.name)}'"
    length = bitmap.table_size * 8
    tables.areas.append(Area(bitmap.table_offset, length, f"the table of {name}"))
    if bitmap.table_size > MAX_BITMAP_TABLE_ENTRIES or bitmap.table_offset + length > tables.file_length:
        return
    try:
        words = unpack_words(tables.storage.read(bitmap.table_offset, length))
    except StorageError as error:
        tables.errors.append(str(error))
        return
    for index, word in enumerate(words):
        try:
            kind, offset = decode_bitmap_entry(word, tables.geometry, at=bitmap.table_offset + index * 8)
        except CorruptImage as error:
            tables.faults.append(f"entry {index} of {name}: {error}")
            continue
        if len(tables.areas) >= MAX_AREAS:
            tables.errors.append(f"{name} is not checked to its end: there are more than {MAX_AREAS} bitmap clusters")
            return
        if kind is BitmapCluster.DATA:
            tables.areas.append(Area(offset, tables.geometry.cluster_size, f"the bits of {name}"))
