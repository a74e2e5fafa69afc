"""Refcounts of every width, by the specification's packing."""

from __future__ import annotations

import itertools
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import CorruptImage, InternalError
from cowslice.format.geometry import Geometry
from cowslice.format.refcounts import (
    decode_reftable,
    encode_reftable_entry,
    get_refcount,
    last_count,
    pack_refblock,
    refblock_offset,
    reftable_reserved,
    set_refcount,
    unpack_refblock,
    zero_counts,
)
from cowslice.format.words import pack_words, unpack_words

# order, the bytes of counts 1, 0, 1, 1 ... packed by hand
PACKED = [
    (0, b"\x0d", [1, 0, 1, 1, 0, 0, 0, 0]),
    (1, b"\xe4", [0, 1, 2, 3]),
    (2, b"\xf1", [1, 15]),
    (3, b"\x01\xff", [1, 255]),
    (4, b"\x01\x02\x00\x03", [0x102, 3]),
    (5, b"\x01\x02\x03\x04", [0x1020304]),
    (6, b"\x80" + bytes(6) + b"\x01", [(1 << 63) + 1]),
]


@pytest.mark.parametrize("order, raw, counts", PACKED)
def test_counts_are_packed_as_the_specification_says(order: int, raw: bytes, counts: list[int]) -> None:
    assert list(unpack_refblock(raw, order)) == counts
    assert [get_refcount(raw, index, order) for index in range(len(counts))] == counts


@pytest.mark.parametrize("order", range(7))
def test_the_greatest_count_fits_and_one_more_does_not(order: int) -> None:
    block = bytearray(64)
    greatest = Geometry(16, refcount_order=order).max_refcount
    set_refcount(block, 5 if order < 6 else 0, order, greatest)
    assert max(unpack_refblock(block, order)) == greatest
    for value in (greatest + 1, -1):
        with pytest.raises(InternalError):
            set_refcount(block, 0, order, value)


@pytest.mark.parametrize("order", range(3))
def test_counts_that_do_not_fit_are_not_packed(order: int) -> None:
    with pytest.raises(InternalError):
        pack_refblock(array("B", [1 << (1 << order)] + [0] * 7), order)
    with pytest.raises(InternalError):
        pack_refblock(array("B", [0]), order)


def test_counts_of_another_type_are_not_packed() -> None:
    with pytest.raises(InternalError):
        pack_refblock(array("B", [0, 0]), 4)


def test_packing_leaves_the_array_as_it_was() -> None:
    counts = array("H", [1, 2])
    assert pack_refblock(counts, 4) == b"\0\1\0\2"
    assert list(counts) == [1, 2]


def test_a_table_entry_points_at_a_block_or_nowhere() -> None:
    assert refblock_offset(0x20000, Geometry(16)) == 0x20000
    assert refblock_offset(0, Geometry(16)) == 0
    assert refblock_offset(0x20000 | 0x1FF, Geometry(16)) == 0x20000
    assert reftable_reserved(0x20000 | 0x1FF) == 0x1FF
    with pytest.raises(CorruptImage) as caught:
        refblock_offset(0x20200, Geometry(16), at=8)
    assert caught.value.offset == 8


def test_a_whole_table_gives_the_offsets() -> None:
    assert list(decode_reftable(pack_words([0x20000, 0, 0x30001]))) == [0x20000, 0, 0x30000]


def test_a_block_offset_that_no_entry_can_hold_is_our_fault() -> None:
    assert encode_reftable_entry(1 << 63) == 1 << 63
    with pytest.raises(InternalError):
        encode_reftable_entry(0x20001)


def test_a_table_of_broken_length_is_our_fault() -> None:
    with pytest.raises(InternalError):
        unpack_words(bytes(9))


counts_by_chance = st.integers(0, 6).flatmap(lambda order: st.tuples(
    st.just(order),
    st.lists(st.one_of(st.just(0), st.just(0), st.integers(0, (1 << (1 << order)) - 1)), min_size=8, max_size=400)
    .map(lambda counts: counts[: len(counts) // 8 * 8])))


@given(counts_by_chance)
def test_free_runs_and_the_last_count_are_those_of_a_plain_look(drawn: tuple[int, list[int]]) -> None:
    order, counts = drawn
    raw = bytearray((len(counts) << order) // 8)
    for index, count in enumerate(counts):
        set_refcount(raw, index, order, count)
    runs = zero_counts(bytes(raw), order)
    assert [index for start, length in runs for index in range(start, start + length)] == [
        index for index, count in enumerate(counts) if not count]
    assert all(start + length < after for (start, length), (after, _) in itertools.pairwise(runs))
    assert last_count(bytes(raw), order) == max((index for index, count in enumerate(counts) if count), default=-1)
