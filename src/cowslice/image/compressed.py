"""Compressed clusters: read in neighbourly batches, decompressed on all cores.

It does not know guest offsets: a cluster is named by where its stream begins in a storage and how long it can be.
No lock is held while anything is read or decompressed, a cluster wanted by many threads is decompressed once, and a
failure is told to those who waited for it and then forgotten.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from cowslice.codec import inflate, unzstd
from cowslice.codec.compression import Compression, decompress_cluster
from cowslice.errors import CorruptImage, OutOfRange
from cowslice.image.decompressed import DecompressedCache, Flight, Key
from cowslice.image.inflated import InflatedClusters
from cowslice.processors import cores
from cowslice.storage.spans import MergedRead, plan_merged_reads
from cowslice.units import KiB, MiB, div_ceil

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from cowslice.storage.base import Storage

# A batch is one read and then some 100 us of decompression for each stream of it: smaller than this, threads cost more
# than they give; larger, one batch would keep the others waiting.
LEAST_BATCH = 64 * KiB
MOST_BATCH = MiB

Item = TypeVar("Item")
Deliver = Callable[[int, bytes], None]


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes wanted of one compressed cluster: `target` gets what begins `skip` bytes into it.

    The stream lies in `length` bytes from `host_offset`. `target` is a writable view of bytes.
    """

    host_offset: int
    length: int
    skip: int
    target: memoryview


class CompressedClusters:
    """The compressed clusters of one layer. May be used by many threads at once.

    `kind` is the header's compression_type. `shared` is the cache of the chain; without one the layer has its own.
    Where compiled code can inflate, `inflated` does it, and knows this layer by the number `layer`; else it is None.
    """

    def __init__(
        self, storage: Storage, *, kind: int, cluster_size: int, shared: DecompressedCache | None = None
    ) -> None:
        self._storage = storage
        self._kind = kind
        self.zstd = kind == Compression.ZSTD
        self._cluster_size = cluster_size
        self._cache = DecompressedCache() if shared is None else shared
        compiled = storage.fileno() >= 0 and (
            unzstd.available() if self.zstd else kind == Compression.DEFLATE and inflate.available())
        self.inflated = self._cache.inflated if compiled else None
        self.layer = self._cache.new_layer(compiled=compiled)

    def cluster(self, host_offset: int, length: int) -> bytes:
        """Return the whole cluster whose stream lies in `length` bytes from `host_offset`.

        Raises CorruptImage if the stream is damaged, UnsupportedImage for an unknown kind, StorageError.
        """
        data = self._cache.look((self.layer, host_offset, length))
        return self.clusters([(host_offset, length)])[0] if data is None else data

    def forget(self) -> None:
        """Keep no cluster any longer: a stream was written where another may have been."""
        self._cache.trim()

    def clusters(self, spans: Sequence[tuple[int, int]], *, keep: bool = True) -> list[bytes]:
        """Return the cluster of each (host offset, length), in the given order. Raises as `cluster`."""
        found = [b""] * len(spans)
        self._provide(spans, found.__setitem__, keep)
        return found

    def fill(self, parts: Sequence[Part], *, keep: bool = True) -> None:
        """Fill the target of every part; several threads copy. Without `keep` nothing new stays in the cache.

        Raises as `cluster`, for the first part that failed; then the content of all targets is unknown.
        """
        if self.inflated is not None:
            parts = self._inflate(parts, self.inflated)
            if not parts:
                return

        def deliver(number: int, data: bytes) -> None:
            part = parts[number]
            part.target[:] = memoryview(data)[part.skip : part.skip + len(part.target)]

        self._provide([(part.host_offset, part.length) for part in parts], deliver, keep)

    def _inflate(self, parts: Sequence[Part], inflated: InflatedClusters) -> list[Part]:
        """Fill in compiled code, on all cores, and return the parts that it refuses."""
        refused: list[Part] = []
        for part in parts:
            _check(part.host_offset, part.length)

        def inflate_part(part: Part) -> None:
            if not inflated.read_part(self._storage.fileno(), self._storage.alignment, self.layer, self._cluster_size,
                                      part.host_offset, part.length, part.skip, part.target,
                                      zstd=self.zstd):
                refused.append(part)

        run_together(parts, inflate_part)
        return refused

    def _provide(self, spans: Sequence[tuple[int, int]], deliver: Deliver, keep: bool) -> None:
        """Deliver every cluster: the kept ones, then those that are ours to load, then those that others load.

        Nobody waits before all of his own flights have landed, so nobody waits in a circle.
        """
        own: list[Flight] = []
        others: list[tuple[int, Flight]] = []
        try:
            for number, (offset, length) in enumerate(spans):
                _check(offset, length)
                data, flight, mine = self._cache.claim((self.layer, offset, length), number, keep)
                if data is not None:
                    deliver(number, data)
                elif mine:
                    own.append(flight)
                else:
                    others.append((number, flight))
            self._load(own, deliver)
        finally:
            for flight in own:
                if not flight.landed.is_set():
                    self._cache.land(flight, None)
        for flight in own:
            if flight.error is not None:
                raise flight.error
        for number, flight in others:
            self._join(flight, number, deliver, keep)

    def _join(self, flight: Flight, number: int, deliver: Deliver, keep: bool) -> None:
        flight.landed.wait()
        if flight.error is not None:
            raise flight.error
        if flight.data is not None:
            deliver(number, flight.data)
        else:
            deliver(number, self.clusters([flight.key[1:]], keep=keep)[0])

    def _load(self, flights: Sequence[Flight], deliver: Deliver) -> None:
        """Land all flights. Batches are spread over the cores; what is near in the storage is read together."""
        spans = [flight.key[1:] for flight in flights]
        fair = div_ceil(sum(length for _, length in spans), cores())
        gap = self._storage.read_gap  # what is cheaper to read than to ask for apart is never worth splitting
        batches = plan_merged_reads(spans, gap=gap, most=max(min(max(fair, LEAST_BATCH), MOST_BATCH), gap))
        run_together(batches, lambda batch: self._load_batch(batch, flights, deliver))

    def _load_batch(self, batch: MergedRead, flights: Sequence[Flight], deliver: Deliver) -> None:
        members = [flights[member] for member in batch.members]
        buffer = bytearray(batch.length)
        try:
            self._storage.read_into(batch.offset, buffer)
        except Exception as error:
            self._load_apart(members, error, deliver)
            return
        self._cache.count_read(batch.length)
        view = memoryview(buffer)
        for flight in members:
            at = flight.key[1] - batch.offset
            self._land(flight, view[at : at + flight.key[2]], deliver)

    def _load_apart(self, members: Sequence[Flight], error: Exception, deliver: Deliver) -> None:
        """After a failed read of several streams: the fault of one must not fail its neighbours."""
        if len(members) == 1:
            self._cache.land(members[0], None, error)
            return
        for flight in members:
            _, offset, length = flight.key
            self._load_batch(MergedRead(offset, length, (0,)), [flight], deliver)

    def _land(self, flight: Flight, payload: memoryview, deliver: Deliver) -> None:
        try:
            data = decompress_cluster(self._kind, payload, self._cluster_size)
            deliver(flight.number, data)
        except CorruptImage as error:
            self._cache.land(flight, None, self._located(error, flight.key))
        except Exception as error:
            self._cache.land(flight, None, error)
        else:
            self._cache.land(flight, data)

    def _located(self, error: CorruptImage, key: Key) -> CorruptImage:
        where = f"at host offset {key[1]:#x} of '{self._storage.name}', at most {key[2]} bytes long"
        return CorruptImage(f"{error} ({where})", structure=error.structure, offset=key[1])


