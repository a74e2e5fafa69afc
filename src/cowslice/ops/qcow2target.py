"""Where a copy into a new qcow2 image goes: clusters are appended in guest order, maps follow what they map.

It does not read. Each chunk passes three steps: `prepare` (compress) and `store` (write) run in many threads at once,
`place` (take host clusters) in the order of chunks, so that what is near in the guest is near in the file. Of the map
only the tables of chunks under way are in memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from cowslice.codec.compression import compress_cluster
from cowslice.format.entries import ALL_SUBCLUSTERS, COPIED, ZERO, encode_bitmap, encode_compressed
from cowslice.format.header import CryptMethod
from cowslice.format.words import pack_words
from cowslice.image.filling import provide_space
from cowslice.image.newimage import NewImage
from cowslice.ops.bytescan import data_runs
from cowslice.ops.sources import Chunk, Content
from cowslice.units import SECTOR

Clusters = tuple[int, int]  # guest clusters, first and end


@dataclass(slots=True)
class Prepared:
    """One chunk on its way: which clusters are stored plainly, which compressed, which are zeros."""

    chunk: Chunk
    view: memoryview
    runs: list[tuple[int, int]] = field(default_factory=list)
    plain: list[Clusters] = field(default_factory=list)
    streams: list[tuple[int, bytes]] = field(default_factory=list)
    zeros: list[Clusters] = field(default_factory=list)


@dataclass(slots=True)
class Placed:
    """What is to be written where: plain clusters at host bytes, streams likewise, and tables that are complete."""

    prepared: Prepared
    hosts: list[int]
    offsets: list[int]
    tables: list[tuple[int, int, bytes]]


class Qcow2Target:
    """Puts a copy into `image`. `sparse`: zeros of that size are not stored, 0 stores all; `compress`: each cluster.

    `preallocation` is that of the options of the image; a cluster of zeros then has space all the same. Zeros beyond
    the `backing_size` bytes of a backing file need no entry.
    """

    def __init__(
        self, image: NewImage, *, sparse: int, compress: bool = False, preallocation: str = "off",
        backing_size: int = 0,
    ) -> None:
        self._image = image
        self._geometry = image.geometry
        self._sparse = sparse
        self._compress = compress
        self._preallocation = preallocation
        self._backed = self._geometry.clusters(backing_size)  # guest clusters that a backing file would show through
        self._stores_zeros = preallocation != "off"
        self._open: dict[int, tuple[int, array[int]]] = {}

    def prepare(self, chunk: Chunk, view: memoryview) -> Prepared:
        """Find what must be stored of a chunk; `view` holds its bytes up to the end of its last cluster."""
        prepared = Prepared(chunk, view)
        bits = self._geometry.cluster_bits
        first, end = chunk.start >> bits, self._geometry.clusters(chunk.end)
        if chunk.content is Content.BELOW:
            return prepared
        if chunk.content is Content.ZERO:
            (prepared.plain if self._stores_zeros else prepared.zeros).append((first, end))
            return self._over_backing(prepared)
        prepared.runs = data_runs(view, self._sparse) if self._sparse else [(0, len(view))]
        if self._stores_zeros:
            prepared.plain.append((first, end))
            return prepared
        stored = list(_clusters_of(prepared.runs, first, bits))
        prepared.zeros = list(_between(stored, first, end))
        prepared.plain = self._compressed(prepared, stored) if self._compress else stored
        return self._over_backing(prepared)

    def place(self, prepared: Prepared) -> Placed:
        """Take host clusters; called in the order of chunks."""
        bits = self._geometry.cluster_bits
        for first, end in prepared.zeros:
            self._set(first, end, None)
        # The first table of a chunk stands before what it maps, where a reader that goes on forward meets it.
        for first, _ in (*prepared.plain[:1], *((cluster, 0) for cluster, _ in prepared.streams[:1])):
            self._table(first // self._geometry.l2_entries)
        offsets = self._image.take_bytes([len(payload) for _, payload in prepared.streams])
        for (cluster, payload), offset in zip(prepared.streams, offsets, strict=True):
            self._set_word(cluster, encode_compressed(offset, len(payload), bits))
        hosts = []
        for first, end in prepared.plain:
            host = (first if self._image.has_data_file else self._image.take(end - first)) << bits
            self._set(first, end, host)
            hosts.append(host)
        return Placed(prepared, hosts, offsets, list(self._complete(prepared.chunk.end)))

    def store(self, placed: Placed) -> None:
        """Write what was placed."""
        for (first, end), host in zip(placed.prepared.plain, placed.hosts, strict=True):
            self._store_plain(placed.prepared, first, end, host)
        streams = [payload for _, payload in placed.prepared.streams]
        for offset, run in _joined(placed.offsets, streams):
            self._image.storage.pwrite(offset, run)
        for index, cluster, table in placed.tables:
            self._image.link(index, cluster, table)

    def finish(self) -> None:
        """Write the tables that are left."""
        for index, cluster, table in self._complete(self._geometry.l2_span * (len(self._open) and max(self._open) + 1)):
            self._image.link(index, cluster, table)

    def _over_backing(self, prepared: Prepared) -> Prepared:
        """Leave of the zeros those that would show a backing file; version 2 has no entry for them and stores them."""
        zeros = [(first, min(end, self._backed)) for first, end in prepared.zeros if first < self._backed]
        prepared.zeros = [] if self._image.header.version < 3 else zeros
        if self._image.header.version < 3:
            prepared.plain += zeros
        return prepared

    def _compressed(self, prepared: Prepared, stored: list[Clusters]) -> list[Clusters]:
        """Compress all stored clusters; return those that did not become smaller."""
        bits, size = self._geometry.cluster_bits, self._geometry.cluster_size
        kind = self._image.header.compression_type
        plain = []
        for first, end in stored:
            for cluster in range(first, end):
                at = (cluster << bits) - prepared.chunk.start
                payload = compress_cluster(kind, prepared.view[at : at + size], fast=True)
                if payload is None:
                    plain.append((cluster, cluster + 1))
                else:
                    prepared.streams.append((cluster, payload))
        return plain

    def _store_plain(self, prepared: Prepared, first: int, end: int, host: int) -> None:
        bits, image = self._geometry.cluster_bits, self._image
        length = (end - first) << bits
        if image.has_data_file:
            length = min(length, image.header.size - host)
        if prepared.chunk.content is Content.ZERO:
            self._store_zeros(first << bits, host, length)
            return
        start = (first << bits) - prepared.chunk.start
        if image.cipher is not None:
            number = first << bits if image.header.crypt_method == CryptMethod.AES else host
            image.data.pwrite(host, image.cipher.encrypt(number // SECTOR, prepared.view[start : start + length]))
            return
        if not image.blank and not image.has_data_file:
            image.data.pwrite(host, prepared.view[start : start + length])
            return
        self._provide(host, length)
        for begin, stop in prepared.runs:
            begin, stop = max(begin, start), min(stop, start + length)
            if begin < stop:
                image.data.pwrite(host + begin - start, prepared.view[begin:stop])

    def _store_zeros(self, guest: int, host: int, length: int) -> None:
        image = self._image
        if image.cipher is None:
            if image.blank:
                self._provide(host, length)
            else:
                image.data.zero(host, length)
            return
        step = max(1 << 20, self._geometry.cluster_size)
        for done in range(0, length, step):
            data = bytes(min(step, length - done))
            if image.cipher is not None:
                number = guest if image.header.crypt_method == CryptMethod.AES else host
                data = image.cipher.encrypt((number + done) // SECTOR, data)
            image.data.pwrite(host + done, data)

    def _provide(self, host: int, length: int) -> None:
        if not self._image.has_data_file:  # a data file had its space from the start
            provide_space(self._image.data, self._preallocation, host, length)

    def _table(self, index: int) -> tuple[int, array[int]]:
        found = self._open.get(index)
        if found is None:
            words = array("Q", bytes(self._geometry.cluster_size))
            found = self._open[index] = self._image.take(1), words
        return found

    def _set_word(self, cluster: int, word: int) -> None:
        index, at = divmod(cluster, self._geometry.l2_entries)
        self._table(index)[1][at << self._geometry.extended_l2] = word

    def _set(self, first: int, end: int, host: int | None) -> None:
        """Map guest clusters to a run of host bytes, or to zeros."""
        entries, size, width = self._geometry.l2_entries, self._geometry.cluster_size, 1 + self._geometry.extended_l2
        while first < end:
            index, at = divmod(first, entries)
            count = min(end - first, entries - at)
            words = self._table(index)[1]
            span = slice(at * width, (at + count) * width, width)
            if host is not None:
                words[span] = array("Q", range(COPIED | host, COPIED | (host + count * size), size))
                host += count * size
            elif width == 1:
                words[span] = array("Q", [ZERO]) * count
            if width == 2:
                bitmap = encode_bitmap(0, ALL_SUBCLUSTERS) if host is None else encode_bitmap(ALL_SUBCLUSTERS, 0)
                words[slice(at * 2 + 1, (at + count) * 2, 2)] = array("Q", [bitmap]) * count
            first += count

    def _complete(self, end: int) -> Iterator[tuple[int, int, bytes]]:
        """Give out the tables that map nothing behind the guest byte `end`."""
        for index in sorted(self._open):
            if (index + 1) * self._geometry.l2_span > end:
                break
            cluster, words = self._open.pop(index)
            yield index, cluster, pack_words(words)


def _clusters_of(runs: list[tuple[int, int]], base: int, bits: int) -> Iterator[Clusters]:
    """The clusters that runs of bytes touch, neighbours together; `base` is the cluster of byte 0."""
    first = end = -1
    for start, stop in runs:
        begin, behind = start >> bits, ((stop - 1) >> bits) + 1
        if begin > end:
            if end >= 0:
                yield base + first, base + end
            first = begin
        end = behind
    if end >= 0:
        yield base + first, base + end


def _between(stored: list[Clusters], first: int, end: int) -> Iterator[Clusters]:
    """The clusters from `first` to `end` that are not stored."""
    for begin, stop in stored:
        if begin > first:
            yield first, begin
        first = stop
    if end > first:
        yield first, end


def _joined(offsets: list[int], streams: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """Streams that directly follow each other as one."""
    start = 0
    for number in range(1, len(streams) + 1):
        if number == len(streams) or offsets[number] != offsets[number - 1] + len(streams[number - 1]):
            yield offsets[start], b"".join(streams[start:number])
            start = number
