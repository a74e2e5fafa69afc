"""LRU stack distances of one slice size, in one pass: how many misses a cache of each size would have had.

It knows spans of guest bytes and weights, nothing of qcow2. What must hold: each access is counted once, as a first
touch or at the smallest cache that would have held its slice.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Stack:
    """One LRU stack of slices of `1 << span_bits` guest bytes each."""

    def __init__(self, span_bits: int, *, weights: NDArray[np.uint16] | None = None) -> None:
        self._bits = span_bits
        self._weights = weights
        self._order: list[int] = []
        self._found: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self.cold = [0, 0]

    def add(self, first: NDArray[np.uint64], last: NDArray[np.uint64], writes: NDArray[np.uint8]) -> None:
        """Touch every slice from byte `first` to byte `last` of each request, in order."""
        for start, end, write in zip(first.tolist(), last.tolist(), writes.tolist(), strict=True):
            for number in range(start >> self._bits, (end >> self._bits) + 1):
                self._touch(number, int(write))

    def _touch(self, number: int, write: int) -> None:
        if number in self._order:
            place = self._order.index(number)
            self._found[write][sum(self._weight(one) for one in self._order[: place + 1])] += 1
            del self._order[place]
        else:
            self.cold[write] += 1
        self._order.insert(0, number)

    def _weight(self, number: int) -> int:
        return 1 if self._weights is None else int(self._weights[number])

    @property
    def touched(self) -> int:
        """Distinct slices."""
        return len(self._order)

    @property
    def rate(self) -> float:
        """The share of slices that was looked at."""
        return 1.0

    def distances(self, write: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Distances that occurred, ascending, and how many accesses had each."""
        found = sorted(self._found[write].items())
        return (np.array([d for d, _ in found], dtype=np.int64), np.array([n for _, n in found], dtype=np.int64))
