"""What a guest did, watched while its requests pass: how many, how long, where on the disk and when.

It knows nothing of caches. Memory is bounded however long the trace is: when the columns of the map are used up, each
two become one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cowslice.tune.requests import Operation, Requests
from cowslice.units import div_ceil

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS = 128  # of the heat map, in time; between half of them and all are used
ROWS = 48  # in place; each is an equal part of the disk
PIECES = 1 << 22  # parts of the disk whose first touch is noticed, at most: a byte each
_FIRST_COLUMN = 64  # requests in a column to begin with


@dataclass(frozen=True, slots=True, eq=False)
class Habits:
    """A summary of one trace: counts, bytes, seconds (NaN where no times are known), and where it went.

    `heat[row, column]` counts the requests to a part of the disk in a stretch of `per_column` requests; `fresh[column]`
    the parts of `piece_bytes` first touched then, out of `touched` in all.
    """

    requests: int
    reads: int
    writes: int
    mean_length: int
    seconds: float
    end: int
    piece_bytes: int
    touched: int
    per_column: int
    heat: NDArray[np.int64]
    fresh: NDArray[np.int64]

    @property
    def arrivals(self) -> float | None:
        """Requests per second, or None where no times are known."""
        return self.requests / self.seconds if self.seconds > 0 else None

    @property
    def late_share(self) -> float:
        """The share of parts first touched in the last quarter of the trace: high while it still finds new places."""
        if not self.touched:
            return 0.0
        return float(self.fresh[len(self.fresh) - len(self.fresh) // 4 :].sum()) / self.touched


class Survey:
    """Watches requests on their way: iterate `watch(requests)`, then ask `habits()`.

    `disk_size` is in bytes; first touches are noticed of parts of `piece_bytes`, of larger ones on an enormous disk.
    """

    def __init__(self, disk_size: int, piece_bytes: int) -> None:
        self._row_bytes = span_of_rows(disk_size)
        self._piece_bytes = max(piece_bytes, div_ceil(max(disk_size, 1), PIECES))
        self._seen = np.zeros(div_ceil(max(disk_size, 1), self._piece_bytes), dtype=np.bool_)
        self._heat = np.zeros((ROWS, COLUMNS), dtype=np.int64)
        self._fresh = np.zeros(COLUMNS, dtype=np.int64)
        self._per_column = _FIRST_COLUMN
        self._counts = {Operation.READ: 0, Operation.WRITE: 0}
        self._requests = self._bytes = self._end = 0
        self._first = self._last = float("nan")

    def watch(self, requests: Iterable[Requests]) -> Iterator[Requests]:
        """Yield the same chunks."""
        for chunk in requests:
            self._add(chunk)
            yield chunk

    def habits(self) -> Habits:
        """What was seen so far."""
        used = div_ceil(self._requests, self._per_column)
        return Habits(
            requests=self._requests, reads=self._counts[Operation.READ], writes=self._counts[Operation.WRITE],
            mean_length=self._bytes // self._requests if self._requests else 0, seconds=self._last - self._first,
            end=self._end, piece_bytes=self._piece_bytes, touched=int(self._seen.sum()), per_column=self._per_column,
            heat=self._heat[:, :used].copy(), fresh=self._fresh[:used].copy())  # fmt: skip

    def _add(self, chunk: Requests) -> None:
        for operation in self._counts:
            self._counts[operation] += int((chunk.operation == operation).sum())
        known = chunk.time[~np.isnan(chunk.time)]
        if len(known):
            self._first, self._last = (float(known[0]) if np.isnan(self._first) else self._first), float(known[-1])
        moves = chunk.length > 0
        offset, length = chunk.offset[moves].astype(np.int64), chunk.length[moves].astype(np.int64)
        if not len(offset):
            return
        self._end = max(self._end, int((offset + length).max()))
        self._bytes += int(length.sum())
        self._place(offset, offset + length - 1)

    def _place(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> None:
        """Enter requests into the maps; one beyond the disk counts for its last part."""
        while self._requests + len(first) > self._per_column * COLUMNS:
            self._halve()
        columns = (self._requests + np.arange(len(first))) // self._per_column
        self._requests += len(first)
        np.add.at(self._heat, (np.minimum(first // self._row_bytes, ROWS - 1), columns), 1)
        for place in (first, last):
            pieces, at = np.unique(np.minimum(place // self._piece_bytes, len(self._seen) - 1), return_index=True)
            new = ~self._seen[pieces]
            np.add.at(self._fresh, columns[at[new]], 1)
            self._seen[pieces] = True

    def _halve(self) -> None:
        self._per_column *= 2
        half = COLUMNS // 2
        heat, fresh = self._heat.reshape(ROWS, half, 2).sum(axis=2), self._fresh.reshape(half, 2).sum(axis=1)
        self._heat[:, half:], self._fresh[half:] = 0, 0
        self._heat[:, :half], self._fresh[:half] = heat, fresh


def span_of_rows(disk_size: int) -> int:
    """Guest bytes of one row of a heat map of a disk of `disk_size` bytes."""
    return div_ceil(max(disk_size, 1), ROWS)
