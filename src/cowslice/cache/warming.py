"""Reads metadata in the background after an image was opened, so that a map that fits never misses again.

It does not know how a map reads, nor where the room ends. The thread is a daemon, holds nothing that a reader waits
for, and has ended when `close` returns: only then may the storages be closed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from cowslice.errors import CowsliceError


class Warmable(Protocol):
    """A slice map, as far as it concerns us: once stopped, it warms no more."""

    def warm(self) -> int: ...

    def stop(self) -> None: ...


class Warmup:
    """One warm-up of the maps of a chain, one map after the other, in a thread of its own. Thread safe."""

    def __init__(self, maps: Sequence[Warmable]) -> None:
        self._maps = tuple(maps)
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cowslice-warmup", daemon=True)
        self._lock = threading.Lock()
        self._begun = False

    def start(self) -> None:
        """Begin, unless it has begun or was cancelled."""
        with self._lock:
            if not self._begun and not self._cancelled.is_set():
                self._begun = True
                self._thread.start()

    def cancel(self) -> None:
        """Let it end soon, or never begin. Does not wait."""
        with self._lock:
            self._cancelled.set()
        for one in self._maps:
            one.stop()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it is over, at most `timeout` seconds; answer whether it is. One that never began is over."""
        if self._begun:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Cancel it and return when its thread has ended. It may be called twice."""
        self.cancel()
        self.join()

    def _run(self) -> None:
        for one in self._maps:
            if self._cancelled.is_set():
                return
            try:
                one.warm()
            except CowsliceError:
                continue  # whoever asks for the damaged part hears of it
