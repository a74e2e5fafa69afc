"""Upkeep: warms once, trims at intervals, ends when told."""

from __future__ import annotations

import threading

from cowslice.errors import CorruptImage
from cowslice.image.upkeep import Upkeep


class Fake:
    """A slice map and a slice cache that count what is asked of them."""

    def __init__(self, *, fails: bool = False, blocks: bool = False) -> None:
        self.warmed = 0
        self.trimmed = threading.Event()
        self.stopped = threading.Event()
        self._fails, self._blocks = fails, blocks

    def warm(self) -> int:
        self.warmed += 1
        if self._fails:
            raise CorruptImage("a table is damaged")
        if self._blocks:
            self.stopped.wait()
        return 1

    def stop(self) -> None:
        self.stopped.set()

    def trim(self) -> int:
        self.trimmed.set()
        return 0


def test_every_map_is_warmed_once() -> None:
    maps = [Fake(), Fake()]
    upkeep = Upkeep([Fake()], maps, warm=True, interval=0)
    assert upkeep.wait_warm(10)
    upkeep.end()
    assert [one.warmed for one in maps] == [1, 1]


def test_without_warm_up_nothing_is_read_and_nobody_waits() -> None:
    maps = [Fake()]
    upkeep = Upkeep([Fake()], maps, warm=False, interval=0)
    assert upkeep.wait_warm(0)
    upkeep.end()
    assert maps[0].warmed == 0


def test_memory_is_given_back_at_the_interval() -> None:
    cache = Fake()
    upkeep = Upkeep([cache], [Fake()], warm=False, interval=1)
    assert cache.trimmed.wait(30)
    upkeep.end()


def test_a_damaged_map_does_not_stop_the_upkeep() -> None:
    cache = Fake()
    upkeep = Upkeep([cache], [Fake(fails=True)], warm=True, interval=1)
    assert upkeep.wait_warm(10)
    assert cache.trimmed.wait(30)
    upkeep.end()


def test_ending_stops_a_warm_up_that_is_under_way() -> None:
    one = Fake(blocks=True)
    upkeep = Upkeep([Fake()], [one, Fake()], warm=True, interval=600)
    upkeep.end()
    upkeep.end()
    assert upkeep.wait_warm(0)
