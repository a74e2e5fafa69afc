"""The way a client takes from the greeting to transmission: what it asks for, and what it does without.

It does not know sockets. TLS comes first, so that nothing else is said in clear; then the richest replies that the
server has; then the contexts; then GO, or EXPORT_NAME where the server knows nothing newer.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum

from cowslice.nbd.buffer import Bytes
from cowslice.nbd.client_handshake import ClientHandshake, ClientHandshakeEvent
from cowslice.nbd.events import NEED_DATA, Accepted, Greeted, Need, Ready, Refused, StartTls
from cowslice.nbd.wire import BASE_ALLOCATION, Answer, Mode, Option

OpeningEvent = Need | StartTls | Ready | Refused

_Steps = Generator[Refused | None, ClientHandshakeEvent, None]


class TlsWish(Enum):
    """NEVER asks for TLS; IF_OFFERED goes on without when refused, which anybody on the way can do; ALWAYS does not."""

    NEVER = "never"
    IF_OFFERED = "if offered"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client wants of a session. `extended` and `structured` are taken where the server has them."""

    export: str = ""
    tls: TlsWish = TlsWish.NEVER
    extended: bool = True
    structured: bool = True
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)


class Opening:
    """Open a session. Use it like `ClientHandshake`: it ends with Ready, or with Refused by the server.

    After StartTls run the TLS handshake, then call `tls_started`. After Refused send what there is to send and close.
    """

    def __init__(self, wish: Wish) -> None:
        self._handshake = ClientHandshake()
        self._steps = _steps(self._handshake, wish)
        self._end: OpeningEvent | None = None
        next(self._steps)

    def receive(self, data: Bytes) -> None:
        """Take bytes from the server; they are copied. Then call `next_event` until it says NEED_DATA."""
        self._handshake.receive(data)

    def receive_eof(self) -> None:
        """The server closed. Raises RemoteProtocolError unless the opening was over."""
        if self._end is None:
            self._handshake.receive_eof()

    def data_to_send(self) -> bytes:
        """What the server is to be sent now; empty when there is nothing."""
        return self._handshake.data_to_send()

    def take_leftover(self) -> bytes:
        """What came after the negotiation: the first bytes of transmission."""
        return self._handshake.take_leftover()

    def tls_started(self) -> None:
        """Go on after StartTls."""
        self._handshake.tls_started()
        self._steps.send(Accepted(Option.STARTTLS))

    def next_event(self) -> OpeningEvent:
        """Go as far as the bytes reach. Raises RemoteProtocolError when the server breaks the protocol."""
        while self._end is None:
            event = self._handshake.next_event()
            if event is NEED_DATA:
                return NEED_DATA
            if isinstance(event, StartTls):
                return event
            if isinstance(event, Ready):
                self._end = event
                return event
            refused = self._steps.send(event)
            if refused is not None:
                self._end = refused
                return refused
        return NEED_DATA


def _steps(handshake: ClientHandshake, wish: Wish) -> _Steps:
    """Ask one thing after another. It is sent each answer; a value that it yields ends the opening."""
    greeted = yield None
    tls = wish.tls
    if isinstance(greeted, Greeted) and greeted.fixed:
        if tls is not TlsWish.NEVER:
            handshake.start_tls()
            answer = yield None
            if isinstance(answer, Refused) and tls is TlsWish.ALWAYS:
                handshake.abort()
                yield answer
        yield from _features(handshake, wish)
        handshake.go(wish.export)
        answer = yield None
        old = handshake.mode is not Mode.EXTENDED and isinstance(answer, Refused) and answer.answer == Answer.ERR_UNSUP
        if isinstance(answer, Refused) and not old:
            handshake.abort()
            yield answer
    elif tls is TlsWish.ALWAYS:
        yield Refused(Option.STARTTLS, Answer.ERR_UNSUP, "the server does not know fixed newstyle")
    handshake.export_name(wish.export)
    yield None


def _features(handshake: ClientHandshake, wish: Wish) -> _Steps:
    if wish.extended:
        handshake.extended_headers()
        yield None
    if wish.structured and handshake.mode is Mode.SIMPLE:
        handshake.structured_replies()
        yield None
    if wish.contexts and handshake.mode is not Mode.SIMPLE:
        handshake.set_contexts(wish.export, wish.contexts)
        yield None
