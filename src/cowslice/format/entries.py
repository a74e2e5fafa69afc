"""L1 and L2 entries: packed words and what they mean (spec: "L1 table", "L2 table", "Extended L2 Entries").

It does not know where the words were read: a caller that does passes `at`, the host offset of the entry, for messages.
Reserved bits do not change a meaning, as for QEMU; `l1_reserved` and `l2_reserved` show them to a check.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from cowslice.errors import CorruptImage, InternalError
from cowslice.format.geometry import SUBCLUSTERS, Geometry
from cowslice.format.limits import MAX_HOST_OFFSET
from cowslice.units import SECTOR

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1 << 0
L1_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED_MASK = 0x7F00_0000_0000_01FF
L2_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L2_RESERVED_MASK = 0x3F00_0000_0000_01FE
# Extended L2 entries: the zero flag of the first word is reserved, the second word holds 32 + 32 bits.
L2_RESERVED_MASK_EXTENDED = L2_RESERVED_MASK | ZERO
ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1


class Kind(Enum):
    """What a cluster or a subcluster is.

    UNALLOCATED and RESERVED read from the backing file, ZERO and ZERO_ALLOCATED as zeros; RESERVED and ZERO_ALLOCATED
    own host space whose content is ignored. RESERVED and MIXED exist only with extended L2 entries; a MIXED cluster
    has subclusters of different kinds.
    """

    UNALLOCATED = "unallocated"
    ZERO = "zero"
    ZERO_ALLOCATED = "zero, allocated"
    NORMAL = "normal"
    COMPRESSED = "compressed"
    RESERVED = "unallocated, space kept"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class Entry:
    """One decoded L2 entry.

    `host_offset` is the first host byte, or -1 where no host space is owned. `length` is the host bytes to read: the
    cluster size, a compressed stream's bound, or 0. `allocated` and `zero` are the subcluster bits (0 without them).
    """

    kind: Kind
    host_offset: int = -1
    length: int = 0
    copied: bool = False
    allocated: int = 0
    zero: int = 0

    def subcluster(self, index: int) -> Kind:
        """The kind of subcluster `index`, which is that of the cluster unless it is MIXED."""
        if self.kind is not Kind.MIXED:
            return self.kind
        return _SUBCLUSTER_KINDS[self.host_offset >= 0, self.allocated >> index & 1, self.zero >> index & 1]


def l2_table_offset(word: int, geometry: Geometry, at: int = -1) -> int:
    """Host offset of the L2 table of an L1 entry, 0 when its whole span is unallocated. Raises CorruptImage."""
    offset = word & L1_OFFSET_MASK
    if not geometry.is_aligned(offset):
        raise CorruptImage(
            f"L1 entry {word:#018x} points at {offset:#x}, which is not aligned to clusters of "
            f"{geometry.cluster_size:#x} bytes",
            structure="L1 table",
            offset=at,
        )
    return offset


def decode_entry(
    word: int, bitmap: int, geometry: Geometry, *, version: int = 3, data_file: bool = False, at: int = -1
) -> Entry:
    """Say what an L2 entry means; `bitmap` is the second word of an extended entry, else 0.

    Raises CorruptImage for what QEMU calls fatal corruption: an unaligned cluster, a zero flag in version 2, a
    compressed cluster in an image with a data file or outside the format's range, an impossible subcluster bitmap.
    """
    if word & COMPRESSED:
        return _decode_compressed(word, bitmap, geometry, data_file=data_file, at=at)
    offset = word & L2_OFFSET_MASK
    if not geometry.is_aligned(offset):
        raise _corrupt(word, f"points at {offset:#x}, not aligned to clusters of {geometry.cluster_size:#x} bytes", at)
    copied = bool(word & COPIED)
    # Offset 0 is the header's place, unless guest data lives in another file: there COPIED tells (spec: L2 table).
    owned = offset != 0 or (data_file and copied)
    if geometry.extended_l2:
        return _decode_extended(word, bitmap, geometry, offset=offset if owned else -1, at=at)
    length = geometry.cluster_size if owned else 0
    if word & ZERO:
        if version < 3:
            raise _corrupt(word, "has the zero flag, which a version 2 image cannot have", at)
        # Here an offset of 0 is always no cluster, COPIED or not, in QEMU as in the table of the specification.
        return Entry(Kind.ZERO_ALLOCATED, offset, length, copied) if offset else Entry(Kind.ZERO, copied=copied)
    return Entry(Kind.NORMAL, offset, length, copied) if owned else Entry(Kind.UNALLOCATED, copied=copied)


def subcluster_runs(entry: Entry, geometry: Geometry) -> Iterator[tuple[int, int, Kind]]:
    """Cut a cluster into (first subcluster, count, kind) of neighbours that are alike; one run unless MIXED."""
    if entry.kind is not Kind.MIXED:
        yield 0, geometry.subclusters, entry.kind
        return
    first, kind = 0, entry.subcluster(0)
    for index in range(1, SUBCLUSTERS):
        here = entry.subcluster(index)
        if here is not kind:
            yield first, index - first, kind
            first, kind = index, here
    yield first, SUBCLUSTERS - first, kind


def compressed_span(word: int, cluster_bits: int) -> tuple[int, int]:
    """Host offset and length in bytes of a compressed cluster; the stream may end before the length does.

    Bits 0..x-1 are the offset, x..61 the further sectors, x = 62 - (cluster_bits - 8) (spec: compressed clusters).
    """
    x = 70 - cluster_bits
    offset = word & ((1 << x) - 1)
    sectors = (word >> x & ((1 << (cluster_bits - 8)) - 1)) + 1
    return offset, sectors * SECTOR - (offset & (SECTOR - 1))


def bitmap_fault(word: int, bitmap: int, *, data_file: bool = False) -> str:
    """Why the subcluster bitmap cannot stand beside this extended entry, or '' when it can."""
    allocated, zero = bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
    if word & COMPRESSED:
        return f"is compressed but has the subcluster bitmap {bitmap:#018x}, expected 0" if bitmap else ""
    if allocated & zero:
        return f"has subclusters {allocated & zero:#010x} both allocated and zero"
    owned = word & L2_OFFSET_MASK or (data_file and word & COPIED)
    if allocated and not owned:
        return f"has allocated subclusters {allocated:#010x} but no host cluster"
    return ""


def l1_reserved(word: int) -> int:
    """The reserved bits that are set in an L1 entry."""
    return word & L1_RESERVED_MASK


def l2_reserved(word: int, geometry: Geometry) -> int:
    """The reserved bits that are set in the first word of an L2 entry; a compressed one has COPIED reserved."""
    if word & COMPRESSED:
        return word & COPIED
    return word & (L2_RESERVED_MASK_EXTENDED if geometry.extended_l2 else L2_RESERVED_MASK)


def encode_l1(l2_offset: int, *, copied: bool) -> int:
    """The L1 entry that points at an L2 table. Raises InternalError for an offset that no entry can hold."""
    return _offset_bits(l2_offset) | (COPIED if copied else 0)


def encode_normal(host_offset: int, *, copied: bool) -> int:
    """The L2 entry of a cluster with data, and the first word of any extended entry that owns a host cluster."""
    return _offset_bits(host_offset) | (COPIED if copied else 0)


def encode_zero(host_offset: int = 0, *, copied: bool = False) -> int:
    """The standard L2 entry of a cluster that reads as zeros, keeping the host cluster when there is one."""
    return encode_normal(host_offset, copied=copied) | ZERO


def encode_compressed(host_offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of a compressed stream of `length` bytes at any host offset. Raises InternalError if none can be."""
    x = 70 - cluster_bits
    if length < 1 or not 0 <= host_offset < 1 << min(x, 56):
        raise InternalError(f"a compressed cluster cannot lie at {host_offset:#x} with {length} bytes")
    sectors = (host_offset + length - 1) // SECTOR - host_offset // SECTOR
    if sectors >= 1 << (cluster_bits - 8):
        raise InternalError(f"a compressed cluster of {length} bytes is longer than its entry can say")
    return COMPRESSED | sectors << x | host_offset


