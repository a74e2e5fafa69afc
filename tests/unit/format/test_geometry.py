"""The sizes that follow from a header, against figures that were worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.format.geometry import Geometry
from cowslice.format.limits import MAX_L1_ENTRIES
from cowslice.testing import strategies
from cowslice.units import GiB, KiB, MiB, TiB

# cluster_bits, L2 entries, guest bytes of one L2 table, largest disk, host bytes of one 16-bit refcount block
_FIGURES = [
    (9, 64, 32 * KiB, 128 * GiB, 128 * KiB),
    (12, 512, 2 * MiB, 8 * TiB, 8 * MiB),
    (16, 8192, 512 * MiB, 2048 * TiB, 2 * GiB),
    (18, 32768, 8 * GiB, 32768 * TiB, 32 * GiB),
    (21, 262144, 512 * GiB, 2 * 1024 * 1024 * TiB, 2 * TiB),
]


@pytest.mark.parametrize("bits, entries, span, largest, refblock_span", _FIGURES)
def test_the_figures_of_a_cluster_size(bits: int, entries: int, span: int, largest: int, refblock_span: int) -> None:
    geometry = Geometry(bits)
    assert (geometry.l2_entries, geometry.l2_span, geometry.refblock_span) == (entries, span, refblock_span)
    assert geometry.l1_entries(largest) == MAX_L1_ENTRIES


@pytest.mark.parametrize("bits", range(14, 22))
def test_extended_l2_halves_the_entries_and_the_span(bits: int) -> None:
    plain, extended = Geometry(bits), Geometry(bits, extended_l2=True)
    assert (extended.l2_entries * 2, extended.l2_span * 2) == (plain.l2_entries, plain.l2_span)
    assert (extended.subclusters, extended.subcluster_size) == (32, (1 << bits) // 32)


@given(strategies.geometries())
def test_one_l2_table_and_one_refcount_block_fill_a_cluster(geometry: Geometry) -> None:
    assert geometry.l2_entries * geometry.l2_entry_size == geometry.cluster_size
    assert geometry.refblock_entries * geometry.refcount_bits == geometry.cluster_size * 8


@given(strategies.geometries(), st.integers(0, (1 << 62)))
def test_the_indices_of_a_guest_offset_give_it_back(geometry: Geometry, offset: int) -> None:
    table = geometry.l1_index(offset) * geometry.l2_span
    cluster = table + geometry.l2_index(offset) * geometry.cluster_size
    assert cluster + geometry.in_cluster(offset) == offset
    start = cluster + geometry.subcluster_index(offset) * geometry.subcluster_size
    assert 0 <= offset - start < geometry.subcluster_size


@given(strategies.geometries(), st.integers(1, 1 << 62))
def test_the_last_byte_of_a_disk_has_the_last_l1_entry(geometry: Geometry, size: int) -> None:
    assert geometry.l1_index(size - 1) == geometry.l1_entries(size) - 1
