"""The offsets that a caller gives for many requests, as the compiled path takes them.

It does not know the disk: whether they lie inside is judged where they are used.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cowslice.errors import BadOption, OutOfRange

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def offsets_of(offsets: ReadableBuffer | Iterable[int]) -> memoryview | array[int]:
    """The offsets as a buffer of 64-bit integers; one that is given is not copied."""
    try:
        view = memoryview(offsets)  # type: ignore[arg-type]
    except TypeError:
        try:
            return array("q", offsets)  # type: ignore[arg-type]
        except OverflowError:
            raise OutOfRange("an offset does not fit 64 bits, expected offsets inside the disk") from None
    if view.ndim != 1 or view.itemsize != 8 or view.format not in ("q", "l", "Q", "L"):
        raise BadOption(f"offsets has items of type '{view.format}', expected one dimension of 64-bit integers")
    return view
