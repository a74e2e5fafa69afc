"""L1 and L2 entries: every state of the specification's tables, and every one that it forbids."""

from __future__ import annotations

import pytest

from cowslice.errors import CorruptImage, InternalError
from cowslice.format.entries import (
    ALL_SUBCLUSTERS,
    COMPRESSED,
    COPIED,
    ZERO,
    Entry,
    Kind,
    bitmap_fault,
    compressed_span,
    decode_entry,
    encode_bitmap,
    encode_compressed,
    encode_l1,
    encode_normal,
    encode_zero,
    l1_reserved,
    l2_reserved,
    l2_table_offset,
    subcluster_runs,
)
from cowslice.format.geometry import Geometry

PLAIN = Geometry(16)
EXTENDED = Geometry(16, extended_l2=True)
HOST = 0x50000

STANDARD = [
    (0, Entry(Kind.UNALLOCATED)),
    (ZERO, Entry(Kind.ZERO)),
    (HOST | ZERO, Entry(Kind.ZERO_ALLOCATED, HOST, 65536)),
    (HOST | ZERO | COPIED, Entry(Kind.ZERO_ALLOCATED, HOST, 65536, copied=True)),
    (HOST, Entry(Kind.NORMAL, HOST, 65536)),
    (HOST | COPIED, Entry(Kind.NORMAL, HOST, 65536, copied=True)),
    (COPIED, Entry(Kind.UNALLOCATED, copied=True)),
    (COMPRESSED | HOST, Entry(Kind.COMPRESSED, HOST, 512)),
    (COMPRESSED | 2 << 54 | HOST + 100, Entry(Kind.COMPRESSED, HOST + 100, 3 * 512 - 100)),
]


@pytest.mark.parametrize("word, entry", STANDARD)
def test_a_standard_entry_means_what_the_table_says(word: int, entry: Entry) -> None:
    assert decode_entry(word, 0, PLAIN) == entry


def test_with_a_data_file_the_copied_flag_tells_that_offset_zero_is_a_cluster() -> None:
    assert decode_entry(COPIED, 0, PLAIN, data_file=True) == Entry(Kind.NORMAL, 0, 65536, copied=True)
    assert decode_entry(COPIED | ZERO, 0, PLAIN, data_file=True) == Entry(Kind.ZERO, copied=True)
    assert decode_entry(0, 0, PLAIN, data_file=True).kind is Kind.UNALLOCATED
    assert decode_entry(COPIED, 1, EXTENDED, data_file=True).subcluster(0) is Kind.NORMAL


SUBCLUSTERS = [
    (HOST, 1, 0, Kind.NORMAL),
    (HOST, 0, 1, Kind.ZERO_ALLOCATED),
    (HOST, 0, 0, Kind.RESERVED),
    (0, 0, 1, Kind.ZERO),
    (0, 0, 0, Kind.UNALLOCATED),
]


@pytest.mark.parametrize("offset, allocated, zero, kind", SUBCLUSTERS)
@pytest.mark.parametrize("index", [0, 13, 31])
def test_one_subcluster_means_what_the_table_says(
    offset: int, allocated: int, zero: int, kind: Kind, index: int
) -> None:
    entry = decode_entry(offset, encode_bitmap(allocated << index, zero << index), EXTENDED)
    others = decode_entry(offset, 0, EXTENDED).kind
    assert [entry.subcluster(i) for i in range(32)] == [kind if i == index else others for i in range(32)]


@pytest.mark.parametrize("offset, allocated, zero, kind", SUBCLUSTERS)
def test_a_cluster_of_equal_subclusters_is_of_their_kind(offset: int, allocated: int, zero: int, kind: Kind) -> None:
    bitmap = encode_bitmap(ALL_SUBCLUSTERS * allocated, ALL_SUBCLUSTERS * zero)
    entry = decode_entry(offset, bitmap, EXTENDED)
    assert entry.kind is kind
    assert list(subcluster_runs(entry, EXTENDED)) == [(0, 32, kind)]


def test_runs_join_equal_neighbours() -> None:
    entry = decode_entry(HOST, encode_bitmap(0b1110, 0b1), EXTENDED)
    assert entry.kind is Kind.MIXED
    assert list(subcluster_runs(entry, EXTENDED)) == [
        (0, 1, Kind.ZERO_ALLOCATED),
        (1, 3, Kind.NORMAL),
        (4, 28, Kind.RESERVED),
    ]


