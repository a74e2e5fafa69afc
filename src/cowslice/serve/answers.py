"""What a request is answered with: the handler that every way of serving shares, one for each connection.

It knows no socket and no thread. What must hold: a request is answered whatever happens, nothing of a fault but a
sentence without names reaches the client, and one answer takes no more memory than its request's length asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cowslice.errors import Closed, CowsliceError, CryptoError, ImageError, StorageError, UnsupportedImage
from cowslice.nbd.buffer import Bytes
from cowslice.nbd.events import BadRequest, Request, Session
from cowslice.nbd.replies import Data, Hole, Replies
from cowslice.nbd.requests import CHANGES
from cowslice.nbd.wire import Command, CommandFlag, Mode, NbdError, error_from_errno
from cowslice.serve.exports import Export
from cowslice.units import KiB, MiB

HOLES_FROM = 64 * KiB  # a shorter read is sent sooner than its holes are looked up
SHORTEST_HOLE = 4 * KiB  # a shorter run of zeros costs both sides less as data
MOST_EXTENTS = 1 << 14  # in one block status, over all its contexts: a client asks on from where it ends
MOST_CACHED = 32 * MiB  # what one CACHE reads ahead; it is only a hint
MOST_TOLD = 16  # faults reported of one connection: a client must not fill the log

Answer = tuple[Sequence[Bytes], bool]  # what to send, and whether it says that the request failed


class Answers:
    """Answer the requests of one session to one export. Any number of threads may ask at once.

    `report` hears a sentence for each fault of the image or the storage, up to MOST_TOLD of them.
    """

    def __init__(self, export: Export, session: Session, report: Callable[[str], None]) -> None:
        self._export = export
        self.writethrough = export.writethrough
        self._disk = export.disk
        self._contexts = {context.id: context.name for context in session.contexts}
        self._chunks = session.mode is not Mode.SIMPLE
        self._replies = Replies(session)
        self._report = report
        self._told = 0

    def answer(self, request: Request | BadRequest) -> Answer:
        """Carry out a request. It never raises: what goes wrong is in the answer."""
        if isinstance(request, BadRequest):
            return [self._replies.error(request.request, request.error, request.reason)], True
        try:
            return self._carry_out(request), False
        except MemoryError:
            return [self._replies.error(request, NbdError.ENOMEM, "no memory")], True
        except Exception as fault:
            return [self._failure(request, fault)], True

    def is_stable(self, request: Request) -> bool:
        """Whether the answer promises that what the request changes is stable, so that it may take long."""
        return (request.command == Command.FLUSH or bool(request.flags & CommandFlag.FUA)
                or (self.writethrough and request.command in CHANGES))

    def _carry_out(self, request: Request) -> Sequence[Bytes]:
        if request.command == Command.READ:
            return self._read(request)
        if request.command == Command.BLOCK_STATUS:
            return [self._status(request)]
        if request.command == Command.CACHE:
            self._read_ahead(request.offset, min(request.length, MOST_CACHED))
        else:
            self._change(request)
        return [self._replies.done(request)]

    def _change(self, request: Request) -> None:
        """What writes; on a read-only export only FLUSH comes here, and has nothing to do."""
        disk = self._disk
        if request.command == Command.WRITE:
            disk.write(request.offset, request.payload)
        elif request.command == Command.TRIM:
            disk.discard(request.offset, request.length)
        elif request.command == Command.WRITE_ZEROES:
            self._zero(request)
        if self.is_stable(request):
            disk.flush()

    def _zero(self, request: Request) -> None:
        """FAST_ZERO promises that it is no slower than writing: it never is, but where the format cannot say zeros."""
        if request.flags & CommandFlag.FAST_ZERO and not self._disk.zeroes_fast:
            raise UnsupportedImage("this image cannot say that clusters read as zeros", features=("fast zero",))
        self._disk.zero(request.offset, request.length, keep=bool(request.flags & CommandFlag.NO_HOLE))

    def _read(self, request: Request) -> Sequence[Bytes]:
        offset, length = request.offset, request.length
        if not self._chunks or request.flags & CommandFlag.DF or length < HOLES_FROM:
            return self._replies.read(request, [self._data(offset, length)] if length else [])
        self._note_read(offset, length)
        pieces: list[Data | Hole] = []
        start = offset  # of the data that waits to be read
        for part, zero in self._export.stored(offset, length):
            if zero and part >= SHORTEST_HOLE:
                if offset > start:
                    pieces.append(self._data(start, offset - start, noted=True))
                pieces.append(Hole(offset, part))
                start = offset + part
            offset += part
        if offset > start:
            pieces.append(self._data(start, offset - start, noted=True))
        return self._replies.read(request, pieces)

    def _data(self, offset: int, length: int, *, noted: bool = False) -> Data:
        buffer = bytearray(length)
        self._disk.read_into(offset, buffer, noted=noted)
        return Data(offset, buffer)

    def _status(self, request: Request) -> bytes:
        one = bool(request.flags & CommandFlag.REQ_ONE)
        most = 1 if one else max(MOST_EXTENTS // len(request.contexts), 1)
        return self._replies.status(request, {
            number: self._export.states(self._contexts[number], request.offset, request.length, most=most)
            for number in request.contexts
        })

    def _read_ahead(self, offset: int, length: int) -> None:
        """Read and forget: what it passes through (the map, the page cache, decompressed clusters) remembers."""
        buffer = memoryview(bytearray(min(length, MiB)))
        end = offset + length
        self._note_read(offset, length)
        while offset < end:
            part = buffer[: min(end - offset, len(buffer))]
            self._disk.read_into(offset, part, noted=True)
            offset += len(part)

    def _note_read(self, offset: int, length: int) -> None:
        """Tell a capture once of what is read in parts."""
        fast = self._export.fast
        if length and fast is not None and fast.recorder.running:
            fast.recorder.note(0, offset, length)

    def _failure(self, request: Request, fault: Exception) -> bytes:
        self._tell(request, fault)
        if isinstance(fault, Closed):
            return self._replies.error(request, NbdError.ESHUTDOWN, "the disk was closed")
        if isinstance(fault, UnsupportedImage):
            return self._replies.error(request, NbdError.ENOTSUP, "the image cannot do that")
        if isinstance(fault, StorageError):
            return self._replies.error(request, error_from_errno(fault.errno or 0), "the storage failed")
        if isinstance(fault, ImageError):
            return self._replies.error(request, NbdError.EIO, "the image is damaged")
        if isinstance(fault, CryptoError):
            return self._replies.error(request, NbdError.EPERM, "the disk cannot be deciphered")
        return self._replies.error(request, NbdError.EIO, "the server failed")

    def _tell(self, request: Request, fault: Exception) -> None:
        self._told += 1
        if self._told > MOST_TOLD:
            return
        kind = "" if isinstance(fault, CowsliceError) else f"internal error: {type(fault).__name__}: "
        more = "; later faults of this client are not told" if self._told == MOST_TOLD else ""
        self._report(f"export '{self._export.name}': {request.length} bytes at {request.offset}: {kind}{fault}{more}")
