"""What a map says of its own presence: shares of slices by place, which must add up to single looks."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.cache.slicemap import SliceCache, SliceMap
from cowslice.errors import BadOption
from cowslice.storage.memory import MemoryStorage

BITS = 16
SLICE = 512  # clusters under a slice of 4 KiB
TABLE = 8192  # under an L2 table


def open_map(slices: int) -> SliceMap:
    clusters = slices * SLICE
    tables = -(-clusters // TABLE)
    l1 = struct.pack(f">{tables}Q", *((n + 1) << BITS for n in range(tables)))
    storage = MemoryStorage(bytes((tables + 1) << BITS))
    return SliceMap(
        SliceCache(1 << 20), cluster_bits=BITS, extended_l2=False, l1=l1, clusters=clusters, entry_bytes=4096,
        storage=storage, readahead=False,
    )  # fmt: skip


def shares(present: set[int], slices: int, cells: int) -> bytes:
    """The obvious twin: a cell shows the slices that begin in it, a narrow one the slice that it lies in."""
    found = []
    for cell in range(cells):
        begin = cell * slices // cells
        inside = range(begin, max((cell + 1) * slices // cells, begin + 1))
        found.append(sum(n in present for n in inside) * 255 // len(inside))
    return bytes(found)


@given(st.integers(1, 200), st.integers(1, 500), st.data())
def test_the_shares_are_those_of_the_slices_that_were_looked_at(slices: int, cells: int, data: st.DataObject) -> None:
    present = data.draw(st.sets(st.integers(0, slices - 1)))
    one = open_map(slices)
    for number in present:
        one.lookup(number * SLICE)
    assert one.residency(cells) == shares(present, slices, cells)


def test_looking_is_not_a_hit() -> None:
    one = open_map(3)
    one.residency(10)
    assert one.cache.statistics()["hits"] == 0


def test_a_map_of_nothing_has_nothing_in_memory() -> None:
    assert open_map(0).residency(4) == bytes(4)


@pytest.mark.parametrize("cells", [0, (1 << 20) + 1])
def test_an_impossible_number_of_parts_is_refused(cells: int) -> None:
    with pytest.raises(BadOption, match="cells"):
        open_map(1).residency(cells)
