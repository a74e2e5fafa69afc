"""Obvious twins of the parts that are fast: a slice map that reads tables as they lie, and small images made of cells.

It knows nothing of caches, packing or chains. What a model image must read as is computed from its cells alone, never
by reading it back.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from cowslice.codec.compression import compress_cluster
from cowslice.format.entries import (
    L1_OFFSET_MASK,
    Kind,
    encode_bitmap,
    encode_compressed,
    encode_l1,
    encode_normal,
    encode_zero,
)
from cowslice.format.extensions import Extension, ExtensionType
from cowslice.format.first_cluster import encode_first_cluster, lay_out
from cowslice.format.geometry import SUBCLUSTERS, Geometry
from cowslice.format.header import CompressionType, Header, Incompatible
from cowslice.storage.base import Storage

_OWNING = (Kind.NORMAL, Kind.ZERO_ALLOCATED, Kind.RESERVED)


class DictSliceMap:
    """The contract of `SliceMap.lookup` without a cache: two reads for each entry, and runs of one cluster."""

    def __init__(self, storage: Storage, geometry: Geometry, l1: bytes) -> None:
        self._storage = storage
        self._geometry = geometry
        self._l1 = l1

    def lookup(self, cluster: int, want: int = 1) -> tuple[int, int, int]:
        """Return (L2 entry word, subcluster bitmap, 1)."""
        geometry = self._geometry
        guest = cluster << geometry.cluster_bits
        at = geometry.l1_index(guest) * 8
        table = int.from_bytes(self._l1[at : at + 8], "big") & L1_OFFSET_MASK
        if not table:
            return 0, 0, 1
        place = table + geometry.l2_index(guest) * geometry.l2_entry_size
        entry = self._storage.read(place, geometry.l2_entry_size)
        return int.from_bytes(entry[:8], "big"), int.from_bytes(entry[8:], "big"), 1


@dataclass(frozen=True, slots=True)
class Cell:
    """What one guest cluster is to be. `parts` are the kinds of its 32 subclusters, or empty where all are `kind`."""

    kind: Kind
    parts: tuple[Kind, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelImage:
    """The bytes of an image file, those of its data file (empty without one), and what was asked for."""

    file: bytes = field(repr=False)
    data_file: bytes = field(repr=False)
    geometry: Geometry
    size: int
    cells: tuple[Cell, ...]
    salt: int

    def over(self, below: bytes) -> bytes:
        """The guest bytes when the backing file's are `below`, which may be shorter or longer."""
        lower = below[: self.size].ljust(self.size, b"\0")
        part = self.geometry.subcluster_size
        seen = bytearray()
        for number, cell in enumerate(self.cells):
            content = cluster_content(self.geometry, self.salt, number)
            for index in range(self.geometry.subclusters):
                kind = cell.parts[index] if cell.parts else cell.kind
                place = (number << self.geometry.cluster_bits) + index * part
                if kind in (Kind.NORMAL, Kind.COMPRESSED):
                    seen += content[index * part : (index + 1) * part]
                elif kind in (Kind.UNALLOCATED, Kind.RESERVED):
                    seen += lower[place : place + part].ljust(part, b"\0")
                else:
                    seen += bytes(part)
        return bytes(seen[: self.size])


def cluster_content(geometry: Geometry, salt: int, number: int) -> bytes:
    """Bytes that differ in every eight: which image, which guest cluster, where in it."""
    words = geometry.cluster_size // 8
    return b"".join((salt << 56 | number << 24 | word).to_bytes(8, "big") for word in range(words))


def build_image(
    geometry: Geometry, cells: Sequence[Cell], *, size: int, salt: int = 1, order: int = 0, version: int = 3,
    compression: CompressionType = CompressionType.DEFLATE, data_file: bytes = b"",
    backing: tuple[bytes, bytes] | None = None,
) -> ModelImage:
    """Make an image of `size` guest bytes whose clusters are `cells`, one for each guest cluster.

    `order` seeds where clusters come to lie, 0 for guest order. `data_file` names an external data file. `backing` is
    (name, format). Counts are left zero: the image is for reading only.
    """
    return _Builder(geometry, tuple(cells), size, salt, version, compression, data_file).build(order, backing)


