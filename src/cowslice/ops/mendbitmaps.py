"""What a repair does about bitmaps: those that are damaged go, the others stay, and one damaged never spoils another.

It does not know counts: what a bitmap leaves behind is leaked and found by the next count. What must hold: while the
directory changes, the header says that there are no bitmaps, so that nobody takes half of it for true.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cowslice.errors import CowsliceError
from cowslice.format.bitmaps import (
    Bitmap,
    BitmapCluster,
    BitmapDirectory,
    decode_bitmap_directory,
    decode_bitmap_entry,
    encode_bitmap_directory,
    is_foreign,
)
from cowslice.format.extensions import BitmapsPointer, ExtensionType, with_extension
from cowslice.format.findings import escaped
from cowslice.format.first_cluster import FirstCluster, encode_first_cluster
from cowslice.format.header import Autoclear
from cowslice.format.words import unpack_words
from cowslice.ops.dataruns import DataRuns
from cowslice.ops.overlay import Overlay, Stage
from cowslice.ops.references import load_tables, stored_count
from cowslice.ops.tables import Tables
from cowslice.units import KiB

_PIECE = 64 * KiB


def mend_bitmaps(overlay: Overlay, left: list[str]) -> bool:
    """Plan a directory without damaged bitmaps: whether there is one. What stands in the way is added to `left`.

    A bitmap of a kind that is not known here is not damaged, and stays. Raises StorageError.
    """
    tables = load_tables(overlay)
    pointer = tables.first.bitmaps
    if pointer is None:
        return False
    length = max(0, min(pointer.directory_size, tables.file_length - pointer.directory_offset))
    directory = decode_bitmap_directory(tables.storage.read(pointer.directory_offset, length), pointer.count,
                                        tables.geometry, tables.header.size, at=pointer.directory_offset)
    kept = [bitmap for bitmap in directory.bitmaps if not _is_damaged(tables, bitmap)]
    if len(kept) == pointer.count and not directory.rest:
        return False
    if kept and not _is_owned(tables, pointer):
        left.append("the bitmap directory lies in a cluster that is used for something else too")
        return False
    gone = [f"'{escaped(one.name)}'" for one in directory.bitmaps if one not in kept]
    _plan(overlay, tables.first, pointer, kept, f"without the damaged bitmaps {', '.join(gone)}" if gone else
          "as far as it can be read")
    return True


def _plan(overlay: Overlay, first: FirstCluster, pointer: BitmapsPointer, kept: list[Bitmap], why: str) -> None:
    header = first.header
    off = replace(first, header=replace(header, autoclear=header.autoclear & ~Autoclear.BITMAPS))
    overlay.change(Stage.RAISE, 0, encode_first_cluster(off), "no bitmaps while their directory changes" if kept else
                   "no bitmap can be used")
    if not kept:
        return
    content = encode_bitmap_directory(BitmapDirectory(tuple(kept)))
    overlay.change(Stage.SWITCH, pointer.directory_offset, content.ljust(pointer.directory_size, b"\0"),
                   f"the bitmap directory {why}")
    shorter = replace(pointer, count=len(kept), directory_size=len(content)).encode()
    extensions = with_extension(off.extensions, ExtensionType.BITMAPS, shorter.payload)
    overlay.change(Stage.SWITCH, 0, encode_first_cluster(replace(off, extensions=extensions)),
                   f"the header names the bitmap directory {why}")
    overlay.change(Stage.MEND, 0, encode_first_cluster(replace(first, extensions=extensions)), "bitmaps again")


def _is_owned(tables: Tables, pointer: BitmapsPointer) -> bool:
    """Whether the directory has its clusters for itself, as far as counts tell."""
    bits = tables.geometry.cluster_bits
    first, last = pointer.directory_offset, pointer.directory_offset + pointer.directory_size - 1
    return all(stored_count(tables, cluster) == 1 for cluster in range(first >> bits, (last >> bits) + 1))


def _is_damaged(tables: Tables, bitmap: Bitmap) -> bool:
    if bitmap.fault:
        return not is_foreign(bitmap)
    if bitmap.table_offset + bitmap.table_size * 8 > tables.file_length:
        return True
    try:
        return any(offset >= tables.file_length for offset in _places(tables, bitmap))
    except CowsliceError:
        return True


def _places(tables: Tables, bitmap: Bitmap) -> Iterator[int]:
    """The host offsets of its clusters of bits. Raises CorruptImage for an entry that cannot be, StorageError."""
    end = bitmap.table_offset + bitmap.table_size * 8
    for start, stop in DataRuns(tables.storage).within(bitmap.table_offset, end):
        for at in range(start, stop, _PIECE):
            for word in unpack_words(tables.storage.read(at, min(_PIECE, stop - at))):
                kind, offset = decode_bitmap_entry(word, tables.geometry, at=at)
                if kind is BitmapCluster.DATA:
                    yield offset
