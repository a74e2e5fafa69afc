"""An image that is there already as the target of a copy: written over, and whole clusters of zeros said.

It does not know what is copied. Whatever stops the work, the image stays sound, with a part of the copy in it.
"""

from __future__ import annotations

from cowslice.errors import BadOption, OutOfRange
from cowslice.image.gate import shown
from cowslice.image.image import Image


class ImageTarget:
    """Writes to `image`, which is open for writing and stays the caller's, in any order.

    `is_zero`: the caller knows that it reads as zeros. Raises OutOfRange when it has less than `size` bytes, BadOption
    when it cannot be zeros because of a backing file.
    """

    ordered = False

    def __init__(self, image: Image, size: int, *, is_zero: bool = False) -> None:
        if image.size < size:
            raise OutOfRange(f"'{shown(image.path)}' has {image.size} bytes, but the disk has {size}")
        if is_zero and len(image.layers) > 1:
            raise BadOption(f"'{shown(image.path)}' has a backing file, expected none of a target that is all zeros")
        self._image = image
        self._is_zero = is_zero

    def write(self, offset: int, data: memoryview) -> None:
        self._image.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        if not self._is_zero:
            self._image.zero(offset, length)

    def fileno(self) -> int:
        """-1: the bytes of an image stand elsewhere in its file."""
        return -1
