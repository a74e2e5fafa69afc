"""Header extensions: an ordered sequence of typed records, and typed views of those that are known.

It does not know the rest of the first cluster. Unknown records, duplicates and payloads are kept byte for byte and in
order; padding is written as zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from cowslice.errors import BadOption
from cowslice.format.findings import Fault, Finding, escaped, raise_first
from cowslice.format.limits import FEATURE_NAME_LENGTH, MAX_EXTENSIONS
from cowslice.units import round_up

WHERE = "header extensions"
_RECORD = struct.Struct(">II")
_FEATURE = struct.Struct(f">BB{FEATURE_NAME_LENGTH}s")
_BITMAPS = struct.Struct(">IIQQ")
_CRYPTO = struct.Struct(">QQ")


class ExtensionType(IntEnum):
    """Known type numbers (spec: Header extensions)."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO = 0x0537BE77
    DATA_FILE = 0x44415441


@dataclass(frozen=True, slots=True)
class Extension:
    """One record; `payload` without its padding."""

    type: int
    payload: bytes

    @property
    def encoded_length(self) -> int:
        """Bytes it takes on disk, head and padding included."""
        return _RECORD.size + round_up(len(self.payload), 8)


@dataclass(frozen=True, slots=True)
class BitmapsPointer:
    """Where the bitmap directory lies, in bytes (spec: Bitmaps extension)."""

    count: int
    directory_size: int
    directory_offset: int
    reserved: int = 0

    def encode(self) -> Extension:
        """The extension that says so."""
        payload = _BITMAPS.pack(self.count, self.reserved, self.directory_size, self.directory_offset)
        return Extension(ExtensionType.BITMAPS, payload)


@dataclass(frozen=True, slots=True)
class CryptoPointer:
    """Where the encryption header lies, in bytes (spec: Full disk encryption header pointer)."""

    offset: int
    length: int

    def encode(self) -> Extension:
        """The extension that says so."""
        return Extension(ExtensionType.CRYPTO, _CRYPTO.pack(self.offset, self.length))


@dataclass(frozen=True, slots=True)
class FeatureName:
    """One row of the feature name table. `kind` is 0 incompatible, 1 compatible, 2 autoclear; `name` is untrusted."""

    kind: int
    bit: int
    name: bytes


# What we write, so that software which does not know a bit can say its name. The names are those of QEMU.
STANDARD_FEATURE_NAMES = (
    FeatureName(0, 0, b"dirty bit"),
    FeatureName(0, 1, b"corrupt bit"),
    FeatureName(0, 2, b"external data file"),
    FeatureName(0, 3, b"compression type"),
    FeatureName(0, 4, b"extended L2 entries"),
    FeatureName(1, 0, b"lazy refcounts"),
    FeatureName(2, 0, b"bitmaps"),
    FeatureName(2, 1, b"raw external data"),
)


def decode_extensions(data: bytes, start: int, end: int) -> tuple[Extension, ...]:
    """Decode the records from `start` up to the END record or `end`. Raises MalformedImage when one does not fit."""
    extensions, _, findings = unpack_extensions(data, start, end)
    raise_first(findings)
    return extensions


def unpack_extensions(data: bytes, start: int, end: int) -> tuple[tuple[Extension, ...], int, list[Finding]]:
    """As decode_extensions, but gives (records, where they end, findings) and never raises.

    The end is behind the END record when there is one. Bytes behind the end of `data` count as zeros.
    """
    found: list[Extension] = []
    offset = start
    while offset + _RECORD.size <= end:
        kind, length = _RECORD.unpack(data[offset : offset + _RECORD.size].ljust(_RECORD.size, b"\0"))
        body = offset + _RECORD.size
        if kind == ExtensionType.END:
            return tuple(found), body, []
        if len(found) == MAX_EXTENSIONS:
            message = f"there are more than {MAX_EXTENSIONS} header extensions"
            return tuple(found), offset, [Finding(Fault.MALFORMED, message, WHERE, "type", offset)]
        if length > end - body:
            message = f"extension {kind:#010x} has a length of {length} bytes, but only {end - body} are left for it"
            return tuple(found), offset, [Finding(Fault.MALFORMED, message, WHERE, "length", offset + 4)]
        found.append(Extension(kind, data[body : body + length].ljust(length, b"\0")))
        offset = body + round_up(length, 8)
    return tuple(found), min(offset, end), []


