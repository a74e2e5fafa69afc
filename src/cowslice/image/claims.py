"""Which guest clusters are being rewritten, so that two writers never give one guest cluster two host clusters.

It does not know what is written. `lock` is the image's allocation lock; all methods are called without it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Claims:
    """Spans of guest clusters, each held by one request. Who wants a part of a held one waits."""

    def __init__(self, lock: threading.Condition) -> None:
        self._lock = lock
        self._held: list[tuple[int, int]] = []
        self._waiting = 0

    @contextmanager
    def on(self, first: int, end: int) -> Iterator[None]:
        """Hold guest clusters [first, end) for the block."""
        span = (first, end)
        with self._lock:
            while any(begin < end and first < stop for begin, stop in self._held):
                self._waiting += 1
                try:
                    self._lock.wait()
                finally:
                    self._waiting -= 1
            self._held.append(span)
        try:
            yield
        finally:
            with self._lock:
                self._held.remove(span)
                if self._waiting:
                    self._lock.notify_all()
