"""The size of a packed map is that of its slices one by one, and of a large map an even sample tells it nearly."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowslice.cache.packing import PackedSlice
from cowslice.ops.layout import write_populated_image
from cowslice.ops.mapsize import measure_map_size
from cowslice.ops.references import read_first_cluster
from cowslice.storage.file import FileStorage


@pytest.fixture(params=["sequential", "random"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> FileStorage:
    write_populated_image(tmp_path / "disk.qcow2", size=64 << 20, cluster_bits=13, layout=request.param)
    return FileStorage(tmp_path / "disk.qcow2")


def test_every_slice_counts_with_its_directory_word(disk: FileStorage) -> None:
    header = read_first_cluster(disk).header
    found = measure_map_size(disk, header)
    words = disk.read(header.l1_table_offset, header.l1_size * 8)
    expected = 0
    for at in range(0, len(words), 8):
        table = disk.read(int.from_bytes(words[at : at + 8], "big") & 0x00FFFFFFFFFFFE00, 8192)
        for start in range(0, 8192, 4096):
            expected += PackedSlice(table[start : start + 4096], 13).payload_bytes + 8
    assert (found.tables, found.raw, found.packed, found.exact) == (8, 65536, expected, True)


def test_a_sample_is_near_the_whole(disk: FileStorage) -> None:
    header = read_first_cluster(disk).header
    whole = measure_map_size(disk, header)
    sample = measure_map_size(disk, header, budget=5)
    assert not sample.exact
    assert sample.raw == whole.raw
    assert abs(sample.packed - whole.packed) <= whole.packed // 4
