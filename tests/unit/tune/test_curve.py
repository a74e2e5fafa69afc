"""What a curve counts: which requests look slices up, and what QEMU makes of a size."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from cowslice.errors import BadOption, OutOfRange
from cowslice.format.geometry import Geometry
from cowslice.tune.curve import DISCARD, FLUSH, READ, WRITE, ZERO, curves_for, slice_curves
from cowslice.units import GiB, KiB, MiB

SIZE = 4 * GiB
GEOMETRY = Geometry(16)


def chunk(*requests):
    """One chunk of (operation, offset, length)."""
    operation, offset, length = zip(*requests, strict=True) if requests else ((), (), ())
    return SimpleNamespace(operation=np.array(operation, dtype=np.uint8), offset=np.array(offset, dtype=np.uint64),
                           length=np.array(length, dtype=np.uint64))


def curve_of(*requests, entry_bytes=4096, geometry=GEOMETRY):
    return slice_curves([chunk(*requests)], geometry, disk_size=SIZE).by_entry_bytes[entry_bytes]


def test_there_is_a_curve_for_every_slice_size_from_a_sector_to_the_cluster():
    curves = slice_curves([], GEOMETRY, disk_size=SIZE)
    assert list(curves.by_entry_bytes) == [512 << n for n in range(8)]
    assert [curve.slice_span for curve in curves.by_entry_bytes.values()] == [4 * MiB << n for n in range(8)]


def test_nothing_asked_misses_nothing():
    curve = curve_of()
    assert (curve.accesses, curve.cold, curve.miss_ratio(1 * MiB)) == (0, 0, 0.0)


def test_a_request_looks_up_every_slice_that_it_touches():
    curve = curve_of((READ, 31 * MiB, 66 * MiB))
    assert (curve.reads, curve.cold, curve.touched) == (4, 4, 4)


def test_reads_and_the_rest_are_counted_apart():
    curve = curve_of((READ, 0, 512), (WRITE, 0, 512), (ZERO, 40 * MiB, 512), (READ, 40 * MiB, 512))
    assert (curve.reads, curve.cold_reads, curve.writes, curve.cold_writes) == (2, 1, 2, 1)


def test_a_flush_looks_nothing_up():
    assert slice_curves([chunk((FLUSH, 0, 0), (READ, 0, 0))], GEOMETRY, disk_size=SIZE).requests == 0


def test_a_discard_looks_up_its_whole_clusters_only():
    ragged = (DISCARD, 32 * MiB - 64 * KiB + 1, 64 * KiB + 100)
    whole = (DISCARD, 32 * MiB - 64 * KiB, 128 * KiB)
    tail = (DISCARD, SIZE - 100, 99)
    assert [curve_of(one).accesses for one in (ragged, whole, tail)] == [0, 2, 0]


def test_a_request_beyond_the_disk_is_refused_by_name():
    with pytest.raises(OutOfRange, match=str(SIZE - 511)):
        curve_of((READ, SIZE - 511, 512))
    with pytest.raises(OutOfRange):
        curve_of((READ, 2**64 - 1, 512))


def test_a_disk_without_bytes_is_refused():
    with pytest.raises(BadOption, match="disk_size is 0"):
        slice_curves([], GEOMETRY, disk_size=0)


def test_qemu_has_whole_entries_and_two_at_least():
    curve = curve_of((READ, 0, 512))
    assert [curve.entries_of(size) for size in (0, 4096, 8191, 8192, 12287, 12288)] == [2, 2, 2, 2, 2, 3]


def test_a_warm_cache_has_no_first_touches():
    curve = curve_of(*[(READ, n % 4 * 32 * MiB, 512) for n in range(40)])
    assert [curve.miss_ratio(size) for size in (3 * 4096, 4 * 4096)] == [1.0, 0.1]
    assert [curve.miss_ratio(size, warm=True) for size in (3 * 4096, 4 * 4096)] == [0.9, 0.0]
    assert curve.full_bytes == 4 * 4096


def test_other_clusters_are_answered_in_the_same_pass():
    asked = [chunk(*[(READ, n * 16 * MiB, 512) for n in range(64)])]
    narrow, wide, extended = curves_for(asked, [GEOMETRY, Geometry(18), Geometry(16, True)], disk_size=SIZE)
    assert [c.by_entry_bytes[4096].touched for c in (narrow, wide, extended)] == [32, 8, 64]