def encode_bitmap(allocated: int, zero: int) -> int:
    """The second word of an extended entry. Raises InternalError when a subcluster is both or there are too many."""
    if allocated & zero or (allocated | zero) & ~ALL_SUBCLUSTERS:
        raise InternalError(f"subclusters cannot be allocated {allocated:#x} and zero {zero:#x}")
    return zero << SUBCLUSTERS | allocated


def encode_entry(entry: Entry, geometry: Geometry) -> tuple[int, int]:
    """The (word, bitmap) of an entry: the inverse of decode_entry. Reserved bits are not kept."""
    if entry.kind is Kind.COMPRESSED:
        return encode_compressed(entry.host_offset, entry.length, geometry.cluster_bits), 0
    word = encode_normal(max(entry.host_offset, 0), copied=entry.copied)
    if geometry.extended_l2:
        return word, encode_bitmap(entry.allocated, entry.zero)
    return word | (ZERO if entry.kind in (Kind.ZERO, Kind.ZERO_ALLOCATED) else 0), 0


# By (owns a host cluster, allocated bit, zero bit); spec: "Extended L2 Entries".
_SUBCLUSTER_KINDS = {
    (False, 0, 0): Kind.UNALLOCATED,
    (False, 0, 1): Kind.ZERO,
    (True, 0, 0): Kind.RESERVED,
    (True, 0, 1): Kind.ZERO_ALLOCATED,
    (True, 1, 0): Kind.NORMAL,
}


def _decode_compressed(word: int, bitmap: int, geometry: Geometry, *, data_file: bool, at: int) -> Entry:
    if data_file:
        raise _corrupt(word, "is compressed, which an image with an external data file cannot have", at)
    if fault := bitmap_fault(word, bitmap):
        raise _corrupt(word, fault, at)
    offset, length = compressed_span(word, geometry.cluster_bits)
    if offset > MAX_HOST_OFFSET:
        raise _corrupt(word, f"points at {offset:#x}, expected less than 2^56", at)
    return Entry(Kind.COMPRESSED, offset, length)


def _decode_extended(word: int, bitmap: int, geometry: Geometry, *, offset: int, at: int) -> Entry:
    if fault := bitmap_fault(word, bitmap, data_file=offset == 0):
        raise _corrupt(word, fault, at)
    allocated, zero = bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
    owned = offset >= 0
    if allocated in (0, ALL_SUBCLUSTERS) and zero in (0, ALL_SUBCLUSTERS):
        kind = _SUBCLUSTER_KINDS[owned, allocated & 1, zero & 1]
    else:
        kind = Kind.MIXED
    return Entry(kind, offset, geometry.cluster_size if owned else 0, bool(word & COPIED), allocated, zero)


def _offset_bits(offset: int) -> int:
    if offset & ~L2_OFFSET_MASK:
        raise InternalError(f"host offset {offset:#x} does not fit a table entry")
    return offset


def _corrupt(word: int, what: str, at: int) -> CorruptImage:
    return CorruptImage(f"L2 entry {word:#018x} {what}", structure="L2 table", offset=at)
