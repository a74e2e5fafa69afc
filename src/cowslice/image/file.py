"""An image as a binary file object, for code that wants to seek and read.

It does not know how an image is read. It has a position of its own, so each thread takes its own file.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Protocol

from cowslice.errors import OutOfRange

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class Readable(Protocol):
    """An image, as far as it concerns us."""

    @property
    def size(self) -> int: ...

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None: ...


class ImageFile(io.RawIOBase):
    """Read the guest disk as a file of its size. Closing it leaves the image open."""

    def __init__(self, image: Readable, name: str) -> None:
        super().__init__()
        self.name = name
        self.mode = "rb"
        self._image = image
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset` bytes from the start, the position or the end; past the end is allowed and reads nothing."""
        self._check_open()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._image.size}
        if whence not in bases:
            raise ValueError(f"whence is {whence}, expected 0, 1 or 2")
        target = bases[whence] + offset
        if target < 0:
            raise OutOfRange(f"seek to {target} asked, expected 0 or more")
        self._position = target
        return target

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read as many bytes as fit in `buffer` or are left before the end; return how many."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        length = max(min(len(view), self._image.size - self._position), 0)
        if length:
            self._image.read_into(self._position, view[:length])
        self._position += length
        return length

    def write(self, buffer: ReadableBuffer) -> int:
        """Refuse: the image is open for reading."""
        raise io.UnsupportedOperation("not writable")

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on a closed file")
