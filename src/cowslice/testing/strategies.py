"""Hypothesis strategies for what qcow2 keeps on disk: well-formed records of every kind, and bytes that are not.

It does not know what a test wants to hold. Everything that is not called hostile is accepted by the strict decoders.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from cowslice.format.bitmaps import Bitmap, BitmapFlags, bitmap_table_entries
from cowslice.format.entries import (
    ALL_SUBCLUSTERS,
    COPIED,
    L2_OFFSET_MASK,
    encode_bitmap,
    encode_compressed,
    encode_normal,
    encode_zero,
)
from cowslice.format.extensions import CryptoPointer, Extension, ExtensionType, encode_feature_names
from cowslice.format.first_cluster import FirstCluster, lay_out
from cowslice.format.geometry import Geometry
from cowslice.format.header import Autoclear, Compatible, CompressionType, CryptMethod, Header, Incompatible
from cowslice.format.limits import (
    HEADER_LENGTH_V2,
    HEADER_LENGTH_V3,
    HEADER_LENGTH_WRITTEN,
    MAX_CLUSTER_BITS,
    MAX_HOST_OFFSET,
    MAX_L1_ENTRIES,
    MAX_REFTABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    MIN_CLUSTER_BITS_EXTENDED_L2,
)
from cowslice.format.snapshots import Snapshot

_U16 = st.integers(0, (1 << 16) - 1)
_U32 = st.integers(0, (1 << 32) - 1)
_U64 = st.integers(0, (1 << 64) - 1)
_KNOWN_TYPES = frozenset(ExtensionType)
_NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)


def cluster_bits(*, extended_l2: bool = False) -> st.SearchStrategy[int]:
    """Every legal cluster_bits."""
    return st.integers(MIN_CLUSTER_BITS_EXTENDED_L2 if extended_l2 else MIN_CLUSTER_BITS, MAX_CLUSTER_BITS)


@st.composite
def geometries(draw: st.DrawFn, *, extended_l2: bool | None = None) -> Geometry:
    """Every legal geometry; `extended_l2` None means both kinds."""
    extended = draw(st.booleans()) if extended_l2 is None else extended_l2
    return Geometry(draw(cluster_bits(extended_l2=extended)), extended, draw(st.integers(0, 6)))


def host_offsets(geometry: Geometry, *, minimum: int = 1) -> st.SearchStrategy[int]:
    """Aligned host offsets, in bytes, of cluster `minimum` and later ones, that a table entry can hold."""
    last = MAX_HOST_OFFSET >> geometry.cluster_bits
    near = st.integers(minimum, minimum + 64)
    return st.one_of(near, st.integers(minimum, last)).map(lambda cluster: cluster << geometry.cluster_bits)


@st.composite
def headers(draw: st.DrawFn, *, version: int | None = None) -> Header:
    """Headers that decode_header accepts, without a backing name; v3 ones carry unknown bits and bytes, too."""
    chosen = draw(st.sampled_from((2, 3))) if version is None else version
    extended = chosen == 3 and draw(st.booleans())
    geometry = Geometry(draw(cluster_bits(extended_l2=extended)), extended)
    size = draw(st.integers(0, min(geometry.l2_span * MAX_L1_ENTRIES, (1 << 63) - 1)))
    places = host_offsets(geometry)
    common = Header(
        version=chosen,
        cluster_bits=geometry.cluster_bits,
        size=size,
        crypt_method=draw(st.sampled_from((CryptMethod.NONE, CryptMethod.AES))),
        l1_size=draw(st.integers(geometry.l1_entries(size), MAX_L1_ENTRIES)),
        l1_table_offset=draw(places),
        refcount_table_offset=draw(places),
        refcount_table_clusters=draw(st.integers(1, MAX_REFTABLE_BYTES >> geometry.cluster_bits)),
        snapshot_count=draw(st.integers(0, MAX_SNAPSHOTS)),
        snapshots_offset=draw(places),
        header_length=HEADER_LENGTH_V2,
        tail=b"",
    )
    return common if chosen == 2 else _with_features(draw, common, extended=extended)


def unknown_extensions() -> st.SearchStrategy[Extension]:
    """Extensions of types that nobody knows, with any payload."""
    return st.builds(Extension, _U32.filter(lambda kind: kind not in _KNOWN_TYPES), st.binary(max_size=24))


@st.composite
def first_clusters(draw: st.DrawFn) -> FirstCluster:
    """Whole first clusters that decode_first_cluster accepts: known and unknown extensions, with and without a name."""
    header = draw(headers())
    extensions = draw(st.lists(unknown_extensions(), max_size=3))
    name = draw(st.just(b"") | _NAMES)
    if name:
        extensions.insert(0, Extension(ExtensionType.BACKING_FORMAT, draw(st.sampled_from((b"qcow2", b"raw")))))
    if header.has_data_file:
        extensions.append(Extension(ExtensionType.DATA_FILE, draw(_NAMES)))
    if draw(st.booleans()):
        pointer = CryptoPointer(draw(host_offsets(header.geometry)), draw(st.integers(592, 1 << 21)))
        extensions.append(pointer.encode())
        header = replace(header, crypt_method=CryptMethod.LUKS)
    if header.cluster_bits > 10 and draw(st.booleans()):
        extensions.append(encode_feature_names())
    return lay_out(header, extensions, name)


@st.composite
def l2_words(draw: st.DrawFn, geometry: Geometry) -> tuple[int, int]:
    """(word, bitmap) of legal L2 entries of every kind; the bitmap is 0 without extended L2 entries."""
    kind = draw(st.sampled_from(("unallocated", "compressed", "normal", "zero", "zero allocated")))
    if kind == "compressed":
        return draw(compressed_words(geometry)), 0
    offset = draw(host_offsets(geometry)) if kind in ("normal", "zero allocated") else 0
    copied = bool(offset) and draw(st.booleans())
    if geometry.extended_l2:
        return encode_normal(offset, copied=copied), draw(subcluster_bitmaps(owned=bool(offset)))
    if kind.startswith("zero"):
        return encode_zero(offset, copied=copied), 0
    return encode_normal(offset, copied=copied), 0


@st.composite
def compressed_words(draw: st.DrawFn, geometry: Geometry) -> int:
    """Descriptors of compressed clusters at any byte, of any length they can state."""
    bits = geometry.cluster_bits
    offset = draw(st.integers(1 << bits, (1 << min(70 - bits, 56)) - (1 << 23)))
    length = draw(st.integers(1, geometry.cluster_size))
    return encode_compressed(offset, length, bits)


@st.composite
def subcluster_bitmaps(draw: st.DrawFn, *, owned: bool) -> int:
    """Legal subcluster bitmaps, with allocated subclusters only if the entry owns a host cluster."""
    zero = draw(st.one_of(st.sampled_from((0, ALL_SUBCLUSTERS)), _U32))
    allocated = draw(st.one_of(st.sampled_from((0, ALL_SUBCLUSTERS)), _U32)) if owned else 0
    return encode_bitmap(allocated & ~zero, zero)


def hostile_l2_words() -> st.SearchStrategy[tuple[int, int]]:
    """Any two words, biased to the bits that mean something."""
    word = st.one_of(_U64, st.builds(lambda a, b: (a & L2_OFFSET_MASK) | (b & COPIED), _U64, _U64))
    return st.tuples(word, st.one_of(st.just(0), _U64))


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Records with any fields, extra data of any legal kind included."""
    return Snapshot(
        l1_offset=draw(_U64),
        l1_size=draw(_U32),
        id=draw(st.binary(max_size=20)),
        name=draw(st.binary(max_size=40)),
        seconds=draw(_U32),
        nanoseconds=draw(_U32),
        vm_clock_ns=draw(_U64),
        vm_state_size_32=draw(_U32),
        extra=draw(st.one_of(st.sampled_from((b"", bytes(16), bytes(24))), st.binary(max_size=64))),
    )


