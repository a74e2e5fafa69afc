"""A connected socket to an NBD server: what is sent leaves in one piece, what comes goes where the caller says.

It knows no message. One thread may receive while another sends; OSError and CryptoError come out, TimeoutError where a
deadline passed.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Sequence

from cowslice.nbd.buffer import Bytes
from cowslice.storage.nbdaddress import NbdAddress

MOST_AT_ONCE = 1 << 18  # bytes that are waited for together: waking up for each packet costs more than a copy
MOST_VECTORS = 512  # of one sendmsg; Linux takes 1024


def dial(address: NbdAddress, deadline: float) -> Channel:
    """Connect. Raises OSError."""
    left = max(deadline - time.monotonic(), 0.001)
    if not address.path:
        connected = socket.create_connection((address.host, address.port), left)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return Channel(connected)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(left)
        connected.connect(address.path)
    except BaseException:
        connected.close()
        raise
    return Channel(connected)


class Channel:
    """A plain connection. It owns the socket."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._deadline: float | None = None

    def set_deadline(self, deadline: float) -> None:
        """Let nothing wait beyond a moment of the monotonic clock."""
        self._deadline = deadline

    def begin_transmission(self, patience: float) -> None:
        """Wait for bytes without end from now on, and `patience` seconds for the other side to take some."""
        self._deadline = None
        self.socket.settimeout(None)
        value = struct.pack("ll", int(patience), int(patience % 1 * 1_000_000))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def recv(self, most: int) -> bytes:
        """What has come, at most `most` bytes; b"" at the end."""
        self._arm()
        return self.socket.recv(most)

    def recv_into(self, target: memoryview) -> int:
        """Put what comes at the start of `target`; the number of bytes, 0 at the end. It may wait for many of them."""
        self._arm()
        return self.socket.recv_into(target[:MOST_AT_ONCE], flags=socket.MSG_WAITALL)

    def send(self, parts: Sequence[Bytes]) -> None:
        """Send all parts, one behind the other, for one thread at a time. They are not copied."""
        views = [view for part in parts if (view := memoryview(part)).nbytes]
        first = 0
        while first < len(views):
            sent = self._send_some(views[first : first + MOST_VECTORS])
            while first < len(views) and sent >= views[first].nbytes:
                sent -= views[first].nbytes
                first += 1
            if sent:
                views[first] = views[first][sent:]

    def say_last(self, parts: Sequence[Bytes]) -> None:
        """Send a few last bytes if that is possible without waiting."""
        with contextlib.suppress(OSError):
            self.socket.sendmsg(list(parts), [], socket.MSG_DONTWAIT)

    def shut(self) -> None:
        """Let everything that waits for the other side end. The descriptor stays open."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back. No other method may be running."""
        self.socket.close()

    def _send_some(self, views: list[memoryview]) -> int:
        self._arm()
        try:
            return self.socket.sendmsg(views)
        except BlockingIOError:
            raise TimeoutError from None

    def _arm(self) -> None:
        if self._deadline is None:
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)
