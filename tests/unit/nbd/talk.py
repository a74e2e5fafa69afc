"""Both halves of the protocol without sockets: three ways to feed a message, and a whole server over a bytearray.

The server knows nothing that the protocol does not: what it serves is a `Disk`, which tests shape and break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from cowslice.nbd import (
    NEED_DATA,
    Aborted,
    BadRequest,
    Data,
    Disconnect,
    Export,
    Hole,
    Negotiated,
    Replies,
    Request,
    ServerHandshake,
    ServerTransmission,
    StartTls,
)
from cowslice.nbd.wire import (
    BASE_ALLOCATION,
    CLIENT_FLAGS,
    COMPACT_REQUEST,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    STATE_HOLE,
    STATE_ZERO,
    Command,
    CommandFlag,
    NbdError,
)

FIXED = CLIENT_FLAGS.pack(3)  # fixed newstyle, no zeroes


class Machine(Protocol):
    """What takes bytes and gives events."""

    def receive(self, data: bytes) -> None: ...
    def next_event(self) -> Any: ...


def drain(machine: Machine) -> list[Any]:
    """Every event that the bytes so far make."""
    events = []
    while (event := machine.next_event()) is not NEED_DATA:
        events.append(event)
    return events


def feed_whole(machine: Machine, message: bytes) -> list[Any]:
    machine.receive(message)
    return drain(machine)


def feed_bytes(machine: Machine, message: bytes) -> list[Any]:
    """One byte at a time: nothing may be said before the last one."""
    early = []
    for number, byte in enumerate(message, 1):
        machine.receive(bytes([byte]))
        events = drain(machine)
        if number < len(message):
            early += events
    assert not early, f"said before the message was whole: {early}"
    return events


def feed_trailing(machine: Machine, message: bytes) -> list[Any]:
    """With the beginning of another message behind it."""
    machine.receive(message + TRAILING)
    return drain(machine)


TRAILING = b"\x25"  # the first byte of a request; too few for anything
WAYS: tuple[Callable[[Machine, bytes], list[Any]], ...] = (feed_whole, feed_bytes, feed_trailing)


def compact(command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 7) -> bytes:
    """A compact request header."""
    return COMPACT_REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def extended(command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 7) -> bytes:
    """An extended request header."""
    return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)


Verdict = tuple[NbdError, str, int | None] | None


@dataclass(slots=True)
class Disk:
    """Content, in granules that are holes when they are zero. `verdict` may fail any request."""

    content: bytearray
    granule: int = 4096
    verdict: Callable[[Request], Verdict] = lambda _request: None
    log: list[Request | BadRequest] = field(default_factory=list)

    def spans(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Offset, length and whether it is a hole."""
        end = offset + length
        while offset < end:
            stop = min(end, (offset // self.granule + 1) * self.granule)
            yield offset, stop - offset, not any(self.content[offset:stop])
            offset = stop

    def pieces(self, offset: int, length: int) -> list[Data | Hole]:
        return [
            Hole(start, count) if hole else Data(start, bytes(self.content[start : start + count]))
            for start, count, hole in self.spans(offset, length)
        ]

    def extents(self, request: Request, context: str) -> list[tuple[int, int]]:
        """In base:allocation holes are holes; every other context says 1 for data."""
        empty, full = (STATE_HOLE | STATE_ZERO, 0) if context == BASE_ALLOCATION else (0, 1)
        return [(count, empty if hole else full) for _, count, hole in self.spans(request.offset, request.length)]

    def change(self, request: Request) -> None:
        if request.command == Command.WRITE:
            self.content[request.offset : request.offset + request.length] = request.payload
        elif request.command in (Command.TRIM, Command.WRITE_ZEROES):
            self.content[request.offset : request.offset + request.length] = bytes(request.length)


class Server:
    """One connection of a whole server. `feed` takes what the client says and returns what it is answered."""

    def __init__(self, exports: Iterable[Export], disks: dict[str, Disk], **policy: Any) -> None:
        self.handshake = ServerHandshake(exports, **policy)
        self.disks = disks
        self.closed = False
        self.tls_wanted = False
        self._transmission: ServerTransmission | None = None
        self._replies: Replies | None = None

    def feed(self, data: bytes) -> bytes:
        if self._transmission is None:
            self.handshake.receive(data)
            return self._negotiate()
        self._transmission.receive(data)
        return self._transmit(self._transmission)

    def _negotiate(self) -> bytes:
        said = bytearray()
        while True:
            event = self.handshake.next_event()
            said += self.handshake.data_to_send()
            if isinstance(event, Negotiated):
                self._transmission = ServerTransmission(event.session, self.handshake.take_leftover())
                self._replies = Replies(event.session)
                return bytes(said) + self._transmit(self._transmission)
            self.tls_wanted = isinstance(event, StartTls)
            self.closed = isinstance(event, Aborted)
            if event is NEED_DATA or self.closed or self.tls_wanted:
                return bytes(said)

    def _transmit(self, transmission: ServerTransmission) -> bytes:
        said = bytearray()
        while (event := transmission.next_event()) is not NEED_DATA:
            if isinstance(event, Disconnect):
                self.closed = True
                break
            said += b"".join(self._answer(event, self.disks[transmission.session.name]))
        return bytes(said)

    def _answer(self, event: Request | BadRequest, disk: Disk) -> list[Any]:
        assert self._replies is not None
        assert self._transmission is not None
        replies = self._replies
        disk.log.append(event)
        if isinstance(event, BadRequest):
            return [replies.error(event.request, event.error, event.reason)]
        verdict = disk.verdict(event)
        if verdict is not None:
            error, reason, offset = verdict
            return [replies.error(event, error, reason, offset=offset)]
        if event.command == Command.READ:
            return list(replies.read(event, disk.pieces(event.offset, event.length)))
        if event.command == Command.BLOCK_STATUS:
            names = {context.id: context.name for context in self._transmission.session.contexts}
            return [replies.status(event, {number: disk.extents(event, names[number]) for number in event.contexts})]
        disk.change(event)
        return [replies.done(event)]


PAYLOAD = int(CommandFlag.PAYLOAD_LEN)
