"""What an open image does in the background: reads its maps once, then gives memory back at intervals.

It does not know the image. The thread is a daemon and holds nothing that a reader waits for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from cowslice.errors import CowsliceError


class Warmable(Protocol):
    """A slice map, as far as it concerns us."""

    def warm(self) -> int: ...

    def stop(self) -> None: ...


class Trimmable(Protocol):
    """A cache, as far as it concerns us."""

    def trim(self) -> int: ...


class Upkeep:
    """Warm `maps` if `warm`, then trim `caches` every `interval` seconds (0: never), until `end`."""

    def __init__(
        self, caches: Sequence[Trimmable], maps: Sequence[Warmable], *, warm: bool, interval: int
    ) -> None:
        self._caches = tuple(caches)
        self._maps = tuple(maps)
        self._warm = warm
        self._interval = interval
        self._ending = threading.Event()
        self._warmed = threading.Event()
        self._thread: threading.Thread | None = None
        if (warm or interval) and maps:
            self._thread = threading.Thread(target=self._run, name="cowslice-upkeep", daemon=True)
            self._thread.start()
        else:
            self._warmed.set()

    def wait_warm(self, timeout: float | None = None) -> bool:
        """Wait until the warm-up is over, at most `timeout` seconds; return whether it is."""
        return self._warmed.wait(timeout)

    def end(self) -> None:
        """Stop and return when the thread has ended. It may be called twice."""
        self._ending.set()
        while self._thread is not None and self._thread.is_alive():
            for one in self._maps:  # again and again: a warm-up that just begins forgets an earlier word
                one.stop()
            self._thread.join(0.02)

    def _run(self) -> None:
        try:
            for one in self._maps if self._warm else ():
                if not self._ending.is_set():
                    one.warm()
        except CowsliceError:
            pass  # whoever asks for the damaged part hears of it
        finally:
            self._warmed.set()
        while self._interval and not self._ending.wait(self._interval):
            for cache in self._caches:
                cache.trim()
