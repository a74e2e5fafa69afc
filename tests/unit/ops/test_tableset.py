"""A set of tables merges what names the same one, stays sorted, and keeps the lowest when there are too many."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cowslice.format.words import pack_words
from cowslice.ops.l2scan import stretches
from cowslice.ops.tableset import TableSet

SIZE = 4096
entries = st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=60)


def made(words: list[int], *, low: int = 0, most: int = 1000, active: bool = True, times: int = 1) -> TableSet:
    tables = TableSet(low, most, 9)
    tables.add(pack_words(words), place=100, times=times, active=times if active else 0, cluster_bits=12)
    tables.finish()
    return tables


@given(named=entries)
def test_a_table_is_there_once_with_how_often_it_is_named(named: list[tuple[int, bool]]) -> None:
    tables = made([offset * 512 | copied << 63 for offset, copied in named])
    times = Counter(offset for offset, copied in named if offset or copied)
    copied = Counter(offset for offset, copied in named if copied)
    assert [tables[n][0] for n in range(len(tables))] == [offset * 512 for offset in sorted(times)]
    for n in range(len(tables)):
        offset, place, active, flagged, count = tables[n]
        first = next(i for i, (sector, flag) in enumerate(named) if sector * 512 == offset and (sector or flag))
        assert (active, flagged, count, place) == (
            times[offset // 512], copied[offset // 512], times[offset // 512], 100 + first)


@given(offsets=st.lists(st.integers(1, 3000), max_size=3000), most=st.integers(1, 50))
def test_sets_that_hold_few_tables_show_all_of_them_in_turn(offsets: list[int], most: int) -> None:
    shown, low = [], 0
    while low < 1 << 56:
        tables = made([offset * 512 for offset in offsets], low=low, most=most)
        assert len(tables) <= most
        shown += [(tables[n][0] // 512, tables[n][4]) for n in range(len(tables))]
        low = tables.high
    assert shown == sorted(Counter(offsets).items())


def test_odd_entries_are_told_up_to_a_number_and_then_counted() -> None:
    tables = TableSet(0, 100, 1)
    words = pack_words([4096, 4096 | 1, 512 | 1, 512])
    assert tables.add(words, place=0, times=2, active=0, cluster_bits=12) == [1]
    assert tables.faults == 2 * (2 + 1)


@given(offsets=st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_stretches_of_overlapping_tables_count_every_byte_as_often_as_tables_cover_it(offsets: list[int]) -> None:
    tables = made([offset * 512 | 1 << 63 for offset in offsets])
    shown, low = Counter[int](), 0
    while low < len(tables):
        high = tables.chain(low, SIZE)
        for stretch in stretches(tables, low, high, SIZE):
            shown.update(dict.fromkeys(range(stretch.start // 512, stretch.end // 512), stretch.times))
            assert stretch.active == stretch.times
        low = high
    assert shown == Counter(sector for offset in offsets for sector in range(offset, offset + 8))
