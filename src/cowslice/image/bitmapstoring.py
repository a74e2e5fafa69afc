"""Puts bitmaps into host clusters of their own, and switches the header to them; all while nobody else is inside.

It does not know what the bits mean. What must hold: table, bits and directory are complete and stable, with their
counts, before the header names them (I4, I5), and the former ones are freed only after it does not (I3).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from cowslice.format.bitmaps import BitmapCluster, decode_bitmap_entry, encode_bitmap_entry
from cowslice.format.extensions import BitmapsPointer, ExtensionType, with_extension
from cowslice.format.first_cluster import FirstCluster
from cowslice.format.geometry import Geometry
from cowslice.format.header import Autoclear
from cowslice.format.words import pack_words
from cowslice.image.headerswitch import is_whole, rearranged, switch_first_cluster, switch_header
from cowslice.image.roots import Roots
from cowslice.image.structures import Structure

if TYPE_CHECKING:
    from cowslice.image.qcow2 import Qcow2Layer


def place(roots: Roots, content: bytes, kind: Structure, undo: ExitStack) -> int:
    """Write a structure to a new place, which is given back if `undo` comes to it; returns where."""
    at = roots.place(content, kind)
    undo.callback(roots.forget, at, len(content))
    return at


def place_bits(roots: Roots, content: bytes, undo: ExitStack) -> int:
    """The table entry for one cluster of bits: said where it can be, else written to a new place."""
    if not any(content):
        return encode_bitmap_entry(BitmapCluster.ALL_ZEROS)
    if content.count(b"\xff") == len(content):
        return encode_bitmap_entry(BitmapCluster.ALL_ONES)
    return encode_bitmap_entry(BitmapCluster.DATA, place(roots, content, Structure.BITMAP_DATA, undo))


def place_table(roots: Roots, words: array[int], undo: ExitStack) -> int:
    """Write a table to a new place; returns where."""
    return place(roots, pack_words(words), Structure.BITMAP_TABLE, undo)


def data_places(words: Iterable[int], geometry: Geometry) -> Iterator[int]:
    """The host offsets of the clusters of bits that a table names."""
    for word in words:
        kind, offset = decode_bitmap_entry(word, geometry)
        if kind is BitmapCluster.DATA:
            yield offset


def with_bitmaps(first: FirstCluster, pointer: BitmapsPointer | None) -> FirstCluster:
    """The first cluster that names this directory, or says that there are no bitmaps. Raises BadOption without room."""
    kept = first.header.autoclear & Autoclear.RAW_EXTERNAL
    autoclear = kept if pointer is None else kept | Autoclear.BITMAPS
    payload = None if pointer is None else pointer.encode().payload
    extensions = with_extension(first.extensions, ExtensionType.BITMAPS, payload)
    return rearranged(first, header=replace(first.header, autoclear=autoclear), extensions=extensions)


def switch_bitmaps(layer: Qcow2Layer, first: FirstCluster) -> None:
    """Let the image have the bitmaps that `first` names, stably. Raises StorageError.

    Where they could be torn from their pointer, bitmaps are off in between.
    """
    if layer.first.header.autoclear & Autoclear.BITMAPS and not is_whole(layer.first, first):
        switch_header(layer, autoclear=layer.first.header.autoclear & Autoclear.RAW_EXTERNAL)
    switch_first_cluster(layer, first)
