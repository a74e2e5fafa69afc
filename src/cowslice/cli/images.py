"""Open the images that a command line names, by the options it gave.

It decides what a missing -f means: qcow2 where its magic is, else raw. What the image then names must pass the gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cowslice.cli.options import HOW_TO_PERMIT, Given, Named, file_options, name_image, open_options
from cowslice.cli.output import warn
from cowslice.errors import BadOption, ReferenceRefused

if TYPE_CHECKING:
    from cowslice.image.image import Image
    from cowslice.image.options import OpenOptions

FORMATS = ("qcow2", "raw")


def open_image(text: str, given: Given, **more: Any) -> Image:
    """Open one IMAGE argument, for reading unless `writable` says more.

    A ReferenceRefused comes out with the flag that would permit it.
    """
    from cowslice.image.image import Image

    name, options = describe(text, given, **more)
    if options.writable and options.format != "raw":
        from cowslice.ops.opening import mend_dirty

        mend_dirty(name, direct=options.direct, on_warning=options.on_warning)
    with explained():
        return Image(name, options)


def describe(text: str, given: Given, **more: Any) -> tuple[str, OpenOptions]:
    """The path or URL of one IMAGE argument, and the options to open it with; they say the format."""
    named = name_image(text, given)
    driver = named.options.get("driver")
    if driver is not None and driver not in FORMATS:
        raise BadOption(f"the format is '{driver}', expected qcow2 or raw")
    if driver is None:
        named.options["driver"] = probe(named, given)
    if named.options["driver"] == "raw":
        for option in [key for key in named.options if key.startswith(("l2-", "cache-size", "refcount-", "backing"))]:
            raise BadOption(f"'{option}' is an option of qcow2 images, but '{named.name}' is raw")
    return named.name, open_options(named, given, on_warning=warn, **more)


@contextmanager
def explained() -> Iterator[None]:
    """Let a ReferenceRefused leave the block with the flag that would permit it."""
    try:
        yield
    except ReferenceRefused as error:
        error.hint = HOW_TO_PERMIT
        raise


def probe(named: Named, given: Given) -> str:
    """The format that a file begins like: "qcow2" or, of anything else, "raw"."""
    from cowslice.image.opening import has_magic
    from cowslice.storage.locate import locate

    options = file_options(named, given)
    with locate(named.name, locking="force-share" if options.force_share else True) as storage:
        return "qcow2" if has_magic(storage) else "raw"