class _Builder:
    """Lays out header, tables and clusters one behind another."""

    def __init__(self, geometry: Geometry, cells: tuple[Cell, ...], size: int, salt: int, version: int,
                 compression: CompressionType, data_file: bytes) -> None:
        self.geometry, self.cells, self.size, self.salt = geometry, cells, size, salt
        self.version, self.compression, self.data_file = version, compression, data_file
        self.file = bytearray(3 * geometry.cluster_size)  # header, refcount table and one block, both left empty
        self.data = bytearray()

    def build(self, order: int, backing: tuple[bytes, bytes] | None) -> ModelImage:
        bits = self.geometry.cluster_bits
        l1_offset = self._take(self.geometry.clusters(self.geometry.l1_entries(self.size) * 8) or 1)
        entries = {number: self._store(number) for number in self._numbers(order)}
        for table in range(self.geometry.l1_entries(self.size)):
            first = table * self.geometry.l2_entries
            words = [entries.get(first + index, (0, 0)) for index in range(self.geometry.l2_entries)]
            if any(words):
                self._put(l1_offset + table * 8, encode_l1(self._table(words), copied=True).to_bytes(8, "big"))
        self.file[: 1 << bits] = self._first_cluster(l1_offset, backing).ljust(1 << bits, b"\0")
        return ModelImage(bytes(self.file), bytes(self.data), self.geometry, self.size, self.cells, self.salt)

    def _numbers(self, order: int) -> list[int]:
        numbers = list(range(len(self.cells)))
        if order:
            random.Random(order).shuffle(numbers)
        return numbers

    def _store(self, number: int) -> tuple[int, int]:
        """Give the cluster its host space and return its entry."""
        cell = self.cells[number]
        if cell.kind is Kind.COMPRESSED:
            return self._store_compressed(number), 0
        parts = cell.parts or (cell.kind,) * self.geometry.subclusters
        owned = any(part in _OWNING for part in parts)
        host = self._store_plain(number) if owned else 0
        if self.geometry.extended_l2:
            allocated = sum(1 << index for index in range(SUBCLUSTERS) if parts[index] is Kind.NORMAL)
            zero = sum(1 << index for index in range(SUBCLUSTERS) if parts[index] in (Kind.ZERO, Kind.ZERO_ALLOCATED))
            return encode_normal(host, copied=owned), encode_bitmap(allocated, zero)
        if parts[0] in (Kind.ZERO, Kind.ZERO_ALLOCATED):
            return encode_zero(host, copied=owned), 0
        return encode_normal(host, copied=owned), 0

    def _store_plain(self, number: int) -> int:
        """Content for every subcluster, those that must not be seen included."""
        content = cluster_content(self.geometry, self.salt, number)
        host = number << self.geometry.cluster_bits
        if self.data_file:
            self.data.extend(bytes(max(host + len(content) - len(self.data), 0)))
            self.data[host : host + len(content)] = content
            return host
        host = self._take(1)
        self._put(host, content)
        return host

    def _store_compressed(self, number: int) -> int:
        payload = compress_cluster(self.compression, cluster_content(self.geometry, self.salt, number))
        assert payload is not None
        host = len(self.file)
        self.file += payload  # streams touch each other; whatever comes next is aligned again
        return encode_compressed(host, len(payload), self.geometry.cluster_bits)

    def _table(self, words: Sequence[tuple[int, int]]) -> int:
        offset = self._take(1)
        second = self.geometry.l2_entry_size - 8
        self._put(offset, b"".join(word.to_bytes(8, "big") + bits.to_bytes(second, "big") for word, bits in words))
        return offset

    def _take(self, clusters: int) -> int:
        offset = self.geometry.clusters(len(self.file)) << self.geometry.cluster_bits
        self.file.extend(bytes(offset + clusters * self.geometry.cluster_size - len(self.file)))
        return offset

    def _put(self, offset: int, content: bytes) -> None:
        self.file[offset : offset + len(content)] = content

    def _first_cluster(self, l1_offset: int, backing: tuple[bytes, bytes] | None) -> bytes:
        cluster = self.geometry.cluster_size
        shape = {"header_length": 72, "tail": b""} if self.version == 2 else {}
        header = Header(
            version=self.version, cluster_bits=self.geometry.cluster_bits, size=self.size,
            l1_size=self.geometry.l1_entries(self.size), l1_table_offset=l1_offset, refcount_table_offset=cluster,
            refcount_table_clusters=1, incompatible=self._features(), compression_type=self.compression,
            **shape)  # type: ignore[arg-type]
        extensions = [Extension(ExtensionType.BACKING_FORMAT, backing[1])] if backing and backing[1] else []
        if self.data_file:
            extensions.append(Extension(ExtensionType.DATA_FILE, self.data_file))
        return encode_first_cluster(lay_out(header, extensions, backing[0] if backing else b""))

    def _features(self) -> Incompatible:
        features = Incompatible(0)
        if self.geometry.extended_l2:
            features |= Incompatible.EXTENDED_L2
        if self.compression:
            features |= Incompatible.COMPRESSION
        if self.data_file:
            features |= Incompatible.DATA_FILE
        return features
