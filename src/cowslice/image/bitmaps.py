"""Persistent dirty bitmaps of an image: listing them and where they are dirty.

It does not change them. A bitmap that cannot be used is listed with the reason, and the image opens all the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from cowslice.errors import CorruptImage
from cowslice.format.bitmaps import (
    Bitmap,
    BitmapCluster,
    decode_bitmap_directory,
    decode_bitmap_entry,
    decode_bitmap_table,
    dirty_ranges,
)
from cowslice.format.findings import escaped
from cowslice.format.first_cluster import FirstCluster
from cowslice.storage.base import Storage


def load_bitmaps(storage: Storage, first: FirstCluster) -> tuple[Bitmap, ...]:
    """Read the bitmap directory; empty when there is none or it is out of date. Raises StorageError only.

    Unusable records are there too, with their `fault`. A directory beyond the end of the file reads as far as it goes.
    """
    pointer = first.bitmaps
    if pointer is None:
        return ()
    at = pointer.directory_offset
    length = max(min(pointer.directory_size, storage.length() - at), 0)
    directory = decode_bitmap_directory(
        storage.read(at, length), pointer.count, first.header.geometry, first.header.size, at=at)
    return directory.bitmaps


def dirty_extents(storage: Storage, first: FirstCluster, bitmap: Bitmap) -> Iterator[tuple[int, int]]:
    """Yield the guest (offset, length) ranges that a bitmap marks, ascending and merged, in bytes.

    Reads one cluster of bitmap data at a time. Raises CorruptImage for a bitmap that cannot be used or is in use.
    """
    if bitmap.fault or bitmap.in_use:
        reason = bitmap.fault or "a writer did not finish it"
        raise CorruptImage(f"bitmap '{escaped(bitmap.name)}' cannot be used: {reason}", structure="bitmap directory")
    start = end = 0
    for offset, length in _ranges(storage, first, bitmap):
        if offset == end and end:
            end += length
            continue
        if end > start:
            yield start, end - start
        start, end = offset, offset + length
    if end > start:
        yield start, end - start


def _ranges(storage: Storage, first: FirstCluster, bitmap: Bitmap) -> Iterator[tuple[int, int]]:
    geometry, size = first.header.geometry, first.header.size
    bits = geometry.cluster_size * 8
    span = bits * bitmap.granularity
    at = bitmap.table_offset
    table = decode_bitmap_table(storage.read_exactly(at, bitmap.table_size * 8), geometry, at=at)
    for index, word in enumerate(table):
        kind, offset = decode_bitmap_entry(word, geometry)
        if kind is BitmapCluster.ALL_ONES:
            yield index * span, min(span, size - index * span)
        elif kind is BitmapCluster.DATA:
            yield from dirty_ranges(storage.read(offset, geometry.cluster_size), index * bits, bitmap.granularity, size)
