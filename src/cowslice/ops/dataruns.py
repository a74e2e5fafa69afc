"""The parts of a file that hold data, for readers that go through it in ascending order.

It does not know what is read. A hole costs one question however large it is, and a run of data is asked for once.
"""

from __future__ import annotations

from collections.abc import Iterator

from cowslice.storage.base import Storage
from cowslice.storage.spans import Span
from cowslice.units import SECTOR, round_up


class DataRuns:
    """Data and holes of a storage; not for several threads at once. `ask` False takes everything for data."""

    def __init__(self, storage: Storage, *, ask: bool = True) -> None:
        self._storage = storage
        self._length = round_up(storage.length(), SECTOR)
        self._ask = ask
        self._span = Span(0, 0, False)

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the (start, end) of all data in a span, widened to whole sectors. Raises StorageError."""
        end = min(end, self._length)
        if not self._ask:
            if start < end:
                yield start, end
            return
        at = done = start
        while at < end:
            span = self._at(at)
            if span.data:
                first = max(at - (at - start) % SECTOR, done)
                done = min(start + round_up(span.end - start, SECTOR), end)
                if first < done:
                    yield first, done
            at = span.end

    def _at(self, offset: int) -> Span:
        """The run that the offset lies in."""
        if not self._span.offset <= offset < self._span.end:
            rest = self._length - offset
            self._span = next(iter(self._storage.extents(offset, rest)), Span(offset, rest, False))
        return self._span
