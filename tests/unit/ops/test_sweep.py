"""Segments of overlapping spans say of every unit how many spans cover it, and what holes are never shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cowslice.ops.dataruns import DataRuns
from cowslice.ops.sweep import sweep
from cowslice.storage.memory import MemoryStorage
from cowslice.storage.spans import Span

spans = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 12), st.integers(1, 5)).map(lambda s: (s[0], s[0] + s[1], s[2])),
    max_size=12,
)


@given(given_spans=spans)
def test_segments_count_every_unit_as_often_as_the_spans_do(given_spans: list[tuple[int, int, int]]) -> None:
    shown = {unit: (segment.times, segment.member) for segment in sweep(given_spans)
             for unit in range(segment.start, segment.end)}
    expected = {}
    for unit in range(50):
        covering = [n for n, (start, end, _) in enumerate(given_spans) if start <= unit < end]
        if covering:
            expected[unit] = (sum(given_spans[n][2] for n in covering), covering[0])
    assert shown == expected


@given(given_spans=spans)
def test_segments_ascend_without_overlap(given_spans: list[tuple[int, int, int]]) -> None:
    edges = [edge for segment in sweep(given_spans) for edge in (segment.start, segment.end)]
    assert edges == sorted(edges)
    assert len(edges) <= 4 * len(given_spans)


class Holed(MemoryStorage):
    """512 bytes of data in every 2048, and a count of the questions for them."""

    asked = 0

    def extents(self, offset: int, length: int):  # type: ignore[no-untyped-def]
        self.asked += 1
        end = offset + length
        while offset < end:
            following = min((offset // 512 + 1) * 512, end)
            yield Span(offset, following - offset, offset // 512 % 4 == 0)
            offset = following


def test_only_data_is_gone_through() -> None:
    runs = DataRuns(Holed(bytes(8192)))
    assert list(runs.within(0, 4096)) == [(0, 512), (2048, 2560)]
    assert list(runs.within(4096, 10000)) == [(4096, 4608), (6144, 6656)]


def test_holes_are_not_asked_for_where_that_is_not_worth_it() -> None:
    storage = Holed(bytes(8192))
    assert list(DataRuns(storage, ask=False).within(1024, 9000)) == [(1024, 8192)]
    assert storage.asked == 0