@st.composite
def bitmaps(draw: st.DrawFn, geometry: Geometry, size: int) -> Bitmap:
    """Usable directory records of a guest disk of `size` bytes, which is small enough for a 512 MiB bitmap."""
    granularity_bits = draw(st.integers(16, 31))
    return Bitmap(
        table_offset=draw(host_offsets(geometry)),
        table_size=bitmap_table_entries(size, granularity_bits, geometry),
        granularity_bits=granularity_bits,
        name=draw(_NAMES),
        flags=BitmapFlags(draw(st.integers(0, 3))),
    )


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The same bytes with some overwritten, and perhaps cut short: almost right, which finds more than noise."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        extremes = st.sampled_from((b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 7, bytes(8)))
        piece = draw(st.one_of(st.binary(min_size=1, max_size=8), extremes))
        changed[place : place + len(piece)] = piece
    keep = draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    return bytes(changed[:keep])


def _with_features(draw: st.DrawFn, header: Header, *, extended: bool) -> Header:
    flags = draw(st.integers(0, 7)) | (Incompatible.EXTENDED_L2 if extended else 0)
    autoclear = Autoclear(draw(_U64))
    if not flags & Incompatible.DATA_FILE:
        autoclear &= ~Autoclear.RAW_EXTERNAL
    length = draw(st.sampled_from((HEADER_LENGTH_V3, HEADER_LENGTH_WRITTEN, HEADER_LENGTH_WRITTEN + 8, 160)))
    zstd = length > HEADER_LENGTH_V3 and draw(st.booleans())
    return replace(
        header,
        incompatible=Incompatible(flags | (Incompatible.COMPRESSION if zstd else 0)),
        compatible=Compatible(draw(_U64)),
        autoclear=autoclear,
        refcount_order=draw(st.integers(0, 6)),
        header_length=length,
        compression_type=CompressionType.ZSTD if zstd else CompressionType.DEFLATE,
        tail=draw(st.binary(min_size=max(length - 105, 0), max_size=max(length - 105, 0))),
    )
