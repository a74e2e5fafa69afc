"""A new qcow2 file laid out from front to back: host clusters are taken in order, nothing is ever freed.

It does not know guest content. Refcount blocks stand wherever they become necessary, every cluster counts one unless
compressed streams share it. The header is written last, when all that it points to is stable: before, the file is no
image (invariants I4 and I5).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cowslice.errors import BadOption
from cowslice.format.entries import encode_l1
from cowslice.format.extensions import BitmapsPointer, Extension, with_extension
from cowslice.format.first_cluster import encode_first_cluster, lay_out
from cowslice.format.geometry import Geometry
from cowslice.format.header import Autoclear, Header
from cowslice.format.limits import MAX_HOST_OFFSET, MAX_REFTABLE_BYTES
from cowslice.format.refcounts import counted_once, set_refcount
from cowslice.format.words import pack_words
from cowslice.image.headerswitch import write_first_cluster
from cowslice.storage.base import Storage
from cowslice.units import SECTOR, MiB, div_ceil, round_up

if TYPE_CHECKING:
    from cowslice.codec.sectors import SectorCipher

_BATCH = MiB  # bytes of refcount blocks written at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """What the first cluster of the image will say, but for the places of tables, and what else it needs.

    `crypto_bytes` is the length of an encryption header. `table_clusters` are kept free for the refcount table behind
    the header. `blank`: bytes of the file that were never written read as zeros.
    """

    header: Header
    extensions: tuple[Extension, ...] = ()
    backing_name: bytes = b""
    crypto_bytes: int = 0
    table_clusters: int = 1
    blank: bool = True


class NewImage:
    """Host clusters of a file under construction. Methods may be called by many threads; `finish` once, at the end.

    `storage` is empty, or anything at all when the blueprint is not `blank`. `data` is where guest data goes: the same
    storage or an external data file. `cipher` is that of guest data, None for none. `bitmaps` is for whoever lays out
    persistent bitmaps, and is set by them.
    """

    def __init__(
        self, storage: Storage, blueprint: Blueprint, *, data: Storage | None = None,
        cipher: SectorCipher | None = None,
    ) -> None:
        self.storage = storage
        self.data = storage if data is None else data
        self.cipher = cipher
        self.header: Header = blueprint.header
        self.geometry: Geometry = blueprint.header.geometry
        self.blank = blueprint.blank
        self.bitmaps: BitmapsPointer | None = None
        self._blueprint = blueprint
        self._lock = threading.Lock()
        self._end = 0
        self._blocks = array("Q")
        self._settled = 1  # refcount blocks before this one are written, but for block 0, which is written at the end
        self._counts: dict[int, dict[int, int]] = {}
        self._packed = 0  # where the last compressed stream ended, in bytes; 0 for nowhere
        self.take(1 + blueprint.table_clusters)
        self._l1_cluster = self.take(self.geometry.clusters(self.header.l1_size * 8)) if self.header.l1_size else 0
        crypto = self.geometry.clusters(blueprint.crypto_bytes)
        self.crypto_offset = self.take(crypto) << self.geometry.cluster_bits if crypto else 0
        self._l1 = array("Q", bytes(8 * self.header.l1_size))

    @property
    def has_data_file(self) -> bool:
        return self.data is not self.storage

    @property
    def host_bytes(self) -> int:
        """Bytes that the file has so far."""
        return self._end << self.geometry.cluster_bits

    def take(self, count: int) -> int:
        """Return the first of `count` host clusters in a row, each counted once. Raises BadOption beyond all limits."""
        with self._lock:
            return self._take(count)

    def take_bytes(self, lengths: Sequence[int]) -> list[int]:
        """Return where in the file compressed streams of these many bytes go, packed back to back."""
        with self._lock:
            return [self._pack(length) for length in lengths]

    def link(self, index: int, cluster: int, table: bytes) -> None:
        """Write L2 table `index` at a host cluster that was taken for it."""
        self.storage.pwrite(cluster << self.geometry.cluster_bits, table)
        self._l1[index] = encode_l1(cluster << self.geometry.cluster_bits, copied=True)
        with self._lock:
            self._write_blocks(self._countable())

    def finish(self, *, extensions: Sequence[Extension] = (), sync: bool = True) -> None:
        """Write what is missing and, last, the header; `extensions` replace those of the blueprint.

        `sync`: all is stable on return, and the header reaches the disk after all else. Raises StorageError.
        """
        table, clusters = self._place_table()
        self._write_counts(table, clusters)
        self._write_l1()
        if self.blank:
            self.storage.truncate(self._length())
        first = self._first_cluster(table, clusters, tuple(extensions) or self._blueprint.extensions)
        if not self.blank:
            first = first.ljust(self.geometry.cluster_size, b"\0")
        if not sync:
            self.storage.pwrite(0, first)
            return
        if self.has_data_file:
            self.data.sync()
        self.storage.sync()
        write_first_cluster(self.storage, first)

    def check_bitmaps(self) -> None:
        """Raise BadOption unless the first cluster has room to name bitmaps."""
        lay_out(*self._with_bitmaps(self.header, self._blueprint.extensions, BitmapsPointer(1, 1, 1)),
                self._blueprint.backing_name)

    def _take(self, count: int) -> int:
        start = self._end
        self._end += count
        entries = self.geometry.refblock_entries
        while len(self._blocks) * entries < self._end:
            self._blocks.append(self._end)
            self._end += 1
        if len(self._blocks) * 8 > MAX_REFTABLE_BYTES or self.host_bytes > MAX_HOST_OFFSET:
            raise BadOption(f"the image needs more than {start << self.geometry.cluster_bits} bytes, which clusters of "
                            f"{self.geometry.cluster_size} bytes with refcounts of {self.geometry.refcount_bits} bits "
                            "cannot count", hint="Use larger clusters.")
        return start

    def _pack(self, length: int) -> int:
        """Place one stream: behind the last one, running into new clusters only if they directly follow."""
        bits = self.geometry.cluster_bits
        at = self._packed
        last = (at - 1) >> bits
        room = round_up(at, self.geometry.cluster_size) - at
        shares = room > 0 and self._count_of(last) < self.geometry.max_refcount
        if not shares or (length > room and last != self._end - 1):
            start = self._take(self.geometry.clusters(length))
            self._packed = (start << bits) + length
            return start << bits
        self._recount(last, self._count_of(last) + 1)
        if length > room:
            self._take(self.geometry.clusters(length - room))
        self._packed = at + length
        return at

    def _count_of(self, cluster: int) -> int:
        block, index = divmod(cluster, self.geometry.refblock_entries)
        return self._counts.get(block, {}).get(index, 1)

    def _recount(self, cluster: int, count: int) -> None:
        block, index = divmod(cluster, self.geometry.refblock_entries)
        self._counts.setdefault(block, {})[index] = count

    def _countable(self) -> int:
        """Refcount blocks whose counts will not change any more."""
        open_cluster = (self._packed - 1) >> self.geometry.cluster_bits if self._packed else self._end
        return min(self._end, open_cluster) // self.geometry.refblock_entries

    def _place_table(self) -> tuple[int, int]:
        """Find room for the refcount table, (host cluster, clusters): where it was kept free, else at the end."""
        kept = self._blueprint.table_clusters
        if len(self._blocks) * 8 <= kept << self.geometry.cluster_bits:
            return 1, kept
        for cluster in range(1, 1 + kept):
            self._recount(cluster, 0)
        clusters = 0
        while True:
            needed = self.geometry.clusters(_blocks_after(len(self._blocks), self._end + clusters, self.geometry) * 8)
            if needed == clusters:
                return self.take(clusters), clusters
            clusters = needed

    def _write_counts(self, table: int, clusters: int) -> None:
        with self._lock:
            self._write_blocks(len(self._blocks))
            self._write_block_run(0, 1)
        bits = self.geometry.cluster_bits
        words = pack_words(block << bits for block in self._blocks)
        self.storage.pwrite(table << bits, words.ljust(clusters << bits, b"\0"))

    def _write_blocks(self, end: int) -> None:
        """Write the refcount blocks up to `end` that are not written yet, neighbours together."""
        while self._settled < end:
            first, most = self._settled, max(_BATCH >> self.geometry.cluster_bits, 1)
            count = 1
            while count < most and first + count < end and self._blocks[first + count] == self._blocks[first] + count:
                count += 1
            self._write_block_run(first, count)
            self._settled += count

    def _write_block_run(self, first: int, count: int) -> None:
        content = b"".join(self._block(number) for number in range(first, first + count))
        self.storage.pwrite(self._blocks[first] << self.geometry.cluster_bits, content)

    def _block(self, number: int) -> bytearray:
        entries = self.geometry.refblock_entries
        block = counted_once(min(self._end - number * entries, entries), self.geometry)
        for index, count in self._counts.pop(number, {}).items():
            set_refcount(block, index, self.geometry.refcount_order, count)
        return block

    def _write_l1(self) -> None:
        """Write the L1 table; what is all zeros in a blank file is there already."""
        if any(self._l1) or not self.blank:
            self.storage.pwrite(self._l1_cluster << self.geometry.cluster_bits, pack_words(self._l1))

    def _length(self) -> int:
        """Bytes of the file: its last cluster only as far as it is used."""
        bits = self.geometry.cluster_bits
        l1_end = (self._l1_cluster << bits) + self.header.l1_size * 8
        for end in (l1_end, round_up(self._packed, SECTOR)):
            if end and (end - 1) >> bits == self._end - 1:
                return end
        return self.host_bytes

    def _first_cluster(self, table: int, clusters: int, extensions: tuple[Extension, ...]) -> bytes:
        bits = self.geometry.cluster_bits
        header = replace(
            self.header, l1_table_offset=self._l1_cluster << bits, refcount_table_offset=table << bits,
            refcount_table_clusters=clusters)
        if self.bitmaps is not None:
            header, extensions = self._with_bitmaps(header, extensions, self.bitmaps)
        return encode_first_cluster(lay_out(header, extensions, self._blueprint.backing_name))

    @staticmethod
    def _with_bitmaps(
        header: Header, extensions: tuple[Extension, ...], pointer: BitmapsPointer
    ) -> tuple[Header, tuple[Extension, ...]]:
        named = pointer.encode()
        return (replace(header, autoclear=header.autoclear | Autoclear.BITMAPS),
                with_extension(extensions, named.type, named.payload))


def table_clusters(clusters: int, geometry: Geometry) -> int:
    """Clusters of the refcount table of a file with `clusters` others, refcount blocks not counted among them."""
    needed = 1
    while (more := geometry.clusters(_blocks_after(0, clusters + needed, geometry) * 8)) > needed:
        needed = more
    return needed


def _blocks_after(blocks: int, clusters: int, geometry: Geometry) -> int:
    """Refcount blocks of a file that had `blocks` and grows to `clusters`, the new blocks not counted among these."""
    return max(blocks, div_ceil(clusters - blocks, geometry.refblock_entries - 1))
