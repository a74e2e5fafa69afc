"""An LRU cache in a few obvious lines, to hold the compiled LRU stack and the replays of QEMU's cache against.

It knows numbers of slices and what they weigh, nothing of requests or qcow2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class LruTwin:
    """Holds the slices used last, as many as weigh `room` together; what weighs nothing is never driven out."""

    def __init__(self, room: int, weigh: Callable[[int], int] = lambda number: 1) -> None:
        self.room = room
        self.weigh = weigh
        self.held: OrderedDict[int, int] = OrderedDict()

    def misses(self, number: int) -> bool:
        """Use a slice; True if it was not there."""
        absent = number not in self.held
        self.held[number] = self.weigh(number)
        self.held.move_to_end(number)
        while sum(self.held.values()) > self.room:
            del self.held[next(old for old, weight in self.held.items() if weight)]
        return absent


def touched_slices(first: Iterable[int], last: Iterable[int], span: int) -> list[tuple[int, ...]]:
    """For each request the slices of `span` bytes that its bytes `first` to `last` lie in."""
    return [tuple(range(a // span, b // span + 1)) for a, b in zip(first, last, strict=True)]
