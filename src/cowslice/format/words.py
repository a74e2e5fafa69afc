"""Tables of big-endian 64-bit words, to and from native arrays.

It does not know what a word means. Used for whole tables only, never for one entry.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

from cowslice.errors import InternalError

WORD = 8


def unpack_words(table: bytes | bytearray | memoryview) -> array[int]:
    """The words of a table as array('Q'). The length is a multiple of 8 bytes; the buffer is copied."""
    if len(table) % WORD:
        raise InternalError(f"a table of {len(table)} bytes is no whole number of words")
    return swapped(array("Q", bytes(table)))


def pack_words(words: Iterable[int]) -> bytes:
    """The big-endian bytes of the words."""
    return swapped(array("Q", words)).tobytes()


def swapped(values: array[int]) -> array[int]:
    """The same array, in place, turned between big-endian and native order."""
    if sys.byteorder == "little":
        values.byteswap()
    return values
