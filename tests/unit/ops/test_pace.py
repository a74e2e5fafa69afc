"""A paced copy waits as long as its bytes cost, by a clock of the test's own."""

from __future__ import annotations

import pytest

from cowslice.errors import BadOption
from cowslice.ops.pace import NAP, Pace, paced


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 100.0
        self.naps: list[float] = []

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_was_spent_is_paid_for_before_more_is(clock: Clock) -> None:
    pace = Pace(1000, clock=clock.read, sleep=clock.sleep)
    for _ in range(5):
        pace.spend(500)
    assert clock.now == pytest.approx(102.0)
    assert max(clock.naps) <= NAP


def test_time_in_which_nothing_was_copied_buys_nothing_later(clock: Clock) -> None:
    pace = Pace(1000, clock=clock.read, sleep=clock.sleep)
    clock.now += 50
    pace.spend(2000)
    pace.spend(1)
    assert clock.now == pytest.approx(152.0)


def test_without_a_rate_nobody_waits(clock: Clock) -> None:
    pace = Pace(0, clock=clock.read, sleep=clock.sleep)
    for _ in range(3):
        pace.spend(1 << 40)
    assert clock.naps == []


def test_a_copy_that_was_called_off_waits_no_longer(clock: Clock) -> None:
    pace = Pace(1, clock=clock.read, sleep=clock.sleep)
    items = paced([5, 6, 7], pace, lambda item: item, lambda: len(clock.naps) >= 3)
    assert list(items) == [5, 6, 7]
    assert len(clock.naps) == 3


def test_a_rate_below_zero_is_refused() -> None:
    with pytest.raises(BadOption, match="-1 bytes"):
        Pace(-1)
