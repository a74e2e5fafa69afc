"""Persistent dirty bitmaps of an image: listing them and where they are dirty.

It does not change them. A bitmap that cannot be used is listed with the reason, and the image opens all the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from cowslice.errors import BadOption, CorruptImage
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
from cowslice.format.geometry import Geometry
from cowslice.storage.base import Storage
from cowslice.units import div_ceil


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


def find_bitmap(bitmaps: Sequence[Bitmap], name: str) -> Bitmap:
    """The record of that name. Raises BadOption where there is none."""
    raw = os.fsencode(name)
    found = next((one for one in bitmaps if one.name == raw), None)
    if found is None:
        there = ", ".join(f"'{escaped(one.name)}'" for one in bitmaps[:20])
        expected = f"one of {there}" if there else "none: there are none"
        raise BadOption(f"bitmap is '{escaped(raw)}', expected {expected}")
    return found


def dirty_extents(
    storage: Storage, first: FirstCluster, bitmap: Bitmap, *, offset: int = 0, length: int | None = None
) -> Iterator[tuple[int, int]]:
    """The guest (offset, length) ranges that a bitmap marks, ascending and merged, in bytes.

    Only what lies inside the span of `length` bytes from `offset`, by default to the end of the disk. Reads one cluster
    of bitmap data at a time. Raises CorruptImage for a bitmap that cannot be used or is in use.
    """
    if bitmap.fault or bitmap.in_use:
        reason = bitmap.fault or "a writer did not finish it"
        raise CorruptImage(f"bitmap '{escaped(bitmap.name)}' cannot be used: {reason}", structure="bitmap directory")
    limit = first.header.size if length is None else min(offset + length, first.header.size)
    return joined_ranges(_ranges(storage, first, bitmap, offset, limit), offset, limit)


def joined_ranges(found: Iterable[tuple[int, int]], offset: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield ascending guest (start, end), cut to those from `offset` to `limit` and merged, as (offset, length)."""
    start = end = 0
    for begin, stop in found:
        if begin >= limit:
            break
        begin, stop = max(begin, offset), min(stop, limit)
        if begin == end and end:
            end = stop
            continue
        if end > start:
            yield start, end - start
        start, end = begin, stop
    if end > start:
        yield start, end - start


def cluster_bits_of(storage: Storage, geometry: Geometry, word: int) -> bytes:
    """One cluster of bits, whole, that a table entry stands for. Raises CorruptImage, StorageError."""
    kind, offset = decode_bitmap_entry(word, geometry)
    if kind is BitmapCluster.DATA:
        return storage.read(offset, geometry.cluster_size)
    return (b"\xff" if kind is BitmapCluster.ALL_ONES else b"\0") * geometry.cluster_size


def _ranges(
    storage: Storage, first: FirstCluster, bitmap: Bitmap, begin: int, limit: int
) -> Iterator[tuple[int, int]]:
    """(start, end) of what is marked by the table entries that concern the span; the outermost may exceed it."""
    geometry, size = first.header.geometry, first.header.size
    bits = geometry.cluster_size * 8
    span = bits * bitmap.granularity
    from_entry, to_entry = begin // span, min(div_ceil(limit, span), bitmap.table_size)
    at = bitmap.table_offset + from_entry * 8
    table = decode_bitmap_table(storage.read_exactly(at, max(to_entry - from_entry, 0) * 8), geometry, at=at)
    for index, word in enumerate(table, from_entry):
        kind, offset = decode_bitmap_entry(word, geometry)
        if kind is BitmapCluster.ALL_ONES:
            yield index * span, min((index + 1) * span, size)
        elif kind is BitmapCluster.DATA:
            data = storage.read(offset, geometry.cluster_size)
            for start, length in dirty_ranges(data, index * bits, bitmap.granularity, size):
                if start + length > begin:
                    yield start, start + length
