"""Replacement policies in a few obvious lines each, to hold the compiled ones against.

They know keys and weights in bytes, nothing of slices. Clock2Q+ follows its description (arXiv 2511.21958) with queues
measured in bytes; what it remembers of keys that left is exact, where the compiled one keeps fingerprints.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

GRANULE = 16
TYPICAL = 1320


class LruModel:
    """Least recently used."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held: OrderedDict[int, int] = OrderedDict()

    def access(self, key: int, weight: int) -> bool:
        """Touch `key`; True for a hit, else it is taken in and the oldest go."""
        if key in self.held:
            self.held.move_to_end(key)
            return True
        size = _charged(weight)
        while self.held and sum(self.held.values()) + size > self.budget:
            self.held.popitem(last=False)
        self.held[key] = size
        return False

    def resident(self) -> set[int]:
        """The keys held now."""
        return set(self.held)


@dataclass
class _Held:
    size: int
    entered: int  # bytes that had entered the small queue when this one had
    referenced: bool = False
    laps: int = 0


class Clock2QPlusModel:
    """A small first-in-first-out queue with a correlation window, a clock for what proved itself, a memory of the gone.

    The small queue's share is a tenth of the budget, the window half of that, both in whole granules.
    """

    def __init__(self, budget: int, *, remembered: int) -> None:
        self.budget = budget
        self.share = budget // 10 // GRANULE * GRANULE
        self.window = budget // 10 // GRANULE // 2 * GRANULE
        self.remembered = remembered
        self.small: OrderedDict[int, _Held] = OrderedDict()  # oldest first
        self.main: OrderedDict[int, _Held] = OrderedDict()
        self.gone: OrderedDict[int, None] = OrderedDict()
        self.entered = 0
        self.evicted = False

    def access(self, key: int, weight: int) -> bool:
        """Touch `key`; True for a hit, else it is taken in and others go."""
        if key in self.main:
            self.main[key].referenced = True
            return True
        if key in self.small:
            held = self.small[key]
            if self.entered - held.entered >= self.window:  # no longer the same burst
                held.referenced = True
            return True
        self._take_in(key, _charged(weight))
        return False

    def resident(self) -> set[int]:
        """The keys held now."""
        return {*self.small, *self.main}

    def _take_in(self, key: int, size: int) -> None:
        while self.resident() and self._bytes(self.small) + self._bytes(self.main) + size > self.budget:
            self._push_one_out()
        held = _Held(size, 0, laps=_laps(size))
        if key in self.gone:
            del self.gone[key]
            self.main[key] = held
            return
        if not self.evicted and self._bytes(self.small) + size > self.share:  # there is room, and nobody to protect
            self.main[key] = held
            return
        self.entered += size
        held.entered = self.entered
        self.small[key] = held

    def _push_one_out(self) -> None:
        """Advance until exactly one has left."""
        self.evicted = True
        while True:
            if self._bytes(self.small) > self.share or not self.main:
                key, held = self.small.popitem(last=False)
                if not held.referenced:
                    self._remember(key)
                    return
                held.referenced = False
                self.main[key] = held
                continue
            key, held = self.main.popitem(last=False)
            if not held.referenced and not held.laps:
                return
            held.laps = _laps(held.size) if held.referenced else held.laps - 1
            held.referenced = False
            self.main[key] = held

    def _remember(self, key: int) -> None:
        self.gone[key] = None
        if len(self.gone) > self.remembered:
            self.gone.popitem(last=False)

    @staticmethod
    def _bytes(queue: OrderedDict[int, _Held]) -> int:
        return sum(held.size for held in queue.values())


def _charged(weight: int) -> int:
    return math.ceil(weight / GRANULE) * GRANULE


def _laps(size: int) -> int:
    """Extra passes for what is cheap to keep: one for each time that it fits twice into a typical slice."""
    return min(3, max(0, math.floor(math.log2(TYPICAL / size))))
