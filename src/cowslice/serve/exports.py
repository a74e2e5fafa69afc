"""What a client can ask for by name: an open image, its description, and what can be said about its parts.

It knows no socket and encodes nothing. Bitmaps are read where they are asked, never as a whole: one may be larger than
memory; a description of parts is bounded in extents and in time, and always makes progress.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowslice.errors import BadOption, LocalProtocolError
from cowslice.format.bitmaps import Bitmap, BitmapFlags
from cowslice.format.findings import escaped
from cowslice.image.bitmaps import dirty_extents, load_bitmaps
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.nbd.events import BlockSizes, export_flags
from cowslice.nbd.events import Export as Offer
from cowslice.nbd.wire import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, STATE_DIRTY, STATE_HOLE, STATE_ZERO

if TYPE_CHECKING:
    from cowslice.image.fastpath import FastPath
    from cowslice.image.image import Image
    from cowslice.image.mapping import Extent

MOST_SECONDS = 0.25  # that one description may take; a client asks on from where it ends
WINDOW = 1 << 12  # clusters that are looked at before the clock is: some 20 ms where every one is an extent of its own
RAW_CLUSTER = 1 << 16  # of a raw file, which has none

State = tuple[int, int]  # length in bytes, flags


@dataclass(frozen=True, slots=True)
class ExportedBitmap:
    """A dirty bitmap of the layer that holds it; a layer may be shorter than the disk.

    That of a `disk` which is open for writing is asked of it, so that it shows what is written meanwhile.
    """

    layer: Qcow2Layer
    bitmap: Bitmap
    disk: Image | None = None

    def states(self, offset: int, length: int) -> Iterator[State]:
        """Yield what the span is made of, dirty and clean, in order."""
        at, end = offset, offset + length
        for start, dirty in self._found(offset, length):
            if start > at:
                yield start - at, 0
            yield dirty, STATE_DIRTY
            at = start + dirty
        if at < end:
            yield end - at, 0

    def _found(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        if self.disk is not None:
            return self.disk.dirty_extents(os.fsdecode(self.bitmap.name), offset, length)
        return dirty_extents(self.layer.storage, self.layer.first, self.bitmap, offset=offset, length=length)


class Export:
    """One image under one name; the empty name is the default export.

    `allocation_depth` also offers that context, `bitmaps` those dirty bitmaps, found in the chain from the top down.
    `max_request` bounds the payload of a request in bytes. `writable` lets clients write, if the image was opened so: a
    flush on one connection covers what all have written, so `multi_conn` is true for it too. With `writethrough` a
    change is stable before it is answered. The image stays the caller's, and must stay open meanwhile.
    Raises BadOption for a bitmap that is not there, damaged or in use, and for text that the protocol cannot carry.
    """

    def __init__(
        self, disk: Image, name: str = "", *, description: str = "", allocation_depth: bool = False,
        bitmaps: Sequence[str] = (), multi_conn: bool = True, max_request: int = BlockSizes().maximum,
        writable: bool = False, writethrough: bool = False,
    ) -> None:
        if writable and not disk.writable:
            raise BadOption(f"'{disk.path}' was opened for reading only, so it cannot be served for writing")
        self.disk = disk
        self.name = name
        self.writable = writable
        self.writethrough = writethrough
        self._bitmaps = {DIRTY_BITMAP + wanted: find_bitmap(disk, wanted, live=writable) for wanted in bitmaps}
        depth = (ALLOCATION_DEPTH,) if allocation_depth else ()
        try:
            self.offer = Offer(
                name, disk.size, flags=export_flags(writable=writable, multi_conn=multi_conn), description=description,
                block_sizes=BlockSizes(maximum=max_request), contexts=(BASE_ALLOCATION, *depth, *self._bitmaps))
        except LocalProtocolError as fault:
            raise BadOption(str(fault)) from None

    @property
    def fast(self) -> FastPath | None:
        """The compiled path of the disk, or None."""
        return self.disk.fast_path

    def states(self, context: str, offset: int, length: int, *, most: int) -> list[State]:
        """What a metadata context says about the span: at most `most` (length, flags), neighbours that differ.

        It begins at `offset`, has at least one extent, and may end before the span does. Raises ImageError and others.
        """
        return _joined(self._pieces(context, offset, length), most)

    def stored(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Yield (length, whether it reads as zeros without looking) for the whole span, neighbours that differ."""
        pending, zero = 0, False
        for extent in self.disk.extents(offset, length):
            if pending and extent.zero != zero:
                yield pending, zero
                pending = 0
            pending, zero = pending + extent.length, extent.zero
        if pending:
            yield pending, zero

    def _pieces(self, context: str, offset: int, length: int) -> Iterator[State]:
        if context == BASE_ALLOCATION:
            for extent in self._extents(offset, length):
                hole, zero = not extent.data, extent.zero
                yield extent.length, (STATE_HOLE if hole else 0) | (STATE_ZERO if zero else 0)
        elif context == ALLOCATION_DEPTH:
            for extent in self._extents(offset, length):
                yield extent.length, self._depth(extent)
        else:
            yield from self._bitmaps[context].states(offset, length)


    def _extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The extents of the span, from time to time cut where nothing changes: joining them has no end of its own."""
        cluster = self.disk.geometry.cluster_size if self.disk.geometry else RAW_CLUSTER
        for start in range(offset, offset + length, WINDOW * cluster):
            yield from self.disk.extents(start, min(WINDOW * cluster, offset + length - start))

    def _depth(self, extent: Extent) -> int:
        """The layer that answers, from 1 for the top one, 0 for none."""
        if extent.present:
            return extent.depth + 1
        # Beyond the end of a shorter backing file it is that file which makes the zeros: so QEMU sees it.
        return extent.depth + 2 if extent.depth + 1 < len(self.disk.layers) else 0


def find_bitmap(disk: Image, name: str, *, live: bool) -> ExportedBitmap:
    """Return the uppermost usable bitmap of that name in the chain. Raises BadOption that says what is wrong.

    One that notes what is written to the disk is shown only to those who may write, `live`: others expect that what
    they read stays as it is.
    """
    raw = os.fsencode(name)
    there: list[str] = []
    for layer in disk.layers:
        if not isinstance(layer, Qcow2Layer):
            continue
        written = disk if layer is disk.layers[0] and disk.writable else None
        for bitmap in written.bitmaps if written else load_bitmaps(layer.storage, layer.first):
            there.append(escaped(bitmap.name))
            if bitmap.name != raw:
                continue
            if bitmap.fault or bitmap.in_use:
                reason = bitmap.fault or "a writer did not finish it"
                raise BadOption(f"bitmap '{escaped(raw)}' of '{layer.name}' cannot be served: {reason}")
            if written and not live and bitmap.flags & BitmapFlags.AUTO:
                raise BadOption(f"bitmap '{escaped(raw)}' of '{layer.name}' changes while the disk is written, "
                                "expected a writable export or a disabled bitmap")
            return ExportedBitmap(layer, bitmap, written)
    known = ", ".join(f"'{one}'" for one in there[:20])
    expected = f"one of {known}" if known else "none: the chain has no bitmaps"
    raise BadOption(f"bitmap is '{escaped(raw)}', expected {expected}")


def _joined(pieces: Iterable[State], most: int) -> list[State]:
    """Neighbours that are alike as one, at most `most` of them, as far as the time reaches."""
    states: list[State] = []
    total = flags = 0
    end = time.monotonic() + MOST_SECONDS
    for length, found in pieces:
        late = time.monotonic() > end
        if total and (found != flags or late):
            states.append((total, flags))
            total = 0
            if len(states) >= most or late:
                return states
        total, flags = total + length, found
    return [*states, (total, flags)] if total else states
