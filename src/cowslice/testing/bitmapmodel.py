"""The obvious twin of the compiled dirty bits: a set of numbers."""

from __future__ import annotations


class PlainDirtyBits:
    """As image.dirtybits.DirtyBits."""

    def __init__(self, size: int, granularity_bits: int) -> None:
        self._granularity = 1 << granularity_bits
        self._count = -(-size // self._granularity)
        self._marked: set[int] = set()

    def mark_span(self, offset: int, length: int) -> None:
        first, end = offset // self._granularity, -(-(offset + length) // self._granularity)
        if length:
            self._marked.update(range(first, min(end, self._count)))

    def read(self, start: int, length: int) -> bytes:
        return bytes(sum(1 << bit for bit in range(8) if byte * 8 + bit in self._marked)
                     for byte in range(start, start + length))

    def clear(self) -> None:
        self._marked.clear()

    def resize(self, size: int) -> None:
        self._count = -(-size // self._granularity)
        self._marked = {number for number in self._marked if number < self._count}
