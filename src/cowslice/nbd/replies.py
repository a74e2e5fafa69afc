"""What a server answers, in whichever of the three styles was negotiated.

It does not know where the data comes from and copies none of it: a reply is a list of buffers to be sent one after the
other. Raises LocalProtocolError when the protocol cannot say what it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import Struct

from cowslice.errors import LocalProtocolError
from cowslice.nbd.buffer import Bytes
from cowslice.nbd.events import Request, Session
from cowslice.nbd.wire import (
    ERROR,
    EXTENDED_EXTENT,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_STATUS,
    HOLE,
    MAX_STATUS_EXTENTS,
    REPLY_DONE,
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
    Mode,
    NbdError,
    cut,
)

_DF = int(CommandFlag.DF)
_REQ_ONE = int(CommandFlag.REQ_ONE)
_ZEROES = memoryview(bytes(1 << 16))
# The longest extent of a compact block status: as much as 32 bits can say in whole 64 KiB blocks.
_LONGEST_COMPACT = U32_MAX & ~0xFFFF


@dataclass(frozen=True, slots=True)
class Data:
    """Content of the export at `offset`. The buffer is referred to, not copied."""

    offset: int
    payload: Bytes

    @property
    def length(self) -> int:
        """Bytes of the export that it describes."""
        return memoryview(self.payload).nbytes


@dataclass(frozen=True, slots=True)
class Hole:
    """Bytes of the export that read as zeroes and are not sent."""

    offset: int
    length: int


class Replies:
    """Encode the replies of one session. It has no state of its own: threads may share it."""

    __slots__ = ("_extent", "_extents", "_mode")

    def __init__(self, session: Session) -> None:
        self._mode = session.mode
        self._extent = EXTENDED_EXTENT if session.mode is Mode.EXTENDED else STATUS_EXTENT
        self._extents = max(1, min(MAX_STATUS_EXTENTS, session.block_sizes.maximum // self._extent.size))

    def done(self, request: Request) -> bytes:
        """Success, with nothing more to say."""
        if self._mode is Mode.SIMPLE:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)
        return self._chunk(request, Chunk.NONE, 0, done=True)

    def error(self, request: Request, error: NbdError, message: str = "", *, offset: int | None = None,
              done: bool = True) -> bytes:
        """Failure, with a sentence and the offset of the bad byte where the style has room for them."""
        if self._mode is Mode.SIMPLE:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, request.cookie)
        text = cut(message)
        payload = ERROR.pack(error, len(text)) + text
        if offset is None:
            return self._chunk(request, Chunk.ERROR, len(payload), done=done) + payload
        self._check_inside(request, offset, 0)
        payload += U64.pack(offset)
        return self._chunk(request, Chunk.ERROR_OFFSET, len(payload), done=done) + payload

    def data_header(self, request: Request, offset: int, length: int, *, done: bool = True) -> bytes:
        """What stands before `length` bytes of content. In the simple style the content is the whole request."""
        self._check_inside(request, offset, length)
        if self._mode is Mode.SIMPLE:
            if (offset, length) != (request.offset, request.length):
                raise LocalProtocolError("a simple reply has room for the whole answer only")
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)
        if not length:
            raise LocalProtocolError("a chunk of data describes no bytes, expected at least one")
        return self._chunk(request, Chunk.OFFSET_DATA, U64.size + length, done=done) + U64.pack(offset)

    def hole(self, request: Request, offset: int, length: int, *, done: bool = True) -> bytes:
        """Zeroes that are not sent. The simple style cannot say it."""
        self._check_inside(request, offset, length)
        if self._mode is Mode.SIMPLE or not 0 < length <= U32_MAX:
            raise LocalProtocolError(f"a hole of {length} bytes cannot be said in a {self._mode.name.lower()} reply")
        return self._chunk(request, Chunk.OFFSET_HOLE, HOLE.size, done=done) + HOLE.pack(offset, length)

    def read(self, request: Request, pieces: Sequence[Data | Hole]) -> list[Bytes]:
        """The whole answer to a READ from pieces that cover it in order without gaps.

        In the simple style, and for the flag DF, holes become zeroes where they have to.
        """
        self._check_cover(request, pieces)
        if not request.length:
            return [self.done(request)]
        whole = request.flags & _DF and len(pieces) > 1
        if self._mode is Mode.SIMPLE or whole:
            content = [buffer for piece in pieces for buffer in _content(piece)]
            return [self.data_header(request, request.offset, request.length), *content]
        parts: list[Bytes] = []
        for number, piece in enumerate(pieces, 1):
            done = number == len(pieces)
            if isinstance(piece, Hole):
                parts.append(self.hole(request, piece.offset, piece.length, done=done))
            else:
                parts += (self.data_header(request, piece.offset, piece.length, done=done), piece.payload)
        return parts

    def block_status(self, request: Request, context: int, extents: Iterable[tuple[int, int]], *, done: bool) -> bytes:
        """One chunk: the status of one context from the request's offset on, as (length in bytes, status).

        Neighbours of one status are joined; what goes beyond the request, the flag REQ_ONE or the limits is left out.
        """
        if self._mode is Mode.SIMPLE or request.command != Command.BLOCK_STATUS:
            raise LocalProtocolError("a block status answers only BLOCK_STATUS, in chunks")
        kept = self._fitting(request, extents)
        packed = b"".join(self._extent.pack(length, status) for length, status in kept)
        if self._mode is Mode.EXTENDED:
            payload = EXTENDED_STATUS.pack(context, len(kept)) + packed
            return self._chunk(request, Chunk.BLOCK_STATUS_EXT, len(payload), done=done) + payload
        payload = U32.pack(context) + packed
        return self._chunk(request, Chunk.BLOCK_STATUS, len(payload), done=done) + payload

    def status(self, request: Request, extents: dict[int, Iterable[tuple[int, int]]]) -> bytes:
        """The whole answer to a BLOCK_STATUS: the extents of every context that it asks for, by id."""
        if set(extents) != set(request.contexts):
            raise LocalProtocolError(f"contexts {sorted(extents)} are answered, expected {sorted(request.contexts)}")
        last = len(extents)
        return b"".join(
            self.block_status(request, context, found, done=number == last)
            for number, (context, found) in enumerate(extents.items(), 1)
        )

    def _fitting(self, request: Request, extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        joined: list[tuple[int, int]] = []
        most = 1 if request.flags & _REQ_ONE else self._extents
        covered = 0
        longest = (1 << 64) - 1 if self._mode is Mode.EXTENDED else _LONGEST_COMPACT
        for length, status in extents:
            if length <= 0 or not 0 <= status <= _largest(self._extent):
                raise LocalProtocolError(f"an extent of {length} bytes with status {status:#x} cannot be said")
            length = min(length, request.length - covered)
            if joined and joined[-1][1] == status:
                joined[-1] = (joined[-1][0] + length, status)
            elif len(joined) == most:
                break
            else:
                joined.append((length, status))
            covered += length
            if joined[-1][0] > longest:
                joined[-1] = (longest, status)
                break
            if covered == request.length:
                break
        if not joined:
            raise LocalProtocolError("a block status describes nothing, expected at least one extent")
        return joined

    def _check_cover(self, request: Request, pieces: Sequence[Data | Hole]) -> None:
        at = request.offset
        for piece in pieces:
            if piece.offset != at or piece.length <= 0:
                raise LocalProtocolError(f"a piece of {piece.length} bytes at {piece.offset}, expected some at {at}")
            at += piece.length
        if request.command != Command.READ or at != request.offset + request.length:
            raise LocalProtocolError(f"the answer ends at {at}, expected {request.offset + request.length} of a READ")

    def _check_inside(self, request: Request, offset: int, length: int) -> None:
        if not request.offset <= offset <= offset + length <= request.offset + request.length:
            raise LocalProtocolError(
                f"{length} bytes at {offset} lie outside the request of {request.length} bytes at {request.offset}"
            )

    def _chunk(self, request: Request, chunk: Chunk, length: int, *, done: bool) -> bytes:
        flags = REPLY_DONE if done else 0
        if self._mode is Mode.EXTENDED:
            return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, flags, chunk, request.cookie, request.offset, length)
        if self._mode is Mode.SIMPLE or length > U32_MAX:
            raise LocalProtocolError(f"a chunk of {length} bytes cannot be sent in a {self._mode.name.lower()} reply")
        return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, chunk, request.cookie, length)


def _largest(layout: Struct) -> int:
    """The largest number that one field of an extent takes."""
    return (1 << layout.size * 4) - 1


def _content(piece: Data | Hole) -> Iterable[Bytes]:
    if isinstance(piece, Data):
        yield piece.payload
        return
    for at in range(0, piece.length, len(_ZEROES)):
        yield _ZEROES[: min(len(_ZEROES), piece.length - at)]
