"""The header of versions 2 and 3: the record, its feature bits, its bytes and the rules it must keep.

It does not know the extensions and the backing name that follow it (first_cluster.py). Unknown feature bits and the
bytes behind the last known field are kept as they are: decoding and encoding again gives the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from cowslice.errors import BadOption
from cowslice.format.findings import Fault, Finding, raise_first
from cowslice.format.geometry import Geometry
from cowslice.format.limits import (
    HEADER_LENGTH_V2,
    HEADER_LENGTH_V3,
    HEADER_LENGTH_WRITTEN,
    MAX_CLUSTER_BITS,
    MAX_L1_ENTRIES,
    MAX_OFFSET,
    MAX_REFCOUNT_ORDER,
    MAX_REFTABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    MIN_CLUSTER_BITS_EXTENDED_L2,
    REFCOUNT_ORDER_V2,
)
from cowslice.units import SECTOR

MAGIC = b"QFI\xfb"
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_MAGIC_AND_VERSION = struct.Struct(">4sI")
COMPRESSION_TYPE_OFFSET = 104
# Where each field lies, for messages and for documentation (spec: Header).
FIELD_OFFSETS: Mapping[str, int] = {
    "magic": 0, "version": 4, "backing_file_offset": 8, "backing_file_size": 16, "cluster_bits": 20, "size": 24,
    "crypt_method": 32, "l1_size": 36, "l1_table_offset": 40, "refcount_table_offset": 48,
    "refcount_table_clusters": 56, "snapshot_count": 60, "snapshots_offset": 64, "incompatible": 72, "compatible": 80,
    "autoclear": 88, "refcount_order": 96, "header_length": 100, "compression_type": 104, "tail": 105,
}  # fmt: skip


class Incompatible(IntFlag):
    """Features that a reader must know. Unknown bits are kept."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """Features that anyone may ignore. Unknown bits are kept."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Features that a writer who does not keep them true must switch off. Unknown bits are kept by reading."""

    BITMAPS = 1 << 0
    RAW_EXTERNAL = 1 << 1


class CryptMethod(IntEnum):
    """Known values of crypt_method."""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(IntEnum):
    """Known values of compression_type."""

    DEFLATE = 0
    ZSTD = 1


