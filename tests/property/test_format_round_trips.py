"""Whatever the format can say survives a trip through its bytes, in both directions."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import CorruptImage
from cowslice.format.bitmaps import (
    Bitmap,
    BitmapDirectory,
    decode_bitmap_directory,
    dirty_ranges,
    encode_bitmap_directory,
)
from cowslice.format.entries import (
    Entry,
    Kind,
    compressed_span,
    decode_entry,
    encode_compressed,
    encode_entry,
    encode_l1,
    l2_table_offset,
    subcluster_runs,
)
from cowslice.format.extensions import Extension, decode_extensions, encode_extensions
from cowslice.format.first_cluster import FirstCluster, decode_first_cluster, encode_first_cluster
from cowslice.format.geometry import Geometry
from cowslice.format.header import Header, decode_header, encode_header
from cowslice.format.refcounts import get_refcount, pack_refblock, set_refcount, unpack_refblock
from cowslice.format.snapshots import Snapshot, decode_snapshot_table, encode_snapshot_table, unpack_snapshots
from cowslice.testing import strategies


@given(strategies.headers())
def test_a_header_survives_its_bytes(header: Header) -> None:
    assert decode_header(encode_header(header)) == header


@given(strategies.headers())
def test_a_header_takes_the_bytes_it_says(header: Header) -> None:
    assert len(encode_header(header)) == header.header_length


@given(strategies.first_clusters())
def test_a_first_cluster_survives_its_bytes(first: FirstCluster) -> None:
    assert decode_first_cluster(encode_first_cluster(first)) == first


@given(strategies.first_clusters(), st.binary(max_size=64))
def test_bytes_behind_the_used_part_change_nothing(first: FirstCluster, noise: bytes) -> None:
    room = (1 << first.header.cluster_bits) - len(encode_first_cluster(first))
    assert decode_first_cluster(encode_first_cluster(first) + noise[:room]) == first


@given(st.lists(strategies.unknown_extensions(), max_size=6), st.integers(0, 40))
def test_unknown_extensions_keep_bytes_and_order(extensions: list[Extension], start: int) -> None:
    data = bytes(start) + encode_extensions(extensions)
    assert list(decode_extensions(data, start, len(data) + 100)) == extensions


@given(strategies.geometries().flatmap(lambda g: st.tuples(st.just(g), strategies.l2_words(g))))
def test_l2_words_survive_their_meaning(case: tuple[Geometry, tuple[int, int]]) -> None:
    geometry, (word, bitmap) = case
    entry = decode_entry(word, bitmap, geometry)
    assert encode_entry(entry, geometry) == (word, bitmap)


@given(strategies.geometries(extended_l2=True).flatmap(lambda g: st.tuples(st.just(g), strategies.l2_words(g))))
def test_subcluster_runs_cover_the_cluster_and_neighbours_differ(case: tuple[Geometry, tuple[int, int]]) -> None:
    geometry, (word, bitmap) = case
    entry = decode_entry(word, bitmap, geometry)
    runs = list(subcluster_runs(entry, geometry))
    kinds = [kind for _, count, kind in runs for _ in range(count)]
    assert kinds == [entry.subcluster(index) for index in range(32)]
    assert all(a[2] is not b[2] for a, b in itertools.pairwise(runs))


@given(strategies.geometries(), st.integers(0, 1 << 48), st.data())
def test_a_compressed_descriptor_covers_its_stream_to_the_end_of_the_last_sector(
    geometry: Geometry, place: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, geometry.cluster_size))
    offset, span = compressed_span(encode_compressed(place, length, geometry.cluster_bits), geometry.cluster_bits)
    assert offset == place
    assert length <= span < length + 512
    assert (offset + span) % 512 == 0


@given(strategies.geometries().flatmap(lambda g: st.tuples(st.just(g), strategies.host_offsets(g))), st.booleans())
def test_an_l1_entry_survives(case: tuple[Geometry, int], copied: bool) -> None:
    geometry, offset = case
    assert l2_table_offset(encode_l1(offset, copied=copied), geometry) == offset


@given(strategies.geometries(), strategies.hostile_l2_words(), st.sampled_from((2, 3)), st.booleans())
def test_any_words_are_an_entry_or_corrupt(
    geometry: Geometry, words: tuple[int, int], version: int, data_file: bool
) -> None:
    try:
        entry = decode_entry(*words, geometry, version=version, data_file=data_file)
    except CorruptImage:
        return
    assert isinstance(entry, Entry)
    assert (entry.host_offset >= 0) == (entry.length > 0)
    assert (entry.kind is Kind.COMPRESSED) == bool(words[0] >> 62 & 1)


@given(st.integers(0, 6), st.binary(min_size=64, max_size=64))
def test_a_refcount_block_survives_its_array(order: int, block: bytes) -> None:
    assert pack_refblock(unpack_refblock(block, order), order) == block


@given(st.integers(0, 6), st.binary(min_size=64, max_size=64))
def test_one_count_and_the_whole_block_agree(order: int, block: bytes) -> None:
    counts = unpack_refblock(block, order)
    assert list(counts) == [get_refcount(block, index, order) for index in range(512 >> order)]


@given(st.integers(0, 6), st.binary(min_size=64, max_size=64), st.data())
def test_setting_a_count_changes_only_that_one(order: int, block: bytes, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, (512 >> order) - 1))
    value = data.draw(st.integers(0, (1 << (1 << order)) - 1))
    changed = bytearray(block)
    set_refcount(changed, index, order, value)
    expected = unpack_refblock(block, order)
    expected[index] = value
    assert unpack_refblock(changed, order) == expected


@given(st.lists(strategies.snapshots(), max_size=5))
def test_snapshots_survive_their_table(snapshots: list[Snapshot]) -> None:
    table = encode_snapshot_table(snapshots)
    assert list(decode_snapshot_table(table, len(snapshots))) == snapshots
    assert len(table) == sum(snapshot.encoded_length for snapshot in snapshots)


@given(st.lists(strategies.snapshots(), min_size=1, max_size=4), st.data())
def test_a_piece_of_a_snapshot_table_gives_its_whole_records(snapshots: list[Snapshot], data: st.DataObject) -> None:
    table = encode_snapshot_table(snapshots)
    cut = data.draw(st.integers(0, len(table)))
    found, used, findings = unpack_snapshots(table[:cut], len(snapshots))
    assert list(found) == snapshots[: len(found)]
    assert used <= cut
    assert not findings


@given(strategies.geometries(), st.integers(1, 1 << 40), st.data())
def test_a_bitmap_directory_survives_its_bytes(geometry: Geometry, size: int, data: st.DataObject) -> None:
    bitmaps = data.draw(st.lists(strategies.bitmaps(geometry, size), max_size=4, unique_by=lambda b: b.name))
    raw = encode_bitmap_directory(BitmapDirectory(tuple(bitmaps)))
    directory = decode_bitmap_directory(raw, len(bitmaps), geometry, size)
    assert [b for b in directory.bitmaps if "table has" not in b.fault] == [b for b in bitmaps if _fits(b, geometry)]
    assert encode_bitmap_directory(directory) == raw


def _fits(bitmap: Bitmap, geometry: Geometry) -> bool:
    return 1 <= bitmap.table_size <= (512 << 20) >> geometry.cluster_bits


@given(st.binary(max_size=400), st.integers(1, 3), st.integers(0, 1 << 40), st.integers(0, 40))
def test_bad_records_of_a_bitmap_directory_are_kept_byte_for_byte(
    raw: bytes, count: int, size: int, extra: int
) -> None:
    geometry = Geometry(16)
    directory = decode_bitmap_directory(raw + bytes(extra), count, geometry, size)
    again = decode_bitmap_directory(encode_bitmap_directory(directory), count, geometry, size)
    assert [b.fault for b in again.bitmaps] == [b.fault for b in directory.bitmaps]
    assert again.rest == directory.rest


@given(st.binary(max_size=200), st.integers(0, 100), st.integers(0, 2000))
def test_dirty_ranges_are_the_set_bits(data: bytes, first: int, size: int) -> None:
    bits = {first + i for i in range(len(data) * 8) if data[i // 8] >> i % 8 & 1}
    covered = [byte for start, length in dirty_ranges(data, first, 7, size) for byte in range(start, start + length)]
    assert covered == [byte for byte in range(size) if byte // 7 in bits]


@given(st.binary(max_size=300))
def test_dirty_ranges_never_touch(data: bytes) -> None:
    ranges = list(dirty_ranges(data, 0, 1, 1 << 20))
    assert all(start + length < following for (start, length), (following, _) in itertools.pairwise(ranges))
