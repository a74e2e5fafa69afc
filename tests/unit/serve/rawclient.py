"""A client for tests that may say anything: it sends what it is told, also nonsense, and takes replies apart.

Its negotiation is the project's own client half; requests and replies are its own few lines.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cowslice
from cowslice.format.entries import Kind
from cowslice.format.geometry import Geometry
from cowslice.nbd.events import Need, Ready, Session
from cowslice.nbd.opening import Opening, Wish
from cowslice.nbd.wire import BASE_ALLOCATION, Command, Mode
from cowslice.serve.connection import Connection, Service
from cowslice.serve.exports import Export
from cowslice.serve.transmission import Limits
from cowslice.storage import MemoryStorage, Storage
from cowslice.testing.model import Cell, ModelImage, build_image

KiB = 1 << 10
PATIENCE = 30.0  # seconds until a test gives up; nothing here takes long
WAYS = ("compiled", "python")  # of serving the same


@dataclass(slots=True)
class Reply:
    """What came for one request. `data` is as long as was asked for; `holes` and `chunks` count what it came in."""

    error: int = 0
    data: bytes = b""
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    holes: int = 0
    chunks: int = 0


class RawClient:
    """Negotiate on a connected socket, then `ask` and `answer`."""

    def __init__(
        self, connected: socket.socket, *, mode: Mode = Mode.STRUCTURED, contexts: tuple[str, ...] = (BASE_ALLOCATION,),
        export: str = "",
    ) -> None:
        self.socket = connected
        connected.settimeout(PATIENCE)
        self.mode = mode
        self._asked: dict[int, tuple[int, int, int]] = {}
        self._cookie = 0
        self.session, self._buffer = self._open(Wish(
            export, extended=mode is Mode.EXTENDED, structured=mode is not Mode.SIMPLE, contexts=contexts))

    def _open(self, wish: Wish) -> tuple[Session, bytes]:
        opening = Opening(wish)
        while True:
            event = opening.next_event()
            self.socket.sendall(opening.data_to_send())
            if isinstance(event, Ready):
                return event.session, opening.take_leftover()
            assert isinstance(event, Need), event
            data = self.socket.recv(4096)
            assert data, "the server closed"
            opening.receive(data)

    def request(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> bytes:
        """The bytes of a request, whose cookie is the next number; it counts as asked."""
        self._cookie += 1
        self._asked[self._cookie] = command, offset, length
        if self.mode is Mode.EXTENDED:
            return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, self._cookie, offset, length) + payload
        return struct.pack(">IHHQQI", 0x25609513, flags, command, self._cookie, offset, length) + payload

    def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request; its cookie."""
        self.socket.sendall(self.request(command, offset, length, flags=flags, payload=payload))
        return self._cookie

    def read(self, offset: int, length: int, **more: Any) -> Reply:
        """Ask for bytes and wait for them, as the only request under way."""
        return self.collect(self.ask(Command.READ, offset, length, **more))

    def status(self, offset: int, length: int, **more: Any) -> Reply:
        """Ask for block status and wait for it."""
        return self.collect(self.ask(Command.BLOCK_STATUS, offset, length, **more))

    def collect(self, cookie: int) -> Reply:
        """Wait for this reply, which must be the next."""
        found, reply = self.answer()
        assert found == cookie
        return reply

    def answers(self, count: int) -> dict[int, Reply]:
        """Wait for that many replies, chunks of which may come mixed."""
        done: dict[int, Reply] = {}
        partial: dict[int, Reply] = {}
        while len(done) < count:
            cookie, last = self._take(partial)
            if last:
                assert cookie not in done
                done[cookie] = partial.pop(cookie)
        return done

    def answer(self) -> tuple[int, Reply]:
        """Wait for the next whole reply."""
        ((cookie, reply),) = self.answers(1).items()
        return cookie, reply

    def ended(self) -> bool:
        """Wait until the server closes; whether it said nothing more."""
        try:
            return not self._buffer and self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def _exactly(self, length: int) -> bytes:
        while len(self._buffer) < length:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._buffer += data
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _take(self, partial: dict[int, Reply]) -> tuple[int, bool]:
        if self.mode is Mode.SIMPLE:
            return self._take_simple(partial), True
        if self.mode is Mode.EXTENDED:
            magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", self._exactly(32))
            assert (magic, offset) == (0x6E8A278C, self._asked[cookie][1])
        else:
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self._exactly(20))
            assert magic == 0x668E33EF
        reply = partial.setdefault(cookie, self._empty(cookie))
        self._fold(reply, cookie, kind, self._exactly(length))
        return cookie, bool(flags & 1)

    def _take_simple(self, partial: dict[int, Reply]) -> int:
        magic, error, cookie = struct.unpack(">IIQ", self._exactly(16))
        assert magic == 0x67446698
        reply = partial[cookie] = Reply(error)
        command, _, length = self._asked[cookie]
        if command == Command.READ and not error:
            reply.data = self._exactly(length)
        return cookie

    def _empty(self, cookie: int) -> Reply:
        command, _, length = self._asked[cookie]
        return Reply(data=b"?" * length if command == Command.READ and length < 1 << 30 else b"")

    def _fold(self, reply: Reply, cookie: int, kind: int, payload: bytes) -> None:
        reply.chunks += 1
        start = self._asked[cookie][1]
        if kind & 0x8000:
            (reply.error,) = struct.unpack_from(">I", payload)
            reply.data = b""
        elif kind == 1:
            at = int.from_bytes(payload[:8], "big") - start
            reply.data = reply.data[:at] + payload[8:] + reply.data[at + len(payload) - 8 :]
        elif kind == 2:
            place, length = struct.unpack(">QI", payload)
            at = place - start
            reply.data = reply.data[:at] + bytes(length) + reply.data[at + length :]
            reply.holes += 1
        elif kind == 5:
            reply.extents[int.from_bytes(payload[:4], "big")] = list(struct.iter_unpack(">II", payload[4:]))
        elif kind == 6:
            context, count = struct.unpack_from(">II", payload)
            reply.extents[context] = list(struct.iter_unpack(">QQ", payload[8:]))
            assert len(reply.extents[context]) == count


