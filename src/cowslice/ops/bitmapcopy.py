"""Copies the bitmaps of a disk into a copy of it.

It does not know how the bytes got there. A copy marks what its source marks, and is enabled if that is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from cowslice.errors import CorruptImage, UnsupportedImage
from cowslice.format.bitmaps import BitmapFlags
from cowslice.format.findings import escaped
from cowslice.image.gate import shown

if TYPE_CHECKING:
    from cowslice.image.image import Image


def check_bitmaps(source: Image, *, skip_broken: bool) -> None:
    """Raise unless the bitmaps of a disk can be copied; with `skip_broken` those that cannot be used do not matter.

    Raises UnsupportedImage for a raw source, CorruptImage for a bitmap that cannot be used.
    """
    if source.header is None:
        raise UnsupportedImage(f"'{shown(source.path)}' is raw, expected a qcow2 image: a raw file has no bitmaps",
                               features=("bitmaps in a raw file",))
    for bitmap in source.bitmaps:
        if (bitmap.fault or bitmap.in_use) and not skip_broken:
            raise CorruptImage(f"bitmap '{escaped(bitmap.name)}' of '{shown(source.path)}' cannot be copied: "
                               f"{bitmap.fault or 'a writer did not finish it'}", structure="bitmap directory",
                               hint="--skip-broken-bitmaps copies the others, bitmap --remove forgets it.")


def copy_bitmaps(source: Image, target: Image, *, warn: Callable[[str], None]) -> None:
    """Add the usable bitmaps of a disk to a copy that is open for writing. Raises BadOption and others."""
    for bitmap in source.bitmaps:
        name = os.fsdecode(bitmap.name)
        if bitmap.fault or bitmap.in_use:
            warn(f"bitmap '{escaped(bitmap.name)}' cannot be used and is not copied")
            continue
        target.add_bitmap(name, granularity=bitmap.granularity, enabled=False)
        target.merge_bitmap(name, name, source)
        if bitmap.flags & BitmapFlags.AUTO:
            target.enable_bitmap(name)
