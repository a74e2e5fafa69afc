"""Who is inside a passage: stamps that pass, and being alone while others want in."""

from __future__ import annotations

import threading

import pytest

from cowslice.errors import InternalError
from cowslice.image.passage import Passage

THREADS = 4
TURNS = 100


def test_a_stamp_passes_at_once_where_nobody_is_inside() -> None:
    passage = Passage()
    assert passage.passed(passage.stamp())


def test_a_stamp_does_not_pass_before_those_inside_have_left() -> None:
    passage = Passage()
    with passage:
        stamp = passage.stamp()
        assert not passage.passed(stamp)
    assert passage.passed(stamp)


def test_who_is_inside_cannot_wait_to_be_alone() -> None:
    passage = Passage()
    with passage, pytest.raises(InternalError):
        passage.pause()


def test_only_who_paused_may_resume() -> None:
    with pytest.raises(InternalError):
        Passage().resume()


def test_nobody_else_is_inside_while_one_is_alone() -> None:
    passage, ended = Passage(), threading.Event()
    alone, seen = [False], []

    def visit() -> None:
        while not ended.is_set():
            with passage, passage:
                seen.append(alone[0])

    visitors = [threading.Thread(target=visit) for _ in range(THREADS)]
    for visitor in visitors:
        visitor.start()
    for _ in range(TURNS):
        with passage.exclusive(), passage:
            alone[0] = True
            ended.wait(0.0002)
            alone[0] = False
    ended.set()
    for visitor in visitors:
        visitor.join(60)
    assert not any(visitor.is_alive() for visitor in visitors)
    assert True not in seen