def _check(host_offset: int, length: int) -> None:
    if host_offset < 0 or length < 1:
        raise OutOfRange(f"a stream of {length} bytes at host offset {host_offset} asked, expected at least 1 byte")


def run_together(items: Iterable[Item], work: Callable[[Item], None]) -> None:
    """Do `work` for all items, in this thread and in those of the pool that are free; return when all is done.

    This thread takes items like the others, so it never waits for a pool that is busy elsewhere. `work` must not raise.
    Where other callers keep the cores busy, handing work around would only cost: then this thread does it all.
    """
    waiting = deque(items)

    def drain() -> None:
        while True:
            try:
                item = waiting.popleft()
            except IndexError:
                return
            work(item)

    futures = []
    with contextlib.suppress(RuntimeError):  # the interpreter is ending: no new threads
        futures += [_pool().submit(drain) for _ in range(min(len(waiting) - 1, cores() - 1 - len(_callers)))]
    _callers.append(None)
    try:
        drain()
    finally:
        _callers.pop()
        waiting.clear()
        for future in futures:
            if not future.cancel():
                future.result()


_callers: deque[None] = deque()  # one item for each caller that is inside run_together; appending is atomic


@cache
def _pool() -> ThreadPoolExecutor:
    """The threads that all images of the process share: one less than there are cores, as the caller works too."""
    from concurrent.futures import ThreadPoolExecutor  # only here: start-up stays light

    return ThreadPoolExecutor(max(cores() - 1, 1), "cowslice-decompress")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
