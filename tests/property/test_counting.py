"""One pass over many entries and counts leaves what their plain reading says, one after the other."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.format.entries import COMPRESSED, COPIED
from cowslice.format.words import pack_words
from cowslice.image.counting import Blocks, first_zero, marked, referred, spread
from cowslice.testing import countmodel

SHIFT = 3  # counts in a block
TYPES = ["B", "H", "I", "Q"]
words = st.lists(st.one_of(st.integers(0, 40).map(lambda n: n << 9), st.integers(0, 40).map(lambda n: n << 9 | COPIED),
                           st.integers(0, (1 << 62) - 1).map(lambda n: n | COMPRESSED), st.integers(0, (1 << 64) - 1)),
                 min_size=8, max_size=32).map(lambda found: found[: len(found) // 8 * 8])
clusters = st.lists(st.integers(0, 47), max_size=30)


@given(words, st.sampled_from([1, 2]), st.sampled_from([9, 12, 16, 21]))
def test_entries_refer_to_what_each_says_and_a_crooked_one_is_named(found: list[int], step: int, bits: int) -> None:
    first = found[::step]
    clusters, plain, crooked = referred(pack_words(found), step=step, cluster_bits=bits)
    expected, packed = countmodel.referred(first, bits)
    assert clusters[:plain].tolist() == expected
    assert sorted(clusters[plain:]) == sorted(packed)
    inside = [word & 0x00FFFFFFFFFFFE00 for word in first
              if not word & COMPRESSED and word & 0x00FFFFFFFFFFFE00 & ((1 << bits) - 1)]
    assert crooked == (inside[0] if inside else 0)


@given(words, st.sampled_from([1, 2]), st.data())
def test_copied_stands_where_the_count_is_one(found: list[int], step: int, drawn: st.DataObject) -> None:
    raw = pack_words(found)
    _, plain, _ = referred(raw, step=step, cluster_bits=9)
    known = drawn.draw(st.none() | st.lists(st.integers(0, 3), min_size=plain, max_size=plain))
    counts, expected = iter(known or [0] * plain), list(found)
    for at in range(0, len(found), step):
        counted = not found[at] & COMPRESSED and found[at] & 0x00FFFFFFFFFFFE00
        expected[at] = countmodel.marked(found[at], next(counts) if counted else 0)
    tables = [(row, pack_words(expected[row * 8 :][:8])) for row in range(len(found) // 8)
              if expected[row * 8 :][:8] != found[row * 8 :][:8]]
    assert marked(raw, None if known is None else array("Q", known), step=step, table_bytes=64) == tables


@given(clusters)
def test_clusters_are_spread_over_the_blocks_that_count_them(chosen: list[int]) -> None:
    places, stranger = spread(array("q", chosen), shift=SHIFT, blocks=4)
    known: dict[int, list[int]] = {}
    for cluster in chosen:
        known.setdefault(cluster >> SHIFT, []).append(cluster & 7)
    assert places == [(index, min(known[index]), max(known[index]) + 1) for index in sorted(known) if index < 4]
    assert stranger == next((cluster for cluster in chosen if cluster >> SHIFT >= 4), -1)


@pytest.mark.parametrize("code", TYPES)
@given(drawn=st.data())
def test_counts_change_one_by_one_or_not_at_all(code: str, drawn: st.DataObject) -> None:
    counts = drawn.draw(st.lists(st.integers(0, 3), min_size=48, max_size=48))
    chosen, up = drawn.draw(clusters), drawn.draw(st.booleans())
    limit = drawn.draw(st.sampled_from([3, 1 << 8 * array(code).itemsize]).map(lambda n: min(n, (1 << 64) - 1)))
    # Block 2 is not held: nothing counts its clusters.
    held = [(index, array(code, counts[index * 8 :][:8])) for index in (0, 1, 3, 4, 5)]
    before = {index * 8 + at: count for index, block in held for at, count in enumerate(block)}
    blocks = Blocks(held, shift=SHIFT, width=array(code).itemsize)
    runs, failed = blocks.change(array("q", chosen), up=up, limit=limit)
    after = countmodel.changed(before, chosen, 1 if up else -1, limit)
    now = {index * 8 + at: count for index, block in held for at, count in enumerate(block)}
    if isinstance(after, int):
        assert (runs, failed, now) == ([], after, before)
        return
    assert (failed, now) == (-1, after)
    fell = [cluster for start, count in runs for cluster in range(start, start + count)]
    assert fell == sorted(cluster for cluster in set(chosen) if after[cluster] == 0)
    assert all(start + count < following for (start, count), (following, _) in pairwise(runs))


@pytest.mark.parametrize("code", TYPES)
@given(chosen=clusters)
def test_counts_are_read_where_a_block_is_held(code: str, chosen: list[int]) -> None:
    held = [(index, array(code, range(index * 8, index * 8 + 8))) for index in (1, 2, 4)]
    found = array("Q", [99] * len(chosen))
    Blocks(held, shift=SHIFT, width=array(code).itemsize).read(array("q", chosen), found)
    assert found.tolist() == [cluster if cluster >> SHIFT in (1, 2, 4) else 99 for cluster in chosen]


@given(st.lists(st.integers(0, 2)))
def test_the_first_count_of_zero_is_found(counts: list[int]) -> None:
    assert first_zero(array("Q", counts)) == (counts.index(0) if 0 in counts else -1)
