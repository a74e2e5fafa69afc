"""The bitmap directory and its tables: one bad record spoils itself and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cowslice.errors import BadOption, CorruptImage, InternalError
from cowslice.format.bitmaps import (
    Bitmap,
    BitmapCluster,
    BitmapDirectory,
    BitmapFlags,
    bitmap_table_entries,
    decode_bitmap_directory,
    decode_bitmap_entry,
    decode_bitmap_table,
    dirty_ranges,
    encode_bitmap,
    encode_bitmap_directory,
    encode_bitmap_entry,
)
from cowslice.format.geometry import Geometry
from cowslice.format.words import pack_words

SIZE = 1 << 30
PLAIN = Geometry(16)
ONE = Bitmap(table_offset=0x60000, table_size=1, granularity_bits=16, name=b"one", flags=BitmapFlags.AUTO)
TWO = replace(ONE, name=b"two")


def decoded(*bitmaps: Bitmap, count: int | None = None, rest: bytes = b"") -> BitmapDirectory:
    raw = b"".join(map(encode_bitmap, bitmaps)) + rest
    return decode_bitmap_directory(raw, len(bitmaps) if count is None else count, PLAIN, SIZE, at=0x1000)


UNUSABLE: list[tuple[str, dict[str, Any]]] = [
    ("type", {"type": 2}),
    ("unknown flags", {"flags": BitmapFlags(8)}),
    ("extra data", {"extra": b"abc"}),
    ("name", {"name": b""}),
    ("name", {"name": b"x" * 1024}),
    ("granularity", {"granularity_bits": 8}),
    ("granularity", {"granularity_bits": 255}),
    ("its table is at", {"table_offset": 0}),
    ("its table is at", {"table_offset": 0x60200}),
    ("entries, expected 1 to", {"table_size": 0}),
    ("entries, expected 1 to", {"table_size": 8193}),
    ("ends beyond", {"table_offset": 0xFFFF_FFFF_FFFF_0000}),
    ("needs 1", {"table_size": 2}),
]


@pytest.mark.parametrize("reason, change", UNUSABLE)
def test_a_bad_record_is_kept_with_its_reason_and_the_others_stay_usable(reason: str, change: dict[str, Any]) -> None:
    bad = replace(ONE, **change)
    directory = decoded(bad, TWO)
    assert [bitmap.usable for bitmap in directory.bitmaps] == [False, True]
    assert reason in directory.bitmaps[0].fault
    assert reason in directory.findings[0].message
    assert encode_bitmap_directory(directory) == encode_bitmap(bad) + encode_bitmap(TWO)


def test_two_bitmaps_of_one_name_leave_the_first_usable() -> None:
    assert [bitmap.usable for bitmap in decoded(ONE, ONE).bitmaps] == [True, False]


def test_extra_data_that_may_be_ignored_is_ignored_and_kept() -> None:
    known = replace(ONE, extra=b"abc", flags=BitmapFlags.EXTRA_DATA_COMPATIBLE)
    directory = decoded(known)
    assert directory.bitmaps == (known,)
    assert directory.findings == ()


def test_a_bitmap_in_use_may_have_a_table_for_another_disk_size() -> None:
    (bitmap,) = decoded(replace(ONE, table_size=9, flags=BitmapFlags.IN_USE)).bitmaps
    assert bitmap.usable
    assert bitmap.in_use


def test_a_directory_that_ends_too_soon_keeps_what_is_whole() -> None:
    directory = decoded(ONE, count=2, rest=b"\1" * 10)
    assert (directory.bitmaps, directory.rest) == ((ONE,), b"\1" * 10)
    assert directory.findings[0].offset == 0x1000 + 32


def test_bytes_behind_the_last_record_are_told() -> None:
    directory = decoded(ONE, TWO, count=1)
    assert directory.bitmaps == (ONE,)
    assert directory.rest == encode_bitmap(TWO)
    assert "32 bytes are left" in directory.findings[0].message


def test_a_bitmap_says_its_granularity_in_bytes() -> None:
    assert ONE.granularity == 65536


ENTRIES = [
    (0, BitmapCluster.ALL_ZEROS, 0),
    (1, BitmapCluster.ALL_ONES, 0),
    (0x70000, BitmapCluster.DATA, 0x70000),
]


@pytest.mark.parametrize("word, cluster, offset", ENTRIES)
def test_a_table_entry_means_what_the_specification_says(word: int, cluster: BitmapCluster, offset: int) -> None:
    assert decode_bitmap_entry(word, PLAIN) == (cluster, offset)
    assert encode_bitmap_entry(cluster, offset) == word


@pytest.mark.parametrize("word", [2, 0x100, 0x70001, 0x70200, 1 << 56, 1 << 63])
def test_a_table_with_a_bad_entry_is_corrupt_and_says_where(word: int) -> None:
    with pytest.raises(CorruptImage) as caught:
        decode_bitmap_table(pack_words([0, 1, word]), PLAIN, at=0x1000)
    assert caught.value.offset == 0x1010


def test_a_sound_table_gives_its_words() -> None:
    assert list(decode_bitmap_table(pack_words([0, 1, 0x70000]), PLAIN)) == [0, 1, 0x70000]


@pytest.mark.parametrize("cluster, offset", [(BitmapCluster.DATA, 0), (BitmapCluster.ALL_ONES, 512)])
def test_an_impossible_table_entry_is_our_fault(cluster: BitmapCluster, offset: int) -> None:
    with pytest.raises(InternalError):
        encode_bitmap_entry(cluster, offset)


@pytest.mark.parametrize(
    "size, bits, entries", [(0, 16, 0), (1, 16, 1), (1 << 35, 16, 1), ((1 << 35) + 1, 16, 2)]
)
def test_a_table_covers_the_disk_exactly(size: int, bits: int, entries: int) -> None:
    assert bitmap_table_entries(size, bits, PLAIN) == entries


def test_dirty_ranges_join_across_pieces_and_stop_at_the_disk() -> None:
    assert list(dirty_ranges(b"\xff" * 100, 8, 512, 512 * 500)) == [(8 * 512, 492 * 512)]
    assert list(dirty_ranges(b"\x01", 8, 512, 512)) == []


@pytest.mark.parametrize("change", [{"granularity_bits": 256}, {"name": bytes(65536)}, {"table_offset": -1}])
def test_what_no_record_can_say_is_not_encoded(change: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        encode_bitmap(replace(ONE, **change))


def test_a_directory_that_no_reader_accepts_is_not_encoded() -> None:
    with pytest.raises(BadOption):
        encode_bitmap_directory(BitmapDirectory((), rest=bytes(1024 * 65535 + 1)))
