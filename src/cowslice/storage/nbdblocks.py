"""The blocks that an NBD server wants requests to keep to. Pure arithmetic.

An export may end inside a block: its last block is what is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of `block` bytes in an export of `size` bytes; one request carries at most `most` bytes."""

    block: int
    most: int
    size: int

    def around(self, start: int, end: int) -> tuple[int, int]:
        """The smallest span of whole blocks that has this one inside."""
        return start // self.block * self.block, min(-(-end // self.block) * self.block, self.size)

    def within(self, start: int, end: int) -> tuple[int, int]:
        """The largest span of whole blocks inside this one; (end, end) when there is none."""
        first = -(-start // self.block) * self.block
        last = end if end == self.size else end // self.block * self.block
        return (first, last) if first < last else (end, end)

    def pieces(self, start: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
        """Cut a span of whole blocks into (start, end) of about `wanted` bytes, none more than a request carries."""
        step = max(min(wanted, self.most) // self.block, 1) * self.block
        return long_pieces(start, end, step)


def long_pieces(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut a span into (start, end) of at most `step` bytes."""
    for at in range(start, end, step):
        yield at, min(at + step, end)
