"""One request of a client while its reply comes in: what it wants, what has come, and whether that may be.

It knows no bytes on their way. A reply that breaks a rule is a RemoteProtocolError: content outside the request or
twice, a success that leaves gaps, a status nobody asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from cowslice.errors import RemoteProtocolError
from cowslice.nbd.events import Completed, Request, Session
from cowslice.nbd.wire import MAX_STATUS_EXTENTS_TAKEN, U32_MAX, Command, CommandFlag, NbdError

# Islands of content that do not touch yet, in one reply. A 32 MiB read in alternating sectors has half as many.
MAX_ISLANDS = 1 << 16

_DF = int(CommandFlag.DF)
_REQ_ONE = int(CommandFlag.REQ_ONE)


class Coverage:
    """Which bytes of a request have come. Islands that touch are joined, so content in order costs nothing."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> bool:
        """Take the bytes from `start` to `end`. False when some of them had come before."""
        at = bisect_left(self._starts, start)
        before, after = at - 1, at
        ends_before = self._ends[before] if at else -1
        starts_after = self._starts[after] if after < len(self._starts) else end + 1
        if ends_before > start or starts_after < end:
            return False
        joins_before, joins_after = ends_before == start, starts_after == end
        if joins_before and joins_after:
            self._ends[before] = self._ends.pop(after)
            del self._starts[after]
        elif joins_before:
            self._ends[before] = end
        elif joins_after:
            self._starts[after] = start
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)
        return True

    @property
    def islands(self) -> int:
        """How many separate pieces there are."""
        return len(self._starts)

    def is_whole(self, start: int, end: int) -> bool:
        """Whether exactly the bytes from `start` to `end` have come."""
        return start == end or (self._starts == [start] and self._ends == [end])


@dataclass(slots=True)
class Pending:
    """A request that was sent and is not answered in full."""

    request: Request
    target: memoryview | None = None
    coverage: Coverage = field(default_factory=Coverage)
    contents: int = 0
    error: NbdError | None = None
    reason: str = ""
    error_offset: int | None = None
    extents: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    described: int = 0

    def take_content(self, offset: int, length: int) -> memoryview:
        """Where this content of the export belongs: a part of the caller's buffer."""
        request = self.request
        if self.target is None:
            raise _breach("it sends content to a request that reads nothing")
        if not length or not request.offset <= offset <= offset + length <= request.offset + request.length:
            raise _breach(
                f"it sends {length} bytes at {offset}, expected some of {request.length} at {request.offset}"
            )
        self.contents += 1
        if request.flags & _DF and self.contents > 1:
            raise _breach("it sends a second piece of a read that must not be fragmented")
        if not self.coverage.add(offset, offset + length):
            raise _breach(f"it sends {length} bytes at {offset} twice")
        if self.coverage.islands > MAX_ISLANDS:
            raise _breach(f"it sends more than {MAX_ISLANDS} separate pieces of one read")
        at = offset - request.offset
        return self.target[at : at + length]

    def take_error(self, error: NbdError, reason: str, offset: int | None) -> None:
        """The request failed, perhaps at this offset. The first error is the one that is told."""
        request = self.request
        if offset is not None and not request.offset <= offset < request.offset + max(request.length, 1):
            raise _breach(f"it reports an error at {offset}, outside the request")
        if self.error is None:
            self.error, self.reason, self.error_offset = error, reason, offset

    def take_status(self, session: Session, context: int, extents: Iterable[tuple[int, int]]) -> None:
        """The status of one context."""
        request = self.request
        if request.command != Command.BLOCK_STATUS or context not in request.contexts or context in self.extents:
            raise _breach(f"it sends a status of context {context}, expected each of {list(request.contexts)} once")
        kept: list[tuple[int, int]] = []
        covered = 0
        most = 1 if request.flags & _REQ_ONE else MAX_STATUS_EXTENTS_TAKEN
        for length, status in extents:
            self.described += 1
            if not length or covered >= request.length or len(kept) == most:
                raise _breach(f"extent {len(kept)} of a status has {length} bytes after {covered} that were described")
            covered += length
            kept.append((length, status))
        if not kept or self.described > MAX_STATUS_EXTENTS_TAKEN:
            raise _breach(f"a status has {len(kept)} extents, expected 1 to {MAX_STATUS_EXTENTS_TAKEN} in a reply")
        if request.flags & _REQ_ONE and covered > request.length:
            raise _breach(f"the one extent has {covered} bytes, expected up to {request.length}")
        self._check_width(session, context, kept)
        # What lies beyond the export means nothing; some servers round up.
        beyond = max(0, request.offset + covered - session.size)
        kept[-1] = (kept[-1][0] - beyond, kept[-1][1])
        self.extents[context] = tuple(kept)

    def _check_width(self, session: Session, context: int, extents: list[tuple[int, int]]) -> None:
        """A context of the specification itself never needs more than 32 bits."""
        names = (known.name for known in session.contexts if known.id == context)
        if any(name.startswith("base:") for name in names) and any(status > U32_MAX for _, status in extents):
            raise _breach("a status of a base: context has more than 32 bits")

    def complete(self) -> Completed:
        """The reply is over: what came of it."""
        request = self.request
        if self.error is None:
            if self.target is not None and not self.coverage.is_whole(request.offset, request.offset + request.length):
                raise _breach("it reports success of a read that it did not answer in full")
            if request.command == Command.BLOCK_STATUS and len(self.extents) < len(request.contexts):
                raise _breach(f"it reports success of a status without contexts {self._missing()}")
            return Completed(request.cookie, request.command, extents=self.extents)
        return Completed(request.cookie, request.command, self.error, self.reason, self.error_offset)

    def _missing(self) -> list[int]:
        return [context for context in self.request.contexts if context not in self.extents]


def _breach(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"the server broke the NBD protocol: {reason}")
