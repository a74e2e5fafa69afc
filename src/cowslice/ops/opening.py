"""The public `open`: an image that its last writer did not close is repaired before it is written.

It does not know how an image is opened or repaired. An image marked corrupt is not touched: that is for a person.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Unpack

from cowslice.errors import CorruptImage
from cowslice.image.gate import shown
from cowslice.image.image import Image
from cowslice.image.image import open_image as open_as_it_is
from cowslice.image.opening import has_magic, open_place, read_first_cluster
from cowslice.image.options import OpenKeywords, OpenOptions, Source


def open_image(source: Source, mode: str = "r", **options: Unpack[OpenKeywords]) -> Image:
    if mode == "r+" and options.get("format") != "raw":
        mend_dirty(source, direct=bool(options.get("direct")), on_warning=options.get("on_warning"))
    return open_as_it_is(source, mode, **options)


open_image.__doc__ = open_as_it_is.__doc__


def mend_dirty(source: Source, *, direct: bool = False, on_warning: Callable[[str], None] | None = None) -> bool:
    """Repair a qcow2 image whose dirty bit is set, as QEMU does before it writes: whether that was needed.

    Raises CorruptImage where faults are left that writing could make worse, ImageError, StorageError.
    """
    with ExitStack() as stack:
        storage = open_place(source, OpenOptions(direct=direct), stack, writable=True).storage
        if not has_magic(storage):
            return False
        header = read_first_cluster(storage).header
        if not header.is_dirty or header.is_corrupt:
            return False
        from cowslice.ops.repair import repair

        # No journal: what is stale are refcounts, and the order of writing keeps every byte readable.
        done = repair(storage, "all", journal=None)
    if faults := done.after.check_errors + done.after.corruptions:
        raise CorruptImage(f"'{shown(storage.name)}' was not closed by its last writer, and of its faults {faults} "
                           "cannot be repaired", structure="refcounts",
                           hint="`cowslice check` names them; the image can still be read.")
    if on_warning:
        on_warning(f"'{shown(storage.name)}' was not closed by its last writer: its refcounts were repaired")
    return True
