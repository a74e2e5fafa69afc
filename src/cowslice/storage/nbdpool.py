"""The connections of one NBD storage: one, and a few more when many requests wait and the server lets us.

It does not know what is requested. What must hold: all connections are sessions of the same export as the first, and
one that breaks breaks the storage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from cowslice.errors import CowsliceError
from cowslice.nbd.events import Session
from cowslice.nbd.wire import ExportFlag
from cowslice.storage.nbdlink import NbdLink

BUSY = 8  # requests under way on each connection before another one is worth a handshake


class NbdPool:
    """Connect once, and up to `most` times when that is worth it and every connection sees what others wrote."""

    def __init__(self, connect: Callable[[], NbdLink], *, most: int) -> None:
        first = connect()
        self.session: Session = first.session
        self._connect = connect
        self._links = [first]
        self._most = most if first.session.flags & ExportFlag.CAN_MULTI_CONN else 1
        self._growing = threading.Lock()
        self._closed = False

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._links)

    def pick(self) -> NbdLink:
        """The connection for the next request: that with the fewest under way."""
        link = min(self._links, key=_load)
        if link.is_broken or link.in_flight < BUSY or len(self._links) >= self._most:
            return link
        return self._grow(link)

    def close(self) -> None:
        """Close all connections and end their threads. It may be called twice."""
        with self._growing:
            self._closed = True
        for link in self._links:
            link.close()

    def _grow(self, instead: NbdLink) -> NbdLink:
        """Another connection, or `instead` when somebody else is connecting or the server wants no more."""
        if not self._growing.acquire(blocking=False):
            return instead
        try:
            if self._closed or len(self._links) >= self._most:
                return instead
            another = self._maybe_connect()
            if another is None:
                self._most = len(self._links)
                return instead
            self._links.append(another)
            return another
        finally:
            self._growing.release()

    def _maybe_connect(self) -> NbdLink | None:
        try:
            another = self._connect()
        except CowsliceError:
            return None  # what we have is enough
        if replace(another.session, description=self.session.description) == self.session:
            return another
        another.close()
        return None


def _load(link: NbdLink) -> tuple[bool, int]:
    """A broken one comes first: whoever asks next hears of it."""
    return not link.is_broken, link.in_flight
