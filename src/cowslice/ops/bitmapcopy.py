"""Copies the bitmaps of a disk into a copy of it: a new image under construction, or one that is there already.

It does not know how the bytes got there. A copy marks what its source marks, and is enabled if that is.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cowslice.errors import BadOption, CorruptImage, UnsupportedImage
from cowslice.format.bitmaps import (
    Bitmap,
    BitmapCluster,
    BitmapDirectory,
    BitmapFlags,
    bitmap_fault,
    bitmap_table_entries,
    encode_bitmap_directory,
    encode_bitmap_entry,
)
from cowslice.format.extensions import BitmapsPointer
from cowslice.format.findings import escaped
from cowslice.format.words import pack_words
from cowslice.image.dirtybits import DirtyBits
from cowslice.image.gate import shown

if TYPE_CHECKING:
    from cowslice.image.image import Image
    from cowslice.image.newimage import NewImage

Warn = Callable[[str], None]


def check_bitmaps(source: Image, *, skip_broken: bool) -> None:
    """Raise unless the bitmaps of a disk can be copied; with `skip_broken` those that cannot be used do not matter.

    Raises UnsupportedImage for a source that has none by its kind, CorruptImage for a bitmap that cannot be used.
    """
    name, header = shown(source.path), source.header
    if header is None or header.version < 3:
        raise UnsupportedImage(f"'{name}' is raw or of version 2, expected a qcow2 image that can have bitmaps",
                               features=("bitmaps in such an image",))
    if source.size != header.size:
        raise UnsupportedImage(f"the snapshot of '{name}' has {source.size} bytes, but its bitmaps describe a disk of "
                               f"{header.size}", features=("bitmaps of another size",))
    for bitmap in source.bitmaps:
        if _is_broken(bitmap) and not skip_broken:
            raise CorruptImage(f"bitmap '{escaped(bitmap.name)}' of '{name}' cannot be copied: "
                               f"{bitmap.fault or 'a writer did not finish it'}", structure="bitmap directory",
                               hint="--skip-broken-bitmaps copies the others, bitmap --remove forgets it.")


# -- into an image that is there --------------------------------------------------------------------------------------


def check_target(source: Image, target: Image) -> None:
    """Raise BadOption or UnsupportedImage where copies of the source's bitmaps cannot be added to `target`."""
    if target.header is None or target.header.version < 3:
        raise UnsupportedImage(f"'{shown(target.path)}' is raw or of version 2, expected a qcow2 image that can have "
                               "bitmaps", features=("bitmaps in such an image",))
    if source.size != target.size:
        raise BadOption(f"'{shown(target.path)}' has {target.size} bytes, expected the {source.size} that the bitmaps "
                        "describe")
    there = {bitmap.name for bitmap in target.bitmaps}
    for bitmap in source.bitmaps:
        if bitmap.name in there and not _is_broken(bitmap):
            raise BadOption(f"'{shown(target.path)}' has a bitmap '{escaped(bitmap.name)}' already, expected none of "
                            "that name", hint="bitmap --remove forgets it.")


def copy_bitmaps(source: Image, target: Image, *, warn: Warn) -> None:
    """Add the usable bitmaps of a disk to a copy that is open for writing. Raises BadOption and others."""
    for bitmap in _usable(source, warn):
        name = os.fsdecode(bitmap.name)
        target.add_bitmap(name, granularity=bitmap.granularity, enabled=False)
        target.merge_bitmap(name, name, source)
        if bitmap.flags & BitmapFlags.AUTO:
            target.enable_bitmap(name)


# -- into a new image -------------------------------------------------------------------------------------------------


def place_bitmaps(source: Image, target: NewImage, *, warn: Warn) -> None:
    """Lay copies of the usable bitmaps of a disk out in a new image of the same size, whose guest content is complete.

    Raises BadOption for a bitmap that is too large for the clusters of the target, the errors of reading and writing.
    """
    records = []
    for bitmap in _usable(source, warn):
        granularity_bits, geometry = bitmap.granularity_bits, target.geometry
        record = Bitmap(table_offset=geometry.cluster_size, granularity_bits=granularity_bits, name=bitmap.name,
                        table_size=bitmap_table_entries(target.header.size, granularity_bits, geometry),
                        flags=bitmap.flags & BitmapFlags.AUTO)
        if fault := bitmap_fault(record, geometry, target.header.size):
            raise BadOption(f"bitmap '{escaped(bitmap.name)}' cannot be copied: {fault}")
        ranges = source.dirty_extents(os.fsdecode(bitmap.name))
        records.append(replace(record, table_offset=_place_table(target, record, ranges)))
    if records:
        content = encode_bitmap_directory(BitmapDirectory(tuple(records)))
        target.bitmaps = BitmapsPointer(len(records), len(content), _place(target, content))


def _place_table(target: NewImage, record: Bitmap, ranges: Iterable[tuple[int, int]]) -> int:
    words = array("Q", bytes(8 * record.table_size))
    for index, content in _clusters_of_bits(ranges, record.granularity_bits, target.geometry.cluster_size):
        if content.count(b"\xff") == len(content):
            words[index] = encode_bitmap_entry(BitmapCluster.ALL_ONES)
        else:
            words[index] = encode_bitmap_entry(BitmapCluster.DATA, _place(target, content))
    return _place(target, pack_words(words))


def _place(target: NewImage, content: bytes) -> int:
    """Write a structure into clusters of its own; returns where."""
    geometry = target.geometry
    clusters = geometry.clusters(len(content))
    at = target.take(clusters) << geometry.cluster_bits
    target.storage.pwrite(at, content.ljust(clusters << geometry.cluster_bits, b"\0"))
    return at


def _clusters_of_bits(
    ranges: Iterable[tuple[int, int]], granularity_bits: int, cluster_size: int
) -> Iterator[tuple[int, bytes]]:
    """Yield (number, bits) of each cluster of bits in which ascending guest (offset, length) set any."""
    span = cluster_size * 8 << granularity_bits
    current, bits = -1, DirtyBits(span, granularity_bits)
    for index, start, length in _cut(ranges, span):
        if index != current and current >= 0:
            yield current, _read(bits, cluster_size)
            bits.clear()
        current = index
        bits.mark_span(start, length)
    if current >= 0:
        yield current, _read(bits, cluster_size)


def _cut(ranges: Iterable[tuple[int, int]], span: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number of the span, offset inside, length) of the parts of each (offset, length)."""
    for offset, length in ranges:
        while length:
            index, start = divmod(offset, span)
            part = min(length, span - start)
            yield index, start, part
            offset, length = offset + part, length - part


def _read(bits: DirtyBits, length: int) -> bytes:
    if bits.lost:
        raise MemoryError("no memory for the bits of a bitmap")
    return bits.read(0, length)


def _usable(source: Image, warn: Warn) -> Iterator[Bitmap]:
    for bitmap in source.bitmaps:
        if _is_broken(bitmap):
            warn(f"bitmap '{escaped(bitmap.name)}' cannot be used and is not copied")
        else:
            yield bitmap


def _is_broken(bitmap: Bitmap) -> bool:
    return bool(bitmap.fault) or bitmap.in_use
