"""Chunks are handed out in order, in as many threads as asked, and everything stops at the first failure."""

from __future__ import annotations

import threading

import pytest

from cowslice.ops.pump import Pump


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_chunk_is_done_once(workers: int) -> None:
    done: list[int] = []
    Pump(iter(range(100)), lambda: lambda number, chunk: done.append(chunk), workers).run()
    assert sorted(done) == list(range(100))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_turns_are_taken_in_the_order_of_the_chunks(workers: int) -> None:
    done: list[int] = []

    def work(number: int, chunk: int) -> None:
        pump.wait_turn(number)
        done.append(chunk)
        pump.end_turn()

    pump = Pump(iter(range(100)), lambda: work, workers)
    pump.run()
    assert done == list(range(100))


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_failure_stops_the_rest_and_comes_out(workers: int) -> None:
    done: list[int] = []

    def work(number: int, chunk: int) -> None:
        if chunk == 3:
            raise OSError(5, "the disk is gone")
        done.append(chunk)

    with pytest.raises(OSError, match="the disk is gone"):
        Pump(iter(range(100000)), lambda: work, workers).run()
    assert len(done) < 100000


def test_a_failure_wakes_those_who_wait_for_their_turn() -> None:
    first_waits = threading.Event()

    def work(number: int, chunk: int) -> None:
        if chunk == 0:
            first_waits.wait(10)
            raise ValueError("no more turns")
        first_waits.set()
        pump.wait_turn(number)

    pump = Pump(iter(range(10)), lambda: work, 3)
    with pytest.raises(ValueError, match="no more turns"):
        pump.run()


def test_a_failing_source_of_chunks_comes_out_too() -> None:
    def chunks():  # type: ignore[no-untyped-def]
        yield 1
        raise KeyError("lost")

    with pytest.raises(KeyError):
        Pump(chunks(), lambda: lambda number, chunk: None, 2).run()
