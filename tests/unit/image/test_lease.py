"""The lease: closing waits for who is inside, and nobody enters afterwards."""

from __future__ import annotations

import threading

import pytest

from cowslice.errors import Closed
from cowslice.image.lease import Lease


def test_an_ended_lease_lets_nobody_in() -> None:
    lease = Lease("disk")
    lease.end()
    with pytest.raises(Closed, match="'disk' is closed"), lease:
        pass


def test_ending_twice_is_allowed() -> None:
    lease = Lease("disk")
    lease.end()
    lease.end()
    assert lease.ended


def test_ending_waits_for_whoever_is_inside() -> None:
    lease = Lease("disk")
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def read() -> None:
        with lease:
            inside.set()
            leave.wait()
            order.append("left")

    def end() -> None:
        lease.end()
        order.append("ended")

    reader, closer = threading.Thread(target=read), threading.Thread(target=end)
    reader.start()
    inside.wait()
    closer.start()
    while not lease.ended:
        pass
    leave.set()
    reader.join()
    closer.join()
    assert order == ["left", "ended"]


def test_a_request_that_fails_leaves_all_the_same() -> None:
    lease = Lease("disk")
    with pytest.raises(ZeroDivisionError), lease:
        raise ZeroDivisionError
    lease.end()
