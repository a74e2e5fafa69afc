"""Runs of free clusters, sorted by size: the lowest of the smallest that fit is found in logarithmic time.

It does not know why they are free. What must hold: runs lie apart and never touch, for neighbours are joined.
"""

from __future__ import annotations

from heapq import heappop, heappush

_CLASSES = 64  # class k holds runs of 2^k to 2^(k+1) - 1 clusters


class Holes:
    """Disjoint runs of clusters. Each class is a heap by start; entries that went stale are dropped when met."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}  # by start
        self._starts: dict[int, int] = {}  # by end
        self._heaps: list[list[int]] = [[] for _ in range(_CLASSES)]
        self._filled = 0  # bit k: class k may have runs

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, start: int, end: int) -> None:
        """Add clusters [start, end), none of which is in a run."""
        below = self._starts.pop(start, -1)
        if below >= 0:
            del self._ends[below]
            start = below
        above = self._ends.pop(end, -1)
        if above >= 0:
            del self._starts[above]
            end = above
        self._put(start, end)

    def take_at(self, start: int, count: int) -> int:
        """Take up to `count` clusters of the run that begins at `start`; returns how many, 0 where none begins."""
        end = self._ends.get(start, start)
        got = min(count, end - start)
        if got:
            self._cut(start, end, got)
        return got

    def take(self, count: int) -> int:
        """Take `count` clusters that follow each other; returns the first, -1 where no run is that long."""
        level = (count - 1).bit_length()
        start = self._lowest(level)
        if start < 0 and level:
            start = self._fitting(level - 1, count)
        if start >= 0:
            self._cut(start, self._ends[start], count)
        return start

    def take_largest(self) -> tuple[int, int]:
        """Take a whole run of the largest class; returns (first cluster, clusters), (-1, 0) where there is none."""
        while self._filled:
            level = self._filled.bit_length() - 1
            start = self._top(level)
            if start >= 0:
                end = self._ends[start]
                self._cut(start, end, end - start)
                return start, end - start
        return -1, 0

    def cut_off(self, end: int) -> int:
        """Remove the run that ends at `end`; returns where it began, `end` where none ends."""
        start = self._starts.pop(end, end)
        if start < end:
            del self._ends[start]
        return start

    def clear(self) -> None:
        """Forget all runs."""
        self._ends.clear()
        self._starts.clear()
        self._heaps = [[] for _ in range(_CLASSES)]
        self._filled = 0

    def runs(self) -> list[tuple[int, int]]:
        """Every run as (first cluster, clusters), ascending."""
        return sorted((start, end - start) for start, end in self._ends.items())

    def _put(self, start: int, end: int) -> None:
        self._ends[start] = end
        self._starts[end] = start
        level = (end - start).bit_length() - 1
        heappush(self._heaps[level], start)
        self._filled |= 1 << level

    def _cut(self, start: int, end: int, count: int) -> None:
        """Take clusters from the front of a run."""
        del self._ends[start]
        if start + count < end:
            self._put(start + count, end)
        else:
            del self._starts[end]

    def _lowest(self, level: int) -> int:
        """The first run of the smallest class from `level` on that has one, -1 for none."""
        while self._filled >> level:
            rest = self._filled >> level
            found = level + (rest & -rest).bit_length() - 1
            start = self._top(found)
            if start >= 0:
                return start
        return -1

    def _top(self, level: int) -> int:
        """The lowest run of a class, -1 when it turns out to be empty."""
        heap = self._heaps[level]
        while heap:
            start = heap[0]
            end = self._ends.get(start, start)
            if end > start and (end - start).bit_length() - 1 == level:
                return start
            heappop(heap)
        self._filled &= ~(1 << level)
        return -1

    def _fitting(self, level: int, count: int) -> int:
        """The lowest run of one class, if that has room for `count`; -1 otherwise."""
        start = self._top(level)
        return start if start >= 0 and self._ends[start] - start >= count else -1