def test_the_zero_flag_means_nothing_in_an_extended_entry() -> None:
    assert decode_entry(HOST | ZERO, encode_bitmap(ALL_SUBCLUSTERS, 0), EXTENDED).kind is Kind.NORMAL
    assert l2_reserved(HOST | ZERO, EXTENDED) == ZERO


CORRUPT = [
    (HOST + 512, 0, PLAIN),
    (HOST + 512 | ZERO, 0, PLAIN),
    (HOST, 1 << 32 | 1, EXTENDED),
    (0, 1, EXTENDED),
    (COPIED, 1, EXTENDED),
    (COMPRESSED | HOST, 1 << 40, EXTENDED),
    (COMPRESSED | 1 << 57, 0, Geometry(9)),
]


@pytest.mark.parametrize("word, bitmap, geometry", CORRUPT)
def test_an_impossible_entry_is_corrupt_and_says_where(word: int, bitmap: int, geometry: Geometry) -> None:
    with pytest.raises(CorruptImage) as caught:
        decode_entry(word, bitmap, geometry, at=4711)
    assert (caught.value.structure, caught.value.offset) == ("L2 table", 4711)
    assert f"{word:#018x}" in str(caught.value)


@pytest.mark.parametrize("index", range(32))
def test_every_subcluster_that_is_both_allocated_and_zero_is_found(index: int) -> None:
    assert bitmap_fault(HOST, 1 << index | 1 << (32 + index))
    assert bitmap_fault(0, 1 << index)
    assert not bitmap_fault(HOST, 1 << index)


def test_a_version_2_image_has_no_zero_flag() -> None:
    with pytest.raises(CorruptImage):
        decode_entry(HOST | ZERO, 0, PLAIN, version=2)


def test_an_image_with_a_data_file_has_no_compressed_clusters() -> None:
    with pytest.raises(CorruptImage):
        decode_entry(COMPRESSED | HOST, 0, PLAIN, data_file=True)


@pytest.mark.parametrize("bit", [*range(1, 9), *range(56, 62)])
def test_reserved_bits_are_shown_and_change_no_meaning(bit: int) -> None:
    assert l2_reserved(HOST | 1 << bit, PLAIN) == 1 << bit
    assert decode_entry(HOST | 1 << bit, 0, PLAIN) == decode_entry(HOST, 0, PLAIN)


def test_a_compressed_entry_may_not_be_copied() -> None:
    assert l2_reserved(COMPRESSED | COPIED | HOST, PLAIN) == COPIED
    assert l2_reserved(COMPRESSED | 0x1FE, PLAIN) == 0


@pytest.mark.parametrize("bits, x, longest", [(9, 61, 1024), (12, 58, 8192), (16, 54, 131072), (21, 49, 1 << 22)])
def test_the_descriptor_of_a_compressed_cluster_is_cut_by_its_size(bits: int, x: int, longest: int) -> None:
    assert compressed_span(COMPRESSED | (1 << 62) - (1 << x), bits) == (0, longest)
    assert compressed_span(COMPRESSED | (1 << x) - 512, bits) == ((1 << x) - 512, 512)


@pytest.mark.parametrize("offset, length", [(0, 0), (-1, 10), (1 << 54, 10), (0, 131073)])
def test_an_impossible_compressed_cluster_is_our_fault(offset: int, length: int) -> None:
    with pytest.raises(InternalError):
        encode_compressed(offset, length, 16)


def test_an_l1_entry_points_at_a_table_or_nowhere() -> None:
    assert l2_table_offset(COPIED | HOST, PLAIN) == HOST
    assert l2_table_offset(0, PLAIN) == 0
    assert l1_reserved(COPIED | HOST | 1 << 56 | 1) == 1 << 56 | 1
    with pytest.raises(CorruptImage):
        l2_table_offset(HOST + 0x200, PLAIN)


@pytest.mark.parametrize("offset", [1, 511, 1 << 56, -512])
def test_an_offset_that_no_entry_can_hold_is_our_fault(offset: int) -> None:
    for encode in (encode_l1, encode_normal):
        with pytest.raises(InternalError):
            encode(offset, copied=False)
    with pytest.raises(InternalError):
        encode_zero(offset)


@pytest.mark.parametrize("allocated, zero", [(1, 1), (1 << 32, 0), (0, 1 << 32)])
def test_an_impossible_bitmap_is_our_fault(allocated: int, zero: int) -> None:
    with pytest.raises(InternalError):
        encode_bitmap(allocated, zero)
