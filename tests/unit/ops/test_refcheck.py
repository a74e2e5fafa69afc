"""The compiled count of references equals the plain one, entry for entry."""

from __future__ import annotations

import struct
from array import array
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cowslice.format.entries import COMPRESSED, L2_OFFSET_MASK
from cowslice.format.geometry import Geometry
from cowslice.format.refcounts import get_refcount, pack_refblock, set_refcount, unpack_refblock
from cowslice.ops.claimscan import claims
from cowslice.ops.l2rules import EntryRules, judge_entry
from cowslice.ops.refcheck import SATURATED, UNREADABLE, Owners, Tally
from cowslice.testing.tally import Counted, count_entries, count_span

CLUSTERS = 12  # host clusters of the file in these tests
BITS = 14


@st.composite
def words(draw: st.DrawFn) -> int:
    """L2 entries, mostly right: aligned or compressed places near the file, flags, now and then stray bits."""
    kind = draw(st.sampled_from(["none", "normal", "normal", "compressed", "noise"]))
    if kind == "none":
        return draw(st.sampled_from([0, 1, 1 << 63]))
    if kind == "noise":
        return draw(st.integers(0, (1 << 64) - 1))
    copied = draw(st.booleans()) << 63
    if kind == "normal":
        return copied | draw(st.integers(0, CLUSTERS + 1)) << BITS | draw(st.sampled_from([0, 0, 0, 1, 512]))
    sectors = draw(st.integers(0, (1 << (BITS - 8)) - 1))
    stray = draw(st.sampled_from([0, 0, 0, 1])) << 63
    return stray | 1 << 62 | sectors << (70 - BITS) | draw(st.integers(0, (CLUSTERS << BITS) + 100))


bitmaps = st.sampled_from([0, 0, 0xFFFFFFFF, 0xFFFFFFFF00000000, 0xFFFF0000FFFF, 0x1_0000_0001, 3])


@given(
    entries=st.lists(st.tuples(words(), bitmaps), max_size=40), extended=st.booleans(), data_file=st.booleans(),
    active=st.booleans(), shared=st.booleans(), limit=st.sampled_from([1, 3, 65535]),
    stored=st.lists(st.sampled_from([0, 1, 1, 2]), min_size=CLUSTERS, max_size=CLUSTERS),
    shortfall=st.sampled_from([0, 1, 511, (1 << BITS) - 1]),
)  # fmt: skip
def test_a_scanned_table_and_its_judged_rest_count_as_the_model_counts(
    entries: list[tuple[int, int]], extended: bool, data_file: bool, active: bool, shared: bool, limit: int,
    stored: list[int], shortfall: int,
) -> None:
    entries = entries if extended else [(word, 0) for word, _ in entries]
    length = (CLUSTERS << BITS) - shortfall
    rules = EntryRules(Geometry(BITS, extended), data_file, active, length)
    expected = count_entries(entries, rules, dict(enumerate(stored)), limit)
    tally = Tally(0, CLUSTERS + 1, limit)
    tally.load(0, pack_refblock(array("H", stored), 4), 4)
    odd, overflowed, allocated, compressed, fragmented, _ = tally.scan(
        _table(entries, extended), cluster_bits=BITS, extended=extended, data_file=data_file, file_length=length,
        active=active, shared=shared)
    overflows = sum(count for _, _, count in overflowed)
    for index in odd:
        verdict = judge_entry(*entries[index], rules, lambda cluster: dict(enumerate(stored)).get(cluster, 0))
        if verdict.span:
            first, last = verdict.span[0] >> BITS, (sum(verdict.span) - 1) >> BITS
            overflows += tally.add(first, last - first + 1)[0]
    assert set(expected.faulty) <= set(odd)
    assert [tally.get(k)[1] for k in range(CLUSTERS + 1)] == [expected.references[k] for k in range(CLUSTERS + 1)]
    assert overflows == expected.overflows
    assert (allocated, compressed) == (expected.allocated, expected.compressed)
    assert fragmented == expected.fragmented


