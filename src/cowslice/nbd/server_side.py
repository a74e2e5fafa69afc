"""The server's half of transmission: bytes in, checked requests out.

It does not know what a request does, nor in which order replies go: `replies` makes those. One request comes out of
each `next_event`; at most one payload within the export's limits is held, and what is refused is not stored at all.
"""

from __future__ import annotations

from cowslice.errors import LocalProtocolError, RemoteProtocolError
from cowslice.nbd.buffer import Bytes, Inbox
from cowslice.nbd.events import NEED_DATA, BadRequest, Disconnect, Need, Request, Session
from cowslice.nbd.requests import SHUTTING_DOWN, Fault, fault_of
from cowslice.nbd.wire import (
    COMPACT_REQUEST,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    REQUEST_MAGIC,
    U32,
    U64,
    Command,
    CommandFlag,
    ExportFlag,
    Mode,
    NbdError,
    word,
)

ServerEvent = Need | Request | BadRequest | Disconnect

_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)


class ServerTransmission:
    """Take one client's requests. `leftover` is what the handshake had left.

    Bytes go in by `receive`; each `next_event` gives a Request to carry out, a BadRequest to answer with its error, or
    Disconnect. Call it until it says NEED_DATA before the next `receive`, then one request bounds the memory.
    """

    def __init__(self, session: Session, leftover: Bytes = b"") -> None:
        self.session = session
        self._inbox = Inbox(leftover)
        self._extended = session.mode is Mode.EXTENDED
        self._header = EXTENDED_REQUEST if self._extended else COMPACT_REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if self._extended else REQUEST_MAGIC
        self._context_ids = tuple(context.id for context in session.contexts)
        self._waiting: tuple[Request, int] | None = None  # a header whose payload has not all come, and its length
        self._refused: BadRequest | None = None  # to be told when its payload is over
        self._broken = ""
        self._gone = False
        self._stopping = False

    def receive(self, data: Bytes) -> None:
        """Take bytes from the client; they are copied, what belongs to a refused request is dropped."""
        self._inbox.put(data)

    def shut_down(self) -> None:
        """Refuse every request from now on with ESHUTDOWN; those given out before are still to be answered."""
        self._stopping = True

    @property
    def refused(self) -> BadRequest | None:
        """The request that `next_event` will refuse once its payload has gone by."""
        return self._refused

    def take_leftover(self) -> bytes:
        """Every byte that belongs to no request yet. Raises LocalProtocolError in the middle of a payload."""
        if self._waiting is not None or self._refused is not None:
            raise LocalProtocolError("a request is half read, its header is gone")
        return self._inbox.take_all()

    def next_event(self) -> ServerEvent:
        """The next request. Raises RemoteProtocolError when the stream cannot be understood any more: close then."""
        if self._broken:
            raise RemoteProtocolError(self._broken)
        if self._gone:
            return NEED_DATA
        if self._refused is not None:
            return self._tell_refused(self._refused)
        if self._waiting is None:
            return self._read_header()
        return self._read_payload(*self._waiting)

    def _read_header(self) -> ServerEvent:
        fields = self._inbox.take_fields(self._header)
        if fields is None:
            return NEED_DATA
        magic, flags, command, cookie, offset, length = fields
        if magic != self._magic:
            raise self._break(f"a request begins with {magic:#010x}, expected {self._magic:#010x}")
        request = Request(command, flags, cookie, offset, length)
        if command == Command.DISC:
            self._gone = True
            return Disconnect()
        payload = self._payload_length(request)
        if payload:
            return self._expect_payload(request, payload)
        return self._judge(request, self._fault_without_payload(request))

    def _payload_length(self, request: Request) -> int:
        """Bytes that follow the header.

        WRITE brings its payload whether or not it says so: QEMU's client leaves the flag out with extended headers.
        """
        says_so = self._extended and request.flags & _PAYLOAD_LEN
        return request.length if says_so or request.command == Command.WRITE else 0

    def _fault_without_payload(self, request: Request) -> Fault | None:
        if not request.flags & _PAYLOAD_LEN or (self._extended and request.command == Command.WRITE):
            return None
        return Fault(NbdError.EINVAL, f"{word(request.command, Command)} has the flag PAYLOAD_LEN and no payload")

    def _expect_payload(self, request: Request, length: int) -> ServerEvent:
        if length > max(MAX_PAYLOAD, self.session.block_sizes.maximum):
            raise self._break(f"{word(request.command, Command)} has a payload of {length} bytes")
        fault = self._fault_with_payload(request, length)
        if fault is not None:
            self._inbox.skip(length)
            self._refused = BadRequest(request, fault.error, fault.reason)
            return self._tell_refused(self._refused)
        self._waiting = request, length
        return self._read_payload(request, length)

    def _fault_with_payload(self, request: Request, length: int) -> Fault | None:
        """What is known to be wrong before a payload is stored."""
        if self._stopping:
            return SHUTTING_DOWN
        if request.command == Command.WRITE:
            return self._fault_of_write(request)
        if request.command != Command.BLOCK_STATUS or not self.session.flags & ExportFlag.BLOCK_STATUS_PAYLOAD:
            return Fault(NbdError.EINVAL, f"{word(request.command, Command)} does not take a payload")
        most = U64.size + U32.size * len(self._context_ids)
        if length > most or length <= U64.size or length % U32.size:
            return Fault(NbdError.EINVAL, f"BLOCK_STATUS has a payload of {length} bytes, expected 12 to {most}")
        return None

    def _fault_of_write(self, request: Request) -> Fault | None:
        if request.flags & _PAYLOAD_LEN and not self._extended:
            return Fault(NbdError.EINVAL, "the flag PAYLOAD_LEN needs extended headers")
        return fault_of(self.session, _without_payload_flag(request))

    def _tell_refused(self, refused: BadRequest) -> ServerEvent:
        if self._inbox.skipping:
            return NEED_DATA
        self._refused = None
        return refused

    def _read_payload(self, request: Request, length: int) -> ServerEvent:
        payload = self._inbox.take(length)
        if payload is None:
            return NEED_DATA
        self._waiting = None
        if request.command == Command.WRITE:
            return Request(Command.WRITE, _without_payload_flag(request).flags, request.cookie, request.offset, length,
                           payload)
        return self._filtered_status(request, payload)

    def _filtered_status(self, request: Request, payload: bytes) -> ServerEvent:
        """A BLOCK_STATUS that names the contexts it wants (extended headers, "NBD_CMD_BLOCK_STATUS")."""
        (effect,) = U64.unpack_from(payload)
        wanted = tuple(context for (context,) in U32.iter_unpack(payload[U64.size :]))
        asked = Request(Command.BLOCK_STATUS, _without_payload_flag(request).flags, request.cookie, request.offset,
                        effect, contexts=wanted)
        fault = None
        if len(set(wanted)) < len(wanted) or not set(wanted) <= set(self._context_ids):
            fault = Fault(NbdError.EINVAL, "BLOCK_STATUS names contexts twice or contexts that were not selected")
        return self._judge(asked, fault)

    def _judge(self, request: Request, fault: Fault | None) -> ServerEvent:
        if self._stopping:
            fault = SHUTTING_DOWN
        clean = _without_payload_flag(request)
        fault = fault or fault_of(self.session, clean)
        if fault is not None:
            return BadRequest(request, fault.error, fault.reason)
        if clean.command == Command.BLOCK_STATUS and not clean.contexts:
            return Request(clean.command, clean.flags, clean.cookie, clean.offset, clean.length,
                           contexts=self._context_ids)
        return clean

    def _break(self, reason: str) -> RemoteProtocolError:
        self._broken = f"the client broke the NBD protocol: {reason}"
        return RemoteProtocolError(self._broken)


def _without_payload_flag(request: Request) -> Request:
    """The request by its effect: the flag says only where the length comes from."""
    if not request.flags & _PAYLOAD_LEN:
        return request
    return Request(request.command, request.flags & ~_PAYLOAD_LEN, request.cookie, request.offset,
                   request.length, request.payload, request.contexts)
