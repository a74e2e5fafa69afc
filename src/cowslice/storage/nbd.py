"""A storage over an NBD export: requests of many threads side by side, as large and as aligned as the server wants.

It does not know sockets or the protocol's bytes. An export keeps its length: writing past its end is NoSpace. What a
server says of holes counts for a second, because who walks over a sparse disk asks once for each of its extents.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cowslice.errors import BadOption, NoSpace, ReadOnly, RemoteProtocolError, StorageError
from cowslice.nbd.client_side import ClientTransmission
from cowslice.nbd.events import Completed
from cowslice.nbd.wire import BASE_ALLOCATION, STATE_ZERO, ExportFlag, NbdError, errno_from_error, shown
from cowslice.storage.base import Storage, check_span
from cowslice.storage.nbdaddress import NbdAddress, parse_nbd_uri
from cowslice.storage.nbdblocks import Blocks, long_pieces
from cowslice.storage.nbdlink import Ask, Call, NbdLink
from cowslice.storage.nbdopening import Connector
from cowslice.storage.nbdpool import NbdPool
from cowslice.storage.spans import MergedRead, Span, batches
from cowslice.units import GiB, KiB, MiB

if TYPE_CHECKING:
    import ssl

    from _typeshed import ReadableBuffer

TIMEOUT = 60.0  # seconds of silence: a server may have to wait for a disk that is spun up, or flush a large cache
CONNECTIONS = 4
PIECE = MiB  # of one read or write: several under way are faster than a large one
PIECES = 16  # of one call under way
LONG_PIECE = 128 * MiB  # of a request without payload: a server that must write the zeros is not silent for too long
STATUS_PIECE = 2 * GiB  # of one question for holes: a multiple of every block, and 32 bits can say it
IN_FLIGHT = 32 * MiB  # bounds the memory of merged reads that are under way together
STATUS_LIFE = 1.0  # seconds


class _Status(NamedTuple):
    """What the server said of some spans, and when."""

    said: float
    spans: tuple[Span, ...]


class NbdStorage(Storage):
    """Open an export: nbd://host[:port]/export, nbd+unix:///export?socket=PATH, or nbds: for TLS.

    `mode`: "r" or "r+". `ca`, `cert`, `key`: PEM files for TLS; the authorities that the system trusts are the default.
    `timeout`: seconds that the server may be silent when it was asked. `connections`: how many, at most, if the server
    allows several.
    Raises BadOption, StorageError, RemoteProtocolError, CryptoError, or ReadOnly for "r+" of a read-only export.
    """

    read_gap = 64 * KiB  # what a gigabit line carries in half a millisecond

    def __init__(
        self, uri: str, mode: str = "r", *, ca: str | os.PathLike[str] = "", cert: str | os.PathLike[str] = "",
        key: str | os.PathLike[str] = "", timeout: float = TIMEOUT, connections: int = CONNECTIONS,
    ) -> None:
        self.name = uri
        address = parse_nbd_uri(uri)
        if mode not in ("r", "r+"):
            raise BadOption(f"mode is '{mode}', expected 'r' or 'r+': '{uri}' is there or not, it cannot be made")
        if not 0 < timeout <= 86400 or not 1 <= connections <= 64:
            raise BadOption(f"timeout is {timeout} and connections {connections}, expected up to 86400 and 1 to 64")
        tls = _tls_context(address, os.fspath(ca), os.fspath(cert), os.fspath(key))
        self._pool = NbdPool(Connector(address, uri, timeout, tls).connect, most=connections)
        self._session = session = self._pool.session
        sizes = session.block_sizes
        self._blocks = Blocks(sizes.minimum, sizes.maximum, session.size)
        self.alignment = sizes.minimum
        self._open = True
        self._patching = threading.Lock()  # held from reading a block to writing it back
        self._status = _Status(-STATUS_LIFE, ())
        self._status_context = next((one.id for one in session.contexts if one.name == BASE_ALLOCATION), None)
        self.writable = mode == "r+"
        if self.writable and session.flags & ExportFlag.READ_ONLY:
            self._pool.close()
            raise ReadOnly(f"cannot open '{uri}' for writing: the export is read-only")

    def pread(self, offset: int, buffer: memoryview) -> int:
        check_span(offset, len(buffer))
        length = min(len(buffer), max(self.length() - offset, 0))
        self._read_all([(offset, buffer[:length])])
        return length

    def length(self) -> int:
        if not self._open:
            raise self._closed("use")
        return self._session.size

    def close(self) -> None:
        self._open = False
        self._pool.close()

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        view = memoryview(data).cast("B")
        if self._begin_change("write to", offset, len(view)):
            first, last = self._blocks.within(offset, offset + len(view))
            self._patch(offset, view[: first - offset])
            middle = view[first - offset : last - offset]
            self._run("write to", (_write(start, middle[start - first : stop - first])
                                   for start, stop in self._blocks.pieces(first, last, PIECE)))
            self._patch(last, view[last - offset :])

    def truncate(self, length: int) -> None:
        self._check_writable("resize")
        check_span(0, length)
        if length != (has := self.length()):
            raise StorageError(f"cannot resize '{self.name}' to {length} bytes: it is an export of {has} bytes",
                               errno=errno.EINVAL, filename=self.name)

    def sync(self) -> None:
        self.length()
        if self.writable and self._session.flags & ExportFlag.SEND_FLUSH:
            self._run("sync", [ClientTransmission.flush])

    def zero(self, offset: int, length: int) -> None:
        if not self._begin_change("write to", offset, length):
            return
        if not self._session.flags & ExportFlag.SEND_WRITE_ZEROES:
            super().zero(offset, length)
            return
        end = offset + length
        first, last = self._blocks.within(offset, end)
        self._patch(offset, memoryview(bytes(first - offset)))
        self._run("write to", (_zero(*piece) for piece in long_pieces(first, last, LONG_PIECE)))
        self._patch(last, memoryview(bytes(end - last)))

    def discard(self, offset: int, length: int) -> None:
        self._check_writable("discard from")
        check_span(offset, length)
        end = min(offset + length, self.length())
        if not self._session.flags & ExportFlag.SEND_TRIM:
            return
        first, last = self._blocks.within(offset, end) if offset < end else (0, 0)
        self._run("discard from", (_trim(*piece) for piece in long_pieces(first, last, LONG_PIECE)))

    def extents(self, offset: int, length: int) -> Iterator[Span]:
        check_span(offset, length)
        end, stored = offset + length, min(offset + length, self.length())
        if self._status_context is None:
            yield from super().extents(offset, length)
            return
        while offset < stored:
            for span in self._ask_status(offset, stored):
                stop = min(span.end, end)
                if stop > offset:
                    yield Span(offset, stop - offset, span.data)
                    offset = stop
        if offset < end:
            yield Span(offset, end - offset, False)

    # Reading

    def _read_all(self, wanted: Iterable[tuple[int, memoryview]]) -> None:
        """Fill buffers from spans inside the export. What is not whole blocks goes by a buffer of ours."""
        detours: list[tuple[memoryview, memoryview]] = []
        self._run("read", self._reads(wanted, detours))
        for target, source in detours:
            target[:] = source

    def _reads(
        self, wanted: Iterable[tuple[int, memoryview]], detours: list[tuple[memoryview, memoryview]]
    ) -> Iterator[Ask]:
        for offset, view in wanted:
            if not len(view):
                continue
            end = offset + len(view)
            first, last = self._blocks.around(offset, end)
            for start, stop in self._blocks.pieces(first, last, PIECE):
                inside, outside = max(start, offset), min(stop, end)
                target = view[inside - offset : outside - offset]
                if outside - inside < stop - start:
                    whole = memoryview(bytearray(stop - start))
                    detours.append((target, whole[inside - start : outside - start]))
                    target = whole
                yield _read(start, target)

    def _fetch(self, reads: Sequence[MergedRead]) -> Iterator[tuple[MergedRead, bytes]]:
        """Have many reads under way, as many as may be in memory together."""
        size = self.length()
        for batch in batches(reads, IN_FLIGHT):
            buffers = [bytearray(one.length) for one in batch]
            self._read_all((one.offset, memoryview(buffer)[: max(size - one.offset, 0)])
                           for one, buffer in zip(batch, buffers, strict=True))
            yield from zip(batch, map(bytes, buffers), strict=True)

    def _ask_status(self, offset: int, end: int) -> Sequence[Span]:
        """Spans from a block at or before `offset`, as far as the server tells; the first one reaches beyond it."""
        known = self._status
        if time.monotonic() - known.said < STATUS_LIFE and known.spans[0].offset <= offset < known.spans[-1].end:
            return known.spans
        start, stop = self._blocks.around(offset, end)
        stop = min(stop, start + STATUS_PIECE)
        said = time.monotonic()
        answer = self._run("read the holes of", [_status(start, stop - start)])
        spans = []
        for length, state in answer.extents[self._status_context or 0] if answer else ():
            spans.append(Span(start, length, not state & STATE_ZERO))
            start += length
        if start <= offset or (start % self._blocks.block and start < self._session.size):
            raise RemoteProtocolError(f"the server broke the NBD protocol: its extents end at {start}, expected more, "
                                      f"and whole blocks of {self._blocks.block}")
        if not self.writable:  # what we change ourselves must be seen at once
            self._status = _Status(said, tuple(spans))
        return spans

    # Writing

    def _begin_change(self, doing: str, offset: int, length: int) -> bool:
        """Check a change; False when there is nothing to do."""
        self._check_writable(doing)
        check_span(offset, length)
        if length and offset + length > self.length():
            raise NoSpace(f"cannot {doing} '{self.name}': {length} bytes at offset {offset} end beyond the export of "
                          f"{self._session.size} bytes", errno=errno.ENOSPC, filename=self.name)
        return length > 0

    def _check_writable(self, doing: str) -> None:
        self.length()
        if not self.writable:
            raise self._read_only(doing)

    def _patch(self, offset: int, piece: memoryview) -> None:
        """Write a piece that has no whole block inside."""
        end = offset + len(piece)
        for start, stop in self._blocks.pieces(*self._blocks.around(offset, end), 1) if len(piece) else ():
            inside, outside = max(start, offset), min(stop, end)
            block = memoryview(bytearray(stop - start))
            with self._patching:
                self._run("read", [_read(start, block)])
                block[inside - start : outside - start] = piece[inside - offset : outside - offset]
                self._run("write to", [_write(start, block)])

    # Requests

    def _run(self, doing: str, asks: Iterable[Ask]) -> Completed | None:
        """Make all requests, some at once; the last answer. When it returns or raises, none is under way."""
        waiting: deque[tuple[NbdLink, Call]] = deque()
        answer = None
        try:
            for ask in asks:
                if len(waiting) == PIECES:
                    answer = self._settle(doing, *waiting.popleft())
                link = self._pool.pick()
                waiting.append((link, link.submit(ask)))
            while waiting:
                answer = self._settle(doing, *waiting.popleft())
        except BaseException:
            for link, call in waiting:
                link.wait(call)
            raise
        return answer

    def _settle(self, doing: str, link: NbdLink, call: Call) -> Completed:
        answer = link.finish(call)
        if answer.error is None:
            return answer
        code = errno_from_error(answer.error)
        reason = f": the server says '{shown(answer.reason)}'" if answer.reason else ""
        where = "" if answer.error_offset is None else f" at offset {answer.error_offset}"
        kind = NoSpace if answer.error is NbdError.ENOSPC else StorageError
        raise kind(f"cannot {doing} '{self.name}'{where}: {os.strerror(code)}{reason}", errno=code, filename=self.name)


def _tls_context(address: NbdAddress, ca: str, cert: str, key: str) -> ssl.SSLContext | None:
    if not address.tls:
        if ca or cert or key:
            raise BadOption("certificates are given, expected them only with nbds: or nbds+unix:")
        return None
    from cowslice.storage.nbdtls import TlsFiles, context_for

    return context_for(address, TlsFiles(ca, cert, key))


def _read(offset: int, target: memoryview) -> Ask:
    return lambda transmission: transmission.read(offset, target)


def _write(offset: int, piece: memoryview) -> Ask:
    return lambda transmission: transmission.write(offset, piece)


def _zero(start: int, stop: int) -> Ask:
    return lambda transmission: transmission.write_zeroes(start, stop - start)


def _trim(start: int, stop: int) -> Ask:
    return lambda transmission: transmission.trim(start, stop - start)


def _status(offset: int, length: int) -> Ask:
    return lambda transmission: transmission.block_status(offset, length)