def encode_extensions(extensions: Iterable[Extension], *, end_record: bool = True) -> bytes:
    """The bytes of the records in order, with the END record unless it is not wanted."""
    parts = []
    for extension in extensions:
        if extension.type == ExtensionType.END:
            raise BadOption("extension type 0 ends the sequence and cannot be one of it")
        parts.append(_RECORD.pack(extension.type, len(extension.payload)))
        parts.append(extension.payload + bytes(-len(extension.payload) % 8))
    return b"".join(parts) + (_RECORD.pack(ExtensionType.END, 0) if end_record else b"")


def last_of(extensions: Sequence[Extension], kind: int) -> Extension | None:
    """The extension of a type; of several the last one counts, as for QEMU."""
    return next((extension for extension in reversed(extensions) if extension.type == kind), None)


def text_of(extensions: Sequence[Extension], kind: int) -> bytes | None:
    """A name up to its first NUL, which is where C code stops reading; None when there is none."""
    extension = last_of(extensions, kind)
    return extension.payload.split(b"\0", 1)[0] if extension else None


def decode_bitmaps_pointer(payload: bytes) -> BitmapsPointer | None:
    """The record of a bitmaps extension, or None for a wrong length."""
    if len(payload) != _BITMAPS.size:
        return None
    count, reserved, size, offset = _BITMAPS.unpack(payload)
    return BitmapsPointer(count, size, offset, reserved)


def decode_crypto_pointer(payload: bytes) -> CryptoPointer | None:
    """The record of an encryption header extension, or None for a wrong length."""
    return CryptoPointer(*_CRYPTO.unpack(payload)) if len(payload) == _CRYPTO.size else None


def decode_feature_names(payload: bytes) -> Iterator[FeatureName]:
    """The whole rows of a feature name table; a rest that is no row is skipped."""
    whole = len(payload) - len(payload) % _FEATURE.size
    for kind, bit, name in _FEATURE.iter_unpack(payload[:whole]):
        yield FeatureName(kind, bit, name.rstrip(b"\0"))


def encode_feature_names(names: Iterable[FeatureName] = STANDARD_FEATURE_NAMES) -> Extension:
    """The extension that holds the rows. Raises BadOption for a name of more than 46 bytes."""
    rows = []
    for row in names:
        if len(row.name) > FEATURE_NAME_LENGTH:
            raise BadOption(f"feature name has {len(row.name)} bytes, expected at most {FEATURE_NAME_LENGTH}")
        rows.append(_FEATURE.pack(row.kind, row.bit, row.name))
    return Extension(ExtensionType.FEATURE_NAMES, b"".join(rows))


def feature_names(extensions: Sequence[Extension]) -> Mapping[tuple[int, int], str]:
    """Escaped names by (kind, bit), from the image's own table; empty without one."""
    extension = last_of(extensions, ExtensionType.FEATURE_NAMES)
    if extension is None:
        return {}
    rows = decode_feature_names(extension.payload)
    return {(row.kind, row.bit): escaped(row.name.split(b"\0", 1)[0]) for row in rows}


def with_extension(extensions: Sequence[Extension], kind: int, payload: bytes | None) -> tuple[Extension, ...]:
    """The same sequence with the one extension of a type set, or without any when `payload` is None.

    The record keeps its place; a new one goes before the first that QEMU would write later.
    """
    place = next((i for i, extension in enumerate(extensions) if extension.type == kind), None)
    if place is None:
        later = _ORDER.get(kind, len(_ORDER))
        ranks = (_ORDER.get(extension.type, len(_ORDER)) for extension in extensions)
        place = next((i for i, rank in enumerate(ranks) if rank > later), len(extensions))
    before = tuple(extension for extension in extensions[:place] if extension.type != kind)
    after = tuple(extension for extension in extensions[place:] if extension.type != kind)
    return before + (() if payload is None else (Extension(kind, payload),)) + after


_ORDER: dict[int, int] = {
    kind: rank
    for rank, kind in enumerate(
        (
            ExtensionType.BACKING_FORMAT,
            ExtensionType.DATA_FILE,
            ExtensionType.CRYPTO,
            ExtensionType.FEATURE_NAMES,
            ExtensionType.BITMAPS,
        )
    )
}
