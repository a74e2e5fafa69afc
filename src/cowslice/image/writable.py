"""Opening an image for writing: what must hold before the first write, and the parts that write.

It does not read or write guest bytes. What must hold: an image marked corrupt is not written; metadata that guest
bytes must never overwrite is fenced; autoclear bits that are not kept true are off on disk before any change (I7).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cowslice.errors import CorruptImage, ReadOnly, UnsupportedImage
from cowslice.format.entries import L1_OFFSET_MASK
from cowslice.format.header import Autoclear
from cowslice.format.words import unpack_words
from cowslice.image.allocator import Allocator
from cowslice.image.chain import Chain, open_chain
from cowslice.image.commit import Commits
from cowslice.image.dirtybits import Marks
from cowslice.image.fastpath import FastPath
from cowslice.image.fences import Fences
from cowslice.image.freespace import FreeSpace
from cowslice.image.gate import shown
from cowslice.image.headerswitch import switch_header
from cowslice.image.layer import Layer
from cowslice.image.options import OpenOptions, Source
from cowslice.image.passage import Passage
from cowslice.image.punching import Punching
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.image.refcounts import Refcounts
from cowslice.image.snapshots import load_snapshots
from cowslice.image.structures import Structure
from cowslice.image.tables import Tables
from cowslice.image.tracking import Tracking
from cowslice.image.writes import Qcow2Writes, RawWrites, Writes
from cowslice.image.writing import Writer

if TYPE_CHECKING:
    from cowslice.cache.slicemap import SliceMap

_KEPT_TRUE = Autoclear.BITMAPS | Autoclear.RAW_EXTERNAL


def open_writes(chain: Chain, options: OpenOptions, fast: FastPath | None) -> Writes:
    """The changing half of a chain whose top file is open for writing. Raises ImageError, StorageError.

    Without a compiled path the caller changes bitmaps only.
    """
    top = chain.layers[0]
    if not isinstance(top, Qcow2Layer):
        passage, fences = Passage(), Fences()
        if fast is not None:
            fast.make_writable(passage, fences)
        return RawWrites(top, passage, _ignore if fast is None else fast.resize)
    writer = _writer_of(chain, options)
    if fast is not None:
        fast.make_writable(writer.tables.passage, writer.tables.fences)
        fast.supply_writes(writer.claims, writer.tables.allocator.supply, writer.provide)
        fast.writes_in_place = options.detect_zeroes == "off"
        writer.commits.refused = fast.stop_writing
    return Qcow2Writes(writer, _tracking(writer, options, fast),
                       keep_reference=options.discard_no_unref)


def _tracking(writer: Writer, options: OpenOptions, fast: FastPath | None) -> Tracking:
    """The bitmaps of the image, told of every change and of every size."""
    tracking = Tracking(writer, Marks() if fast is None else fast.marks)
    if tracking.warning and options.on_warning is not None:
        options.on_warning(tracking.warning)

    def resized(size: int) -> None:
        if fast is not None:
            fast.resize(size)
        tracking.resized(size)

    writer.resizing, writer.resized = tracking.resizing, resized
    return tracking


def _ignore(size: int) -> None:
    """Nobody needs to know."""


@contextmanager
def opened_writer(source: Source, options: OpenOptions) -> Iterator[Writer]:
    """The writer of an image that nobody reads meanwhile, for changes of its metadata; closed clean at the end.

    Raises the errors of opening, and StorageError.
    """
    chain = open_chain(source, options, options.on_warning or _unheard)
    with chain.stack:
        writer = _writer_of(chain, options)
        try:
            yield writer
        finally:
            if writer.commits.fault is None:
                writer.commits.finish()


def _writer_of(chain: Chain, options: OpenOptions) -> Writer:
    return open_writer(chain.layers, refcount_budget=chain.refcount_budget, slice_budget=chain.cache.budget,
                       punching=options.punching)


def _unheard(warning: str) -> None:
    """Nobody asked."""


def open_writer(layers: Sequence[Layer], *, refcount_budget: int, slice_budget: int, punching: Punching) -> Writer:
    """The writer of the top layer, a Qcow2Layer whose storage is writable. Raises ImageError, StorageError."""
    layer = layers[0]
    assert isinstance(layer, Qcow2Layer)
    check_writable(layer)
    fences = Fences()
    fence_metadata(fences, layer)
    header = layer.first.header
    refcounts = Refcounts(layer.storage, header, header.geometry, budget_bytes=refcount_budget, fences=fences)
    freespace = FreeSpace(refcounts, layer.storage, header.geometry)
    allocator = Allocator(refcounts, freespace, fences, header.geometry, layer.storage)
    _clear_unknown(layer)  # last: an image that is refused stays as it is
    slices: SliceMap = layer.slices  # type: ignore[assignment]
    tables = Tables(layer, slices, refcounts, allocator, fences=fences, passage=Passage(), punching=punching)
    return Writer(layers, tables, Commits(tables), dirty_bytes=max(slice_budget // 4, 64 * 1024))


def check_writable(layer: Qcow2Layer) -> None:
    """Raise unless the image may be written."""
    name, header = shown(layer.name), layer.first.header
    if not layer.storage.writable:
        raise ReadOnly(f"cannot write to '{name}': it was opened for reading only")
    if header.is_corrupt:
        raise CorruptImage(f"'{name}' is marked corrupt, so it can only be read", structure="header",
                           hint="Repair it with `cowslice check -r all`, or read it.")
    if header.is_dirty:
        raise CorruptImage(f"'{name}' was not closed by its last writer, and its refcounts may be stale",
                           structure="refcounts", hint="Repair it with `cowslice check -r all`.")
    if header.has_data_file and header.snapshot_count:
        raise UnsupportedImage(f"'{name}' has snapshots and an external data file, expected only one of them",
                               features=("snapshot with external data file",))


def _clear_unknown(layer: Qcow2Layer) -> None:
    """Take off autoclear bits that we do not keep true (I7). Raises StorageError."""
    autoclear = layer.first.header.autoclear
    if autoclear & _KEPT_TRUE != autoclear:  # not `& ~`: that has only the bits that we know
        switch_header(layer, autoclear=autoclear & _KEPT_TRUE)


def fence_metadata(fences: Fences, layer: Qcow2Layer) -> None:
    """Fence all that guest bytes must never overwrite, but the refcount structures, which Refcounts knows."""
    header, geometry = layer.first.header, layer.first.header.geometry
    size = geometry.cluster_size
    fences.add(0, size, Structure.HEADER)
    _fence(fences, header.l1_table_offset, header.l1_size * 8, size, Structure.L1_TABLE)
    for word in unpack_words(layer.l1):
        if word & L1_OFFSET_MASK:
            _fence(fences, word & L1_OFFSET_MASK, size, size, Structure.L2_TABLE)
    if header.snapshot_count:
        snapshots = load_snapshots(layer.storage, header)
        length = sum(one.encoded_length for one in snapshots)
        _fence(fences, header.snapshots_offset, length, size, Structure.SNAPSHOT_TABLE)
        for one in snapshots:
            _fence(fences, one.l1_offset, one.l1_size * 8, size, Structure.SNAPSHOT_L1)
    if crypto := layer.first.crypto:
        _fence(fences, crypto.offset, crypto.length, size, Structure.CRYPTO_HEADER)


def _fence(fences: Fences, offset: int, length: int, size: int, kind: Structure) -> None:
    """Whole clusters. Raises CorruptImage where two structures claim one: nothing there is safe to write."""
    if not length:
        return
    start = offset // size * size
    whole = -(-(offset + length - start) // size) * size
    found = fences.hit(start, whole)
    if found is not None:
        raise CorruptImage(f"{kind.label} at {offset:#x} lies on {Structure(found[2]).label}, expected each in "
                           "clusters of its own", structure=kind.label, offset=offset,
                           hint="Repair it with `cowslice check -r all`.")
    fences.add(start, whole, kind)
