"""The first host cluster as a whole: header, extensions, backing file name, and every rule that joins them.

It opens nothing: the names that an image carries stay opaque bytes. Only this cluster may hold any of the three parts,
and what is decoded here encodes to the same bytes again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cowslice.errors import BadOption
from cowslice.format.extensions import (
    WHERE,
    BitmapsPointer,
    CryptoPointer,
    Extension,
    ExtensionType,
    decode_bitmaps_pointer,
    decode_crypto_pointer,
    encode_extensions,
    feature_names,
    last_of,
    text_of,
    unpack_extensions,
)
from cowslice.format.findings import Fault, Finding, escaped, overlaps, raise_first
from cowslice.format.header import (
    FIELD_OFFSETS,
    Autoclear,
    CryptMethod,
    Header,
    encode_header,
    header_findings,
    unpack_header,
)
from cowslice.format.limits import (
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    MAX_CLUSTER_BITS,
    MAX_CRYPTO_HEADER_BYTES,
    MAX_FINDINGS,
    MAX_OFFSET,
    MIN_CLUSTER_BITS,
)

# Enough to learn the cluster size from, and what is read when it is impossible.
PREFIX_LENGTH = 1 << MIN_CLUSTER_BITS
_END_RECORD = 8


@dataclass(frozen=True, slots=True)
class FirstCluster:
    """What the first cluster says. `raw_backing_name` is the field as it stands; `backing_name` is what it names."""

    header: Header
    extensions: tuple[Extension, ...] = ()
    raw_backing_name: bytes = b""

    @property
    def backing_name(self) -> bytes | None:
        """Name of the backing file up to its first NUL, None when there is none. Untrusted."""
        return self.raw_backing_name.split(b"\0", 1)[0] or None

    @property
    def backing_format(self) -> str | None:
        """Format name of the backing file, None when the image does not say. Untrusted."""
        raw = text_of(self.extensions, ExtensionType.BACKING_FORMAT)
        return raw.decode("utf-8", "surrogateescape") if raw else None

    @property
    def data_file_name(self) -> bytes | None:
        """Name of the external data file, None without one or when the image does not say. Untrusted."""
        raw = text_of(self.extensions, ExtensionType.DATA_FILE)
        return raw or None if self.header.has_data_file else None

    @property
    def crypto(self) -> CryptoPointer | None:
        """Where the LUKS header lies, None when the image has none."""
        extension = last_of(self.extensions, ExtensionType.CRYPTO)
        if extension is None or self.header.crypt_method != CryptMethod.LUKS:
            return None
        return decode_crypto_pointer(extension.payload)

    @property
    def bitmaps(self) -> BitmapsPointer | None:
        """Where the bitmap directory lies; None when there is none, it is out of date or breaks a rule."""
        extension = last_of(self.extensions, ExtensionType.BITMAPS)
        if extension is None or not self.header.autoclear & Autoclear.BITMAPS:
            return None
        pointer = decode_bitmaps_pointer(extension.payload)
        return None if pointer is None or bitmaps_pointer_fault(pointer, self.header) else pointer


def first_cluster_length(prefix: bytes) -> int:
    """Bytes to read for the whole first cluster, from the first PREFIX_LENGTH bytes of the file. Never raises.

    PREFIX_LENGTH itself when the header gives no possible size: nothing behind it could be understood.
    """
    header, _ = unpack_header(prefix)
    if header is None or not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        return PREFIX_LENGTH
    return 1 << header.cluster_bits


def decode_first_cluster(data: bytes) -> FirstCluster:
    """Decode the first cluster; `data` holds first_cluster_length bytes, or less where the file ends before.

    Raises NotAnImage, MalformedImage or UnsupportedImage for the first rule that is broken.
    """
    first, findings = inspect_first_cluster(data)
    raise_first(findings)
    assert first is not None
    return first


def inspect_first_cluster(data: bytes, *, file_length: int | None = None) -> tuple[FirstCluster | None, list[Finding]]:
    """Decode as far as possible and report everything worth saying. Never raises for any bytes.

    With `file_length` in bytes the places of the tables are also held against the file.
    """
    header, findings = unpack_header(data)
    if header is None:
        return None, findings
    if not _is_framed(header):
        findings.extend(header_findings(header))
        return FirstCluster(header), findings
    end = header.backing_file_offset or 1 << header.cluster_bits
    end = min(end, 1 << header.cluster_bits)
    extensions, _, broken = unpack_extensions(data, header.header_length, end)
    findings.extend(header_findings(header, feature_names(extensions) if header.unknown_incompatible else None))
    findings.extend(broken)
    name_faults = list(_backing_faults(header))
    findings.extend(name_faults)
    first = FirstCluster(header, extensions, b"" if name_faults else _backing_name(header, data))
    findings.extend(_limited(_extension_findings(first)))
    findings.extend(_name_findings(first))
    if file_length is not None:
        findings.extend(_placement_findings(first, file_length))
    return first, findings


def encode_first_cluster(first: FirstCluster) -> bytes:
    """The used bytes of the first cluster, from the header to the end of the backing name; the rest is zeros.

    The name goes where the header says (lay_out puts it somewhere). Raises BadOption when the parts do not fit.
    """
    header, name = first.header, first.raw_backing_name
    cluster_size = 1 << header.cluster_bits
    limit = header.backing_file_offset or cluster_size
    parts = encode_header(header) + encode_extensions(first.extensions, end_record=False)
    if first.extensions:
        # The padding of the last record, and only that, may reach into what follows: then it is not there.
        padding = first.extensions[-1].encoded_length - 8 - len(first.extensions[-1].payload)
        parts = parts[: max(limit, len(parts) - padding)]
    if len(parts) > limit or limit + len(name) > cluster_size:
        raise BadOption(
            f"header, extensions and backing name need {len(parts) + len(name)} bytes, more than the {cluster_size} "
            "bytes of the first cluster"
        )
    if len(name) != (header.backing_file_size if header.backing_file_offset else 0):
        raise BadOption(f"backing name has {len(name)} bytes, but the header says {header.backing_file_size}")
    # Without room for an END record the sequence ends where the name or the cluster begins (spec).
    end = bytes(min(_END_RECORD, limit - len(parts)))
    return (parts + end).ljust(limit, b"\0") + name if name else parts + end


def lay_out(header: Header, extensions: Sequence[Extension], backing_name: bytes = b"") -> FirstCluster:
    """Put the backing name behind the extensions and say so in the header. Raises BadOption when it does not fit."""
    if len(backing_name) > MAX_BACKING_NAME:
        raise BadOption(f"backing name has {len(backing_name)} bytes, expected at most {MAX_BACKING_NAME}")
    offset = header.header_length + len(encode_extensions(extensions))
    if offset + len(backing_name) > 1 << header.cluster_bits:
        raise BadOption(
            f"header, extensions and backing name need {offset + len(backing_name)} bytes, more than a cluster of "
            f"{1 << header.cluster_bits} bytes has",
            hint="use larger clusters or a shorter backing name",
        )
    placed = replace(
        header, backing_file_offset=offset if backing_name else 0, backing_file_size=len(backing_name)
    )
    return FirstCluster(placed, tuple(extensions), backing_name)


def bitmaps_pointer_fault(pointer: BitmapsPointer, header: Header) -> str:
    """Why the bitmap directory cannot be where the pointer says, or ''."""
    if pointer.reserved:
        return f"reserved is {pointer.reserved:#x}, expected 0"
    if not 1 <= pointer.count <= MAX_BITMAPS:
        return f"nb_bitmaps is {pointer.count}, expected 1 to {MAX_BITMAPS}"
    if not 1 <= pointer.directory_size <= MAX_BITMAP_DIRECTORY_BYTES:
        return f"directory_size is {pointer.directory_size}, expected 1 to {MAX_BITMAP_DIRECTORY_BYTES}"
    if pointer.directory_offset == 0 or not header.geometry.is_aligned(pointer.directory_offset):
        return f"directory_offset is {pointer.directory_offset:#x}, expected a multiple of the cluster size"
    if pointer.directory_offset + pointer.directory_size > MAX_OFFSET:
        return f"directory_offset is {pointer.directory_offset:#x}, so that the directory ends beyond 2^63"
    return ""


def _is_framed(header: Header) -> bool:
    bits = header.cluster_bits
    return MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS and header.header_length <= 1 << bits


def _limited(findings: Iterator[Finding]) -> Iterator[Finding]:
    for _, finding in zip(range(MAX_FINDINGS), findings, strict=False):
        yield finding


def _backing_name(header: Header, data: bytes) -> bytes:
    if not header.backing_file_offset:
        return b""
    start, size = header.backing_file_offset, header.backing_file_size
    return bytes(data[start : start + size]).ljust(size, b"\0")


def _backing_faults(header: Header) -> Iterator[Finding]:
    offset, size = header.backing_file_offset, header.backing_file_size
    cluster_size = 1 << header.cluster_bits
    if not offset:
        return
    if offset > cluster_size:
        yield _bad_name("backing_file_offset", f"backing_file_offset is {offset}, outside the first cluster")
    elif offset < header.header_length:
        yield _bad_name("backing_file_offset", f"backing_file_offset is {offset}, inside the header")
    limit = min(MAX_BACKING_NAME, max(cluster_size - offset, 0))
    if size > limit:
        yield _bad_name("backing_file_size", f"backing_file_size is {size}, expected at most {limit}")


def _bad_name(field: str, message: str) -> Finding:
    return Finding(Fault.MALFORMED, message, "header", field, FIELD_OFFSETS[field])


def _extension_findings(first: FirstCluster) -> Iterator[Finding]:
    yield from _format_findings(first)
    yield from _crypto_findings(first)
    yield from _data_file_findings(first)
    yield from _bitmaps_findings(first)
    yield from _type_findings(first)


_KNOWN = frozenset(ExtensionType)


def _type_findings(first: FirstCluster) -> Iterator[Finding]:
    seen: set[int] = set()
    offset = first.header.header_length
    for extension in first.extensions:
        if extension.type not in _KNOWN:
            message = f"extension {extension.type:#010x} of {len(extension.payload)} bytes is unknown"
            yield Finding(Fault.NOTE, message, WHERE, "type", offset)
        elif extension.type in seen:
            message = f"extension {ExtensionType(extension.type).name} is there twice, the last one counts"
            yield Finding(Fault.NOTE, message, WHERE, "type", offset)
        seen.add(extension.type)
        offset += extension.encoded_length


def _offset_of(first: FirstCluster, kind: ExtensionType) -> int:
    """Host offset of the extension that counts, -1 when there is none."""
    found, offset = -1, first.header.header_length
    for extension in first.extensions:
        if extension.type == kind:
            found = offset
        offset += extension.encoded_length
    return found


def _format_findings(first: FirstCluster) -> Iterator[Finding]:
    extension = last_of(first.extensions, ExtensionType.BACKING_FORMAT)
    if extension is not None and len(extension.payload) > MAX_BACKING_FORMAT:
        message = f"backing format name has {len(extension.payload)} bytes, expected at most {MAX_BACKING_FORMAT}"
        offset = _offset_of(first, ExtensionType.BACKING_FORMAT)
        yield Finding(Fault.MALFORMED, message, WHERE, "backing format", offset)


def _crypto_findings(first: FirstCluster) -> Iterator[Finding]:
    extension = last_of(first.extensions, ExtensionType.CRYPTO)
    luks = first.header.crypt_method == CryptMethod.LUKS
    if extension is None:
        if luks:
            yield Finding(Fault.MALFORMED, "crypt_method is 2 (LUKS), but no extension says where the header is", WHERE,
                          "crypto")  # fmt: skip
        return
    pointer = decode_crypto_pointer(extension.payload)
    if not luks:
        message = f"there is an encryption header, but crypt_method is {first.header.crypt_method}, expected 2 (LUKS)"
    elif pointer is None:
        message = f"encryption header pointer has {len(extension.payload)} bytes, expected 16"
    elif not first.header.geometry.is_aligned(pointer.offset) or pointer.offset == 0:
        message = f"encryption header is at {pointer.offset:#x}, expected a multiple of the cluster size"
    elif pointer.length > MAX_CRYPTO_HEADER_BYTES:
        message = f"encryption header has {pointer.length} bytes, expected at most {MAX_CRYPTO_HEADER_BYTES}"
    elif pointer.offset + pointer.length > MAX_OFFSET:
        message = f"encryption header at {pointer.offset:#x} ends beyond 2^63"
    else:
        return
    yield Finding(Fault.MALFORMED, message, WHERE, "crypto", _offset_of(first, ExtensionType.CRYPTO))


def _data_file_findings(first: FirstCluster) -> Iterator[Finding]:
    named = last_of(first.extensions, ExtensionType.DATA_FILE)
    if named is not None and not first.header.has_data_file:
        message = f"data file '{escaped(named.payload)}' is named but not used"
        yield Finding(Fault.NOTE, message, WHERE, "data file", _offset_of(first, ExtensionType.DATA_FILE))
    if first.header.has_data_file and not first.data_file_name:
        message = "guest data lies in an external file that the image does not name"
        yield Finding(Fault.NOTE, message, WHERE, "data file")


def _bitmaps_findings(first: FirstCluster) -> Iterator[Finding]:
    extension = last_of(first.extensions, ExtensionType.BITMAPS)
    current = bool(first.header.autoclear & Autoclear.BITMAPS)
    offset = _offset_of(first, ExtensionType.BITMAPS)
    if extension is None:
        if current:
            yield Finding(Fault.NOTE, "autoclear bit 0 says bitmaps, but there is no such extension", WHERE, "bitmaps")
        return
    if not current:
        message = "bitmaps are ignored: a program that does not know them has written since"
        yield Finding(Fault.UNUSABLE, message, WHERE, "bitmaps", offset)
        return
    pointer = decode_bitmaps_pointer(extension.payload)
    if pointer is None:
        fault = f"extension has {len(extension.payload)} bytes, expected 24"
    else:
        fault = bitmaps_pointer_fault(pointer, first.header)
    if fault:
        yield Finding(Fault.UNUSABLE, f"bitmaps are unusable: {fault}", WHERE, "bitmaps", offset)


def _name_findings(first: FirstCluster) -> Iterator[Finding]:
    name = first.raw_backing_name
    if b"\0" in name:
        message = f"backing name '{escaped(name)}' holds a NUL and is read up to it"
        yield Finding(Fault.NOTE, message, "header", "backing name", first.header.backing_file_offset)


def _placement_findings(first: FirstCluster, file_length: int) -> Iterator[Finding]:
    header = first.header
    cluster_size = 1 << header.cluster_bits
    table = header.refcount_table_clusters << header.cluster_bits
    spans = [
        ("the header", 0, cluster_size),
        ("the L1 table", header.l1_table_offset, header.l1_size * 8),
        ("the refcount table", header.refcount_table_offset, table),
        ("the snapshot table", header.snapshots_offset, header.snapshot_count * 40),
    ]
    if pointer := first.bitmaps:
        spans.append(("the bitmap directory", pointer.directory_offset, pointer.directory_size))
    if crypto := first.crypto:
        spans.append(("the encryption header", crypto.offset, crypto.length))
    for before, after, offset in overlaps(spans):
        yield Finding(Fault.UNSAFE, f"{after} at {offset:#x} overlaps {before}", "layout", "", offset)
    for name, offset, length in spans[1:]:
        if length and offset + length > file_length:
            fault = Fault.UNSAFE if offset >= file_length else Fault.NOTE
            message = f"{name} at {offset:#x} ends beyond the end of the file at {file_length:#x}"
            yield Finding(fault, message, "layout", "", offset)
