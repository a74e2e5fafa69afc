"""The client's half of transmission: requests out, replies put together.

It does not know sockets and copies no payload more than once: what is written is referred to until it was sent, what is
read goes straight into the caller's buffer. Requests that the session does not allow are refused here
(LocalProtocolError); nothing that the server says is trusted (RemoteProtocolError, then the connection is only good for
closing).
"""

from __future__ import annotations

from collections.abc import Iterable

from cowslice.errors import LocalProtocolError, RemoteProtocolError
from cowslice.nbd.assembly import Pending
from cowslice.nbd.buffer import Bytes, Inbox
from cowslice.nbd.events import NEED_DATA, Completed, Need, Request, Session
from cowslice.nbd.options import decode_error_text
from cowslice.nbd.requests import fault_of
from cowslice.nbd.wire import (
    CHUNK_IS_ERROR,
    COMPACT_REQUEST,
    ERROR,
    EXTENDED_EXTENT,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    EXTENDED_STATUS,
    HOLE,
    MAX_STATUS_EXTENTS_TAKEN,
    MAX_STRING,
    REPLY_DONE,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STATUS_EXTENT,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    U32,
    U32_MAX,
    U64,
    Chunk,
    Command,
    CommandFlag,
    ExportFlag,
    Mode,
    error_from_wire,
)

ClientEvent = Need | Completed

_MAX_ERROR_CHUNK = 1 << 16  # an error is a string and a few fields, also one of a type that is not known
_ZEROES = bytes(1 << 16)
_COOKIES = (1 << 64) - 1


