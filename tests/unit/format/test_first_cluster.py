"""The first cluster: extensions, names and pointers, and the rules that join them with the header."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cowslice.errors import BadOption, ImageError, MalformedImage, NotAnImage, UnsupportedImage
from cowslice.format.extensions import (
    STANDARD_FEATURE_NAMES,
    BitmapsPointer,
    CryptoPointer,
    Extension,
    ExtensionType,
    FeatureName,
    decode_extensions,
    decode_feature_names,
    encode_extensions,
    encode_feature_names,
    with_extension,
)
from cowslice.format.findings import Fault, Finding
from cowslice.format.first_cluster import (
    PREFIX_LENGTH,
    FirstCluster,
    decode_first_cluster,
    encode_first_cluster,
    first_cluster_length,
    inspect_first_cluster,
    lay_out,
)
from cowslice.format.header import Autoclear, Header, Incompatible, encode_header
from cowslice.format.limits import MAX_EXTENSIONS
from tests.unit.format.samples import GOOD, GOOD_V2

FORMAT = Extension(ExtensionType.BACKING_FORMAT, b"qcow2")
UNKNOWN = Extension(0x12345678, b"\x01\x02\x03")
BITMAPS = replace(GOOD, autoclear=Autoclear.BITMAPS)
LUKS = replace(GOOD, crypt_method=2)


def image(header: Header, *extensions: Extension, name: bytes = b"") -> bytes:
    return encode_first_cluster(lay_out(header, extensions, name))


def findings(raw: bytes, fault: Fault | None = None) -> list[Finding]:
    return [finding for finding in inspect_first_cluster(raw)[1] if fault in (None, finding.fault)]


def test_names_and_pointers_are_found() -> None:
    header = replace(BITMAPS, crypt_method=2, incompatible=Incompatible.DATA_FILE)
    parts = (
        FORMAT,
        Extension(ExtensionType.DATA_FILE, b"data.raw"),
        CryptoPointer(0x50000, 2068480).encode(),
        BitmapsPointer(2, 64, 0x40000).encode(),
    )
    first = decode_first_cluster(image(header, *parts, name=b"base.qcow2"))
    assert (first.backing_name, first.backing_format, first.data_file_name) == (b"base.qcow2", "qcow2", b"data.raw")
    assert (first.crypto, first.bitmaps) == (CryptoPointer(0x50000, 2068480), BitmapsPointer(2, 64, 0x40000))


def test_an_image_without_names_has_none() -> None:
    first = decode_first_cluster(image(GOOD))
    assert (first.backing_name, first.backing_format, first.data_file_name, first.crypto, first.bitmaps) == (None,) * 5


def test_bytes_beyond_the_end_of_the_file_are_zeros() -> None:
    raw = encode_header(GOOD)
    assert decode_first_cluster(raw) == FirstCluster(GOOD)


def test_extensions_end_where_the_backing_name_begins_even_without_an_end_record() -> None:
    header = replace(GOOD_V2, backing_file_offset=72 + 16, backing_file_size=4)
    raw = encode_header(header) + encode_extensions([UNKNOWN], end_record=False) + b"base"
    first = decode_first_cluster(raw)
    assert (first.extensions, first.backing_name) == ((UNKNOWN,), b"base")
    assert encode_first_cluster(first) == raw


def test_a_backing_name_may_stand_where_padding_would_be() -> None:
    header = replace(GOOD_V2, backing_file_offset=72 + 11, backing_file_size=4)
    raw = encode_header(header) + encode_extensions([UNKNOWN], end_record=False)[:11] + b"base"
    first = decode_first_cluster(raw)
    assert (first.extensions, first.backing_name) == ((UNKNOWN,), b"base")
    assert encode_first_cluster(first) == raw


def test_extensions_may_fill_the_cluster_to_its_end() -> None:
    header = replace(GOOD, cluster_bits=9, l1_size=1 << 15)
    first = FirstCluster(header, (Extension(1, bytes(512 - 112 - 8)),))
    raw = encode_first_cluster(first)
    assert len(raw) == 512
    assert decode_first_cluster(raw) == first


def test_an_extension_that_does_not_fit_is_malformed() -> None:
    raw = encode_header(GOOD) + (0x12345678).to_bytes(4, "big") + (0xFFFFFFFF).to_bytes(4, "big")
    with pytest.raises(MalformedImage) as caught:
        decode_first_cluster(raw)
    assert caught.value.where == "header extensions"
    assert findings(raw)[0].offset == 112 + 4


def test_of_two_extensions_of_one_type_the_last_counts_and_it_is_noted() -> None:
    raw = image(GOOD, FORMAT, Extension(ExtensionType.BACKING_FORMAT, b"raw"), name=b"base")
    assert decode_first_cluster(raw).backing_format == "raw"
    assert [finding.offset for finding in findings(raw, Fault.NOTE)] == [112 + 16]


def test_a_name_ends_at_a_nul_and_the_bytes_are_kept() -> None:
    raw = image(GOOD, name=b"base\0/etc/shadow")
    first = decode_first_cluster(raw)
    assert first.backing_name == b"base"
    assert encode_first_cluster(first) == raw
    assert [finding.field for finding in findings(raw, Fault.NOTE)] == ["backing name"]


BAD_NAMES = [
    ("backing_file_offset", {"backing_file_offset": 65537, "backing_file_size": 0}),
    ("backing_file_offset", {"backing_file_offset": 100, "backing_file_size": 4}),
    ("backing_file_size", {"backing_file_offset": 120, "backing_file_size": 1024}),
    ("backing_file_size", {"backing_file_offset": 65530, "backing_file_size": 7}),
]


@pytest.mark.parametrize("field, change", BAD_NAMES)
def test_a_backing_name_outside_its_bounds_is_malformed(field: str, change: dict[str, int]) -> None:
    with pytest.raises(MalformedImage) as caught:
        decode_first_cluster(encode_header(replace(GOOD, **change)))
    assert caught.value.field == field


def test_the_size_of_a_backing_name_means_nothing_without_its_offset() -> None:
    assert decode_first_cluster(encode_header(replace(GOOD, backing_file_size=9999))).backing_name is None


BAD_EXTENSIONS = [
    ("backing format", GOOD, Extension(ExtensionType.BACKING_FORMAT, b"x" * 16)),
    ("crypto", GOOD, CryptoPointer(0x40000, 592).encode()),
    ("crypto", LUKS, None),
    ("crypto", LUKS, Extension(ExtensionType.CRYPTO, bytes(15))),
    ("crypto", LUKS, CryptoPointer(0x40001, 592).encode()),
    ("crypto", LUKS, CryptoPointer(0x40000, 1 << 40).encode()),
    ("crypto", LUKS, CryptoPointer(0xFFFF_FFFF_FFFF_0000, 592).encode()),
]


@pytest.mark.parametrize("field, header, extension", BAD_EXTENSIONS)
def test_a_bad_extension_is_malformed(field: str, header: Header, extension: Extension | None) -> None:
    with pytest.raises(MalformedImage) as caught:
        decode_first_cluster(image(header, *([extension] if extension else [])))
    assert caught.value.field == field


BAD_BITMAPS = [
    Extension(ExtensionType.BITMAPS, bytes(23)),
    BitmapsPointer(0, 64, 0x40000).encode(),
    BitmapsPointer(65536, 64, 0x40000).encode(),
    BitmapsPointer(1, 64, 0x40000, reserved=1).encode(),
    BitmapsPointer(1, 0, 0x40000).encode(),
    BitmapsPointer(1, 1 << 40, 0x40000).encode(),
    BitmapsPointer(1, 64, 0).encode(),
    BitmapsPointer(1, 64, 0x40200).encode(),
    BitmapsPointer(1, 64, 0xFFFF_FFFF_FFFF_0000).encode(),
]


@pytest.mark.parametrize("extension", BAD_BITMAPS)
def test_a_bad_bitmaps_extension_leaves_the_image_readable(extension: Extension) -> None:
    raw = image(BITMAPS, extension)
    assert decode_first_cluster(raw).bitmaps is None
    assert [finding.field for finding in findings(raw, Fault.UNUSABLE)] == ["bitmaps"]


def test_bitmaps_are_ignored_when_their_autoclear_bit_is_off() -> None:
    raw = image(GOOD, BitmapsPointer(1, 64, 0x40000).encode())
    assert decode_first_cluster(raw).bitmaps is None
    assert findings(raw, Fault.UNUSABLE)


def test_a_bitmaps_bit_without_its_extension_is_noted() -> None:
    raw = image(BITMAPS)
    assert decode_first_cluster(raw).bitmaps is None
    assert [finding.field for finding in findings(raw, Fault.NOTE)] == ["bitmaps"]


def test_a_data_file_is_only_what_the_feature_bit_makes_one() -> None:
    named = Extension(ExtensionType.DATA_FILE, b"/etc/shadow")
    raw = image(GOOD, named)
    assert decode_first_cluster(raw).data_file_name is None
    assert [finding.field for finding in findings(raw, Fault.NOTE)] == ["data file"]


def test_a_data_file_without_a_name_is_noted() -> None:
    raw = image(replace(GOOD, incompatible=Incompatible.DATA_FILE))
    assert decode_first_cluster(raw).data_file_name is None
    assert [finding.field for finding in findings(raw, Fault.NOTE)] == ["data file"]


def test_more_extensions_than_the_limit_are_malformed() -> None:
    many = encode_header(GOOD) + encode_extensions([Extension(1, b"")] * (MAX_EXTENSIONS + 1))
    with pytest.raises(MalformedImage, match=str(MAX_EXTENSIONS)):
        decode_first_cluster(many)


def test_unknown_features_are_named_from_the_image_in_escaped_text() -> None:
    names = encode_feature_names([FeatureName(0, 9, b"evil\x1b[2J\n"), FeatureName(1, 9, b"other")])
    raw = image(replace(GOOD, incompatible=Incompatible(1 << 9)), names)
    with pytest.raises(UnsupportedImage) as caught:
        decode_first_cluster(raw)
    assert caught.value.features == (r"evil\x1b[2J\n",)


def test_a_fault_does_not_hide_another() -> None:
    bad = replace(GOOD, crypt_method=2, refcount_order=8, incompatible=Incompatible(1 << 9))
    raw = encode_header(replace(bad, backing_file_offset=50, backing_file_size=3)) + b"\0\0\0\1\xff\xff\xff\xff"
    fields = {finding.field for finding in findings(raw) if finding.fatal}
    assert fields >= {"incompatible", "refcount_order", "backing_file_offset", "crypto"}


def test_tables_that_overlap_forbid_writing() -> None:
    bad = replace(GOOD, l1_table_offset=0x10000)
    _, found = inspect_first_cluster(encode_header(bad), file_length=1 << 20)
    assert [(f.fault, f.offset) for f in found] == [(Fault.UNSAFE, 0x10000)]


@pytest.mark.parametrize("length, fault", [(0x30000, Fault.UNSAFE), (0x30008, Fault.NOTE)])
def test_a_table_beyond_the_end_of_the_file_is_told(length: int, fault: Fault) -> None:
    _, found = inspect_first_cluster(encode_header(GOOD), file_length=length)
    assert [(f.fault, f.offset) for f in found] == [(fault, 0x30000)]


def test_bitmaps_and_the_encryption_header_take_part_in_the_layout() -> None:
    header = replace(BITMAPS, crypt_method=2)
    raw = image(header, BitmapsPointer(1, 64, 0x40000).encode(), CryptoPointer(0x40000, 592).encode())
    (overlap,) = inspect_first_cluster(raw, file_length=1 << 20)[1]
    assert overlap.message == "the encryption header at 0x40000 overlaps the bitmap directory"


def test_a_sound_layout_has_no_findings() -> None:
    assert inspect_first_cluster(encode_header(GOOD), file_length=0x30010)[1] == []


@pytest.mark.parametrize("raw", [b"", b"QFI\xfb", bytes(600), encode_header(GOOD)[:100]])
def test_what_is_no_header_gives_no_record(raw: bytes) -> None:
    assert inspect_first_cluster(raw)[0] is None
    with pytest.raises(ImageError):
        decode_first_cluster(raw)


def test_the_prefix_tells_how_much_to_read() -> None:
    assert first_cluster_length(encode_header(GOOD)) == 65536
    assert first_cluster_length(encode_header(replace(GOOD, cluster_bits=40))) == PREFIX_LENGTH
    assert first_cluster_length(b"") == PREFIX_LENGTH


def test_not_an_image_is_its_own_error() -> None:
    with pytest.raises(NotAnImage):
        decode_first_cluster(bytes(512))


@pytest.mark.parametrize("name", [b"x" * 1024, b"x" * 400])
def test_a_name_that_has_no_room_is_refused(name: bytes) -> None:
    with pytest.raises(BadOption):
        lay_out(replace(GOOD, cluster_bits=9), [UNKNOWN], name)


def test_a_first_cluster_whose_parts_collide_is_not_encoded() -> None:
    first = FirstCluster(replace(GOOD, backing_file_offset=120, backing_file_size=4), (FORMAT, UNKNOWN), b"base")
    with pytest.raises(BadOption):
        encode_first_cluster(first)


def test_a_name_of_another_length_than_the_header_says_is_not_encoded() -> None:
    with pytest.raises(BadOption):
        encode_first_cluster(FirstCluster(replace(GOOD, backing_file_offset=128, backing_file_size=5), (), b"base"))


def test_an_extension_cannot_pose_as_the_end() -> None:
    with pytest.raises(BadOption):
        encode_extensions([Extension(0, b"")])


def test_setting_an_extension_keeps_the_place_and_removes_duplicates() -> None:
    before = (FORMAT, UNKNOWN, FORMAT)
    assert with_extension(before, FORMAT.type, b"raw") == (Extension(FORMAT.type, b"raw"), UNKNOWN)
    assert with_extension(before, FORMAT.type, None) == (UNKNOWN,)


def test_a_new_extension_goes_before_those_that_follow_it_by_custom() -> None:
    names = encode_feature_names()
    after = with_extension((names, UNKNOWN), ExtensionType.DATA_FILE, b"d")
    assert [extension.type for extension in after] == [ExtensionType.DATA_FILE, names.type, UNKNOWN.type]
    assert with_extension((UNKNOWN,), 7, b"")[-1] == Extension(7, b"")


def test_the_standard_feature_names_survive() -> None:
    assert tuple(decode_feature_names(encode_feature_names().payload)) == STANDARD_FEATURE_NAMES


def test_a_feature_name_of_more_than_46_bytes_is_refused() -> None:
    with pytest.raises(BadOption):
        encode_feature_names([FeatureName(0, 1, b"x" * 47)])


def test_the_bytes_of_padding_do_not_matter() -> None:
    raw = bytearray(encode_extensions([UNKNOWN]))
    raw[11:16] = b"\xff" * 5
    assert decode_extensions(bytes(raw), 0, len(raw)) == (UNKNOWN,)
