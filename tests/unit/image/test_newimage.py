"""Host clusters of a file under construction are counted as often as they are used, wherever they end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowslice.errors import BadOption
from cowslice.format.geometry import Geometry
from cowslice.format.header import Header, decode_header
from cowslice.format.refcounts import decode_reftable, get_refcount
from cowslice.image.newimage import Blueprint, NewImage
from cowslice.storage import MemoryStorage
from cowslice.testing import peers


def _counts(storage: MemoryStorage) -> list[int]:
    header = decode_header(storage.read(0, 512))
    geometry = header.geometry
    table = storage.read(header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)
    blocks = [storage.read(offset, geometry.cluster_size) for offset in decode_reftable(table) if offset]
    return [get_refcount(block, index, geometry.refcount_order) for block in blocks
            for index in range(geometry.refblock_entries)]


@settings(max_examples=60, deadline=None)
@given(
    order=st.integers(0, 6),
    steps=st.lists(st.one_of(st.integers(1, 300), st.lists(st.integers(1, 511), min_size=1, max_size=40)), max_size=12),
)
def test_every_cluster_is_counted_once_for_each_use(order: int, steps: list[int | list[int]]) -> None:
    storage, geometry = MemoryStorage(), Geometry(9, refcount_order=order)
    image = NewImage(storage, Blueprint(header=Header(cluster_bits=9, refcount_order=order, size=1024, l1_size=1)))
    uses: dict[int, int] = {}
    streams: list[tuple[int, int]] = []
    for step in steps:
        if isinstance(step, int):
            first = image.take(step)
            found = range(first, first + step)
            assert not uses.keys() & set(found)
            uses.update(dict.fromkeys(found, 1))
            continue
        for offset, length in zip(image.take_bytes(step), step, strict=True):
            streams.append((offset, offset + length))
            for cluster in range(offset >> 9, (offset + length - 1 >> 9) + 1):
                uses[cluster] = uses.get(cluster, 0) + 1
    table = image.take(1)
    image.link(0, table, bytes(512))
    image.finish(sync=False)
    streams.sort()
    assert all(before[1] <= after[0] for before, after in pairwise(streams))
    assert max(uses.values(), default=0) <= geometry.max_refcount
    counts = _counts(storage)
    assert {cluster: counts[cluster] for cluster in uses} == uses
    assert set(counts) <= {0, 1, *uses.values()}


def test_more_than_can_be_counted_is_refused() -> None:
    header = Header(cluster_bits=9, refcount_order=6, size=1024, l1_size=1)
    image = NewImage(MemoryStorage(), Blueprint(header=header))
    with pytest.raises(BadOption, match="cannot count"):
        image.take(64 * (8 << 20) // 8 + 1)


@peers.needs("qemu-img")
@pytest.mark.parametrize("order", range(7))
def test_a_table_that_outgrows_its_place_moves_to_the_end(tmp_path: Path, order: int) -> None:
    storage = MemoryStorage()
    image = NewImage(storage, Blueprint(header=Header(cluster_bits=9, refcount_order=order, size=1024, l1_size=1)))
    table = image.take(1)
    image.take(65 * image.geometry.refblock_entries)
    image.link(0, table, bytes(512))
    image.finish()
    path = tmp_path / "disk.qcow2"
    path.write_bytes(storage.read(0, storage.length()))
    checked = peers.qemu_img_json("check", path, expect=3)
    assert "corruptions" not in checked
    assert checked["leaks"] == 65 * image.geometry.refblock_entries
