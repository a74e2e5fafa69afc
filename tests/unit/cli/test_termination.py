"""What a signal does to a command: the first one unwinds it, and no other one reaches what it does to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest

from cowslice.cli.termination import SIGNALS, Terminated, ended_by_signals


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_ends_the_block_and_says_which_it_was(number: int) -> None:
    with pytest.raises(Terminated), ended_by_signals() as ending:
        signal.raise_signal(number)
    assert (ending.number, ending.status) == (number, 128 + number)


def test_later_ones_wait_until_all_is_closed_and_are_told_so_once(capfd: pytest.CaptureFixture[str]) -> None:
    closed = []

    def close() -> None:
        for number in SIGNALS:
            signal.raise_signal(number)
        with contextlib.suppress(OSError):  # also where an error of its own is being handled
            try:
                raise OSError
            finally:
                signal.raise_signal(signal.SIGINT)
        closed.append(True)

    with contextlib.suppress(Terminated), ended_by_signals() as ending, contextlib.ExitStack() as stack:
        stack.callback(close)
        stack.callback(close)
        signal.raise_signal(signal.SIGTERM)
    assert (closed, ending.number) == ([True, True], signal.SIGTERM)
    assert capfd.readouterr().err.count("ending already") == 1


def test_one_that_somebody_swallowed_can_be_repeated() -> None:
    seen = 0
    with ended_by_signals() as ending:
        for _ in range(3):
            try:
                signal.raise_signal(signal.SIGINT)
            except Terminated:
                seen += 1
    assert (seen, ending.number) == (3, signal.SIGINT)


def test_a_command_that_ends_of_its_own_can_hold_them_off() -> None:
    with ended_by_signals() as ending:
        ending.hold()
        signal.raise_signal(signal.SIGTERM)
    assert ending.number == signal.SIGTERM


@pytest.mark.parametrize("came", [False, True])
def test_behind_the_block_all_is_as_before_but_for_a_process_that_is_about_to_end(came: bool) -> None:
    with contextlib.suppress(Terminated), ended_by_signals():
        if came:
            signal.raise_signal(signal.SIGHUP)
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN if came else signal.SIG_DFL}


def test_what_was_ignored_stays_so_but_for_sigterm() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with ended_by_signals():
        ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    assert ignored == [signal.SIGINT, signal.SIGHUP]


def test_another_thread_than_the_main_one_changes_nothing() -> None:
    def run() -> None:
        with ended_by_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done
