"""How large an image would be: empty, or with the content of a disk, and when every cluster is allocated.

It reads metadata only. The arithmetic is that of `qemu-img measure`, so that both promise the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from cowslice.errors import BadOption
from cowslice.format.bitmaps import Bitmap
from cowslice.format.geometry import Geometry
from cowslice.format.limits import MAX_L1_BYTES
from cowslice.image.createoptions import CreateOptions
from cowslice.image.image import Image
from cowslice.image.keymaking import choices_of, header_bytes
from cowslice.units import SECTOR, div_ceil, round_up

_BITMAP_RECORD = 24  # bytes of a directory record before the name (spec: Bitmap directory entry)


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of the file with the content that is there, with every cluster, and of bitmaps (None: none can be kept)."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None


def measure(options: CreateOptions, *, size: int | None = None, source: Image | None = None) -> Measured:
    """What an image made with `options` takes, for an empty disk of `size` guest bytes or a copy of `source`.

    Raises BadOption for a disk that no such image can hold, and the errors of reading the source's map.
    """
    if (size is None) == (source is None):
        raise BadOption("measure needs either a size or a source, expected one of them")
    guest = round_up(source.size if source is not None else size or 0, SECTOR)
    if options.format == "raw":
        return Measured(guest, guest)
    geometry = options.geometry
    full = _fully_allocated(guest, options)
    content = _content(guest, options, source)
    bitmaps = _bitmaps(source, geometry) if source is not None and options.version >= 3 else None
    return Measured(full - round_up(guest, geometry.cluster_size) + content, full, bitmaps)


def _fully_allocated(guest: int, options: CreateOptions) -> int:
    geometry = options.geometry
    tables = div_ceil(geometry.clusters(guest), geometry.l2_entries)
    if tables * 8 > MAX_L1_BYTES:
        options.check_size(guest)
    clusters = 1 + tables + geometry.clusters(tables * 8) + geometry.clusters(guest)
    clusters += _refcount_clusters(clusters, geometry)
    return (clusters << geometry.cluster_bits) + round_up(_crypto_bytes(options), geometry.cluster_size)


def _refcount_clusters(others: int, geometry: Geometry) -> int:
    """Clusters of blocks and table that count `others` clusters and themselves."""
    table = blocks = before = 0
    while True:
        blocks = div_ceil(others + table + blocks, geometry.refblock_entries)
        table = geometry.clusters(blocks * 8)
        if table + blocks == before:
            return before
        before = table + blocks


def _content(guest: int, options: CreateOptions, source: Image | None) -> int:
    """Bytes of clusters that get data at once."""
    if options.preallocation in ("falloc", "full"):
        return round_up(guest, options.geometry.cluster_size)
    if source is None:
        return 0
    if options.backing_file is not None:  # which part of the source the backing file has nobody knows
        return round_up(guest, options.geometry.cluster_size)
    return _stored(source, options.geometry.cluster_size)


def _stored(source: Image, cluster_size: int) -> int:
    """Bytes of clusters of the target that hold any data of the source."""
    total = done = 0
    for extent in source.extents():
        if extent.zero or not extent.data or extent.end <= done:
            continue
        start = max(extent.start // cluster_size * cluster_size, done)
        done = round_up(extent.end, cluster_size)
        total += done - start
    return total


def _crypto_bytes(options: CreateOptions) -> int:
    if options.encryption != "luks":
        return 0
    return header_bytes(choices_of(options))


def _bitmaps(source: Image, geometry: Geometry) -> int | None:
    """Bytes that copies of the source's bitmaps take, of those in use as well; None where it cannot have any."""
    if source.header is None or source.header.version < 3:
        return None
    kept = [bitmap for bitmap in source.bitmaps if bitmap.usable]
    size = geometry.cluster_size
    directory = sum(round_up(_BITMAP_RECORD + len(bitmap.name), 8) for bitmap in kept)
    return sum(_bitmap_bytes(source.size, bitmap, geometry) for bitmap in kept) + round_up(directory, size)


def _bitmap_bytes(guest: int, bitmap: Bitmap, geometry: Geometry) -> int:
    bits = div_ceil(guest, bitmap.granularity)
    clusters = geometry.clusters(div_ceil(bits, 8))
    return (clusters << geometry.cluster_bits) + round_up(clusters * 8, geometry.cluster_size)
