"""Gives metadata memory back at intervals: `cache_clean_interval`, for all images of the process in one thread.

It does not know what a cache holds, and never keeps one alive: a cache that nobody uses any more drops out by itself.
The thread begins when something is registered and ends when nothing is; it holds no lock while a cache is trimmed.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Trimmable(Protocol):
    """A slice cache, as far as it concerns us."""

    def trim(self) -> int: ...


@dataclass(slots=True)
class _Turn:
    """When a cache is next to be trimmed."""

    cache: weakref.ref[Trimmable]
    seconds: float
    due: float


def _sleep(condition: threading.Condition, seconds: float) -> None:
    condition.wait(min(seconds, threading.TIMEOUT_MAX))


class Cleaner:
    """Trims each registered cache at its own interval. Thread safe.

    `clock` tells seconds that never go back; `wait(condition, seconds)` is called with the condition held and returns
    when it is notified or the time has passed, or earlier.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Condition, float], None] = _sleep,
    ) -> None:
        self.changed = threading.Condition()
        self._clock = clock
        self._wait = wait
        self._turns: dict[int, _Turn] = {}
        self._thread: threading.Thread | None = None

    @property
    def thread(self) -> threading.Thread | None:
        """The thread that cleans, None while nothing is registered."""
        return self._thread

    def register(self, cache: Trimmable, seconds: float) -> None:
        """Trim the cache every so many seconds from now on, instead of what was said before; 0 means never."""
        if seconds <= 0:
            self.unregister(cache)
            return
        with self.changed:
            self._turns[id(cache)] = _Turn(weakref.ref(cache), seconds, self._clock() + seconds)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cowslice-cleaner", daemon=True)
                self._thread.start()
            self.changed.notify_all()

    def unregister(self, cache: Trimmable) -> None:
        """Trim the cache no more; a trim that is under way goes on. One that is not registered may be given."""
        with self.changed:
            turn = self._turns.get(id(cache))
            if turn is not None and turn.cache() is cache:
                del self._turns[id(cache)]
            self.changed.notify_all()

    def _run(self) -> None:
        while True:
            with self.changed:
                due = self._take_due()
                if not self._turns:
                    self._thread = None
                    return
                if not due:
                    self._wait(self.changed, min(turn.due for turn in self._turns.values()) - self._clock())
            for cache in due:
                _trim(cache)

    def _take_due(self) -> list[weakref.ref[Trimmable]]:
        """Forget the caches that are gone; answer those whose time has come and set their next time."""
        now = self._clock()
        self._turns = {key: turn for key, turn in self._turns.items() if turn.cache() is not None}
        due = [turn for turn in self._turns.values() if turn.due <= now]
        for turn in due:
            turn.due = now + turn.seconds
        return [turn.cache for turn in due]


def _trim(reference: weakref.ref[Trimmable]) -> None:
    """In a function of its own, so that no local variable keeps the cache alive while the thread waits."""
    cache = reference()
    if cache is not None:
        cache.trim()


_shared = Cleaner()


def register(cache: Trimmable, seconds: float) -> None:
    """Trim the cache every so many seconds from now on; 0 means never. The cache is not kept alive."""
    _shared.register(cache, seconds)


def unregister(cache: Trimmable) -> None:
    """Trim the cache no more."""
    _shared.unregister(cache)


def _begin_anew() -> None:
    """Threads do not survive a fork: the child starts its own when it registers a cache."""
    global _shared
    _shared = Cleaner()


os.register_at_fork(after_in_child=_begin_anew)
