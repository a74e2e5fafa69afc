"""Overlapping spans cut into disjoint segments, so that what many name is looked at once and counted many times.

Pure arithmetic on numbers of any unit: it does not know what the spans are. The segments are ascending, cover every
span, and are at most twice as many as the spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Segment:
    """`start` to `end`, covered `times` times; `member` is the lowest number of a span that covers it."""

    start: int
    end: int
    times: int
    member: int


def sweep(spans: Sequence[tuple[int, int, int]]) -> Iterator[Segment]:
    """Cut spans (start, end, times), none of them empty, into segments."""
    order = sorted(range(len(spans)), key=lambda n: spans[n][0])
    edges = sorted({edge for start, end, _ in spans for edge in (start, end)})
    ending: list[tuple[int, int]] = []
    members: list[int] = []
    begun = times = 0
    for edge, following in pairwise(edges):
        while ending and ending[0][0] <= edge:
            times -= spans[heappop(ending)[1]][2]
        while begun < len(order) and spans[order[begun]][0] <= edge:
            heappush(ending, (spans[order[begun]][1], order[begun]))
            heappush(members, order[begun])
            times += spans[order[begun]][2]
            begun += 1
        while members and spans[members[0]][1] <= edge:
            heappop(members)
        if members:
            yield Segment(edge, following, times, members[0])
