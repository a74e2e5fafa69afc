"""Runs of free clusters against a set of clusters."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cowslice.image.holes import Holes


def runs_of(free: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for cluster in sorted(free):
        if found and sum(found[-1]) == cluster:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((cluster, 1))
    return found


class Play:
    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.holes = Holes()
        self.free: set[int] = set()

    def add(self) -> None:
        start = self.dice.randrange(300)
        end = start + self.dice.choice((1, 2, 9, 40))
        if not self.free & set(range(start, end)):
            self.holes.add(start, end)
            self.free |= set(range(start, end))

    def take(self) -> None:
        count = self.dice.choice((1, 2, 5, 30))
        start = self.holes.take(count)
        lengths = [length for _, length in runs_of(self.free)]
        if start < 0:
            # A run of the class below is found only if it is the lowest of its class.
            assert max(lengths, default=0) < 1 << (count - 1).bit_length()
            return
        assert any(first == start and length >= count for first, length in runs_of(self.free))
        self.free -= set(range(start, start + count))

    def take_at(self) -> None:
        start, count = self.dice.randrange(300), self.dice.choice((1, 3))
        got = self.holes.take_at(start, count)
        assert got == min(count, dict(runs_of(self.free)).get(start, 0))
        self.free -= set(range(start, start + got))

    def take_largest(self) -> None:
        start, count = self.holes.take_largest()
        if start < 0:
            assert not self.free
            return
        assert dict(runs_of(self.free))[start] == count
        assert count.bit_length() == max(length for _, length in runs_of(self.free)).bit_length()
        self.free -= set(range(start, start + count))

    def cut_off(self) -> None:
        end = self.dice.randrange(340)
        start = self.holes.cut_off(end)
        expected = next((first for first, length in runs_of(self.free) if first + length == end), end)
        assert start == expected
        self.free -= set(range(start, end))

    def clear(self) -> None:
        if self.dice.random() < 0.05:
            self.holes.clear()
            self.free = set()


@given(st.integers(0, 1 << 32))
def test_what_is_taken_was_free_and_neighbours_are_one(seed: int) -> None:
    play = Play(seed)
    for _ in range(120):
        play.dice.choice((play.add, play.add, play.add, play.take, play.take_at, play.take_largest, play.cut_off,
                          play.clear))()
        assert play.holes.runs() == runs_of(play.free)
        assert len(play.holes) == len(runs_of(play.free))