class ClientTransmission:
    """Send requests in a session and take the replies. `leftover` is what the handshake had left.

    Each request method returns a cookie, which comes back in Completed; replies come in any order. What is to be sent
    waits in `data_to_send`. Bytes go in by `receive`, or, faster, into `payload_target`.
    """

    def __init__(self, session: Session, leftover: Bytes = b"") -> None:
        self.session = session
        self._inbox = Inbox(leftover)
        self._outbox: list[Bytes] = []
        self._pending: dict[int, Pending] = {}
        self._cookie = 0
        self._disconnected = False
        self._broken = ""
        self._chunk: tuple[Pending, int, int, bool] | None = None  # request, type, payload length, last of its reply
        self._sink: tuple[Pending, memoryview, bool] | None = None  # request, part not filled yet, last of its reply

    # Requests

    def read(self, offset: int, target: memoryview, *, df: bool = False) -> int:
        """Fill a buffer from the export at `offset`. It belongs to us until the request is completed."""
        view = _as_bytes(target)
        if view.readonly:
            raise LocalProtocolError("the buffer of a read cannot be written to")
        request = self._request(Command.READ, offset, view.nbytes, CommandFlag.DF if df else 0)
        return self._send(request, target=view)

    def write(self, offset: int, data: Bytes, *, fua: bool = False) -> int:
        """Write a buffer to the export at `offset`. It must not change until it was sent."""
        payload = _as_bytes(memoryview(data))
        request = self._request(Command.WRITE, offset, payload.nbytes, CommandFlag.FUA if fua else 0)
        return self._send(request, payload=payload)

    def flush(self) -> int:
        """Make stable what was written and answered before."""
        return self._send(self._request(Command.FLUSH, 0, 0, 0))

    def trim(self, offset: int, length: int, *, fua: bool = False) -> int:
        """Say that a span is not needed any more; what it then reads as is not defined."""
        return self._send(self._request(Command.TRIM, offset, length, CommandFlag.FUA if fua else 0))

    def cache(self, offset: int, length: int) -> int:
        """Say that a span will be read soon."""
        return self._send(self._request(Command.CACHE, offset, length, 0))

    def write_zeroes(self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False,
                     fast: bool = False) -> int:
        """Make a span read as zeroes; `fast` fails with ENOTSUP rather than being slow."""
        flags = (CommandFlag.FUA if fua else 0) | (CommandFlag.NO_HOLE if no_hole else 0)
        flags |= CommandFlag.FAST_ZERO if fast else 0
        return self._send(self._request(Command.WRITE_ZEROES, offset, length, flags))

    def block_status(self, offset: int, length: int, *, one: bool = False,
                     contexts: Iterable[int] | None = None) -> int:
        """Ask for the status of a span in all contexts, or only in some where the server can do that."""
        selected = tuple(context.id for context in self.session.contexts)
        wanted = selected if contexts is None else tuple(contexts)
        flags = int(CommandFlag.REQ_ONE) if one else 0
        request = self._request(Command.BLOCK_STATUS, offset, length, flags, contexts=wanted)
        if wanted == selected:
            return self._send(request)
        if not self.session.flags & ExportFlag.BLOCK_STATUS_PAYLOAD:
            raise LocalProtocolError("the server cannot answer for some of the contexts only")
        if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(selected):
            raise LocalProtocolError(f"contexts {list(wanted)} are asked for, expected some of {list(selected)}")
        payload = U64.pack(length) + b"".join(U32.pack(context) for context in wanted)
        return self._send(request, payload=memoryview(payload))

    def disconnect(self) -> None:
        """Say goodbye. The server answers what is under way and closes; no request may follow."""
        if self._disconnected:
            return
        self._disconnected = True
        self._outbox.append(self._header(self._request(Command.DISC, 0, 0, 0), 0, 0))

    def _request(self, command: Command, offset: int, length: int, flags: int,
                 contexts: tuple[int, ...] = ()) -> Request:
        self._cookie = self._cookie + 1 & _COOKIES
        return Request(command, int(flags), self._cookie, offset, length, contexts=contexts)

    def _send(self, request: Request, *, target: memoryview | None = None, payload: memoryview | None = None) -> int:
        self._check(request)
        flags, length = request.flags, request.length
        if payload is not None:
            length = payload.nbytes
            if self.session.mode is Mode.EXTENDED:
                flags |= CommandFlag.PAYLOAD_LEN
        self._outbox.append(self._header(request, flags, length))
        if payload is not None and length:
            self._outbox.append(payload)
        self._pending[request.cookie] = Pending(request, target)
        return request.cookie

    def _check(self, request: Request) -> None:
        if self._disconnected or self._broken:
            raise LocalProtocolError("a request was made after the end of the session")
        if request.offset < 0 or request.length < 0:
            raise LocalProtocolError(f"{request.length} bytes at {request.offset} are asked for")
        fault = fault_of(self.session, request)
        if fault is not None:
            raise LocalProtocolError(f"{Command(request.command).name}: {fault.reason}")
        if self.session.mode is not Mode.EXTENDED and request.length > U32_MAX:
            raise LocalProtocolError(f"{request.length} bytes are asked for, expected up to {U32_MAX} in one request")

    def _header(self, request: Request, flags: int, length: int) -> bytes:
        if self.session.mode is Mode.EXTENDED:
            return EXTENDED_REQUEST.pack(
                EXTENDED_REQUEST_MAGIC, flags, request.command, request.cookie, request.offset, length
            )
        return COMPACT_REQUEST.pack(REQUEST_MAGIC, flags, request.command, request.cookie, request.offset, length)

    # Bytes

    @property
    def in_flight(self) -> int:
        """Requests that are not answered in full."""
        return len(self._pending)

    def data_to_send(self) -> list[Bytes]:
        """Buffers to be sent one after the other; those of writes are the caller's own."""
        buffers, self._outbox = self._outbox, []
        return buffers

    def receive(self, data: Bytes) -> None:
        """Take bytes from the server; they are copied. Then call `next_event` until it says NEED_DATA."""
        self._inbox.put(data)

    def payload_target(self) -> memoryview | None:
        """Where the very next bytes from the server belong, when that is a caller's buffer; then `payload_received`."""
        return self._sink[1] if self._sink is not None and not len(self._inbox) else None

    def payload_received(self, count: int) -> None:
        """Say that `count` bytes were received into `payload_target`."""
        if self._sink is None or len(self._inbox) or not 0 <= count <= len(self._sink[1]):
            raise LocalProtocolError(f"{count} bytes were received for no buffer")
        pending, rest, last = self._sink
        self._sink = pending, rest[count:], last

    def receive_eof(self) -> None:
        """The server closed. Raises RemoteProtocolError unless everything was answered."""
        if self._pending or len(self._inbox):
            raise self._break(f"it closed the connection with {len(self._pending)} requests not answered")

    # Replies

    def next_event(self) -> ClientEvent:
        """The next request that is completed. Raises RemoteProtocolError when the server breaks the protocol."""
        if self._broken:
            raise RemoteProtocolError(self._broken)
        try:
            while True:
                pending = self._advance()
                if pending is None:
                    return NEED_DATA
                if pending.request.cookie not in self._pending:
                    return pending.complete()
        except RemoteProtocolError as error:
            self._broken = str(error)
            raise

    def _advance(self) -> Pending | None:
        """One step: a header, or a payload. The request it belonged to, or None while bytes are missing."""
        if self._sink is not None:
            return self._fill()
        if self._chunk is not None:
            return self._read_chunk(*self._chunk)
        magic = self._inbox.peek(U32)
        if magic is None:
            return None
        return self._read_header(magic[0])

    def _read_header(self, magic: int) -> Pending | None:
        mode = self.session.mode
        if magic == SIMPLE_REPLY_MAGIC and mode is not Mode.EXTENDED:
            return self._read_simple()
        if mode is Mode.STRUCTURED and magic == STRUCTURED_REPLY_MAGIC:
            fields = self._inbox.take_fields(STRUCTURED_REPLY)
            return None if fields is None else self._begin_chunk(fields[1], fields[2], fields[3], None, fields[4])
        if mode is Mode.EXTENDED and magic == EXTENDED_REPLY_MAGIC:
            fields = self._inbox.take_fields(EXTENDED_REPLY)
            return None if fields is None else self._begin_chunk(*fields[1:])
        raise self._break(f"a reply begins with {magic:#010x}, which is none of a {mode.name.lower()} session")

    def _find(self, cookie: int) -> Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise self._break(f"it answers a request {cookie:#x} that is not under way")
        return pending

    def _read_simple(self) -> Pending | None:
        fields = self._inbox.take_fields(SIMPLE_REPLY)
        if fields is None:
            return None
        pending = self._find(fields[2])
        request = pending.request
        if fields[1]:
            pending.take_error(error_from_wire(fields[1]), "", None)
        if self.session.mode is Mode.STRUCTURED and request.command == Command.READ:
            raise self._break("it answers a READ with a simple reply in a structured session")
        if request.command == Command.READ and not fields[1] and request.length:
            self._sink = pending, pending.take_content(request.offset, request.length), True
            return self._fill()
        del self._pending[request.cookie]
        return pending

    def _begin_chunk(self, flags: int, chunk: int, cookie: int, offset: int | None, length: int) -> Pending | None:
        pending = self._find(cookie)
        if offset is not None and offset != pending.request.offset:
            raise self._break(f"it answers offset {offset}, expected {pending.request.offset} as in the request")
        self._check_length(pending, chunk, length)
        self._chunk = pending, chunk, length, bool(flags & REPLY_DONE)
        return self._read_chunk(*self._chunk)

    def _check_length(self, pending: Pending, chunk: int, length: int) -> None:
        """Refuse a payload by its header, before it is stored."""
        if chunk & CHUNK_IS_ERROR:
            least, most, step = ERROR.size, _MAX_ERROR_CHUNK, 1
        elif chunk == Chunk.OFFSET_DATA:
            least, most, step = U64.size + 1, U64.size + pending.request.length, 1
        elif chunk == Chunk.OFFSET_HOLE:
            least, most, step = HOLE.size, HOLE.size, 1
        elif chunk == Chunk.NONE:
            least, most, step = 0, 0, 1
        elif chunk == self._status_chunk():
            first, step = (8, 16) if chunk == Chunk.BLOCK_STATUS_EXT else (4, 8)
            least, most = first + step, first + step * MAX_STATUS_EXTENTS_TAKEN
        else:
            raise self._break(f"a chunk has type {chunk}, which no {self.session.mode.name.lower()} session has")
        if not least <= length <= most or (length - least) % step:
            raise self._break(f"a chunk of type {chunk} has {length} bytes, expected {least} to {most}")

    def _status_chunk(self) -> Chunk:
        return Chunk.BLOCK_STATUS_EXT if self.session.mode is Mode.EXTENDED else Chunk.BLOCK_STATUS

    def _read_chunk(self, pending: Pending, chunk: int, length: int, last: bool) -> Pending | None:
        if chunk == Chunk.OFFSET_DATA:
            offset = self._inbox.take_fields(U64)
            if offset is None:
                return None
            self._chunk = None
            self._sink = pending, pending.take_content(offset[0], length - U64.size), last
            return self._fill()
        payload = self._inbox.take(length)
        if payload is None:
            return None
        self._chunk = None
        self._take_chunk(pending, chunk, payload)
        if chunk == Chunk.NONE and not last:
            raise self._break("a chunk of type NONE is not the last of its reply")
        return self._end_of_chunk(pending, last)

    def _fill(self) -> Pending | None:
        if self._sink is None:
            return None
        pending, rest, last = self._sink
        rest = rest[self._inbox.take_into(rest) :]
        if len(rest):
            self._sink = pending, rest, last
            return None
        self._sink = None
        return self._end_of_chunk(pending, last)

    def _end_of_chunk(self, pending: Pending, last: bool) -> Pending:
        if last:
            del self._pending[pending.request.cookie]
        return pending

    def _take_chunk(self, pending: Pending, chunk: int, payload: bytes) -> None:
        if chunk & CHUNK_IS_ERROR:
            self._take_error(pending, chunk, payload)
        elif chunk == Chunk.OFFSET_HOLE:
            _zero(pending.take_content(*HOLE.unpack(payload)))
        elif chunk == Chunk.BLOCK_STATUS:
            (context,) = U32.unpack_from(payload)
            pending.take_status(self.session, context, STATUS_EXTENT.iter_unpack(payload[U32.size :]))
        elif chunk == Chunk.BLOCK_STATUS_EXT:
            context, count = EXTENDED_STATUS.unpack_from(payload)
            if count * EXTENDED_EXTENT.size != len(payload) - EXTENDED_STATUS.size:
                raise self._break(f"a status says that it has {count} extents in {len(payload)} bytes")
            pending.take_status(self.session, context, EXTENDED_EXTENT.iter_unpack(payload[EXTENDED_STATUS.size :]))

    def _take_error(self, pending: Pending, chunk: int, payload: bytes) -> None:
        """Any error chunk begins alike; one of a type that is not known tells no more than that."""
        value, length = ERROR.unpack_from(payload)
        rest = payload[ERROR.size + length :]
        fields = U64.size if chunk == Chunk.ERROR_OFFSET else 0
        if not value or length > MAX_STRING or ERROR.size + length + fields > len(payload):
            raise self._break(f"an error chunk has error {value} and {length} bytes of text in {len(payload)} bytes")
        text = decode_error_text(payload[ERROR.size : ERROR.size + length])
        offset = U64.unpack_from(rest)[0] if fields and pending.request.command != Command.FLUSH else None
        pending.take_error(error_from_wire(value), text, offset)

    def _break(self, reason: str) -> RemoteProtocolError:
        self._broken = f"the server broke the NBD protocol: {reason}"
        return RemoteProtocolError(self._broken)


def _as_bytes(buffer: memoryview) -> memoryview:
    """The same memory as plain bytes."""
    if not buffer.c_contiguous:
        raise LocalProtocolError("a buffer has gaps, expected contiguous memory")
    return buffer.cast("B")


def _zero(target: memoryview) -> None:
    """Fill with zeroes without making as many."""
    for at in range(0, len(target), len(_ZEROES)):
        part = target[at : at + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]