@given(
    entries=st.lists(st.tuples(words(), bitmaps), max_size=40), extended=st.booleans(), data_file=st.booleans(),
    copied=st.integers(0, 3), others=st.integers(0, 3), limit=st.sampled_from([1, 3, 65535]),
    stored=st.lists(st.sampled_from([0, 1, 1, 2]), min_size=CLUSTERS, max_size=CLUSTERS),
    shortfall=st.sampled_from([0, 1, 511, (1 << BITS) - 1]), window=st.integers(1, CLUSTERS + 1),
)  # fmt: skip
def test_what_is_judged_without_a_word_counts_as_the_plain_rules_do(
    entries: list[tuple[int, int]], extended: bool, data_file: bool, copied: int, others: int, limit: int,
    stored: list[int], shortfall: int, window: int,
) -> None:
    entries = entries if extended else [(word, 0) for word, _ in entries]
    # The flag of an unaligned entry in cluster 0 needs a count that other windows leave to the caller.
    assume(not any(0 < word & L2_OFFSET_MASK < 1 << BITS and not word & COMPRESSED for word, _ in entries))
    length, times = (CLUSTERS << BITS) - shortfall, copied + others
    counts = dict(enumerate(stored))
    references, faults = Counter[int](), 0
    for active, visits in ((False, others), (True, copied)):
        rules = EntryRules(Geometry(BITS, extended), data_file, active, length)
        for entry in entries * visits:
            verdict = judge_entry(*entry, rules, lambda cluster: counts.get(cluster, 0))
            faults += len(verdict.faults)
            found = Counted()
            count_span(found, verdict, rules, 9)
            references += found.references
    expected = [min(references[k], limit) for k in range(CLUSTERS + 1)]
    shown = []
    for first in range(0, CLUSTERS + 1, window):
        tally = Tally(first, min(window, CLUSTERS + 1 - first), limit)
        tally.load(0, pack_refblock(array("H", stored), 4), 4)
        odd, overflowed, _, _, _, told = tally.scan(
            _table(entries, extended), cluster_bits=BITS, extended=extended, data_file=data_file, file_length=length,
            active=copied > 0, shared=False, times=times, visits=copied, copied=copied, described=1)
        assert not odd
        assert not overflowed
        faults -= told
        shown += [tally.get(k)[1] for k in range(first, first + tally.clusters)]
    overflows = sum(max(0, references[k] - limit) for k in range(CLUSTERS + 1))
    assert (shown, faults + overflows) == (expected, 0)


@given(entries=st.lists(words(), max_size=40), window=st.integers(1, CLUSTERS + 1))
def test_windows_count_together_what_one_window_counts(entries: list[int], window: int) -> None:
    whole = _scanned(entries, 0, CLUSTERS + 1)
    parts = [part for first in range(0, CLUSTERS + 1, window)
             for part in _scanned(entries, first, min(window, CLUSTERS + 1 - first))]
    assert parts == whole


@given(order=st.integers(0, 6), data=st.data())
def test_stored_refcounts_of_any_width_are_taken_as_they_are(order: int, data: st.DataObject) -> None:
    block = data.draw(st.binary(min_size=32, max_size=32))
    counts = unpack_refblock(block, order)
    tally = Tally(0, len(counts), 1)
    tally.load(0, block, order)
    shown = [count if count < UNREADABLE else SATURATED for count in counts]
    assert [tally.get(k)[0] for k in range(len(counts))] == shown


def test_a_run_of_clusters_that_differ_alike_is_one_mismatch() -> None:
    tally = Tally(0, 8, 65535)
    tally.load(0, pack_refblock(array("H", [0, 1, 1, 2, 0, 0, 0, 0]), 4), 4)
    tally.add(3)
    assert tally.mismatch(0) == (1, 2, 1, 0)
    assert tally.mismatch(3) == (3, 1, 2, 1)
    assert tally.mismatch(4) is None
    assert tally.highest() == 3


def test_an_unreadable_refcount_is_no_mismatch() -> None:
    tally = Tally(0, 4, 65535)
    tally.add(0, 4)
    assert tally.unreadable(1, 10) == 3
    assert tally.mismatch(0) == (0, 1, 0, 1)
    assert tally.mismatch(1) is None


def test_a_cluster_outside_the_window_cannot_be_asked_for() -> None:
    with pytest.raises(IndexError):
        Tally(4, 2, 1).get(3)


