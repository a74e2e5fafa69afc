"""Which host clusters are free, learnt little by little: finding room never reads all refcounts of a full image.

It does not know what clusters are for, nor changes a count. What must hold: every cluster that it names counts 0, no
request can still be using it, and it is named once.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from heapq import heappop, heappush

from cowslice.format.geometry import Geometry
from cowslice.format.limits import MAX_HOST_OFFSET
from cowslice.image.holes import Holes
from cowslice.image.refcounts import Refcounts, Run
from cowslice.storage.base import Storage

_CHUNK = 1 << 15  # clusters scanned at a time: one block of 64 KiB clusters and 16-bit refcounts
_CHUNKS_PER_REQUEST = 64
_BYTES_PER_REQUEST = 1 << 20  # of refcounts: about a millisecond
_MOST_HOLES = 1 << 15  # about 10 MB of memory; beyond it all are forgotten, and found again when needed


class FreeSpace:
    """The free clusters of one image. All methods are called with the image's allocation lock held.

    `end` is one past the last cluster in use, and all behind it count 0; `limit` is the first cluster that the storage
    cannot hold. Raises StorageError.
    """

    def __init__(self, refcounts: Refcounts, storage: Storage, geometry: Geometry, *, limit: int | None = None) -> None:
        self.refcounts = refcounts
        self.holes = Holes()
        self.limit = _limit_of(storage, geometry) if limit is None else limit
        self.end = refcounts.used_end()
        self._block_shift = geometry.refblock_entries.bit_length() - 1
        self._shift = min(self._block_shift, _CHUNK.bit_length() - 1)
        chunk_bytes = max(1 << self._shift << geometry.refcount_order >> 3, 512)
        self._patience = max(min(_CHUNKS_PER_REQUEST, _BYTES_PER_REQUEST // chunk_bytes), 1)
        self._next = 0  # chunks below were scanned, but for those in _again
        self._ahead: set[int] = set()  # chunks from _next on that were scanned
        self._again: set[int] = set()  # chunks below _next that must be scanned once more
        self._promising: list[int] = []  # a heap of chunks that have room and were not scanned
        self._held: Counter[int] = Counter()  # by chunk: clusters that count 0 and may not be named yet

    @property
    def only_end(self) -> bool:
        """Whether all free clusters lie behind `end`."""
        return not self.holes and not self._promising and self._next >= (self.end - 1 >> self._shift) + 1

    @property
    def room(self) -> int:
        """Clusters from `end` on that one refcount block counts."""
        return min((self.end >> self._block_shift) + 1 << self._block_shift, self.limit) - self.end

    def take_hole(self, count: int, *, near: int = -1, whole: bool = False) -> Run:
        """Take a run of up to `count` clusters below `end`: behind cluster `near`, or the smallest that fits.

        Failing that the largest one known, unless `whole` asks for all or nothing. (-1, 0) where there is none.
        """
        got = self.holes.take_at(near + 1, count) if near >= 0 and not whole else 0
        if got:
            return near + 1, got
        start = self._fitting(count)
        if start >= 0:
            return start, count
        if whole:
            return -1, 0
        start, found = self.holes.take_largest()
        if found > count:
            self.holes.add(start + count, start + found)
        return start, min(found, count)

    def take_end(self, count: int) -> int:
        """Take `count` clusters from `end` on, for which there is `room` or a block each; returns the first."""
        start = self.end
        self.end = start + count
        return start

    def hold(self, runs: list[Run]) -> None:
        """Name clusters to nobody although they count 0 from now on; add() ends that."""
        for chunk, start, end in self._pieces(runs):
            self._held[chunk] += end - start

    def add(self, runs: list[Run]) -> None:
        """Take note that held clusters may be handed out. Raises nothing: what is known needs no reading."""
        for chunk, start, end in self._pieces(runs):
            left = self._held[chunk] - (end - start)
            if left > 0:
                self._held[chunk] = left
            else:
                del self._held[chunk]
            self._release(chunk, start, end)

    def lower_end(self) -> int:
        """Find the last cluster in use, reading counts as far as they are all 0; returns one past it."""
        while self.end:
            chunk = self.end - 1 >> self._shift
            if not self._is_scanned(chunk):
                if not self._scan(chunk):
                    break
            elif not self._drop_tail():
                if self.refcounts.has_block(chunk << self._shift >> self._block_shift):
                    break
                self.end = chunk << self._shift  # nothing counts it, so nothing is there
        return self.end

    def _fitting(self, count: int) -> int:
        """The first of `count` clusters, after looking through a bounded number of chunks; -1 for none."""
        # What cannot grow is searched to its end.
        patience = self._patience if self.end + count < self.limit else 1 << 63
        for _ in range(patience):
            start = self.holes.take(count)
            if start >= 0 or not self._scan_more():
                return start
        return self.holes.take(count)

    def _scan_more(self) -> bool:
        """Scan the next chunk that is worth it; whether there was one."""
        while self._promising:
            chunk = heappop(self._promising)
            if not self._is_scanned(chunk) and self._scan(chunk):
                return True
        while self._next << self._shift < self.end:
            chunk = self._next
            if chunk not in self._ahead and not self._scan(chunk):
                self._again.add(chunk)
            self._ahead.discard(chunk)
            self._next += 1
            return True
        return False

    def _scan(self, chunk: int) -> bool:
        """Learn the free clusters of a chunk; not while some of them are held, then whether they are is unclear."""
        if self._held.get(chunk):
            return False
        first = chunk << self._shift
        if first < self.end and self.refcounts.has_block(first >> self._block_shift):
            for start, count in self.refcounts.free_runs(first, first + (1 << self._shift)):
                if start < self.end:
                    self.holes.add(start, min(start + count, self.end))
        if chunk >= self._next:
            self._ahead.add(chunk)
        self._again.discard(chunk)
        self._drop_tail()
        return True

    def _release(self, chunk: int, start: int, end: int) -> None:
        """Add free clusters of one chunk to what is known of it."""
        if end == self.end:
            self.end = start
            self._drop_tail()
        elif self._is_scanned(chunk):
            self.holes.add(start, end)
            if len(self.holes) > _MOST_HOLES:
                self._forget()
        if not self._is_scanned(chunk) and not self._held.get(chunk):
            heappush(self._promising, chunk)

    def _drop_tail(self) -> bool:
        """Let `end` fall over a hole right before it; whether there was one."""
        before, self.end = self.end, self.holes.cut_off(self.end)
        return self.end < before

    def _forget(self) -> None:
        self.holes.clear()
        self._ahead.clear()
        self._again.clear()
        self._promising.clear()
        self._next = 0

    def _is_scanned(self, chunk: int) -> bool:
        return chunk in self._ahead or (chunk < self._next and chunk not in self._again)

    def _pieces(self, runs: list[Run]) -> Iterator[tuple[int, int, int]]:
        """Cut runs into (chunk, first cluster, end cluster)."""
        for start, count in runs:
            end = start + count
            while start < end:
                chunk = start >> self._shift
                stop = min(end, chunk + 1 << self._shift)
                yield chunk, start, stop
                start = stop


def _limit_of(storage: Storage, geometry: Geometry) -> int:
    """Clusters that the storage can hold: a block device does not grow, a file does until offsets are too large."""
    descriptor = storage.fileno()
    if descriptor >= 0 and stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return storage.length() >> geometry.cluster_bits
    return MAX_HOST_OFFSET + 1 >> geometry.cluster_bits
