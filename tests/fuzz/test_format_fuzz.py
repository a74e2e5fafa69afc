"""Almost-right and random bytes into every decoder: only ImageErrors come out, and what is read can be written."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowslice.errors import CorruptImage, ImageError
from cowslice.format.bitmaps import decode_bitmap_directory, decode_bitmap_table, encode_bitmap, encode_bitmap_directory
from cowslice.format.extensions import decode_extensions
from cowslice.format.findings import raise_first
from cowslice.format.first_cluster import (
    decode_first_cluster,
    encode_first_cluster,
    first_cluster_length,
    inspect_first_cluster,
)
from cowslice.format.geometry import Geometry
from cowslice.format.header import Header, Incompatible, decode_header, encode_header, inspect_header
from cowslice.format.limits import MAX_FINDINGS
from cowslice.format.refcounts import refblock_offset
from cowslice.format.snapshots import decode_snapshot_table, encode_snapshot_table, snapshot_findings
from cowslice.testing import strategies
from cowslice.units import MiB

_ALMOST = strategies.first_clusters().flatmap(lambda first: strategies.mutated(encode_first_cluster(first)))
_FIRST_CLUSTERS = st.one_of(_ALMOST, st.binary(max_size=600).map(lambda rest: b"QFI\xfb\0\0\0\3" + rest))
_SNAPSHOTS = st.lists(strategies.snapshots(), min_size=1, max_size=3).map(encode_snapshot_table)
_DIRECTORIES = st.lists(strategies.bitmaps(Geometry(16), 1 << 30), min_size=1, max_size=3).map(
    lambda bitmaps: b"".join(map(encode_bitmap, bitmaps))
)


@given(_FIRST_CLUSTERS)
def test_a_hostile_header_is_refused_or_survives_its_bytes(raw: bytes) -> None:
    try:
        header = decode_header(raw)
    except ImageError:
        return
    assert decode_header(encode_header(header)) == header


@given(_FIRST_CLUSTERS)
def test_a_hostile_first_cluster_is_refused_or_survives_its_bytes(raw: bytes) -> None:
    try:
        first = decode_first_cluster(raw)
    except ImageError:
        return
    assert decode_first_cluster(encode_first_cluster(first)) == first


@given(_FIRST_CLUSTERS, st.integers(0, 1 << 40))
def test_an_inspection_never_raises_and_agrees_with_the_strict_decoder(raw: bytes, file_length: int) -> None:
    first, findings = inspect_first_cluster(raw, file_length=file_length)
    refused = any(finding.fatal for finding in findings)
    assert refused or first is not None
    try:
        decode_first_cluster(raw)
    except ImageError:
        assert refused
    else:
        assert not refused


@given(_FIRST_CLUSTERS)
def test_every_message_is_one_printable_line(raw: bytes) -> None:
    assert all(finding.message.isprintable() for finding in inspect_first_cluster(raw, file_length=0)[1])


@given(_FIRST_CLUSTERS)
def test_the_views_of_a_hostile_first_cluster_do_not_raise(raw: bytes) -> None:
    first, findings = inspect_first_cluster(raw)
    if first is not None and not any(finding.fatal for finding in findings):
        assert first.header.geometry.l1_entries(first.header.size) <= first.header.l1_size
        assert b"\0" not in (first.backing_name or b"") + (first.data_file_name or b"")
        assert len(first.backing_format or "") < 16


@given(st.binary(max_size=512))
def test_the_length_to_read_is_that_of_a_cluster(raw: bytes) -> None:
    assert first_cluster_length(b"QFI\xfb\0\0\0\3" + raw) in {1 << bits for bits in range(9, 22)}


@given(st.binary(max_size=300), st.integers(0, 300), st.integers(0, 400))
def test_hostile_extensions_are_refused_or_lie_inside_their_room(raw: bytes, start: int, end: int) -> None:
    try:
        extensions = decode_extensions(raw, start, end)
    except ImageError:
        return
    assert sum(8 + len(extension.payload) for extension in extensions) <= max(end - start, 0)


@given(st.one_of(_SNAPSHOTS.flatmap(strategies.mutated), st.binary(max_size=200)), st.integers(0, 1 << 20))
def test_a_hostile_snapshot_table_is_refused_or_survives_its_bytes(raw: bytes, count: int) -> None:
    count = min(count, 5)
    try:
        snapshots = decode_snapshot_table(raw, count)
    except ImageError:
        return
    assert decode_snapshot_table(encode_snapshot_table(snapshots), count) == snapshots
    for snapshot in snapshots:
        assert all(finding.message.isprintable() for finding in snapshot_findings(snapshot, Geometry(16)))


@given(
    st.one_of(_DIRECTORIES.flatmap(strategies.mutated), st.binary(max_size=200)),
    st.integers(0, 5),
    strategies.geometries(),
    st.integers(0, (1 << 64) - 1),
)
def test_a_hostile_bitmap_directory_never_raises_and_keeps_its_records(
    raw: bytes, count: int, geometry: Geometry, size: int
) -> None:
    directory = decode_bitmap_directory(raw, count, geometry, size)
    raise_first(directory.findings)
    assert len(directory.bitmaps) <= count
    again = decode_bitmap_directory(encode_bitmap_directory(directory), count, geometry, size)
    assert again.bitmaps == directory.bitmaps


@given(st.binary(max_size=64).map(lambda raw: raw[: len(raw) // 8 * 8]), strategies.geometries())
def test_a_hostile_bitmap_table_is_refused_or_read(raw: bytes, geometry: Geometry) -> None:
    try:
        words = decode_bitmap_table(raw, geometry)
    except CorruptImage:
        return
    assert len(words) == len(raw) // 8


@given(st.integers(0, (1 << 64) - 1), strategies.geometries())
def test_a_hostile_refcount_table_entry_is_refused_or_aligned(word: int, geometry: Geometry) -> None:
    try:
        offset = refblock_offset(word, geometry)
    except CorruptImage:
        return
    assert geometry.is_aligned(offset)


_CLUSTER = 2 * MiB
_ROOM = _CLUSTER - 112
_BOMBS = {
    "many empty unknown extensions": b"\0\0\0\1\0\0\0\0" * (_ROOM // 8),
    "many duplicates of a known one": b"\xe2\x79\x2a\xca\0\0\0\0" * (_ROOM // 8),
    "one that fills the cluster": b"\0\0\0\1" + (_ROOM - 8).to_bytes(4, "big") + b"\x1b" * (_ROOM - 8),
    "a feature table that fills it": b"\x68\x03\xf8\x57" + (_ROOM - 8).to_bytes(4, "big") + b"\0\x1b" * (_ROOM // 2),
}


@pytest.mark.parametrize("bomb", _BOMBS)
def test_a_first_cluster_full_of_extensions_costs_bounded_memory(bomb: str) -> None:
    header = Header(cluster_bits=21, refcount_table_offset=_CLUSTER, refcount_table_clusters=1,
                    incompatible=Incompatible(1 << 40))  # fmt: skip
    raw = encode_header(header) + _BOMBS[bomb]
    tracemalloc.start()
    try:
        _, findings = inspect_first_cluster(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(findings) <= MAX_FINDINGS + 2
    assert peak < 16 * MiB


def test_many_snapshots_cost_what_they_take_on_disk() -> None:
    raw = bytes(40) * 65536
    assert len(decode_snapshot_table(raw, 65536)) == 65536


@pytest.mark.long
@settings(max_examples=5000, derandomize=True)
@given(st.binary(max_size=4096))
def test_noise_behind_a_magic_never_raises(raw: bytes) -> None:
    inspect_header(b"QFI\xfb\0\0\0\2" + raw)
    inspect_first_cluster(b"QFI\xfb\0\0\0\3" + raw, file_length=len(raw))


@pytest.mark.long
@settings(max_examples=5000, derandomize=True)
@given(_ALMOST)
def test_a_long_campaign_of_almost_right_first_clusters_agrees_with_itself(raw: bytes) -> None:
    try:
        first = decode_first_cluster(raw)
    except ImageError:
        assert any(finding.fatal for finding in inspect_first_cluster(raw)[1])
        return
    assert decode_first_cluster(encode_first_cluster(first)) == first
