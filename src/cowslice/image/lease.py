"""Who is inside an open image, so that closing waits for them and nobody reads a descriptor that was closed.

It takes no lock on the way in or out: appending to and popping from a deque are atomic. What must hold: a request
first enters and then looks whether the image is closed; closing first says so and then waits until nobody is inside.
"""

from __future__ import annotations

import threading
from collections import deque

from cowslice.errors import Closed

_GLANCE = 0.05  # seconds; a waiting close looks again at least this often, should it miss the last one out


class Lease:
    """Enter for one request (`with lease:`), end for all (`end()`). `name` is for the message."""

    __slots__ = ("_ended", "_inside", "_left", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._inside: deque[None] = deque()
        self._ended = False
        self._left = threading.Event()

    @property
    def ended(self) -> bool:
        """Whether no new request may enter."""
        return self._ended

    def __enter__(self) -> None:
        self._inside.append(None)
        if self._ended:
            self.__exit__()
            raise Closed(f"'{self._name}' is closed")

    def __exit__(self, *exception: object) -> None:
        self._inside.pop()
        if self._ended:
            self._left.set()

    def end(self) -> None:
        """Let nobody in any more and return when the last one has left."""
        self._ended = True
        while self._inside:
            self._left.wait(_GLANCE)
            self._left.clear()