def connected_to(place: str) -> socket.socket:
    """A connection to a Unix socket on which nothing was said yet."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(PATIENCE)
    connected.connect(place)
    return connected


def connect(place: str, **options: Any) -> RawClient:
    """A client of the server at a Unix socket."""
    return RawClient(connected_to(place), **options)


@dataclass(slots=True)
class Wired:
    """One connection of a server, and the client's end of it."""

    socket: socket.socket
    connection: Connection
    thread: threading.Thread
    reports: list[str]

    def client(self, **options: Any) -> RawClient:
        return RawClient(self.socket, **options)


@contextmanager
def wired(
    disk: cowslice.Image, *, way: str = "compiled", limits: Limits | None = None,
    pair: tuple[socket.socket, socket.socket] | None = None, **options: Any
) -> Iterator[Wired]:
    """Serve a disk to one client over a socket pair; in the end the connection must be over, and all its threads."""
    ours, theirs = pair or socket.socketpair()
    reports: list[str] = []
    limits = limits or Limits()
    exports = {"": Export(disk, max_request=limits.max_request, **options)}
    connection = Connection(
        ours, Service(exports=exports, limits=limits, report=reports.append, compiled=way == "compiled"), "client 1")
    thread = threading.Thread(target=connection.run)
    thread.start()
    try:
        yield Wired(theirs, connection, thread, reports)
    finally:
        theirs.close()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the connection did not end"
        assert not [one.name for one in threading.enumerate() if one.name.startswith("client 1")]


def model(cells: str, *, cluster_bits: int = 16, salt: int = 1) -> ModelImage:
    """An image whose clusters are: N normal, Z zero, . unallocated, C compressed."""
    kinds = {"N": Kind.NORMAL, "Z": Kind.ZERO, ".": Kind.UNALLOCATED, "C": Kind.COMPRESSED}
    geometry = Geometry(cluster_bits)
    return build_image(geometry, [Cell(kinds[cell]) for cell in cells], size=len(cells) << cluster_bits, salt=salt)


def in_memory(image: ModelImage) -> Storage:
    return MemoryStorage(image.file)
