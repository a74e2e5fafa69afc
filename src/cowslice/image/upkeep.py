"""What an open image does in the background: reads its maps once, and gives memory back at intervals.

It does not know the image, nor how either is done.
"""

from __future__ import annotations

from collections.abc import Sequence

from cowslice.cache import cleaning
from cowslice.cache.cleaning import Trimmable
from cowslice.cache.warming import Warmable, Warmup


class Upkeep:
    """Warm `maps` if `warm`, and trim `caches` every `interval` seconds (0: never), until `end`.

    Caches of an image that nobody closes are trimmed no more once they are gone.
    """

    def __init__(
        self, caches: Sequence[Trimmable], maps: Sequence[Warmable], *, warm: bool, interval: int
    ) -> None:
        self._caches = tuple(caches)
        self._warmup = Warmup(maps)
        if warm and maps:
            self._warmup.start()
        for cache in self._caches if maps else ():
            cleaning.register(cache, interval)

    def wait_warm(self, timeout: float | None = None) -> bool:
        """Wait until the warm-up is over, at most `timeout` seconds; return whether it is."""
        return self._warmup.join(timeout)

    def end(self) -> None:
        """Stop both and return when no map is read any more. It may be called twice."""
        for cache in self._caches:
            cleaning.unregister(cache)
        self._warmup.close()
