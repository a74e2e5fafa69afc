"""The cleaner: every cache at its interval, in one thread, which lives as long as there is something to clean."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from cowslice.cache import cleaning
from cowslice.cache.cleaning import Cleaner
from cowslice.cache.slicemap import SliceCache

PATIENCE = 60


class Time:
    """A clock that stands still until it is told, and a wait that says for how long it was asked to wait."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asked: list[float] = []
        self._resting = threading.Semaphore(0)

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        self.asked.append(seconds)
        self._resting.release()
        condition.wait(PATIENCE)

    def until_rest(self) -> float:
        """Return once the cleaner rests again: for how many seconds it means to."""
        assert self._resting.acquire(timeout=PATIENCE)
        return self.asked[-1]


class Cache:
    def __init__(self) -> None:
        self.trims = 0

    def trim(self) -> int:
        self.trims += 1
        return 0


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def cleaner(time):
    return Cleaner(clock=lambda: time.now, wait=time.wait)


def advance(cleaner, time, seconds):
    """Let time pass and the cleaner do what is due; return for how long it then means to rest."""
    with cleaner.changed:
        time.now += seconds
        cleaner.changed.notify_all()
    return time.until_rest()


def ended(thread):
    thread.join(PATIENCE)
    return not thread.is_alive()


def test_a_cache_is_trimmed_at_its_interval_and_not_before(cleaner, time):
    cache = Cache()
    cleaner.register(cache, 5)
    assert time.until_rest() == 5
    assert advance(cleaner, time, 4) == 1
    assert cache.trims == 0
    assert advance(cleaner, time, 1) == 5
    assert cache.trims == 1
    advance(cleaner, time, 5)
    assert cache.trims == 2
    cleaner.unregister(cache)


def test_each_cache_has_an_interval_of_its_own_in_one_thread(cleaner, time):
    often, seldom = Cache(), Cache()
    cleaner.register(often, 2)
    time.until_rest()
    thread = cleaner.thread
    cleaner.register(seldom, 5)
    time.until_rest()
    for _ in range(5):
        advance(cleaner, time, 2)
    assert (often.trims, seldom.trims) == (5, 1)  # at 2, 4 ... 10; at 6, and then at 11
    assert cleaner.thread is thread


def test_a_new_interval_replaces_the_old_one(cleaner, time):
    cache = Cache()
    cleaner.register(cache, 500)
    time.until_rest()
    cleaner.register(cache, 3)
    assert time.until_rest() == 3
    advance(cleaner, time, 3)
    assert cache.trims == 1


@pytest.mark.parametrize("seconds", [0, -1])
def test_an_interval_of_zero_is_off(cleaner, seconds):
    cleaner.register(Cache(), seconds)
    assert cleaner.thread is None


def test_zero_ends_what_was_registered(cleaner, time):
    cache = Cache()
    cleaner.register(cache, 5)
    time.until_rest()
    thread = cleaner.thread
    cleaner.register(cache, 0)
    assert ended(thread)
    assert cleaner.thread is None


def test_the_thread_ends_with_the_last_cache_and_begins_again_with_the_next(cleaner, time):
    one, other = Cache(), Cache()
    cleaner.register(one, 5)
    cleaner.register(other, 5)
    time.until_rest()
    first = cleaner.thread
    cleaner.unregister(one)
    assert first.is_alive()
    cleaner.unregister(other)
    assert ended(first)
    cleaner.register(one, 5)
    assert cleaner.thread is not first
    assert cleaner.thread.daemon
    cleaner.unregister(one)


def test_a_cache_is_not_kept_alive_and_its_end_ends_the_thread(cleaner, time):
    cache = Cache()
    cleaner.register(cache, 5)
    time.until_rest()
    thread = cleaner.thread
    del cache
    gc.collect()
    with cleaner.changed:
        time.now += 5
        cleaner.changed.notify_all()
    assert ended(thread)


def test_a_slice_cache_can_be_registered_and_forgotten(cleaner, time):
    cache = SliceCache(1 << 20)
    cleaner.register(cache, 5)
    time.until_rest()
    advance(cleaner, time, 5)
    thread = cleaner.thread
    cleaner.unregister(cache)
    assert ended(thread)


def test_what_was_never_registered_is_unregistered_without_a_word(cleaner):
    cleaner.unregister(Cache())


def test_a_cache_that_is_being_trimmed_holds_up_nobody(cleaner, time):
    class Slow(Cache):
        begun, go_on = threading.Event(), threading.Event()

        def trim(self) -> int:
            self.begun.set()
            assert self.go_on.wait(PATIENCE)
            return super().trim()

    slow = Slow()
    cleaner.register(slow, 5)
    time.until_rest()
    with cleaner.changed:
        time.now += 5
        cleaner.changed.notify_all()
    assert slow.begun.wait(PATIENCE)
    cleaner.register(Cache(), 7)
    cleaner.unregister(slow)
    slow.go_on.set()


def test_the_process_shares_one_cleaner():
    one, other = SliceCache(1000), SliceCache(1000)
    cleaning.register(one, 600)
    cleaning.register(other, 600)
    named = [thread for thread in threading.enumerate() if thread.name == "cowslice-cleaner"]
    assert named.count(cleaning._shared.thread) == 1
    cleaning.unregister(one)
    cleaning.unregister(other)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_cleans_for_itself():
    cache = SliceCache(1000)
    cleaning.register(cache, 600)
    child = os.fork()
    if child == 0:
        cleaning.register(cache, 600)
        thread = cleaning._shared.thread
        os._exit(0 if thread is not None and thread.is_alive() else 1)
    cleaning.unregister(cache)
    assert os.waitpid(child, 0)[1] == 0
