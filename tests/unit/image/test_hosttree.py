"""What tables refer to, read in bulk, is what their entries say one by one."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import CorruptImage
from cowslice.format.entries import COMPRESSED, COPIED, L2_OFFSET_MASK, ZERO, Kind, decode_entry
from cowslice.format.geometry import Geometry
from cowslice.format.words import pack_words
from cowslice.image.hosttree import Tree, tables_of
from cowslice.storage import MemoryStorage

GEOMETRIES = [Geometry(9), Geometry(12), Geometry(14, extended_l2=True)]


def stored(geometry: Geometry, words: list[int]) -> tuple[MemoryStorage, list[int]]:
    """A file whose second and fourth clusters are L2 tables that begin with these words, and the L1 words."""
    size, step = geometry.cluster_size, geometry.l2_entry_size
    table = b"".join(pack_words([word]).ljust(step, b"\0") for word in words).ljust(size, b"\0")
    return MemoryStorage(bytes(size) + table + bytes(size) + table), [size, 0, 3 * size | COPIED]


@st.composite
def entries(draw: st.DrawFn, geometry: Geometry) -> int:
    cluster = draw(st.integers(0, 1 << 20)) << geometry.cluster_bits
    kind = draw(st.sampled_from(["plain", "copied", "zero", "packed"]))
    if kind == "packed":
        x = 70 - geometry.cluster_bits
        sectors = draw(st.integers(0, (1 << geometry.cluster_bits - 8) - 1))
        return COMPRESSED | sectors << x | draw(st.integers(1, 1 << 30))
    flag = {"plain": 0, "copied": COPIED, "zero": 0 if geometry.extended_l2 else ZERO}[kind]
    return cluster | flag if cluster else 0


def one_by_one(words: list[int], geometry: Geometry) -> list[int]:
    found: list[int] = []
    for word in words:
        entry = decode_entry(word, 0, geometry)
        if entry.host_offset >= 0 and entry.kind is not Kind.UNALLOCATED:
            first = entry.host_offset >> geometry.cluster_bits
            found += range(first, (entry.host_offset + max(entry.length, 1) - 1 >> geometry.cluster_bits) + 1)
    return found


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@given(drawn=st.data())
def test_the_clusters_are_those_of_every_entry_and_of_the_tables(geometry: Geometry, drawn: st.DataObject) -> None:
    words = drawn.draw(st.lists(entries(geometry), max_size=12))
    storage, l1 = stored(geometry, words)
    found = [int(n) for some in tables_of(storage, geometry, l1)
             for clusters in some.clusters(data_file=False) for n in clusters]
    assert sorted(found) == sorted([1, 3, *one_by_one(words, geometry) * 2])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@given(drawn=st.data())
def test_copied_is_set_exactly_where_the_count_is_one_and_nothing_else_changes(
    geometry: Geometry, drawn: st.DataObject
) -> None:
    words = drawn.draw(st.lists(entries(geometry), min_size=1, max_size=12))
    counts = {word & L2_OFFSET_MASK: drawn.draw(st.integers(0, 3)) for word in words}

    def counts_of(clusters: array[int]) -> array[int]:
        return array("Q", [counts[cluster << geometry.cluster_bits] for cluster in clusters])

    storage, l1 = stored(geometry, words)
    for some in tables_of(storage, geometry, l1):
        for offset, content in some.with_copied(counts_of):
            storage.pwrite(offset, content)
    after, _ = stored(geometry, [
        word if word & COMPRESSED else word & ~COPIED | COPIED * (counts[word & L2_OFFSET_MASK] == 1 and word != 0)
        for word in words])
    assert storage.read(0, storage.length()) == after.read(0, after.length())


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@given(drawn=st.data())
def test_copied_is_cleared_everywhere_and_only_tables_that_change_come_out(
    geometry: Geometry, drawn: st.DataObject
) -> None:
    words = drawn.draw(st.lists(entries(geometry), min_size=1, max_size=12))
    storage, l1 = stored(geometry, words)
    cleared = [word if word & COMPRESSED else word & ~COPIED for word in words]
    (some,) = tables_of(storage, geometry, l1)
    changed = list(some.without_copied())
    after, _ = stored(geometry, cleared)
    size = geometry.cluster_size
    assert changed == [(at, after.read(at, size)) for at in (size, 3 * size) if words != cleared]


@pytest.mark.parametrize("word", [513, 1 << 12 | 512])
def test_an_entry_that_points_inside_a_cluster_is_refused(word: int) -> None:
    storage, l1 = stored(Geometry(12), [word & ~1])
    (some,) = tables_of(storage, Geometry(12), l1)
    with pytest.raises(CorruptImage, match="not aligned"):
        list(some.clusters(data_file=False))


def test_beside_a_data_file_only_the_tables_count() -> None:
    storage, l1 = stored(Geometry(12), [COPIED | 1 << 20])
    (some,) = tables_of(storage, Geometry(12), l1)
    assert [found.tolist() for found in some.clusters(data_file=True)] == [[1, 3]]


def test_a_small_tree_is_read_once() -> None:
    storage, l1 = stored(Geometry(12), [1 << 20])
    tree = Tree(storage, Geometry(12), l1)
    list(tree)
    storage.pwrite(4096, bytes(8))
    (some,) = tree
    assert some.content[:8] == (1 << 20).to_bytes(8, "big")
