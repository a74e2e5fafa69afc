"""A small NBD server that does what a test says: honest in the negotiation, then as the script wants.

It is the protocol's server half over a Unix socket, with a thread for each client.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from cowslice.nbd import Export
from cowslice.nbd.wire import (
    CLIENT_FLAGS,
    COMPACT_REQUEST,
    GREETING,
    NBD_MAGIC,
    OLD_EXPORT,
    OPTION,
    OPTION_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    ExportFlag,
    HandshakeFlag,
)
from tests.unit.nbd.talk import Disk, Server

PATIENCE = 30.0


class Client:
    """One connection as the script sees it."""

    def __init__(self, connected: socket.socket, server: Server) -> None:
        self.socket = connected
        self.server = server

    def negotiate(self) -> None:
        """Go on until transmission begins."""
        self.socket.sendall(self.server.feed(b""))
        while self.server._transmission is None:
            self._step(lambda said: said)

    def negotiate_plainly(self, size: int, flags: int = int(ExportFlag.HAS_FLAGS)) -> None:
        """As a server that is too old for options: replies are simple then, and a script can speak them by hand."""
        self.socket.sendall(GREETING.pack(NBD_MAGIC, OPTION_MAGIC, HandshakeFlag.NO_ZEROES))
        self._exactly(CLIENT_FLAGS.size)
        *_, length = OPTION.unpack(self._exactly(OPTION.size))
        self._exactly(length)
        self.socket.sendall(OLD_EXPORT.pack(size, flags))

    def answer(self, spoil: Callable[[bytes], bytes] = lambda said: said) -> None:
        """Answer until the client leaves; `spoil` may change what is said."""
        while self._step(spoil):
            pass

    def request(self) -> tuple[int, int, int, int]:
        """The next request without a payload: command, cookie, offset, length. Raises EOFError."""
        header = self._exactly(COMPACT_REQUEST.size)
        _, _, command, cookie, offset, length = COMPACT_REQUEST.unpack(header)
        return command, cookie, offset, length

    def reply(self, cookie: int, content: bytes = b"", error: int = 0) -> None:
        """A simple reply."""
        self.socket.sendall(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie) + content)

    def wait_for_end(self) -> None:
        """Say nothing, take everything, until the client leaves."""
        while self.socket.recv(1 << 16):
            pass

    def _exactly(self, length: int) -> bytes:
        taken = b""
        while len(taken) < length:
            got = self.socket.recv(length - len(taken))
            if not got:
                raise EOFError
            taken += got
        return taken

    def _step(self, spoil: Callable[[bytes], bytes]) -> bool:
        got = self.socket.recv(1 << 16)
        if got:
            self.socket.sendall(spoil(self.server.feed(got)))
        return bool(got) and not self.server.closed


Script = Callable[[Client], None]


def honest(client: Client) -> None:
    client.negotiate()
    client.answer()


@contextlib.contextmanager
def scripted(
    disk: Disk, script: Script = honest, *, export: Export | None = None
) -> Iterator[str]:
    """Serve until the block ends; the value is the URI. What the script raises is the test's failure."""
    export = export or Export("", len(disk.content))
    faults: list[BaseException] = []
    clients: list[tuple[threading.Thread, socket.socket]] = []

    def serve(connected: socket.socket) -> None:
        with connected:
            connected.settimeout(PATIENCE)
            try:
                script(Client(connected, Server([export], {export.name: disk})))
            except (ConnectionError, EOFError):
                pass  # the client has left
            except BaseException as fault:
                faults.append(fault)

    def accept(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = listening.accept()
                thread = threading.Thread(target=serve, args=(connected,))
                clients.append((thread, connected))
                thread.start()

    with tempfile.TemporaryDirectory(prefix="cowslice-") as folder, socket.socket(socket.AF_UNIX) as listening:
        path = Path(folder, "s")
        listening.bind(str(path))
        listening.listen()
        accepting = threading.Thread(target=accept, args=(listening,))
        accepting.start()
        try:
            yield f"nbd+unix:///{export.name}?socket={path}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for thread, connected in clients:
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)
                thread.join()
    assert not faults, faults