@given(entries=st.lists(words(), max_size=40), wanted=st.sets(st.integers(0, CLUSTERS + 1)))
def test_claims_are_the_entries_whose_span_meets_a_wanted_cluster(entries: list[int], wanted: set[int]) -> None:
    rules = EntryRules(Geometry(BITS), False, False, 1 << 62)
    expected = []
    for index, word in enumerate(entries):
        counted = Counted()
        count_span(counted, judge_entry(word & ~(1 << 63), 0, rules, lambda cluster: None), rules, 9)
        if word >> 62 & 1 or word & 0x00FFFFFFFFFFFE00:
            expected += [(index, cluster) for cluster in sorted(counted.references) if cluster in wanted]
    found = claims(_table([(word, 0) for word in entries], False), array("Q", sorted(wanted)), cluster_bits=BITS,
                   extended=False)
    assert found == expected


@given(entries=st.lists(words(), max_size=20))
def test_owners_accept_a_table_only_if_the_full_count_finds_one_owner_each(entries: list[int]) -> None:
    owners = Owners(CLUSTERS)
    found = owners.scan(_table([(word, 0) for word in entries], False), cluster_bits=BITS)
    rules = EntryRules(Geometry(BITS), False, True, CLUSTERS << BITS)
    expected = count_entries([(word, 0) for word in entries], rules, dict.fromkeys(range(CLUSTERS), 1), 65535)
    if found is None:
        return
    assert not expected.faulty
    assert not expected.compressed
    assert set(expected.references.values()) <= {1}
    assert found == (expected.allocated, expected.fragmented)
    block = pack_refblock(array("H", [expected.references[k] for k in range(CLUSTERS)]), 4)
    assert owners.agree(0, CLUSTERS, block, 4)
    assert owners.highest() == max(expected.references, default=-1)


@given(order=st.integers(0, 6), owned=st.sets(st.integers(0, 15)), wrong=st.integers(0, 15))
def test_owners_notice_any_count_that_is_not_theirs(order: int, owned: set[int], wrong: int) -> None:
    owners = Owners(16)
    assert all(owners.own(cluster) for cluster in owned)
    counts = unpack_refblock(bytes(16 << order >> 3 or 2), order)[:16]
    for cluster in owned:
        counts[cluster] = 1
    assert owners.agree(0, 16, pack_refblock(counts, order), order)
    counts[wrong] ^= 1
    assert not owners.agree(0, 16, pack_refblock(counts, order), order)


def test_a_cluster_has_one_owner_at_most() -> None:
    owners = Owners(4)
    assert owners.own(1, 2)
    assert not owners.own(2)
    assert not owners.own(4)


def _scanned(entries: list[int], first: int, clusters: int) -> list[int]:
    tally = Tally(first, clusters, 65535)
    tally.scan(_table([(word, 0) for word in entries], False), cluster_bits=BITS, extended=False, data_file=False,
               file_length=CLUSTERS << BITS, active=False, shared=False)
    return [tally.get(first + k)[1] for k in range(clusters)]


def _table(entries: list[tuple[int, int]], extended: bool) -> bytes:
    return b"".join(struct.pack(">QQ" if extended else ">Q", *entry[: 2 if extended else 1]) for entry in entries)


@given(
    order=st.integers(0, 6), first=st.integers(0, 20), up=st.booleans(), down=st.booleans(), fresh=st.booleans(),
    counts=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40),
)  # fmt: skip
def test_counts_are_put_into_a_block_where_they_differ_in_the_wanted_direction(
    order: int, first: int, up: bool, down: bool, fresh: bool, counts: list[tuple[int, int]]
) -> None:
    tally = Tally(first, len(counts), 1)
    block = bytearray(512)
    for n, (stored, counted) in enumerate(counts):
        set_refcount(block, first + n, order, stored)
        tally.add(first + n, 1, counted)
    tally.load(0, block, order)
    changed, _ = tally.put(0, block, order, up=up, down=down, fresh=fresh)
    expected = 0
    for n, (stored, counted) in enumerate(counts):
        chosen = counted > 0 if fresh else (up and counted > stored) or (down and counted < stored)
        expected += chosen
        assert get_refcount(block, first + n, order) == (counted if chosen else stored)
    assert changed == expected
