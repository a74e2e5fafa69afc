"""Where each part of a disk is stored: the extents of `Image.extents`, with the keys that `qemu-img map` gives them.

It does not know terminals. Extents come one by one, so that a map of any length takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cowslice.errors import OutOfRange
from cowslice.image.image import Image
from cowslice.image.mapping import Extent


def map_extents(image: Image, *, start: int = 0, length: int | None = None) -> Iterator[Extent]:
    """Yield the extents of the span, in bytes, cut to the disk. Raises OutOfRange for a start behind its end."""
    if not 0 <= start <= image.size:
        raise OutOfRange(f"the map is to begin at {start}, expected 0 to {image.size}")
    rest = image.size - start
    return image.extents(start, rest if length is None else min(length, rest))


def extent_json(extent: Extent) -> dict[str, Any]:
    """The keys of `qemu-img map --output=json`, in its order; `compressed` as versions since 8.2 print it."""
    shown: dict[str, Any] = {
        "start": extent.start, "length": extent.length, "depth": extent.depth, "present": extent.present,
        "zero": extent.zero, "data": extent.data, "compressed": extent.compressed,
    }  # fmt: skip
    if extent.offset is not None:
        shown["offset"] = extent.offset
    return shown


def extent_state(extent: Extent) -> str:
    """What an extent is, in one or two words."""
    if extent.compressed:
        return "compressed"
    if extent.data:
        return "data, hole" if extent.zero else "data"
    if not extent.present:
        return "unallocated"
    return "zero" if extent.offset is None else "zero, reserved"
