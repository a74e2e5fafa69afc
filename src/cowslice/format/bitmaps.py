"""Persistent dirty bitmaps: the directory, its records and flags, and the bitmap tables (spec: "Bitmaps").

It does not know what a bitmap is for. One bad record never spoils the rest: it is decoded, kept byte for byte and
marked with the reason why it cannot be used.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntFlag

from cowslice.errors import BadOption, CorruptImage, InternalError
from cowslice.format.findings import Fault, Finding, escaped
from cowslice.format.geometry import Geometry
from cowslice.format.limits import (
    MAX_BITMAP_BYTES,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAP_GRANULARITY_BITS,
    MAX_BITMAP_NAME,
    MAX_BITMAP_TABLE_ENTRIES,
    MAX_OFFSET,
    MIN_BITMAP_GRANULARITY_BITS,
)
from cowslice.format.words import unpack_words
from cowslice.units import div_ceil, round_up

WHERE = "bitmap directory"
FIXED_LENGTH = 24
_FIXED = struct.Struct(">QIIBBHI")
DIRTY_TRACKING = 1
TABLE_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
TABLE_ALL_ONES = 1
TABLE_RESERVED_MASK = 0xFF00_0000_0000_01FE


class BitmapFlags(IntFlag):
    """Flags of a record. Unknown bits are kept and make the bitmap unusable."""

    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2


KNOWN_FLAGS = sum(BitmapFlags)


class BitmapCluster(Enum):
    """What an entry of a bitmap table stands for."""

    ALL_ZEROS = "all zeros"
    ALL_ONES = "all ones"
    DATA = "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmap:
    """One directory record. `table_size` counts entries; `fault` says why it cannot be used, or is ''."""

    table_offset: int
    table_size: int
    granularity_bits: int
    name: bytes
    flags: BitmapFlags
    type: int = DIRTY_TRACKING
    extra: bytes = b""
    fault: str = ""

    @property
    def usable(self) -> bool:
        """Whether the record is understood; its bits are meaningful only if it is not `in_use` as well."""
        return not self.fault

    @property
    def in_use(self) -> bool:
        """Whether a writer did not finish, so that the bits are not to be trusted."""
        return bool(self.flags & BitmapFlags.IN_USE)

    @property
    def granularity(self) -> int:
        """Guest bytes that one bit covers. Bounded only for a usable record."""
        return 1 << self.granularity_bits

    @property
    def encoded_length(self) -> int:
        """Bytes it takes in the directory, padding included."""
        return round_up(FIXED_LENGTH + len(self.extra) + len(self.name), 8)


@dataclass(frozen=True, slots=True)
class BitmapDirectory:
    """All records in order; `rest` holds the bytes behind the last that could be cut into one, and `findings` why."""

    bitmaps: tuple[Bitmap, ...]
    rest: bytes = b""
    findings: tuple[Finding, ...] = ()


def decode_bitmap_directory(data: bytes, count: int, geometry: Geometry, size: int, *, at: int = 0) -> BitmapDirectory:
    """Decode a directory of `count` records for a guest disk of `size` bytes; `at` is its host offset. Never raises."""
    bitmaps: list[Bitmap] = []
    findings: list[Finding] = []
    names: set[bytes] = set()
    offset = 0
    while len(bitmaps) < count:
        bitmap = _unpack_bitmap(data, offset)
        if bitmap is None:
            findings.append(_unusable(f"record {len(bitmaps)} of {count} is cut off by the end", at + offset))
            break
        fault = bitmap_fault(bitmap, geometry, size)
        if not fault and bitmap.name in names:
            fault = "another bitmap has the same name"
        names.add(bitmap.name)
        if fault:
            bitmap = _with_fault(bitmap, fault)
            findings.append(_unusable(f"bitmap '{escaped(bitmap.name)}' is unusable: {fault}", at + offset))
        bitmaps.append(bitmap)
        offset = min(offset + bitmap.encoded_length, len(data))
    else:
        if offset < len(data):
            message = f"{len(data) - offset} bytes are left behind the last of {count} records"
            findings.append(_unusable(message, at + offset))
    return BitmapDirectory(tuple(bitmaps), bytes(data[offset:]), tuple(findings))


def encode_bitmap_directory(directory: BitmapDirectory) -> bytes:
    """The bytes of a directory, the rest included. Raises BadOption when a field does not fit or it is too long."""
    data = b"".join(encode_bitmap(bitmap) for bitmap in directory.bitmaps) + directory.rest
    if len(data) > MAX_BITMAP_DIRECTORY_BYTES:
        raise BadOption(f"the bitmap directory has {len(data)} bytes, expected at most {MAX_BITMAP_DIRECTORY_BYTES}")
    return data


def encode_bitmap(bitmap: Bitmap) -> bytes:
    """One record and its padding. Raises BadOption when a field does not fit its place."""
    try:
        fixed = _FIXED.pack(
            bitmap.table_offset, bitmap.table_size, bitmap.flags, bitmap.type, bitmap.granularity_bits,
            len(bitmap.name), len(bitmap.extra),
        )  # fmt: skip
    except struct.error as error:
        raise BadOption(f"a field of bitmap '{escaped(bitmap.name)}' does not fit its width: {error}") from None
    return (fixed + bitmap.extra + bitmap.name).ljust(bitmap.encoded_length, b"\0")


def bitmap_fault(bitmap: Bitmap, geometry: Geometry, size: int) -> str:
    """Why a bitmap of a guest disk of `size` bytes cannot be used, or ''."""
    return _record_fault(bitmap) or _table_fault(bitmap, geometry, size)


def is_foreign(bitmap: Bitmap) -> bool:
    """Whether the record may be sound, but is of a kind, or has flags or data, that only a newer program knows."""
    unknown = int(bitmap.flags) & ~KNOWN_FLAGS
    extra = bitmap.extra and not bitmap.flags & BitmapFlags.EXTRA_DATA_COMPATIBLE
    return bool(bitmap.type != DIRTY_TRACKING or unknown or extra)


def bitmap_table_entries(size: int, granularity_bits: int, geometry: Geometry) -> int:
    """Entries of the table that a bitmap of a guest disk of `size` bytes must have, exactly."""
    bits = div_ceil(size, 1 << granularity_bits)
    return geometry.clusters(div_ceil(bits, 8))


def decode_bitmap_table(data: bytes, geometry: Geometry, *, at: int = 0) -> array[int]:
    """The words of a bitmap table, each of them checked. Raises CorruptImage; `at` is the host offset of the table."""
    words = unpack_words(data)
    for index, word in enumerate(words):
        decode_bitmap_entry(word, geometry, at=at + 8 * index)
    return words


def decode_bitmap_entry(word: int, geometry: Geometry, *, at: int = -1) -> tuple[BitmapCluster, int]:
    """What an entry of a bitmap table stands for, and the host offset of its data or 0. Raises CorruptImage."""
    offset = word & TABLE_OFFSET_MASK
    if word & TABLE_RESERVED_MASK or not geometry.is_aligned(offset) or (offset and word & TABLE_ALL_ONES):
        raise CorruptImage(
            f"bitmap table entry {word:#018x} has reserved bits set or is not aligned to a cluster",
            structure="bitmap table",
            offset=at,
        )
    if offset:
        return BitmapCluster.DATA, offset
    return (BitmapCluster.ALL_ONES if word & TABLE_ALL_ONES else BitmapCluster.ALL_ZEROS), 0


def encode_bitmap_entry(cluster: BitmapCluster, offset: int = 0) -> int:
    """The entry of a bitmap table. Raises InternalError for an offset that no entry can hold."""
    if offset & ~TABLE_OFFSET_MASK or bool(offset) != (cluster is BitmapCluster.DATA):
        raise InternalError(f"bitmap data offset {offset:#x} does not fit an entry of {cluster.value}")
    return offset or (TABLE_ALL_ONES if cluster is BitmapCluster.ALL_ONES else 0)


def dirty_ranges(data: bytes, first_bit: int, granularity: int, size: int) -> Iterator[tuple[int, int]]:
    """The guest (offset, length) ranges whose bits are set in a piece of bitmap data.

    `first_bit` is the number of the first bit of `data`; bits beyond the disk of `size` bytes are ignored.
    """
    start = end = 0
    for first, last in _bit_runs(data):
        if first > end:
            yield from _dirty_range(first_bit + start, first_bit + end, granularity, size)
            start = first
        end = last
    yield from _dirty_range(first_bit + start, first_bit + end, granularity, size)


def _dirty_range(first: int, last: int, granularity: int, size: int) -> Iterator[tuple[int, int]]:
    start, end = first * granularity, min(last * granularity, size)
    if start < end:
        yield start, end - start


def _bit_runs(data: bytes) -> Iterator[tuple[int, int]]:
    """(first, end) of the set bits, cut at 64-byte pieces: shifting one big number for each run would be quadratic."""
    for base in range(0, len(data), 64):
        value, bit = int.from_bytes(data[base : base + 64], "little"), base * 8
        while value:
            skip = (value & -value).bit_length() - 1
            value >>= skip
            run = (~value & (value + 1)).bit_length() - 1
            value >>= run
            yield bit + skip, bit + skip + run
            bit += skip + run


def _unpack_bitmap(data: bytes, offset: int) -> Bitmap | None:
    if offset + FIXED_LENGTH > len(data):
        return None
    fields = _FIXED.unpack_from(data, offset)
    table_offset, table_size, flags, kind, granularity_bits, name_length, extra_length = fields
    extra_end = offset + FIXED_LENGTH + extra_length
    if extra_end + name_length > len(data):
        return None
    return Bitmap(
        table_offset=table_offset,
        table_size=table_size,
        granularity_bits=granularity_bits,
        name=bytes(data[extra_end : extra_end + name_length]),
        flags=BitmapFlags(flags),
        type=kind,
        extra=bytes(data[offset + FIXED_LENGTH : extra_end]),
    )


def _with_fault(bitmap: Bitmap, fault: str) -> Bitmap:
    return Bitmap(
        table_offset=bitmap.table_offset,
        table_size=bitmap.table_size,
        granularity_bits=bitmap.granularity_bits,
        name=bitmap.name,
        flags=bitmap.flags,
        type=bitmap.type,
        extra=bitmap.extra,
        fault=fault,
    )


def _record_fault(bitmap: Bitmap) -> str:
    if bitmap.type != DIRTY_TRACKING:
        return f"type is {bitmap.type}, expected {DIRTY_TRACKING}"
    if unknown := int(bitmap.flags) & ~KNOWN_FLAGS:
        return f"unknown flags {unknown:#x} are set"
    if bitmap.extra and not bitmap.flags & BitmapFlags.EXTRA_DATA_COMPATIBLE:
        return f"it has {len(bitmap.extra)} bytes of extra data that must be understood"
    if not 1 <= len(bitmap.name) <= MAX_BITMAP_NAME:
        return f"its name has {len(bitmap.name)} bytes, expected 1 to {MAX_BITMAP_NAME}"
    bits = bitmap.granularity_bits
    if not MIN_BITMAP_GRANULARITY_BITS <= bits <= MAX_BITMAP_GRANULARITY_BITS:
        return f"granularity_bits is {bits}, expected {MIN_BITMAP_GRANULARITY_BITS} to {MAX_BITMAP_GRANULARITY_BITS}"
    return ""


def _table_fault(bitmap: Bitmap, geometry: Geometry, size: int) -> str:
    if bitmap.table_offset == 0 or not geometry.is_aligned(bitmap.table_offset):
        return f"its table is at {bitmap.table_offset:#x}, expected a multiple of the cluster size"
    limit = min(MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAP_BYTES >> geometry.cluster_bits)
    if not 1 <= bitmap.table_size <= limit:
        return f"its table has {bitmap.table_size} entries, expected 1 to {limit}"
    if bitmap.table_offset + bitmap.table_size * 8 > MAX_OFFSET:
        return f"its table at {bitmap.table_offset:#x} ends beyond 2^63"
    needed = bitmap_table_entries(size, bitmap.granularity_bits, geometry)
    if not bitmap.in_use and bitmap.table_size != needed:
        return f"its table has {bitmap.table_size} entries, but a disk of {size} bytes needs {needed}"
    return ""


def _unusable(message: str, offset: int) -> Finding:
    return Finding(Fault.UNUSABLE, message, WHERE, "", offset)
