"""Exact LRU miss-ratio curves of the metadata cache from one pass over a trace, for every slice size at once.

It does not know where requests come from nor what a miss costs. A request is one access to each slice that its span
touches, as in QEMU, where the lookups of one request within one slice follow each other and only the first can miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cowslice.cache.sizes import MIN_ENTRY_SIZE, MIN_L2_ENTRIES
from cowslice.errors import BadOption, OutOfRange
from cowslice.format.geometry import Geometry
from cowslice.processors import cores
from cowslice.tune.curvestack import Stack
from cowslice.units import div_ceil

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from numpy.typing import NDArray

# Operations as `tune.trace` numbers them.
READ, WRITE, FLUSH, DISCARD, ZERO = range(5)


class Columns(Protocol):
    """What is read of a `Requests`: numpy columns of equal length, offsets and lengths in bytes."""

    @property
    def operation(self) -> NDArray[np.uint8]: ...
    @property
    def offset(self) -> NDArray[np.uint64]: ...
    @property
    def length(self) -> NDArray[np.uint64]: ...


class Counted:
    """What every curve has: accesses of a slice, and misses at each of its sizes, cold ones included."""

    __slots__ = ()
    if TYPE_CHECKING:
        reads: int
        writes: int
        cold_reads: int
        cold_writes: int
        read_misses: NDArray[np.int64]
        write_misses: NDArray[np.int64]

    @property
    def accesses(self) -> int:
        """Lookups of a slice, reads and writes."""
        return self.reads + self.writes

    @property
    def cold(self) -> int:
        """First touches of a slice: misses at every cache size, which a warm-up removes."""
        return self.cold_reads + self.cold_writes

    @property
    def misses(self) -> NDArray[np.int64]:
        """Misses at each size, reads and writes, cold ones included."""
        return self.read_misses + self.write_misses


@dataclass(frozen=True, slots=True, eq=False)
class Curve(Counted):
    """How often a cache of each size would have missed, LRU, slices of `entry_bytes` of metadata.

    `entries` are the cache sizes, ascending from 0, at which the misses change; `read_misses[i]` and `write_misses[i]`
    hold from `entries[i]` up to `entries[i + 1]`, and for ever from the last on. Misses include the `cold_reads` and
    `cold_writes`: first touches, which no size avoids. `writes` counts everything that is not a read. A slice maps
    `slice_span` guest bytes; the disk has `slices` of them, of which the trace touched `touched`. `rate` is the share
    of slices that was sampled, 1.0 when the curve is exact; else the curve may be off by `error`, up or down as a share
    of all accesses, and to the left or right as a share of the slices that were touched.
    """

    entry_bytes: int
    slice_span: int
    slices: int
    touched: int
    reads: int
    writes: int
    cold_reads: int
    cold_writes: int
    entries: NDArray[np.int64]
    read_misses: NDArray[np.int64]
    write_misses: NDArray[np.int64]
    rate: float = 1.0
    error: float = 0.0

    @property
    def full_bytes(self) -> int:
        """The smallest cache that holds every slice that was touched; QEMU has two entries at least."""
        return max(MIN_L2_ENTRIES, self.touched) * self.entry_bytes

    def entries_of(self, cache_bytes: int) -> int:
        """The entries that QEMU makes of `l2-cache-size`: a whole number, at least two."""
        return max(MIN_L2_ENTRIES, cache_bytes // self.entry_bytes)

    def misses_at(self, entries: int) -> int:
        """Misses of a cache with so many entries, cold ones included."""
        at = int(np.searchsorted(self.entries, entries, side="right")) - 1
        return int(self.read_misses[at] + self.write_misses[at])

    def miss_ratio(self, cache_bytes: int, *, warm: bool = False) -> float:
        """Misses per access at an `l2-cache-size` of `cache_bytes` in QEMU, 0.0 without any.

        `warm` leaves first touches out.
        """
        misses = self.misses_at(self.entries_of(cache_bytes)) - (self.cold if warm else 0)
        return misses / self.accesses if self.accesses else 0.0


@dataclass(frozen=True, slots=True)
class Curves:
    """The curves of one trace on a disk of `disk_size` bytes and one geometry, by `l2-cache-entry-size`.

    `requests` counts those that looked anything up: flushes and discards of less than a cluster do not.
    """

    geometry: Geometry
    disk_size: int
    requests: int
    by_entry_bytes: Mapping[int, Curve]


def slice_curves(requests: Iterable[Columns], geometry: Geometry, *, disk_size: int) -> Curves:
    """Compute the curves of all slice sizes from 512 bytes to the cluster in one pass over the chunks of a trace.

    Exact up to a million distinct slices of a size; above, that size is sampled and its curve says so.
    Raises OutOfRange for a request beyond `disk_size` bytes, and what the trace raises.
    """
    return curves_for(requests, [geometry], disk_size=disk_size)[0]


def curves_for(requests: Iterable[Columns], geometries: Sequence[Geometry], *, disk_size: int) -> list[Curves]:
    """Compute the same for several geometries in the same pass: what the disk would need with other clusters."""
    if disk_size <= 0:
        raise BadOption(f"disk_size is {disk_size}, expected a positive number of bytes")
    builders = [_Builder(geometry, disk_size) for geometry in geometries]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(cores()) as pool:
        for chunk in requests:
            for builder in builders:
                builder.add(chunk, pool)
    return [builder.finished() for builder in builders]


def touched_spans(requests: Columns, geometry: Geometry, disk_size: int) -> tuple[
        NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint8]]:
    """First byte, last byte and "is no read" of each request that looks anything up, in order.

    QEMU drops only whole clusters, so of a discard the ragged ends look nothing up. Raises OutOfRange.
    """
    operation, offset, length = requests.operation, requests.offset, requests.length
    first, end = offset, offset + length
    wrong = (end > disk_size) | (end < offset)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise OutOfRange(f"{int(length[at])} bytes at offset {int(offset[at])} are requested, expected a span inside "
                         f"the disk of {disk_size} bytes")
    mask = np.uint64(geometry.cluster_size - 1)
    discards = operation == DISCARD
    if discards.any():
        first = np.where(discards, (first + mask) & ~mask, first)
        end = np.where(discards & (end < disk_size), end & ~mask, end)
    kept = (end > first) & (operation != FLUSH)
    return first[kept], end[kept] - np.uint64(1), (operation[kept] != READ).astype(np.uint8)


class _Builder:
    """The stacks of one geometry."""

    def __init__(self, geometry: Geometry, disk_size: int) -> None:
        self.geometry = geometry
        self.disk_size = disk_size
        self.requests = 0
        self.stacks = {
            1 << bits: _stack(geometry, 1 << bits, disk_size)
            for bits in range(MIN_ENTRY_SIZE.bit_length() - 1, geometry.cluster_bits + 1)}

    def add(self, chunk: Columns, pool: Executor) -> None:
        spans = touched_spans(chunk, self.geometry, self.disk_size)
        self.requests += len(spans[0])
        for _ in pool.map(lambda stack: stack.add(*spans), self.stacks.values()):
            pass

    def finished(self) -> Curves:
        curves = {entry: self._curve(entry, stack) for entry, stack in self.stacks.items()}
        return Curves(self.geometry, self.disk_size, self.requests, curves)

    def _curve(self, entry: int, stack: Stack) -> Curve:
        span = 1 << _span_bits(self.geometry, entry)
        entries, misses = misses_of(stack)
        reads, writes = stack.reads_and_writes
        return Curve(
            entry_bytes=entry, slice_span=span, slices=stack.slices, touched=round(stack.followed / stack.rate),
            reads=reads, writes=writes, cold_reads=stack.cold[0], cold_writes=stack.cold[1], entries=entries,
            read_misses=misses[0], write_misses=misses[1], rate=stack.rate, error=sampling_error(stack))


def _stack(geometry: Geometry, entry_bytes: int, disk_size: int) -> Stack:
    span_bits = _span_bits(geometry, entry_bytes)
    return Stack(span_bits, slices=div_ceil(disk_size, 1 << span_bits))


def _span_bits(geometry: Geometry, entry_bytes: int) -> int:
    """log2 of the guest bytes that a slice of `entry_bytes` maps."""
    return geometry.cluster_bits + (entry_bytes // geometry.l2_entry_size).bit_length() - 1


def misses_of(stack: Stack) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """The cache sizes, from 0, at which the misses of a stack change, and the misses there: of reads, of the rest."""
    found = [stack.distances(write) for write in (False, True)]
    sizes = np.union1d(np.union1d(found[0][0], found[1][0]), [0])
    misses = [_misses(sizes, *found[write]) + stack.cold[write] for write in (0, 1)]
    # What a sample stands for need not add up to the number of accesses, which is known.
    return sizes, [np.minimum(misses[write], stack.reads_and_writes[write]) for write in (0, 1)]


def sampling_error(stack: Stack) -> float:
    """Two standard deviations of what a sample of slices tells: they shrink with the root of how many are followed."""
    return 0.0 if stack.rate == 1.0 else 2 / max(1, stack.followed) ** 0.5


def _misses(entries: NDArray[np.int64], distances: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Accesses whose distance is greater than each of `entries`."""
    beyond = np.concatenate([np.cumsum(counts[::-1], dtype=np.int64)[::-1], np.zeros(1, dtype=np.int64)])
    return beyond[np.searchsorted(distances, entries, side="right")]
