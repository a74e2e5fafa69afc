"""Whether an image was preallocated: many clusters referenced, few of them stored.

QEMU looks for holes inside data clusters only of such images, because asking the file system costs more than it
tells for others. The map must say the same as QEMU's, so this draws the line where QEMU draws it.
"""

from __future__ import annotations

from cowslice.errors import CowsliceError
from cowslice.format.header import Header
from cowslice.format.refcounts import refblock_offset, unpack_refblock
from cowslice.format.words import unpack_words
from cowslice.storage.base import Storage


def looks_preallocated(storage: Storage, header: Header) -> bool:
    """Return whether the file has clearly more counted clusters than stored ones: by a ninth and by two at least.

    Reads the refcount table and blocks of the file's own length. Damaged counts, and a storage that cannot say what
    it stores, are 'no'.
    """
    stored = storage.allocated()
    if stored is None:
        return False
    try:
        return _counted_reach(storage, header, least=_threshold(stored >> header.cluster_bits))
    except CowsliceError:
        return False


def _threshold(stored: int) -> int:
    return max(stored * 10 // 9, stored + 2)


def _counted_reach(storage: Storage, header: Header, *, least: int) -> bool:
    """Whether at least `least` host clusters inside the file have a count that is not zero."""
    geometry = header.geometry
    clusters = geometry.clusters(storage.length())
    if clusters < least:
        return False
    table = storage.read(header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)
    counted = 0
    for index, word in enumerate(unpack_words(table)):
        left = clusters - index * geometry.refblock_entries
        if left <= 0 or counted >= least:
            break
        if offset := refblock_offset(word, geometry):
            counts = unpack_refblock(storage.read(offset, geometry.cluster_size), header.refcount_order)[:left]
            counted += len(counts) - counts.count(0)
    return counted >= least
