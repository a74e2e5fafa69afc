"""Decompressed clusters of one chain, kept for a while within a budget, and those that are on their way.

It does not know streams or files: a cluster is named by its layer and the place of its stream. What must hold: one
that is wanted by many is fetched by one, and who waits for it is told how that ended, whatever it was.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass

from cowslice.errors import BadOption
from cowslice.image.inflated import InflatedClusters
from cowslice.units import MiB

# 128 clusters of 64 KiB: a few sequential readers, or the hot spot of a random one.
DEFAULT_BUDGET = 8 * MiB
Key = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class CompressedStatistics:
    """What a cache did so far. `used` and `budget` are bytes; `read_bytes` were compressed, in `reads` reads."""

    hits: int
    misses: int
    joined: int
    evictions: int
    reads: int
    read_bytes: int
    used: int
    budget: int


class Flight:
    """One cluster on its way. `data` is set only if somebody else waits, so that a large request holds no clusters.

    Neither `data` nor `error` after `landed` means that its thread gave up: try again.
    """

    __slots__ = ("awaited", "data", "error", "keep", "key", "landed", "number")

    def __init__(self, key: Key, number: int, keep: bool) -> None:
        self.key = key
        self.number = number
        self.keep = keep
        self.awaited = False
        self.data: bytes | None = None
        self.error: Exception | None = None
        self.landed = threading.Event()


class DecompressedCache:
    """Decompressed clusters of all layers of one chain: at most `budget` bytes, the least recently used goes first.

    With a budget of 0 nothing is kept, but threads still share what is under way. The layers that compiled code can
    inflate keep theirs in `inflated`; where there are both kinds, each has half of the budget.
    """

    def __init__(self, budget: int = DEFAULT_BUDGET) -> None:
        if budget < 0:
            raise BadOption(f"the budget for decompressed clusters is {budget}, expected zero or more bytes")
        self._budget = budget
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, bytes] = OrderedDict()
        self._flights: dict[Key, Flight] = {}
        self._layers = itertools.count()
        self._used = 0
        self._share = budget
        self._kinds: set[bool] = set()  # of layers: whether they are inflated in compiled code
        self.inflated = InflatedClusters(0)
        self._hits = self._misses = self._joined = self._evictions = 0
        self._reads = self._read_bytes = 0

    def statistics(self) -> CompressedStatistics:
        """Return the counters as they are now."""
        with self._lock:
            own = {"hits": self._hits, "misses": self._misses, "joined": self._joined, "evictions": self._evictions,
                   "reads": self._reads, "read_bytes": self._read_bytes, "used": self._used}
        compiled = self.inflated.counters()
        return CompressedStatistics(**{name: own[name] + compiled[name] for name in own}, budget=self._budget)

    def trim(self) -> int:
        """Give all memory back; return how many bytes."""
        with self._lock:
            freed, self._used = self._used, 0
            self._kept.clear()
        return freed + self.inflated.trim()

    def new_layer(self, *, compiled: bool) -> int:
        """A number that tells the clusters of one layer from those of others. Call it for all before the first read."""
        self._kinds.add(compiled)
        compiled_share = self._budget // len(self._kinds) if True in self._kinds else 0
        self._share = self._budget - compiled_share
        self.inflated.limit(compiled_share)
        return next(self._layers)

    def look(self, key: Key) -> bytes | None:
        """The cluster, if it is kept."""
        with self._lock:
            data = self._kept.get(key)
            if data is not None:
                self._hits += 1
                self._kept.move_to_end(key)
            return data

    def claim(self, key: Key, number: int, keep: bool) -> tuple[bytes | None, Flight, bool]:
        """The kept cluster; else its flight, and whether the caller is the one who must land it."""
        with self._lock:
            flight = self._flights.get(key)
            data = self._kept.get(key)
            if data is not None:
                self._hits += 1
                self._kept.move_to_end(key)
                return data, _NO_FLIGHT, False
            if flight is not None:
                self._joined += 1
                flight.keep = flight.keep or keep
                flight.awaited = True
                return None, flight, False
            self._misses += 1
            flight = self._flights[key] = Flight(key, number, keep)
            return None, flight, True

    def land(self, flight: Flight, data: bytes | None, error: Exception | None = None) -> None:
        """End a flight: with its cluster, with an error, or with neither."""
        with self._lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
            flight.error = error
            flight.data = data if flight.awaited else None
            if data is not None and flight.keep and len(data) <= self._share:
                self._keep(flight.key, data)
        flight.landed.set()

    def count_read(self, length: int) -> None:
        """Note one read of compressed bytes."""
        with self._lock:
            self._reads += 1
            self._read_bytes += length

    def _keep(self, key: Key, data: bytes) -> None:
        self._kept[key] = data
        self._used += len(data)
        while self._used > self._share:
            _, gone = self._kept.popitem(last=False)
            self._used -= len(gone)
            self._evictions += 1


_NO_FLIGHT = Flight((-1, 0, 0), -1, False)
