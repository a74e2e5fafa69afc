"""A part of a disk, counted in blocks, as a disk of its own that can be copied like any other.

It does not know where the copy goes. `count` blocks are copied behind `skip` blocks, whatever the size of the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cowslice.errors import BadOption
from cowslice.image.image import Image
from cowslice.image.options import OpenOptions
from cowslice.storage.base import Storage, check_span
from cowslice.storage.spans import Span

MAX_BLOCK = (1 << 31) - 1  # as QEMU's
MAX_BLOCKS = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Which part: `count` blocks of `size` bytes, all there are with None, behind the first `skip` blocks."""

    size: int = 512
    count: int | None = None
    skip: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_BLOCK:
            raise BadOption(f"bs is {self.size}, expected 1 to {MAX_BLOCK} bytes")
        for name, number in (("count", self.count or 0), ("skip", self.skip)):
            if not 0 <= number <= MAX_BLOCKS:
                raise BadOption(f"{name} is {number}, expected 0 to {MAX_BLOCKS} blocks")

    def span(self, disk: int) -> tuple[int, int]:
        """(offset, length) in bytes of the part of a disk of `disk` bytes."""
        start = min(self.skip * self.size, disk)
        left = disk - start
        return start, left if self.count is None else min(left, self.count * self.size)


class Part(Storage):
    """`length` bytes of a disk from `offset`, as a storage. The disk stays the caller's to close."""

    def __init__(self, image: Image, offset: int, length: int) -> None:
        self.name = image.path
        self._image = image
        self._offset = offset
        self._length = length

    def pread(self, offset: int, buffer: memoryview) -> int:
        check_span(offset, len(buffer))
        inside = min(max(self._length - offset, 0), len(buffer))
        if inside:
            self._image.read_into(self._offset + offset, buffer[:inside])
        return inside

    def length(self) -> int:
        return self._length

    def extents(self, offset: int, length: int) -> Iterator[Span]:
        check_span(offset, length)
        inside = min(max(self._length - offset, 0), length)
        for extent in self._image.extents(self._offset + offset, inside) if inside else ():
            yield Span(extent.start - self._offset, extent.length, not extent.zero)
        if length > inside:
            yield Span(offset + inside, length - inside, False)

    def close(self) -> None:
        """Nothing to close."""


def part_of(image: Image, blocks: Blocks) -> Image:
    """The part as a disk that reads from `image`, which stays open longer; to whole sectors it ends in zeros."""
    return Image(Part(image, *blocks.span(image.size)), OpenOptions(format="raw"))
