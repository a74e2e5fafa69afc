"""The persistent bitmaps of an image that is open for writing: which of them note changes, and what they say.

It does not know how a change is made, only that it is told before. What must hold: invariant I10, a bitmap that notes
changes is in use on disk, stably, before the first of them, and is no longer only after its bits are stable and nobody
writes any more. Changes to bitmaps themselves are on disk when the image is closed.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace

from cowslice.errors import BadOption, UnsupportedImage
from cowslice.format.bitmaps import (
    Bitmap,
    BitmapDirectory,
    BitmapFlags,
    bitmap_fault,
    bitmap_table_entries,
    encode_bitmap_directory,
)
from cowslice.format.extensions import BitmapsPointer, ExtensionType, last_of
from cowslice.format.findings import escaped
from cowslice.format.header import Autoclear
from cowslice.format.limits import MAX_BITMAP_GRANULARITY_BITS, MAX_BITMAPS, MIN_BITMAP_GRANULARITY_BITS
from cowslice.image.bitmapload import FLAGS_AT, BitmapLoader
from cowslice.image.bitmaps import find_bitmap, joined_ranges
from cowslice.image.bitmapstoring import (
    data_places,
    place,
    place_bits,
    place_table,
    switch_bitmaps,
    with_bitmaps,
)
from cowslice.image.dirtybits import Marks
from cowslice.image.gate import shown
from cowslice.image.headerswitch import switch_header
from cowslice.image.markedbitmap import NOWHERE, MarkedBitmap
from cowslice.image.roots import Roots, alone
from cowslice.image.structures import Structure
from cowslice.image.writing import Writer
from cowslice.units import KiB

_FLAGS = struct.Struct(">I")


class Tracking:
    """The bitmaps of the image of `writer`; `marks` are told of each change. What changes them waits to be alone."""

    def __init__(self, writer: Writer, marks: Marks) -> None:
        self.writer = writer
        self.layer = writer.layer
        self.marks = marks
        self.warning = ""
        self._geometry = writer.layer.geometry
        self._all: list[MarkedBitmap] = []
        self._gone: list[MarkedBitmap] = []
        self._directory = (0, 0)
        self._changed = False
        self._open()

    @property
    def bitmaps(self) -> tuple[Bitmap, ...]:
        """All records as they are now: in use are only those that cannot be used any more."""
        return tuple(one.record for one in self._all)

    # -- opening ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Take the bitmaps over, and say on disk of those that will change that they are in use (I10)."""
        first = self.layer.first
        if last_of(first.extensions, ExtensionType.BITMAPS) is None:
            return
        if not first.header.autoclear & Autoclear.BITMAPS:
            self.warning = (f"the bitmaps of '{shown(self.layer.name)}' are out of date and are ignored: a program "
                            "that does not know them has written since")
            return
        pointer = first.bitmaps
        loaded = None if pointer is None else BitmapLoader(self.writer).load(pointer)
        if pointer is None or loaded is None:
            self._dismiss()
            return
        self._directory = pointer.directory_offset, pointer.directory_size
        self._all = [MarkedBitmap(self.layer, one.record, one.at, one.record.flags, one.words, one.words)
                     for one in loaded]
        self._put_in_use([one for one in self._all if one.record.flags & BitmapFlags.AUTO])
        self._update_marks()

    def _dismiss(self) -> None:
        """What may be in a directory that cannot be understood will miss changes: never take it as true (I7)."""
        header = self.layer.first.header
        self.warning = (f"the bitmaps of '{shown(self.layer.name)}' cannot be understood, so that they are given up: "
                        "they would miss what is written")
        switch_header(self.layer, autoclear=header.autoclear & Autoclear.RAW_EXTERNAL)

    def _put_in_use(self, some: Iterable[MarkedBitmap]) -> None:
        """Say on disk, stably, that these are not to be trusted. Each is one sector: what is torn is only early."""
        wanted = [one for one in some if one.at != NOWHERE and not one.flags & BitmapFlags.IN_USE]
        for one in wanted:
            self._put_flags(one, one.flags | BitmapFlags.IN_USE)
        if wanted:
            self._changed = True
            self.writer.commits.sync()

    def _put_flags(self, one: MarkedBitmap, flags: BitmapFlags) -> None:
        self.layer.storage.pwrite(one.at + FLAGS_AT, _FLAGS.pack(flags))
        one.flags = flags

    def _update_marks(self) -> None:
        """Let exactly the enabled bitmaps be told of changes."""
        enabled = [one.marks() for one in self._all if one.enabled]
        self.marks.assign(enabled)
        self.writer.track = self.marks.mark_span if enabled else None

    # -- what they say ----------------------------------------------------------------------------------------------

    def ranges(self, name: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the guest (offset, length) that the bitmap marks inside the span, ascending and merged.

        What is changed meanwhile may be there or not. Raises BadOption, CorruptImage, StorageError.
        """
        one = self._usable(name)
        return joined_ranges(one.pieces(offset, offset + length), offset, min(offset + length, self.layer.size))

    # -- changing them ----------------------------------------------------------------------------------------------

    def add(self, name: str, *, granularity: int | None, enabled: bool) -> None:
        """Add a bitmap without any bit. Raises BadOption, UnsupportedImage."""
        cluster_size = self._geometry.cluster_size
        chosen = min(max(cluster_size, 4 * KiB), 64 * KiB) if granularity is None else granularity
        least, most = 1 << MIN_BITMAP_GRANULARITY_BITS, 1 << MAX_BITMAP_GRANULARITY_BITS
        if not least <= chosen <= most or chosen & (chosen - 1):
            raise BadOption(f"granularity is {chosen}, expected a power of two from {least} to {most}")
        if self.layer.first.header.version < 3:
            raise UnsupportedImage(f"'{shown(self.layer.name)}' is of version 2, which has no bitmaps",
                                   features=("bitmaps in version 2",))
        with alone(self.writer):
            self._check_name(name)
            bits = chosen.bit_length() - 1
            flags = BitmapFlags.AUTO if enabled else BitmapFlags(0)
            entries = bitmap_table_entries(self.layer.size, bits, self._geometry)
            record = Bitmap(table_offset=cluster_size, table_size=entries, granularity_bits=bits,
                            name=os.fsencode(name), flags=flags)
            if fault := bitmap_fault(record, self._geometry, self.layer.size):
                raise BadOption(f"bitmap '{escaped(record.name)}' cannot be: {fault}")
            with_bitmaps(self.layer.first, BitmapsPointer(1, 1, cluster_size))  # raises where there is no room for it
            self._all.append(MarkedBitmap(self.layer, record, NOWHERE, flags, None, array("Q")))
            self._changed = True
            self._update_marks()

    def _check_name(self, name: str) -> None:
        if any(one.record.name == os.fsencode(name) for one in self._all):
            raise BadOption(f"bitmap '{escaped(os.fsencode(name))}' exists already, expected another name")
        if len(self._all) >= MAX_BITMAPS:
            raise BadOption(f"the image has {len(self._all)} bitmaps, expected at most {MAX_BITMAPS}")

    def remove(self, name: str) -> None:
        """Forget a bitmap, an unusable one too. Raises BadOption."""
        with alone(self.writer):
            one = self._named(name)
            self._all.remove(one)
            self._gone.append(one)
            self._changed = True
            self._update_marks()

    def clear(self, name: str) -> None:
        """Let a bitmap mark nothing. Raises BadOption, CorruptImage."""
        with alone(self.writer):
            self._usable(name).clear()
            self._changed = True

    def enable(self, name: str, *, enabled: bool) -> None:
        """Let a bitmap note changes from now on, or note none. Raises BadOption, CorruptImage, StorageError."""
        with alone(self.writer):
            one = self._usable(name)
            if enabled:
                self._put_in_use([one])
            flags = one.record.flags & ~BitmapFlags.AUTO
            one.record = replace(one.record, flags=flags | BitmapFlags.AUTO if enabled else flags)
            self._changed = True
            self._update_marks()

    def merge(self, name: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Mark the (offset, length) in a bitmap too. Raises BadOption, CorruptImage, and what `ranges` raises."""
        with alone(self.writer):
            one = self._usable(name)
            bits = one.marks()
            self._changed = True
            for offset, length in ranges:
                bits.mark_span(offset, length)

    def _named(self, name: str) -> MarkedBitmap:
        record = find_bitmap(self.bitmaps, name)
        return next(one for one in self._all if one.record is record)

    def _usable(self, name: str) -> MarkedBitmap:
        one = self._named(name)
        one.check_sound()
        return one

    # -- another size -----------------------------------------------------------------------------------------------

    def resizing(self, size: int) -> None:
        """The disk will have `size` bytes. Nobody else is inside.

        Until they are stored, tables have the former length: so all are in use.
        Raises UnsupportedImage where a bitmap cannot follow, CorruptImage where one cannot be used.
        """
        if size == self.layer.size:
            return
        for one in self._all:
            one.check_sound()
            entries = bitmap_table_entries(size, one.record.granularity_bits, self._geometry)
            if fault := bitmap_fault(replace(one.record, table_size=entries), self._geometry, size):
                raise UnsupportedImage(f"bitmap '{escaped(one.record.name)}' cannot describe {size} bytes: {fault}",
                                       features=("bitmap of that size",))
        self._put_in_use(self._all)
        for one in self._all:
            if one.bits is not None:
                one.bits.resize(max(size, self.layer.size))

    def resized(self, size: int) -> None:
        """The disk has `size` bytes now: bits behind them are forgotten. Nobody else is inside."""
        for one in self._all:
            if one.sound:
                one.resize(size)

    # -- storing ----------------------------------------------------------------------------------------------------

    def store(self) -> None:
        """Write all that has changed, so that nothing that is sound is in use any more. The last call.

        Raises NoSpace, StorageError; then those that have changed stay in use.
        """
        if not self._changed or self.writer.commits.fault is not None:
            return
        with alone(self.writer) as roots:
            roots.commit()
            self._changed = False
            if self._only_flags():
                self._put_all_flags(roots)
            else:
                self._store(roots)

    def _only_flags(self) -> bool:
        return not self._gone and all(one.at != NOWHERE and one.as_stored for one in self._all)

    def _put_all_flags(self, roots: Roots) -> None:
        """Each is one sector: after a crash some are still in use, which are right all the same."""
        for one in self._all:
            self._put_flags(one, one.flags_to_store)
        roots.sync()

    def _store(self, roots: Roots) -> None:
        with ExitStack() as undo:
            records, tables = [], []
            for one in self._all:
                record, words = self._placed(roots, one, undo)
                records.append(record)
                tables.append(words)
            content = encode_bitmap_directory(BitmapDirectory(tuple(records)))
            at = place(roots, content, Structure.BITMAP_DIRECTORY, undo) if records else 0
            pointer = BitmapsPointer(len(records), len(content), at) if records else None
            first = with_bitmaps(self.layer.first, pointer)
            roots.commit()
            undo.pop_all()
        self.writer.commits.switch(lambda: switch_bitmaps(self.layer, first))
        self._forget_former(roots, tables)
        roots.commit()

    def _placed(self, roots: Roots, one: MarkedBitmap, undo: ExitStack) -> tuple[Bitmap, array[int] | None]:
        """The record of a bitmap, whose table is written anew unless it stands there already; and that table."""
        record = replace(one.record, flags=one.flags_to_store)
        if one.at != NOWHERE and one.as_stored:
            return record, one.stored
        words = array("Q", (self._placed_bits(roots, one, index, undo) for index in range(one.entries)))
        return replace(record, table_offset=place_table(roots, words, undo), table_size=len(words)), words

    def _placed_bits(self, roots: Roots, one: MarkedBitmap, index: int, undo: ExitStack) -> int:
        if not one.is_touched(index):
            return one.word(index)
        return place_bits(roots, one.content(index), undo)

    def _forget_former(self, roots: Roots, tables: list[array[int] | None]) -> None:
        """Free what no bitmap names any more. What could not be understood is left to a repair."""
        for one, words in [*zip(self._all, tables, strict=True), *((one, None) for one in self._gone)]:
            if one.stored is None or words is one.stored:
                continue
            kept = set(data_places(words or (), self._geometry))
            for offset in data_places(one.stored, self._geometry):
                if offset not in kept:
                    roots.forget(offset, self._geometry.cluster_size)
            roots.forget(one.record.table_offset, 8 * len(one.stored))
        roots.forget(*self._directory)
