"""How fast a copy may go: so many bytes in a second and no more, for those who share a disk with others.

It does not know what is copied. The first bytes never wait; what follows waits until those before it are paid for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from cowslice.errors import BadOption

Item = TypeVar("Item")
NAP = 0.2  # seconds: whoever calls the work off waits no longer


class Pace:
    """At most `rate` bytes in a second, 0 for as many as there are. `clock` and `sleep` are those of `time`."""

    def __init__(
        self, rate: int, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        if rate < 0:
            raise BadOption(f"the rate is {rate} bytes in a second, expected 0 or more")
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._free = clock()  # when all that was spent is paid for

    def spend(self, length: int, *, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until `length` more bytes may be copied, or until `stopped` says that it is in vain."""
        if not self._rate:
            return
        while (wait := self._free - self._clock()) > 0 and not stopped():
            self._sleep(min(wait, NAP))
        self._free = max(self._free, self._clock()) + length / self._rate


def paced(
    items: Iterable[Item], pace: Pace, cost: Callable[[Item], int], stopped: Callable[[], bool]
) -> Iterator[Item]:
    """Give the items out no faster than their bytes may be copied."""
    for item in items:
        pace.spend(cost(item), stopped=stopped)
        yield item
