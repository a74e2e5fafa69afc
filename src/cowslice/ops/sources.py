"""Disks one behind another, as the one disk that a copy makes of them, cut into chunks for those who copy.

It does not know where the copy goes. Chunks begin and end at multiples of the target's clusters, whatever the borders
of the sources are, and cover the whole in order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

from cowslice.errors import CowsliceError
from cowslice.format.entries import Kind
from cowslice.image.image import Image
from cowslice.image.mapping import resolve
from cowslice.units import round_up

_ZERO_KINDS = (Kind.ZERO, Kind.ZERO_ALLOCATED)


class Content(Enum):
    """What a chunk is: bytes to read, zeros that need no reading, or nothing of the top file's own."""

    DATA = "data"
    ZERO = "zero"
    BELOW = "below"


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` bytes at `start` of the copy."""

    start: int
    length: int
    content: Content

    @property
    def end(self) -> int:
        return self.start + self.length


class Sources:
    """Images one behind another. `over_backing`: what a top file leaves to its backing file is left to the copy's.

    `seek_zeros` False takes zeros for data like any other.
    """

    def __init__(self, images: Sequence[Image], *, over_backing: bool = False, seek_zeros: bool = True) -> None:
        self._images = [image for image in images if image.size]
        self._starts = [0, *accumulate(image.size for image in self._images)]
        self._over_backing = over_backing
        self._seek_zeros = seek_zeros
        self._stored_until = 0  # asking a file for its holes costs more than remembering what it said
        self.size = self._starts[-1]

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the buffer from `offset`; what lies beyond the end is zeros."""
        done = 0
        while done < len(view):
            if offset + done >= self.size:
                view[done:] = bytes(len(view) - done)
                return
            image, inside = self._at(offset + done)
            length = min(image.size - inside, len(view) - done)
            image.read_into(inside, view[done : done + length])
            done += length

    def chunks(self, *, most: int, unit: int) -> Iterator[Chunk]:
        """Cut into chunks of at most `most` bytes to read each; `unit`, a power of two, divides `most`."""
        offset = 0
        while offset < self.size:
            content, length = self._content_at(offset)
            end = offset + length
            if content is not Content.DATA:
                end = end if end >= self.size else end // unit * unit
                if end > offset:
                    yield Chunk(offset, end - offset, content)
                    offset = end
                    continue
                end = offset + unit
            end = min(round_up(end, unit), (offset // most + 1) * most, self.size)
            yield Chunk(offset, end - offset, Content.DATA)
            offset = end

    def _content_at(self, offset: int) -> tuple[Content, int]:
        """What begins here, and for how many bytes inside one source."""
        image, inside = self._at(offset)
        left = image.size - inside
        if self._seek_zeros and offset >= self._stored_until:
            length, stored = runs_at(image, inside)
            if length:
                return Content.ZERO, length
            self._stored_until = offset + stored
        if not self._over_backing or len(image.layers) < 2:
            return Content.DATA, left
        own = _own_until(image, inside, below=True)
        if own > inside:
            return Content.BELOW, own - inside
        return Content.DATA, _own_until(image, inside, below=False) - inside

    def _at(self, offset: int) -> tuple[Image, int]:
        number = bisect_right(self._starts, offset) - 1
        return self._images[number], offset - self._starts[number]


def zeros_at(image: Image, offset: int) -> int:
    """Bytes from here that read as zeros without being stored. 0 where the map cannot be read: reading will tell."""
    return runs_at(image, offset)[0]


def runs_at(image: Image, offset: int) -> tuple[int, int]:
    """As zeros_at, and how many bytes behind them are known to be stored."""
    end, stored = offset, 0
    try:
        while end < image.size:
            _, piece = resolve(image.layers, end, image.size - end, holes=True)
            if not (piece.below or piece.hole or piece.kind in _ZERO_KINDS):
                stored = piece.length
                break
            end += piece.length
    except CowsliceError:
        pass
    return end - offset, stored


def _own_until(image: Image, offset: int, *, below: bool) -> int:
    """Where the run ends in which the top file leaves everything below, or nothing."""
    end, most = offset, min(image.size, offset + _LOOK_AHEAD)
    while end < most:
        piece = image.layers[0].piece_at(end, image.size - end)
        if piece.below is not below:
            break
        end += piece.length
    return end


_LOOK_AHEAD = 1 << 30  # bytes of one chunk that is not read: it keeps progress moving
