"""Check the commonest image, one plain qcow2 file without a fault, in milliseconds: or say nothing at all.

It imports next to nothing, because a check of a sound image takes less time than importing the rest of the program. It
never reports a fault: whatever is unusual, let alone wrong, makes it answer None, and the full check has the word.
"""

from __future__ import annotations

import os
import stat
from struct import Struct, unpack, unpack_from

from cowslice.errors import CowsliceError
from cowslice.ops.refcheck import Owners
from cowslice.storage.locks import lock_image

# Format section "Header": version 2, then what version 3 adds.
_HEADER = Struct(">4sIQIIQIIQQIIQ")
_FEATURES = Struct(">QQQII")
_LENGTHS = {2: (72,), 3: (104, 112)}
_COMPRESSION = 1 << 3
_PLAIN_EXTENSIONS = (0x6803F857,)  # the names of features: nothing to check
_COPIED = 1 << 63
_TABLE_RESERVED = 0x7F000000000001FF
# Larger files go to the full check, which bounds its memory.
_MOST_CLUSTERS = 1 << 22


class QuickTotals:
    """The numbers of a check that found nothing wrong, in clusters and bytes."""

    __slots__ = ("allocated_clusters", "cluster_size", "compressed_clusters", "fragmented_clusters", "image_end_offset",
                 "total_clusters")
    corruptions = 0
    leaks = 0
    check_errors = 0

    def __init__(self, cluster_size: int, total_clusters: int) -> None:
        self.cluster_size = cluster_size
        self.total_clusters = total_clusters
        self.image_end_offset = 0
        self.allocated_clusters = 0
        self.fragmented_clusters = 0
        self.compressed_clusters = 0


class _Unusual(Exception):
    """Not for us."""


def quick_check(path: str, *, force_share: bool = False) -> QuickTotals | None:
    """Return the totals of a plain image in which everything is right; None for every other image and every trouble."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        lock_image(descriptor, path, writing=False, force_share=force_share)
        return _Quick(descriptor).run()
    except (_Unusual, OSError, CowsliceError):
        return None
    finally:
        os.close(descriptor)


class _Quick:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        status = os.fstat(descriptor)
        _expect(stat.S_ISREG(status.st_mode))
        self.length = status.st_size
        self._take_header(self._read(0, 112))
        self.clusters = -(-self.length // self.cluster_size)
        _expect(self.clusters <= _MOST_CLUSTERS)
        self.buffer = bytearray(self.cluster_size)
        self.owners = Owners(self.clusters)

    def run(self) -> QuickTotals:
        totals = QuickTotals(self.cluster_size, -(-(self.size // 512 * 512) // self.cluster_size))
        blocks = unpack(f">{self.reftable_length // 8}Q", self._read(self.reftable_offset, self.reftable_length))
        for offset, length in ((0, self.cluster_size), (self.l1_offset, self.l1_length),
                               (self.reftable_offset, self.reftable_length)):
            self._own(offset, length)
        for offset in blocks:
            if offset:
                self._own(offset, self.cluster_size)
        for word in unpack(f">{self.l1_length // 8}Q", self._read(self.l1_offset, self.l1_length)):
            if word:
                self._table(word, totals)
        self._hold_against(blocks)
        totals.image_end_offset = (self.owners.highest() + 1) << self.bits
        return totals

    def _take_header(self, raw: bytes) -> None:
        (magic, version, backing, _, self.bits, self.size, crypt, l1_entries, self.l1_offset, self.reftable_offset,
         reftable_clusters, snapshots, _) = _HEADER.unpack_from(raw)
        _expect(magic == b"QFI\xfb" and version in (2, 3) and 9 <= self.bits <= 21)
        _expect(not backing and not crypt and not snapshots)
        self.cluster_size = 1 << self.bits
        incompatible, _, autoclear, self.order, header_length = (
            _FEATURES.unpack_from(raw, 72) if version == 3 else (0, 0, 0, 4, 72))
        compression = raw[104] if header_length > 104 else 0
        _expect(incompatible == (_COMPRESSION if compression else 0) and compression <= 1)
        _expect(not autoclear and self.order <= 6 and header_length in _LENGTHS[version])
        self.l1_length, self.reftable_length = l1_entries * 8, reftable_clusters << self.bits
        _expect(l1_entries * self.cluster_size // 8 * self.cluster_size >= self.size and self.l1_length <= 32 << 20)
        _expect(0 < self.reftable_length <= 8 << 20)
        _expect(not (self.l1_offset | self.reftable_offset) & (self.cluster_size - 1))
        self._take_extensions(header_length)

    def _take_extensions(self, at: int) -> None:
        raw = self._read(0, min(self.cluster_size, 4096))
        while at + 8 <= len(raw):
            kind, length = unpack_from(">II", raw, at)
            if kind == 0:
                return
            _expect(kind in _PLAIN_EXTENSIONS)
            at += 8 + (length + 7) // 8 * 8
        _expect(False)

    def _table(self, word: int, totals: QuickTotals) -> None:
        offset = word & ~_COPIED
        _expect(word & _COPIED and not word & _TABLE_RESERVED)
        self._own(offset, self.cluster_size)
        self._fill(offset)
        found = self.owners.scan(self.buffer, cluster_bits=self.bits)
        _expect(found)
        allocated, fragmented = found or (0, 0)
        totals.allocated_clusters += allocated
        totals.fragmented_clusters += fragmented

    def _hold_against(self, blocks: tuple[int, ...]) -> None:
        entries = self.cluster_size * 8 >> self.order
        for index in range(-(-self.clusters // entries)):
            offset = blocks[index] if index < len(blocks) else 0
            if offset:
                self._fill(offset)
            _expect(self.owners.agree(index * entries, entries, self.buffer if offset else None, self.order))

    def _own(self, offset: int, length: int) -> None:
        _expect(not offset & (self.cluster_size - 1))
        _expect(self.owners.own(offset >> self.bits, -(-length // self.cluster_size)))

    def _read(self, offset: int, length: int) -> bytes:
        raw = os.pread(self.descriptor, length, offset)
        _expect(len(raw) == length)
        return raw

    def _fill(self, offset: int) -> None:
        _expect(os.preadv(self.descriptor, (self.buffer,), offset) == self.cluster_size)


def _expect(usual: object) -> None:
    if not usual:
        raise _Unusual
