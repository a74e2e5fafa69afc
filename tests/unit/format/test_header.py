"""The header: every rule that it can break, by whose name it is refused, and what is kept that nobody knows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cowslice.errors import BadOption, ImageError, MalformedImage, NotAnImage, UnsupportedImage
from cowslice.format.findings import Fault
from cowslice.format.header import (
    FIELD_OFFSETS,
    Autoclear,
    Compatible,
    Header,
    Incompatible,
    decode_header,
    encode_header,
    header_findings,
    inspect_header,
)
from tests.unit.format.samples import GOOD, GOOD_V2


def patched(field: str, value: bytes, header: Header = GOOD) -> bytes:
    """The bytes of a good header with some of them replaced, which no encoder would write."""
    raw = bytearray(encode_header(header))
    start = FIELD_OFFSETS[field]
    raw[start : start + len(value)] = value
    return bytes(raw)


BROKEN: list[tuple[str, dict[str, Any], type[ImageError]]] = [
    ("cluster_bits", {"cluster_bits": 8}, MalformedImage),
    ("cluster_bits", {"cluster_bits": 22}, MalformedImage),
    ("cluster_bits", {"cluster_bits": 13, "incompatible": Incompatible.EXTENDED_L2}, MalformedImage),
    ("header_length", {"cluster_bits": 9, "header_length": 520, "tail": bytes(415)}, MalformedImage),
    ("incompatible", {"incompatible": Incompatible(1 << 63)}, UnsupportedImage),
    ("compression_type", {"compression_type": 2, "incompatible": Incompatible.COMPRESSION}, UnsupportedImage),
    ("compression_type", {"compression_type": 1}, MalformedImage),
    ("compression_type", {"incompatible": Incompatible.COMPRESSION}, MalformedImage),
    ("autoclear", {"autoclear": Autoclear.RAW_EXTERNAL}, MalformedImage),
    ("refcount_order", {"refcount_order": 7}, MalformedImage),
    ("crypt_method", {"crypt_method": 3}, UnsupportedImage),
    ("refcount_table_clusters", {"refcount_table_clusters": 0}, MalformedImage),
    ("refcount_table_clusters", {"refcount_table_clusters": 129}, MalformedImage),
    ("refcount_table_offset", {"refcount_table_offset": 0x10001}, MalformedImage),
    ("refcount_table_offset", {"refcount_table_offset": 0x7FFF_FFFF_FFFF_0000}, MalformedImage),
    ("snapshot_count", {"snapshot_count": 65537}, MalformedImage),
    ("snapshots_offset", {"snapshots_offset": 0x200}, MalformedImage),
    ("snapshots_offset", {"snapshots_offset": 0xFFFF_FFFF_FFFF_0000, "snapshot_count": 1}, MalformedImage),
    ("l1_size", {"l1_size": 4194305}, MalformedImage),
    ("l1_size", {"l1_size": 1}, MalformedImage),
    ("l1_table_offset", {"l1_table_offset": 0x30008}, MalformedImage),
    ("l1_table_offset", {"l1_table_offset": 0xFFFF_FFFF_FFFF_0000}, MalformedImage),
    ("size", {"size": (1 << 64) - 1}, MalformedImage),
]


@pytest.mark.parametrize("field, change, error", BROKEN)
def test_a_broken_rule_is_refused_by_the_name_of_its_field(
    field: str, change: dict[str, Any], error: type[ImageError]
) -> None:
    raw = encode_header(replace(GOOD, **change))
    with pytest.raises(error):
        decode_header(raw)
    assert field in [finding.field for finding in inspect_header(raw)[1] if finding.fatal]


@pytest.mark.parametrize("field, change, error", BROKEN)
def test_a_finding_points_at_the_bytes_of_its_field(
    field: str, change: dict[str, Any], error: type[ImageError]
) -> None:
    findings = [f for f in header_findings(replace(GOOD, **change)) if f.fatal]
    assert (field, FIELD_OFFSETS[field]) in [(f.field, f.offset) for f in findings]
    assert error in [type(f.error()) for f in findings]


def test_all_findings_are_reported_not_only_the_first() -> None:
    bad = replace(GOOD, crypt_method=9, refcount_order=9, l1_size=0, snapshots_offset=3)
    fields = [finding.field for finding in inspect_header(encode_header(bad))[1]]
    assert fields == ["refcount_order", "crypt_method", "snapshots_offset", "l1_size"]


@pytest.mark.parametrize("raw", [b"", b"QFI", b"\0" * 512, b"QFI\xfa" + bytes(508), b"KDMV" + bytes(508)])
def test_bytes_without_the_magic_are_no_image(raw: bytes) -> None:
    with pytest.raises(NotAnImage):
        decode_header(raw)


@pytest.mark.parametrize("version", [0, 1, 4, 0xFFFFFFFF])
def test_another_version_is_unsupported(version: int) -> None:
    with pytest.raises(UnsupportedImage, match=str(version)):
        decode_header(patched("version", version.to_bytes(4, "big")))


@pytest.mark.parametrize("length", [0, 72, 103, 0x7FFFFFFF])
def test_an_impossible_header_length_is_malformed(length: int) -> None:
    with pytest.raises(MalformedImage) as caught:
        decode_header(patched("header_length", length.to_bytes(4, "big")))
    assert caught.value.field == "header_length"


@pytest.mark.parametrize("header", [GOOD, GOOD_V2])
def test_every_shorter_prefix_of_a_header_is_refused(header: Header) -> None:
    raw = encode_header(header)
    for length in range(min(len(raw), 104)):
        with pytest.raises(ImageError):
            decode_header(raw[:length])


def test_a_version_2_header_implies_the_later_fields() -> None:
    header = decode_header(encode_header(GOOD_V2) + b"\xff" * 40)
    assert (header.incompatible, header.refcount_order, header.compression_type) == (0, 4, 0)


def test_a_header_of_104_bytes_has_no_compression_type() -> None:
    short = replace(GOOD, header_length=104, tail=b"")
    assert decode_header(encode_header(short) + b"\xff" * 8) == short


def test_unknown_bits_and_bytes_are_kept() -> None:
    odd = replace(
        GOOD, compatible=Compatible(0xF0F0), autoclear=Autoclear(1 << 63), header_length=120, tail=bytes(range(15))
    )
    assert decode_header(encode_header(odd)) == odd


def test_the_names_of_unknown_features_are_told() -> None:
    bad = replace(GOOD, incompatible=Incompatible(0b11 << 40))
    finding = next(header_findings(bad, {(0, 40): "time travel"}))
    assert finding.features == ("time travel", "incompatible feature bit 41")
    assert "'time travel' (bit 40)" in finding.message


NOTED: list[tuple[str, dict[str, Any]]] = [
    ("header_length", {"header_length": 113, "tail": bytes(8)}),
    ("size", {"size": 1000}),
    ("incompatible", {"incompatible": Incompatible.DIRTY}),
    ("compatible", {"compatible": Compatible(2)}),
    ("autoclear", {"autoclear": Autoclear(4)}),
]


@pytest.mark.parametrize("field, change", NOTED)
def test_what_only_deserves_a_note_does_not_stop_an_open(field: str, change: dict[str, Any]) -> None:
    header = replace(GOOD, **change)
    assert decode_header(encode_header(header)) == header
    assert [(f.field, f.fault) for f in header_findings(header)] == [(field, Fault.NOTE)]


def test_the_corrupt_bit_forbids_writing_but_not_reading() -> None:
    header = decode_header(encode_header(replace(GOOD, incompatible=Incompatible.CORRUPT)))
    assert header.is_corrupt
    assert [finding.forbids_writing for finding in header_findings(header)] == [True]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 4},
        {"version": 2},
        {"size": 1 << 64},
        {"l1_size": -1},
        {"header_length": 103, "tail": b""},
        {"header_length": 112, "tail": b""},
        {"compression_type": 256},
        {"header_length": 104, "tail": b"", "compression_type": 1},
    ],
)
def test_what_no_header_can_say_is_not_encoded(change: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        encode_header(replace(GOOD, **change))


def test_the_properties_name_the_features() -> None:
    flags = Incompatible.DIRTY | Incompatible.CORRUPT | Incompatible.DATA_FILE | Incompatible.EXTENDED_L2
    header = replace(GOOD, incompatible=flags)
    assert header.is_dirty
    assert header.is_corrupt
    assert header.has_data_file
    assert header.geometry.subclusters == 32
