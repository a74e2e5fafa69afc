"""Serve the requests of one connection through the compiled loop, with Python for what that hands over.

It decides nothing of its own: what is handed over goes through the same rules and the same handler as in
`transmission`, so both say the same. The socket must be plain and the disk must have a compiled path.
"""

from __future__ import annotations

import time
from functools import partial

from cowslice.errors import RemoteProtocolError
from cowslice.image.fastpath import FastPath
from cowslice.nbd.events import BadRequest, Need, Request, Session
from cowslice.nbd.requests import SHUTTING_DOWN, fault_of
from cowslice.nbd.server_side import ServerTransmission
from cowslice.nbd.wire import (
    COMPACT_REQUEST,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    ExportFlag,
    Mode,
)
from cowslice.serve.answers import Answers
from cowslice.serve.metrics import Counters, Counts, LoopCounters, add_counts
from cowslice.serve.nbd_loop import Loop
from cowslice.serve.stream import Stream
from cowslice.serve.transmission import Limits, count_answer
from cowslice.serve.workers import Workers
from cowslice.units import KiB

# Nothing but a header, or data behind one: to be judged without being read again.
_BARE = (Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES)
# They come from the loop itself, which must go on meanwhile.
_LONG = (Command.BLOCK_STATUS, Command.CACHE, Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES)
_LONG_READ = 64 * KiB
GARBAGE, IDLE = "garbage", "idle"  # of nbd_loop.ENDS, those that are worth a word


class CompiledTransmission:
    """One connection after its negotiation, as `transmission.Transmission`. `counters` count what Python answers."""

    def __init__(self, stream: Stream, session: Session, answers: Answers, fast: FastPath, *, limits: Limits,
                 counters: Counters, name: str) -> None:
        self._session = session
        self._answers = answers
        self._counters = counters
        self._workers = Workers(limits.workers, name)
        self._loop = Loop(
            stream.fileno(), fast, mode=session.mode, size=session.size,
            writable=not session.flags & ExportFlag.READ_ONLY, writethrough=answers.writethrough,
            max_request=session.block_sizes.maximum, most_requests=limits.most_requests, most_bytes=limits.most_bytes,
            poll_max_ns=limits.poll_max_ns, handover=self._take)

    def run(self, leftover: bytes) -> None:
        """Serve until the client leaves, is idle for too long or breaks the protocol; `leftover` came already.

        Raises RemoteProtocolError or TimeoutError; also then what came before was answered where it can be.
        """
        try:
            end = self._loop.run(leftover)
        finally:
            self._workers.end()
        if self._loop.fault is not None:
            raise self._loop.fault
        if end == GARBAGE:
            raise RemoteProtocolError("the client broke the NBD protocol: what it sent is no request")
        if end == IDLE:
            raise TimeoutError

    def refuse(self) -> None:
        """Answer what comes from now on with ESHUTDOWN, what has come before as ever. Any thread may call."""
        self._loop.refuse()

    def counters(self) -> Counts:
        """What the loop and Python counted together."""
        total = LoopCounters(self._loop).counters()
        add_counts(total, self._counters.counters())
        return total

    def _take(self, command: int, flags: int, cookie: int, offset: int, length: int, payload: bytes, arrived: int,
              cost: int) -> None:
        """Judge a request, and answer it here or leave it to a worker."""
        request = judged(self._session, command, flags, cookie, offset, length, payload)
        if self._loop.refusing and self._loop.is_home():
            request = refused(request)
        serve = partial(self._serve, request, arrived, cost)
        if is_long(request, self._answers) and self._loop.is_home():
            self._workers.submit(serve)
        else:
            serve()

    def _serve(self, request: Request | BadRequest, arrived: int, cost: int) -> None:
        try:
            parts, failed = self._answers.answer(request)
            if self._loop.reply(*parts):
                count_answer(self._counters, request, time.monotonic_ns() - arrived, failed=failed)
        except Exception as fault:
            self._loop.abandon(fault)  # or the client would wait for an answer that never comes
        finally:
            self._loop.finish(cost)


def is_long(request: Request | BadRequest, answers: Answers) -> bool:
    """Whether the thread that takes requests in would be kept waiting.

    A read or a write that has to wait comes from a worker of the loop. What has all it needs in memory is done sooner
    than another thread, which would only be one more that wants the interpreter, gets to it; but for long reads, which
    come here where they must be deciphered or inflated without compiled code.
    """
    if isinstance(request, BadRequest):
        return False
    if request.command == Command.READ:
        return request.length > _LONG_READ
    return request.command in _LONG or (request.command == Command.WRITE and answers.is_stable(request))


def refused(request: Request | BadRequest) -> BadRequest:
    """The same request to a server that is shutting down."""
    asked = request.request if isinstance(request, BadRequest) else request
    return BadRequest(asked, SHUTTING_DOWN.error, SHUTTING_DOWN.reason)


def judged(
    session: Session, command: int, flags: int, cookie: int, offset: int, length: int, payload: bytes
) -> Request | BadRequest:
    """What the protocol's own half says about a request: the loop takes it apart, that half judges it.

    The payload may be missing where that half refuses the request by its header.
    """
    if command in _BARE and not flags & CommandFlag.PAYLOAD_LEN:
        request = Request(command, flags, cookie, offset, length, payload=payload)
        fault = fault_of(session, request)
        return request if fault is None else BadRequest(request, fault.error, fault.reason)
    extended = session.mode is Mode.EXTENDED
    layout, magic = (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if extended else (COMPACT_REQUEST, REQUEST_MAGIC)
    protocol = ServerTransmission(session, layout.pack(magic, flags, command, cookie, offset, length) + payload)
    event = protocol.next_event()
    found = protocol.refused if isinstance(event, Need) else event
    assert isinstance(found, (Request, BadRequest))
    return found
