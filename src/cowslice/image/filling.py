"""Preallocation: gives every guest cluster of a new image its host cluster, and the host clusters their space.

It does not know what a guest will write. Host clusters follow each other in guest order.
"""

from __future__ import annotations

from array import array

from cowslice.format.entries import ALL_SUBCLUSTERS, COPIED, encode_bitmap
from cowslice.format.words import pack_words
from cowslice.image.newimage import NewImage
from cowslice.storage.base import Storage
from cowslice.units import MiB

_ZEROS = bytes(MiB)


def preallocate(image: NewImage, mode: str, *, visible: bool = False) -> None:
    """Map the whole disk. `mode` is "metadata", "falloc" or "full", as in QEMU.

    With extended L2 entries subclusters have space but no content, so that a backing file shows through, unless they
    are to be `visible`. Raises StorageError, BadOption where the format cannot count so many clusters.
    """
    geometry = image.geometry
    size, bits = image.header.size, geometry.cluster_bits
    tables = image.take(image.header.l1_size)
    clusters = geometry.clusters(size)
    first = 0 if image.has_data_file else image.take(clusters) << bits
    if not image.has_data_file:
        if not image.blank:
            image.storage.zero(first, clusters << bits)
        provide_space(image.storage, mode, first, clusters << bits)
    for index in range(image.header.l1_size):
        start = first + index * geometry.l2_span
        end = min(start + geometry.l2_span, first + (clusters << bits))
        image.link(index, tables + index, _table(image, start, end, visible=visible))


def provide_space(storage: Storage, mode: str, offset: int, length: int) -> None:
    """Give the span, which reads as zeros, its space: "falloc" asks the file system, "full" writes zeros."""
    if mode == "falloc":
        storage.allocate(offset, length)
    elif mode == "full":
        for at in range(offset, offset + length, len(_ZEROS)):
            storage.pwrite(at, memoryview(_ZEROS)[: min(len(_ZEROS), offset + length - at)])


def _table(image: NewImage, start: int, end: int, *, visible: bool) -> bytes:
    """The L2 table whose clusters lie at the host bytes from `start` to `end`."""
    geometry = image.geometry
    words = array("Q", range(COPIED | start, COPIED | end, geometry.cluster_size))
    if geometry.extended_l2:
        bitmap = encode_bitmap(ALL_SUBCLUSTERS if visible else 0, 0)
        pairs = array("Q", bytes(16 * len(words)))
        pairs[::2], pairs[1::2] = words, array("Q", [bitmap]) * len(words)
        words = pairs
    return pack_words(words).ljust(geometry.cluster_size, b"\0")
