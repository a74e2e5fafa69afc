"""Threads of one connection: no more than needed, all gone in the end; and the bound on what is under way."""

from __future__ import annotations

import threading

import pytest

from cowslice.serve.workers import InFlight, Workers

PATIENCE = 20.0


def test_tasks_run_side_by_side_up_to_the_number() -> None:
    workers, together = Workers(3, "test"), threading.Barrier(3)
    for _ in range(9):
        workers.submit(lambda: together.wait(PATIENCE) and None)
    workers.end()
    assert not together.broken


def test_no_thread_is_hired_while_one_is_free() -> None:
    workers, done = Workers(8, "frugal"), threading.Event()
    for _ in range(20):
        done.clear()
        workers.submit(done.set)
        assert done.wait(PATIENCE)
        # Its thread counts it as done a moment after the task said so.
        while workers._undone:
            pass
    assert len(workers._threads) == 1
    workers.end()


def test_the_end_waits_for_everything_that_was_handed_in() -> None:
    workers, done = Workers(2, "thorough"), []
    for number in range(100):
        workers.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    workers.end()
    assert sorted(done) == list(range(100))
    assert not [one for one in threading.enumerate() if one.name.startswith("thorough")]


def test_where_the_system_has_no_more_threads_those_that_are_there_do(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, gate, done = Workers(4, "poor"), threading.Event(), []
    workers.submit(lambda: gate.wait(PATIENCE) and None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no threads")))
        workers.submit(lambda: done.append(1))
    gate.set()
    workers.end()
    assert done == [1]


def test_a_request_waits_until_there_is_room_for_its_bytes() -> None:
    flight, entered = InFlight(10, 100), threading.Event()
    flight.enter(60)
    waiting = threading.Thread(target=lambda: (flight.enter(41), entered.set()))
    waiting.start()
    assert not entered.wait(0.1)
    flight.leave(60)
    assert entered.wait(PATIENCE)
    waiting.join()


def test_a_request_larger_than_all_room_goes_alone() -> None:
    flight = InFlight(10, 100)
    flight.enter(1000)
    assert not flight.empty
    flight.leave(1000)
    assert flight.empty
