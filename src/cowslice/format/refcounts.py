"""The refcount table and its blocks, at every width from 1 to 64 bits (spec: "Refcount blocks").

It does not know which cluster is whose. One count is read or written in place; whole blocks go through native arrays.
Widths below a byte fill it from the least significant bits up; wider ones are big-endian.
"""

from __future__ import annotations

from array import array

from cowslice.errors import CorruptImage, InternalError
from cowslice.format.geometry import Geometry
from cowslice.format.words import swapped, unpack_words

REFTABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
REFTABLE_RESERVED_MASK = 0x0000_0000_0000_01FF
_WHETHER_USED = bytes(1) + bytes([1]) * 255
_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}


def refblock_offset(word: int, geometry: Geometry, at: int = -1) -> int:
    """Host offset of the block of a refcount table entry, 0 when all its counts are 0. Raises CorruptImage.

    Reserved bits do not change the meaning; `reftable_reserved` shows them.
    """
    offset = word & REFTABLE_OFFSET_MASK
    if not geometry.is_aligned(offset):
        raise CorruptImage(
            f"refcount table entry {word:#018x} points at {offset:#x}, which is not aligned to clusters of "
            f"{geometry.cluster_size:#x} bytes",
            structure="refcount table",
            offset=at,
        )
    return offset


def reftable_reserved(word: int) -> int:
    """The reserved bits that are set in a refcount table entry."""
    return word & REFTABLE_RESERVED_MASK


def decode_reftable(table: bytes | bytearray | memoryview) -> array[int]:
    """The host offsets of all blocks of a table, 0 for none. Drops reserved bits and does not check alignment."""
    return array("Q", (word & REFTABLE_OFFSET_MASK for word in unpack_words(table)))


def encode_reftable_entry(block_offset: int) -> int:
    """The refcount table entry of a block. Raises InternalError for an offset that no entry can hold."""
    if block_offset & ~REFTABLE_OFFSET_MASK:
        raise InternalError(f"refcount block offset {block_offset:#x} does not fit a table entry")
    return block_offset


def get_refcount(block: bytes | bytearray | memoryview, index: int, order: int) -> int:
    """The count of entry `index` of a block of 2^order-bit counts."""
    if order >= 3:
        width = 1 << (order - 3)
        return int.from_bytes(block[index * width : (index + 1) * width], "big")
    bits = 1 << order
    return int(block[index * bits >> 3]) >> (index * bits & 7) & ((1 << bits) - 1)


def set_refcount(block: bytearray | memoryview, index: int, order: int, value: int) -> None:
    """Write the count of entry `index` in place. Raises InternalError when it does not fit the width."""
    bits = 1 << order
    if not 0 <= value < 1 << bits:
        raise InternalError(f"refcount {value} does not fit {bits} bits")
    if order >= 3:
        width = bits >> 3
        block[index * width : (index + 1) * width] = value.to_bytes(width, "big")
        return
    shift = index * bits & 7
    byte = index * bits >> 3
    block[byte] = block[byte] & ~(((1 << bits) - 1) << shift) | value << shift


def counted_once(count: int, geometry: Geometry) -> bytearray:
    """A block whose first `count` entries are one and the others zero: what a file laid out in one go has."""
    order = geometry.refcount_order
    if order >= 3:
        width = 1 << (order - 3)
        return bytearray((bytes(width - 1) + b"\1") * count).ljust(geometry.cluster_size, b"\0")
    whole, rest = divmod(count, 8 >> order)
    block = bytearray((sum(1 << (at << order) for at in range(8 >> order)),)) * whole
    block = block.ljust(geometry.cluster_size, b"\0")
    for index in range(count - rest, count):
        set_refcount(block, index, order, 1)
    return block


def unpack_refblock(block: bytes | bytearray | memoryview, order: int) -> array[int]:
    """All counts of a block as a native array of the narrowest type: 'B' up to 8 bits, then 'H', 'I', 'Q'."""
    raw = bytes(block)
    if order >= 3:
        return swapped(array(_TYPECODES[order], raw))
    per_byte = 8 >> order
    counts = bytearray(len(raw) * per_byte)
    for position, table in enumerate(_unpack_tables(order)):
        counts[position::per_byte] = raw.translate(table)
    return array("B", bytes(counts))


def pack_refblock(counts: array[int], order: int) -> bytes:
    """The bytes of a block, from an array as unpack_refblock gives it. Raises InternalError when a count is too big."""
    if order >= 3:
        if counts.typecode != _TYPECODES[order]:
            raise InternalError(f"counts of type '{counts.typecode}' cannot become {1 << order}-bit refcounts")
        return swapped(array(counts.typecode, counts)).tobytes()
    per_byte, bits = 8 >> order, 1 << order
    raw = counts.tobytes()
    if len(raw) != len(counts) or len(raw) % per_byte or max(raw, default=0) >> bits:
        raise InternalError(f"counts do not fit {bits} bits or do not fill whole bytes")
    packed = 0
    for position in range(per_byte):
        packed |= int.from_bytes(raw[position::per_byte], "big") << position * bits
    return packed.to_bytes(len(raw) // per_byte, "big")


def zero_counts(raw: bytes, order: int) -> list[tuple[int, int]]:
    """Where part of a block, whole bytes of it, counts 0: ascending (first entry, entries). Byte order is no matter."""
    used = raw
    if order < 3:
        used = bytes(unpack_refblock(raw, order))
    elif order > 3:
        width = 1 << (order - 3)
        if raw.find(bytes(width)) < 0:
            return []
        merged = 0
        for position in range(width):
            merged |= int.from_bytes(raw[position::width], "little")
        used = merged.to_bytes(len(raw) // width, "little")
    used = used.translate(_WHETHER_USED)
    runs = []
    first = used.find(0)
    while first >= 0:
        end = used.find(1, first)
        end = len(used) if end < 0 else end
        runs.append((first, end - first))
        first = used.find(0, end)
    return runs


def last_count(raw: bytes, order: int) -> int:
    """The last entry of a block, whole bytes of it, that is not 0; -1 for none. `raw` is as on disk."""
    size = len(raw.rstrip(b"\0"))
    if order >= 3 or not size:
        return (size - 1) >> max(order - 3, 0)
    return ((size - 1) * 8 + raw[size - 1].bit_length() - 1) >> order


def _unpack_tables(order: int) -> tuple[bytes, ...]:
    bits = 1 << order
    mask = (1 << bits) - 1
    return tuple(bytes(byte >> shift & mask for byte in range(256)) for shift in range(0, 8, bits))
