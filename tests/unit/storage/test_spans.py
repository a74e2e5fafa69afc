"""Many small reads become few large ones that serve them all."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cowslice.storage.spans import Span, plan_merged_reads

spans_lists = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 300)), max_size=30)


@given(spans=spans_lists, gap=st.integers(0, 500), most=st.integers(1, 2000))
def test_every_span_lies_inside_the_one_read_that_names_it(spans: list[tuple[int, int]], gap: int, most: int) -> None:
    reads = plan_merged_reads(spans, gap=gap, most=most)
    named = sorted(n for read in reads for n in read.members)
    assert named == [n for n, (_, length) in enumerate(spans) if length]
    for read in reads:
        for n in read.members:
            assert read.offset <= spans[n][0]
            assert sum(spans[n]) <= read.offset + read.length


@given(spans=spans_lists, gap=st.integers(0, 500), most=st.integers(1, 2000))
def test_a_read_is_larger_than_the_limit_only_for_one_span_alone(
    spans: list[tuple[int, int]], gap: int, most: int
) -> None:
    for read in plan_merged_reads(spans, gap=gap, most=most):
        assert read.length <= most or len(read.members) == 1


@given(spans=spans_lists, gap=st.integers(0, 500))
def test_reads_are_further_apart_than_the_gap(spans: list[tuple[int, int]], gap: int) -> None:
    reads = plan_merged_reads(spans, gap=gap, most=1 << 40)
    for one, after in itertools.pairwise(reads):
        assert after.offset > one.offset + one.length + gap


def test_a_gap_is_read_through_up_to_its_size() -> None:
    spans = [(0, 10), (14, 10)]
    assert [read.length for read in plan_merged_reads(spans, gap=4, most=99)] == [24]
    assert [read.length for read in plan_merged_reads(spans, gap=3, most=99)] == [10, 10]


def test_no_spans_need_no_reads() -> None:
    assert plan_merged_reads([], gap=9, most=9) == []


def test_a_span_knows_its_end() -> None:
    assert Span(10, 5, data=True).end == 15
