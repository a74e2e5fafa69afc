"""Copying left to the system: host bytes go from file to file without passing through this process.

It does not know formats: maps say which bytes lie plainly in which file. What the system cannot copy is read and
written, so the result is the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from cowslice.image.image import Image
from cowslice.units import MiB

BUFFER = 1 * MiB


class Offload:
    """Copies into one file. `write(offset, data)` puts bytes into it, and `descriptor` is the same file, -1 for none.

    One thread uses it: its buffer is made once and reused.
    """

    def __init__(self, descriptor: int, write: Callable[[int, memoryview], None]) -> None:
        self._descriptor = descriptor
        self._write = write
        self._buffer = memoryview(bytearray(BUFFER))

    def copy(self, image: Image, start: int, length: int, target: int) -> None:
        """Copy `length` bytes at `start` of the disk to byte `target` of the file. Raises as reading and writing do."""
        for extent in image.extents(start, length):
            done = 0
            source = image.layers[extent.depth].data.fileno()
            if extent.offset is not None and not extent.zero and min(source, self._descriptor) >= 0:
                done = copy_range(source, extent.offset, self._descriptor, target + extent.start - start, extent.length)
            self._copy_through(image, extent.start + done, extent.length - done, target + extent.start + done - start)

    def _copy_through(self, image: Image, start: int, length: int, target: int) -> None:
        for done in range(0, length, BUFFER):
            view = self._buffer[: min(BUFFER, length - done)]
            image.read_into(start + done, view)
            self._write(target + done, view)


def copy_range(source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
    """Let the system copy between two descriptors; return how many bytes from the beginning it did copy.

    A fault ends it early and is not raised: whoever copies the rest meets it again, with a name.
    """
    done = 0
    try:
        while done < length:
            copied = os.copy_file_range(source, target, length - done, source_offset + done, target_offset + done)
            if not copied:
                break
            done += copied
    except OSError:
        pass
    return done
