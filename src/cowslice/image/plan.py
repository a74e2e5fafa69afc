"""What a write, a zero or a discard makes of one L2 entry: pure, no I/O.

It does not know where new host clusters come from, nor what old bytes were. Spans inside a cluster are bytes from its
start. An entry that owns a cluster with COPIED set is ours alone and is changed in place (I6); any other is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cowslice.format.entries import ALL_SUBCLUSTERS, COPIED, ZERO, Entry, Kind, decode_entry
from cowslice.format.geometry import Geometry

NEW = -1  # of Rewrite.host: a new cluster is needed


@dataclass(frozen=True, slots=True)
class Keep:
    """Bytes beside the written ones that the cluster must hold afterwards. `zero`: they are known to read as zeros."""

    within: int
    length: int
    zero: bool


@dataclass(frozen=True, slots=True)
class Rewrite:
    """How one guest cluster takes a write. `host` is its cluster's byte offset, or -1 where it needs a new one.

    `keeps` must be filled from the guest's old view. `changed`: the entry changes, to `allocated` and `zero`
    subclusters (0 without them). `dropped` are host spans (offset, bytes) that lose a reference.
    """

    cluster: int
    host: int
    keeps: tuple[Keep, ...] = ()
    changed: bool = True
    allocated: int = 0
    zero: int = 0
    dropped: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Blank:
    """What an entry becomes that shall read as zeros; `dropped` as in Rewrite. None in its place: unchanged."""

    word: int
    bitmap: int = 0
    dropped: tuple[int, int] | None = None


class Planner:
    """Plans for one image. `covered` says of a cluster that where it is unallocated a lower layer may show."""

    def __init__(self, geometry: Geometry, *, version: int, data_file: bool) -> None:
        self.geometry = geometry
        self.version = version
        self.data_file = data_file
        self._size = geometry.cluster_size
        self._part = geometry.subcluster_size

    def decode(self, word: int, bitmap: int) -> Entry:
        """The entry of two words. Raises CorruptImage."""
        return decode_entry(word, bitmap, self.geometry, version=self.version, data_file=self.data_file)

    def write(self, cluster: int, entry: Entry, begin: int, end: int, *, covered: bool) -> Rewrite:
        """How bytes [begin, end) of a cluster are written. `covered`: unallocated bytes may come from a lower layer."""
        if self.geometry.extended_l2:
            return self._write_extended(cluster, entry, begin, end, covered=covered)
        ours = self._ours(entry)
        if entry.kind is Kind.NORMAL and ours:
            return Rewrite(cluster, entry.host_offset, changed=False)
        zero = entry.kind in (Kind.ZERO, Kind.ZERO_ALLOCATED) or (entry.kind is Kind.UNALLOCATED and not covered)
        keeps = tuple(_edges(0, self._size, begin, end, zero=zero))
        if ours:
            return Rewrite(cluster, entry.host_offset, keeps)
        return Rewrite(cluster, self._own_place(cluster), keeps, dropped=self.span_of(entry))

    def words(self, plan: Rewrite, host: int) -> tuple[int, int]:
        """(word, bitmap) of the entry once the cluster at byte `host` holds the bytes."""
        return host | COPIED, plan.zero << 32 | plan.allocated

    def blank(self, entry: Entry, mask: int, *, covered: bool, keep: bool) -> Blank | None:
        """What the entry becomes when the subclusters in `mask` (all: the cluster) shall read as zeros.

        `keep` holds on to the host cluster. None where nothing changes. A partial mask over a compressed cluster is the
        caller's to avoid. Not for version 2, which has no zero flag: there `vacated` is all there is.
        """
        if self.geometry.extended_l2:
            return self._blank_extended(entry, mask, covered=covered, keep=keep)
        if entry.kind is Kind.ZERO or (entry.kind is Kind.UNALLOCATED and not covered):
            return None
        if entry.kind is Kind.UNALLOCATED:
            return Blank(ZERO)
        if keep and self._ours(entry) and entry.host_offset > 0:
            return None if entry.kind is Kind.ZERO_ALLOCATED else Blank(entry.host_offset | COPIED | ZERO)
        return Blank(ZERO, dropped=self.span_of(entry))

    def vacated(self, entry: Entry) -> Blank | None:
        """What the entry becomes when the layer shall say nothing about the cluster any more."""
        if entry.kind is Kind.UNALLOCATED:
            return None
        return Blank(0, 0, dropped=self.span_of(entry))

    def span_of(self, entry: Entry) -> tuple[int, int] | None:
        """The host clusters, as (byte offset, bytes), that an entry holds a reference on; None without."""
        if self.data_file or entry.host_offset < 0 or not entry.length:
            return None
        if entry.kind is not Kind.COMPRESSED:
            return entry.host_offset, self._size
        first = entry.host_offset // self._size * self._size
        end = entry.host_offset + entry.length
        return first, -(-(end - first) // self._size) * self._size

    def mask(self, begin: int, end: int) -> int:
        """The subclusters that [begin, end) touches."""
        first, last = begin // self._part, (end - 1) // self._part
        return ((1 << (last - first + 1)) - 1) << first

    def _ours(self, entry: Entry) -> bool:
        if self.data_file:
            return entry.host_offset >= 0
        return entry.copied and entry.host_offset >= 0 and entry.kind is not Kind.COMPRESSED

    def _own_place(self, cluster: int) -> int:
        """In a data file each guest cluster has its place already."""
        return cluster << self.geometry.cluster_bits if self.data_file else NEW

    def _write_extended(self, cluster: int, entry: Entry, begin: int, end: int, *, covered: bool) -> Rewrite:
        touched = self.mask(begin, end)
        if self._ours(entry):
            keeps = tuple(self._keeps(entry, touched & ~entry.allocated, begin, end, covered=covered))
            changed = touched & ~entry.allocated != 0
            return Rewrite(cluster, entry.host_offset, keeps, changed, entry.allocated | touched, entry.zero & ~touched)
        copied = ALL_SUBCLUSTERS if entry.kind is Kind.COMPRESSED else entry.allocated
        keeps = tuple(self._keeps(entry, touched | copied, begin, end, covered=covered))
        zero = entry.zero & ~touched & ~copied
        return Rewrite(cluster, self._own_place(cluster), keeps, True, copied | touched, zero, self.span_of(entry))

    def _keeps(self, entry: Entry, wanted: int, begin: int, end: int, *, covered: bool) -> Iterator[Keep]:
        """What of the subclusters in `wanted` lies outside [begin, end); neighbours that are alike together."""
        zeros = entry.zero if covered or entry.kind is Kind.COMPRESSED else ALL_SUBCLUSTERS & ~entry.allocated
        for zero, mask in ((False, wanted & ~zeros), (True, wanted & zeros)):
            for first, count in _mask_runs(mask):
                yield from _edges(first * self._part, (first + count) * self._part, begin, end, zero=zero)

    def _blank_extended(self, entry: Entry, mask: int, *, covered: bool, keep: bool) -> Blank | None:
        if entry.kind is Kind.COMPRESSED:
            return Blank(0, ALL_SUBCLUSTERS << 32, self.span_of(entry))
        allocated, zero = entry.allocated & ~mask, entry.zero | mask
        if not covered and not entry.allocated and entry.host_offset < 0:
            return None
        host = max(entry.host_offset, 0) | (COPIED if entry.copied else 0)
        owned = entry.host_offset >= 0
        if owned and not allocated and not keep and not self.data_file:
            return Blank(0, zero << 32, self.span_of(entry))
        if allocated == entry.allocated and zero == entry.zero:
            return None
        return Blank(host if owned else 0, zero << 32 | allocated)


def _edges(first: int, last: int, begin: int, end: int, *, zero: bool) -> Iterator[Keep]:
    """What of [first, last) lies outside [begin, end)."""
    if first < begin:
        yield Keep(first, min(last, begin) - first, zero)
    if end < last:
        start = max(first, end)
        yield Keep(start, last - start, zero)


def _mask_runs(mask: int) -> Iterator[tuple[int, int]]:
    """Cut the set bits into (first, count) of neighbours."""
    index = 0
    while mask >> index:
        if mask >> index & 1:
            rest = mask >> index
            count = (rest ^ (rest + 1)).bit_length() - 1
            yield index, count
            index += count
        index += 1