_NO_INCOMPATIBLE, _NO_COMPATIBLE, _NO_AUTOCLEAR = Incompatible(0), Compatible(0), Autoclear(0)
KNOWN_INCOMPATIBLE = sum(Incompatible)
KNOWN_COMPATIBLE = sum(Compatible)
KNOWN_AUTOCLEAR = sum(Autoclear)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """One header. Offsets and sizes are bytes; `l1_size` counts entries, `refcount_table_clusters` clusters.

    `tail` is whatever lies between the compression type and header_length. A version 2 header has no feature bits,
    16-bit refcounts, length 72 and no tail. compression_type is 0 where header_length leaves it out.
    """

    version: int = 3
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = CryptMethod.NONE
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: Incompatible = _NO_INCOMPATIBLE
    compatible: Compatible = _NO_COMPATIBLE
    autoclear: Autoclear = _NO_AUTOCLEAR
    refcount_order: int = REFCOUNT_ORDER_V2
    header_length: int = HEADER_LENGTH_WRITTEN
    compression_type: int = CompressionType.DEFLATE
    tail: bytes = bytes(HEADER_LENGTH_WRITTEN - COMPRESSION_TYPE_OFFSET - 1)

    @property
    def geometry(self) -> Geometry:
        """The sizes that follow. Meaningful only for a header that decode_header accepts."""
        return Geometry(self.cluster_bits, self.extended_l2, self.refcount_order)

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Whether guest data lies in another file."""
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def is_dirty(self) -> bool:
        """Whether refcounts may be stale."""
        return bool(self.incompatible & Incompatible.DIRTY)

    @property
    def is_corrupt(self) -> bool:
        """Whether someone found corruption and forbade writing."""
        return bool(self.incompatible & Incompatible.CORRUPT)

    @property
    def unknown_incompatible(self) -> int:
        """The incompatible feature bits that nobody here knows."""
        return int(self.incompatible) & ~KNOWN_INCOMPATIBLE

    @property
    def unknown_autoclear(self) -> int:
        """The autoclear bits that must go before the first write."""
        return int(self.autoclear) & ~KNOWN_AUTOCLEAR


def decode_header(data: bytes) -> Header:
    """Decode the header at the start of `data`, which holds at least header_length bytes.

    Raises NotAnImage, MalformedImage or UnsupportedImage for the first rule that is broken.
    """
    header, findings = unpack_header(data)
    raise_first(findings)
    assert header is not None
    raise_first(header_findings(header))
    return header


def inspect_header(data: bytes) -> tuple[Header | None, list[Finding]]:
    """Decode as far as possible and report everything that is wrong. Never raises for any bytes."""
    header, findings = unpack_header(data)
    if header is not None:
        findings.extend(header_findings(header))
    return header, findings


def encode_header(header: Header) -> bytes:
    """The header_length bytes of the header. Raises BadOption when a field does not fit its place."""
    _check_shape(header)
    try:
        fixed = _V2.pack(
            MAGIC, header.version, header.backing_file_offset, header.backing_file_size, header.cluster_bits,
            header.size, header.crypt_method, header.l1_size, header.l1_table_offset, header.refcount_table_offset,
            header.refcount_table_clusters, header.snapshot_count, header.snapshots_offset,
        )  # fmt: skip
        if header.version == 2:
            return fixed
        features = _V3.pack(
            header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.header_length
        )
    except struct.error as error:
        raise BadOption(f"a header field does not fit its width: {error}") from None
    if header.header_length == HEADER_LENGTH_V3:
        return fixed + features
    return fixed + features + bytes((header.compression_type,)) + header.tail


def unpack_header(data: bytes) -> tuple[Header | None, list[Finding]]:
    """Cut the bytes into fields without judging them; findings say why there is no header. Never raises."""
    if len(data) < _MAGIC_AND_VERSION.size:
        return None, [_broken("magic", f"the file has {len(data)} bytes, too few for a header", Fault.NOT_AN_IMAGE)]
    magic, version = _MAGIC_AND_VERSION.unpack_from(data)
    if magic != MAGIC:
        return None, [_broken("magic", f"magic is {magic.hex()}, expected {MAGIC.hex()}", Fault.NOT_AN_IMAGE)]
    if version not in (2, 3):
        return None, [_broken("version", f"version is {version}, expected 2 or 3", Fault.UNSUPPORTED)]
    need = HEADER_LENGTH_V2 if version == 2 else HEADER_LENGTH_V3
    if len(data) < need:
        return None, [_broken("magic", f"the header ends after {len(data)} bytes, expected {need}")]
    return (_unpack_v2(data), []) if version == 2 else _unpack_v3(data)


def header_findings(header: Header, names: Mapping[tuple[int, int], str] | None = None) -> Iterator[Finding]:
    """Every rule that the fields alone can break, in the order of their importance.

    `names` maps (kind, bit) of the feature name table to text that is already escaped.
    """
    yield from _cluster_findings(header)
    yield from _feature_findings(header, names or {})
    yield from _width_findings(header)
    if MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        yield from _table_findings(header)
    yield from _note_findings(header)


def _check_shape(header: Header) -> None:
    if header.version not in (2, 3):
        raise BadOption(f"version is {header.version}, expected 2 or 3")
    if header.version == 2:
        plain = (header.incompatible, header.compatible, header.autoclear, header.compression_type, header.tail)
        if any(plain) or header.refcount_order != REFCOUNT_ORDER_V2 or header.header_length != HEADER_LENGTH_V2:
            raise BadOption("a version 2 header has no feature bits, 16-bit refcounts and length 72")
        return
    tail = header.header_length - COMPRESSION_TYPE_OFFSET - 1
    if len(header.tail) != max(tail, 0) or header.header_length < HEADER_LENGTH_V3:
        raise BadOption(f"header_length is {header.header_length}, which does not fit {len(header.tail)} bytes of tail")
    if not 0 <= header.compression_type <= (255 if tail >= 0 else 0):
        raise BadOption(f"compression_type is {header.compression_type}, which has no room in the header")


def _unpack_v2(data: bytes) -> Header:
    fields = _V2.unpack_from(data)[1:]
    return Header(**dict(zip(_V2_NAMES, fields, strict=True)), header_length=HEADER_LENGTH_V2, tail=b"")


def _unpack_v3(data: bytes) -> tuple[Header | None, list[Finding]]:
    incompatible, compatible, autoclear, refcount_order, length = _V3.unpack_from(data, HEADER_LENGTH_V2)
    if length < HEADER_LENGTH_V3:
        return None, [_broken("header_length", f"header_length is {length}, expected at least {HEADER_LENGTH_V3}")]
    if length > 1 << MAX_CLUSTER_BITS:
        return None, [_broken("header_length", f"header_length is {length}, expected no more than a cluster")]
    rest = bytes(data[COMPRESSION_TYPE_OFFSET:length]).ljust(length - COMPRESSION_TYPE_OFFSET, b"\0")
    header = Header(
        **dict(zip(_V2_NAMES, _V2.unpack_from(data)[1:], strict=True)),
        incompatible=Incompatible(incompatible),
        compatible=Compatible(compatible),
        autoclear=Autoclear(autoclear),
        refcount_order=refcount_order,
        header_length=length,
        compression_type=rest[0] if rest else 0,
        tail=rest[1:],
    )
    return header, []


_V2_NAMES = tuple(FIELD_OFFSETS)[1:13]


def _cluster_findings(header: Header) -> Iterator[Finding]:
    bits = header.cluster_bits
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        yield _broken("cluster_bits", f"cluster_bits is {bits}, expected {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}")
        return
    if header.header_length > 1 << bits:
        yield _broken("header_length", f"header_length is {header.header_length}, more than the cluster of {1 << bits}")
    if header.extended_l2 and bits < MIN_CLUSTER_BITS_EXTENDED_L2:
        yield _broken("cluster_bits", f"cluster_bits is {bits}, but extended L2 entries need at least "
                      f"{MIN_CLUSTER_BITS_EXTENDED_L2}")  # fmt: skip


def _feature_findings(header: Header, names: Mapping[tuple[int, int], str]) -> Iterator[Finding]:
    if unknown := header.unknown_incompatible:
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        features = tuple(names.get((0, bit)) or f"incompatible feature bit {bit}" for bit in bits)
        quoted = ", ".join(f"'{name}' (bit {bit})" for name, bit in zip(features, bits, strict=True))
        yield Finding(Fault.UNSUPPORTED, f"the image needs features that are not known here: {quoted}", "header",
                      "incompatible", FIELD_OFFSETS["incompatible"], features)  # fmt: skip
    compression = header.compression_type
    if compression > max(CompressionType):
        yield _broken("compression_type", f"compression_type is {compression}, expected 0 (deflate) or 1 (zstd)",
                      Fault.UNSUPPORTED)  # fmt: skip
    if bool(header.incompatible & Incompatible.COMPRESSION) != bool(compression):
        state = "clear" if compression else "set"
        yield _broken("compression_type", f"compression_type is {compression} but incompatible bit 3 is {state}")
    if header.autoclear & Autoclear.RAW_EXTERNAL and not header.has_data_file:
        yield _broken("autoclear", "autoclear bit 1 (raw external data) is set, but there is no external data file")


def _width_findings(header: Header) -> Iterator[Finding]:
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        order = header.refcount_order
        yield _broken("refcount_order", f"refcount_order is {order}, expected 0 to {MAX_REFCOUNT_ORDER}")
    if header.crypt_method > max(CryptMethod):
        yield _broken("crypt_method", f"crypt_method is {header.crypt_method}, expected 0 (none), 1 (AES) or 2 (LUKS)",
                      Fault.UNSUPPORTED)  # fmt: skip


def _table_findings(header: Header) -> Iterator[Finding]:
    geometry = header.geometry
    clusters = header.refcount_table_clusters
    limit = MAX_REFTABLE_BYTES >> geometry.cluster_bits
    if not clusters:
        yield _broken("refcount_table_clusters", "refcount_table_clusters is 0, expected at least 1")
    if clusters > limit:
        yield _broken("refcount_table_clusters", f"refcount_table_clusters is {clusters}, expected at most {limit}")
    length = clusters << geometry.cluster_bits
    yield from _placed(geometry, "refcount_table_offset", header.refcount_table_offset, length)
    if header.snapshot_count > MAX_SNAPSHOTS:
        yield _broken("snapshot_count", f"snapshot_count is {header.snapshot_count}, expected at most {MAX_SNAPSHOTS}")
    # A record has 40 bytes and more, so this is the least the table takes.
    yield from _placed(geometry, "snapshots_offset", header.snapshots_offset, header.snapshot_count * 40)
    if header.l1_size > MAX_L1_ENTRIES:
        yield _broken("l1_size", f"l1_size is {header.l1_size}, expected at most {MAX_L1_ENTRIES}")
    yield from _placed(geometry, "l1_table_offset", header.l1_table_offset, header.l1_size * 8)
    needed = geometry.l1_entries(header.size)
    if needed > MAX_L1_ENTRIES:
        yield _broken("size", f"size is {header.size}, which needs {needed} L1 entries, more than {MAX_L1_ENTRIES}")
    elif header.l1_size < needed:
        yield _broken("l1_size", f"l1_size is {header.l1_size}, but a disk of {header.size} bytes needs {needed}")


def _placed(geometry: Geometry, field: str, offset: int, length: int) -> Iterator[Finding]:
    if not geometry.is_aligned(offset):
        yield _broken(field, f"{field} is {offset:#x}, expected a multiple of {geometry.cluster_size:#x}")
    if offset + length > MAX_OFFSET:
        yield _broken(field, f"{field} is {offset:#x}, so that its {length} bytes end beyond 2^63")


def _note_findings(header: Header) -> Iterator[Finding]:
    if header.version == 3 and header.header_length % 8:
        yield _broken("header_length", f"header_length is {header.header_length}, no multiple of 8", Fault.NOTE)
    if header.size % SECTOR:
        yield _broken("size", f"size is {header.size}, no multiple of {SECTOR}", Fault.NOTE)
    if header.is_dirty:
        yield _broken("incompatible", "the dirty bit is set: refcounts may be stale until repaired", Fault.NOTE)
    if header.is_corrupt:
        yield _broken("incompatible", "the corrupt bit is set: the image may only be read or repaired", Fault.UNSAFE)
    if header.autoclear & Autoclear.RAW_EXTERNAL and header.backing_file_offset:
        yield _broken("autoclear", "raw external data is set although there is a backing file", Fault.NOTE)
    if unknown := int(header.compatible) & ~KNOWN_COMPATIBLE:
        yield _broken("compatible", f"unknown compatible features {unknown:#x} are ignored", Fault.NOTE)
    if unknown := header.unknown_autoclear:
        yield _broken("autoclear", f"unknown autoclear features {unknown:#x} will be cleared by a write", Fault.NOTE)


def _broken(field: str, message: str, fault: Fault = Fault.MALFORMED) -> Finding:
    return Finding(fault, message, "header", field, FIELD_OFFSETS[field])
