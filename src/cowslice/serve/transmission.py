"""Serve the requests of one connection in plain Python: the truth that the compiled loop is held equal to.

One thread reads, workers carry out and send; replies leave in the order in which they are ready. It does not know how
a request is answered. What must hold: on return every request that came in whole has been answered, or the client is
gone, and no thread of it is left.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from cowslice.errors import BadOption
from cowslice.nbd.events import BadRequest, Disconnect, Need, Request, Session
from cowslice.nbd.server_side import ServerTransmission
from cowslice.nbd.wire import MAX_PAYLOAD, Command
from cowslice.serve.answers import MOST_EXTENTS, Answers
from cowslice.serve.metrics import Counters, Counts
from cowslice.serve.stream import Stream
from cowslice.serve.workers import InFlight, Workers
from cowslice.units import KiB, MiB

RECEIVED_AT_ONCE = 64 * KiB
COMMAND_NAMES = {
    Command.READ: "read", Command.WRITE: "write", Command.FLUSH: "flush", Command.TRIM: "trim",
    Command.CACHE: "cache", Command.WRITE_ZEROES: "zero", Command.BLOCK_STATUS: "status",
}  # fmt: skip


_ENDLESS = float("inf")
_SECONDS = (0, 1 << 30, f"0 to {1 << 30} seconds")
_SOME = (1, _ENDLESS, "at least 1")
RANGES = {  # least, most, and what that is in words, of each field of Limits
    "handshake_timeout": _SECONDS, "idle_timeout": _SECONDS, "max_request": (4 * KiB, 1 << 30, "4 KiB to 1 GiB"),
    "most_requests": _SOME, "most_bytes": _SOME, "workers": _SOME,
    "poll_max_ns": (0, 1_000_000_000, "0 to 1000000000 nanoseconds"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may ask of a server. Times are seconds, 0 for no limit; sizes are bytes.

    `handshake_timeout` bounds the whole negotiation; `idle_timeout` how long a client may ask nothing, and how long it
    may take nothing of what it asked. `max_request` is the longest read or write. `most_requests` and `most_bytes` may
    be under way at once, by up to `workers` threads; a client that asks for more waits. For a client that asks one
    thing after another a connection may wait awake, up to `poll_max_ns` nanoseconds each time. Raises BadOption.
    """

    handshake_timeout: float = 10.0
    idle_timeout: float = 0.0
    max_request: int = MAX_PAYLOAD
    most_requests: int = 128
    most_bytes: int = 2 * MAX_PAYLOAD
    workers: int = 8
    poll_max_ns: int = 100_000

    def __post_init__(self) -> None:
        for name in RANGES:
            check_limit(name, getattr(self, name), name)


def check_limit(field: str, value: float, shown: str) -> None:
    """Refuse a value that a field of Limits cannot have, which its user knows as `shown`. Raises BadOption."""
    least, most, expected = RANGES[field]
    if not least <= value <= most:
        raise BadOption(f"{shown} is {value}, expected {expected}")


class Transmission:
    """One connection after its negotiation. `counters` are told of every answer."""

    def __init__(self, stream: Stream, session: Session, answers: Answers, *, limits: Limits, counters: Counters,
                 name: str) -> None:
        self._stream = stream
        self._session = session
        self._answers = answers
        self._counters = counters
        self._workers = Workers(limits.workers, name)
        self._under_way = InFlight(limits.most_requests, limits.most_bytes)
        self._protocol = ServerTransmission(session)
        self._gone = False
        self._fault: Exception | None = None  # why we gave the connection up, where somebody must be told

    def run(self, leftover: bytes) -> None:
        """Serve until the client leaves, is idle for too long or breaks the protocol; `leftover` came already.

        Raises RemoteProtocolError, TimeoutError, OSError; also then what came before was answered where it can be.
        """
        self._protocol.receive(leftover)
        try:
            while (request := self._next()) is not None:
                size = cost_of(request)
                self._under_way.enter(size)
                self._workers.submit(partial(self._serve, request, size, time.perf_counter_ns()))
        finally:
            self._workers.end()
        if self._fault is not None:
            raise self._fault

    def refuse(self) -> None:
        """Answer what comes from now on with ESHUTDOWN, what has come before as ever. Any thread may call."""
        self._protocol.shut_down()

    def counters(self) -> Counts:
        """What was counted so far."""
        return self._counters.counters()

    def _next(self) -> Request | BadRequest | None:
        """The next request, or None when there will be no more."""
        while not self._gone:
            event = self._protocol.next_event()
            if isinstance(event, Disconnect):
                return None
            if not isinstance(event, Need):
                return event
            data = self._receive()
            if not data:
                return None
            self._protocol.receive(data)
        return None

    def _receive(self) -> bytes:
        while True:
            waits_for_us = not self._under_way.empty
            try:
                return self._stream.recv(RECEIVED_AT_ONCE)
            except TimeoutError:
                if not waits_for_us:
                    raise

    def _serve(self, request: Request | BadRequest, size: int, arrived: int) -> None:
        """Answer one request; a worker's work. A client that cannot be reached is given up."""
        try:
            if not self._gone:
                parts, failed = self._answers.answer(request)
                self._stream.send(parts)
                self._count(request, arrived, failed)
        except OSError:
            self._give_up()
        except Exception as fault:
            self._fault = fault
            self._give_up()
        finally:
            self._under_way.leave(size)

    def _give_up(self) -> None:
        self._gone = True
        self._stream.abort()

    def _count(self, request: Request | BadRequest, arrived: int, failed: bool) -> None:
        count_answer(self._counters, request, time.perf_counter_ns() - arrived, failed=failed)


def count_answer(counters: Counters, request: Request | BadRequest, nanoseconds: int, *, failed: bool) -> None:
    """Count one answer; of a command that nobody knows as if it were a read."""
    asked = request.request if isinstance(request, BadRequest) else request
    command = COMMAND_NAMES.get(Command(asked.command), "read") if asked.command in COMMAND_NAMES else "read"
    counters.note(command, asked.offset, asked.length, nanoseconds, failed=failed)


def cost_of(request: Request | BadRequest) -> int:
    """About how many bytes a request holds until its answer is sent."""
    if isinstance(request, BadRequest):
        return 0
    if request.command == Command.BLOCK_STATUS:
        return MOST_EXTENTS * 16
    return {Command.READ: request.length, Command.CACHE: MiB}.get(Command(request.command), len(request.payload))
