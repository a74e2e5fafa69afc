"""A connected socket as two pipes that many threads may use: plain, or inside TLS.

It knows no message. What must hold: what one `send` is given leaves in one piece, never mixed with another's; nothing
waits with the TLS lock held, because OpenSSL allows one thread at a time inside a session.
"""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

T = TypeVar("T")
MOST_VECTORS = 512  # of one sendmsg; Linux takes 1024
SETTLING = 0.002  # seconds between looks at whether all has arrived
MOST_AT_ONCE = 1 << 18  # bytes that one TLS write is given: its lock must not be held for long


class Stream:
    """A plain connection. It owns the socket.

    `recv` is for one thread; `send`, `stop_reading` and `abort` for any. OSError comes out where the other side is
    gone.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The descriptor, which stays the stream's."""
        return self.socket.fileno()

    def begin_transmission(self, idle_timeout: float) -> None:
        """Wait without end from now on, or `idle_timeout` seconds where that is not 0."""
        self.socket.settimeout(None)
        if idle_timeout:
            # In the kernel, so that it holds for whoever uses the descriptor.
            microseconds = max(int(idle_timeout * 1_000_000), 1)  # none at all would be no limit
            value = struct.pack("ll", *divmod(microseconds, 1_000_000))
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def set_deadline(self, deadline: float | None) -> None:
        """Let nothing wait beyond a moment of the monotonic clock. Raises TimeoutError when it has come."""
        if deadline is None:
            self.socket.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)

    def recv(self, most: int) -> bytes:
        """Return what has come, at most `most` bytes; b"" at the end. Raises TimeoutError when nothing came in time."""
        try:
            return self.socket.recv(most)
        except BlockingIOError:
            raise TimeoutError from None

    def send(self, parts: Sequence[ReadableBuffer]) -> None:
        """Send all parts, one behind the other. After an error nothing more can be sent. They are not copied."""
        views = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
        with self._sending:
            self._send_all(views)

    def stop_reading(self) -> None:
        """Let `recv` see the end, now or as soon as what already came was received."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RD)

    def abort(self) -> None:
        """Let everything that waits for the other side fail. The descriptor stays open."""
        # Not the method of SSLSocket, which would go on in plain text.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def settle(self, seconds: float) -> None:
        """Wait, at most so long, until all that was sent has arrived; what comes meanwhile is thrown away.

        A TCP socket that is closed with something unread takes back what is still on its way.
        """
        end = time.monotonic() + seconds
        while not (self._is_drained() and self._has_arrived()) and time.monotonic() < end:
            time.sleep(SETTLING)

    def close(self) -> None:
        """Give the descriptor back. No other method may be running."""
        self.socket.close()

    def _is_drained(self) -> bool:
        """Throw away what has come; whether that was all."""
        try:
            return not socket.socket.recv(self.socket, MOST_AT_ONCE, socket.MSG_DONTWAIT)
        except OSError:  # nothing is there, or nobody who could miss anything
            return True

    def _has_arrived(self) -> bool:
        """Whether the other side's system has all that was sent; a Unix socket hands it over at once."""
        if self.socket.family == socket.AF_UNIX:
            return True
        (left,) = struct.unpack("i", fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)))
        return not left

    def _send_all(self, views: list[memoryview]) -> None:
        first = 0
        while first < len(views):
            sent = self._send_some(views[first : first + MOST_VECTORS])
            while first < len(views) and sent >= views[first].nbytes:
                sent -= views[first].nbytes
                first += 1
            if sent:
                views[first] = views[first][sent:]

    def _send_some(self, views: list[memoryview]) -> int:
        try:
            return self.socket.sendmsg(views)
        except BlockingIOError:
            raise TimeoutError from None


class TlsStream(Stream):
    """A connection inside TLS. `connected` comes from an SSLContext; nothing goes through it before `shake_hands`."""

    def __init__(self, connected: ssl.SSLSocket) -> None:
        super().__init__(connected)
        self._tls = connected
        self._session = threading.Lock()
        self._idle_timeout = 0.0
        self._deadline: float | None = None
        connected.setblocking(False)

    def begin_transmission(self, idle_timeout: float) -> None:
        self._deadline = None
        self._idle_timeout = idle_timeout

    def set_deadline(self, deadline: float | None) -> None:
        self._deadline = deadline
        self._left()

    def shake_hands(self, deadline: float | None) -> None:
        """Do the TLS handshake. Raises ssl.SSLError, OSError, or TimeoutError at the deadline."""
        self.set_deadline(deadline)
        self._do(self._tls.do_handshake)

    def recv(self, most: int) -> bytes:
        try:
            return self._do(partial(self._tls.recv, most))
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return b""

    def close(self) -> None:
        """Say goodbye as TLS wants it, without waiting for the answer, and give the descriptor back."""
        with contextlib.suppress(OSError, ValueError), self._session:
            self._tls.unwrap()
        super().close()

    def _send_some(self, views: list[memoryview]) -> int:
        # Small parts together: a header in a TLS record of its own would cost as much as a page behind it.
        joined = b"".join(views) if sum(view.nbytes for view in views) <= MOST_AT_ONCE else views[0][:MOST_AT_ONCE]
        return self._do(partial(self._tls.send, joined))

    def _do(self, step: Callable[[], T]) -> T:
        """Do one step of the TLS library, which never waits, until it succeeds."""
        while True:
            try:
                with self._session:
                    return step()
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)

    def _left(self) -> float | None:
        """Seconds that may be waited, None for no end."""
        if self._deadline is None:
            return self._idle_timeout or None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _wait(self, events: int) -> None:
        left = self._left()
        poll = select.poll()
        poll.register(self._tls.fileno(), events)
        if not poll.poll(None if left is None else left * 1000):
            raise TimeoutError
