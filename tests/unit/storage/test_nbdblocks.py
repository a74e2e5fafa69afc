"""Spans in the blocks of an export."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cowslice.storage.nbdblocks import Blocks

SIZE = 10_000
blocks = st.builds(Blocks, st.sampled_from([1, 8, 512, 4096, 65536]), st.sampled_from([65536, 70_000]), st.just(SIZE))
spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda ends: (min(ends), max(ends)))


def _is_whole(blocks: Blocks, start: int, end: int) -> bool:
    return start % blocks.block == 0 and (end % blocks.block == 0 or end == SIZE)


@given(blocks, spans)
def test_the_blocks_around_a_span_are_whole_and_no_more_than_needed(blocks: Blocks, span: tuple[int, int]) -> None:
    start, end = blocks.around(*span)
    assert _is_whole(blocks, start, end)
    assert start <= span[0] < start + blocks.block
    assert span[1] <= end < span[1] + blocks.block


@given(blocks, spans)
def test_the_blocks_within_a_span_are_whole_and_leave_less_than_a_block(blocks: Blocks, span: tuple[int, int]) -> None:
    first, last = blocks.within(*span)
    assert span[0] <= first <= last <= span[1]
    if first < last:
        assert _is_whole(blocks, first, last)
        assert max(first - span[0], span[1] - last) < blocks.block
    else:
        assert (first, last) == (span[1], span[1])
        assert span[1] - span[0] < 2 * blocks.block


@given(blocks, spans, st.integers(1, 1 << 20))
def test_pieces_cover_whole_blocks_and_none_is_too_large(blocks: Blocks, span: tuple[int, int], wanted: int) -> None:
    start, end = blocks.around(*span)
    at = start
    for begin, stop in blocks.pieces(start, end, wanted):
        assert begin == at < stop
        assert _is_whole(blocks, begin, stop)
        assert stop - begin <= blocks.most
        at = stop
    assert at == end
