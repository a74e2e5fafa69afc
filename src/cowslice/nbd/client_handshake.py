"""The client's half of the negotiation: one method per option, one option at a time.

It does not choose the order (`opening` does) and knows neither sockets nor how TLS is done. Nothing that the server
says is trusted: a breach is a RemoteProtocolError, and the answers to one option have a limit in number and bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from cowslice.errors import LocalProtocolError, RemoteProtocolError
from cowslice.nbd.answers import Answers
from cowslice.nbd.buffer import Bytes, Inbox
from cowslice.nbd.events import (
    NEED_DATA,
    Accepted,
    Context,
    ContextsListed,
    Described,
    ExportsListed,
    Greeted,
    Need,
    Ready,
    Refused,
    Session,
    StartTls,
    check_string,
)
from cowslice.nbd.options import (
    BadPayload,
    ContextWish,
    ExportWish,
    decode_error_text,
    encode_context_wish,
    encode_export_wish,
    encode_option,
)
from cowslice.nbd.wire import (
    ANSWER_IS_ERROR,
    CLIENT_FLAGS,
    GREETING,
    KNOWN_HANDSHAKE_FLAGS,
    MAX_QUERIES,
    NBD_MAGIC,
    OLD_EXPORT,
    OLD_PADDING,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Answer,
    HandshakeFlag,
    InfoType,
    Mode,
    Option,
    word,
)

ClientHandshakeEvent = (
    Need | Greeted | Accepted | Refused | ExportsListed | ContextsListed | Described | Ready | StartTls
)

_WANTED = frozenset((int(InfoType.NAME), int(InfoType.DESCRIPTION), int(InfoType.BLOCK_SIZE)))


class _State(Enum):
    GREETING = "greeting"
    IDLE = "no option under way"
    WAITING = "an option under way"
    TLS = "TLS"
    DONE = "done"
    BROKEN = "broken"


class ClientHandshake:
    """Negotiate with one server.

    Bytes go in by `receive`, an event comes out of `next_event`, what is to be sent waits in `data_to_send`. After
    Greeted, and after each answer, call the method of one option.
    """

    def __init__(self) -> None:
        self._state = _State.GREETING
        self._inbox = Inbox()
        self._outbox = bytearray()
        self._flags = HandshakeFlag(0)
        self._encrypted = False
        self._option = 0
        self._name = ""
        self._queries: tuple[str, ...] = ()
        self._answers = Answers()
        self._forget()

    def _forget(self) -> None:
        """Drop what was agreed on, as TLS demands."""
        self._mode = Mode.SIMPLE
        self._contexts: tuple[Context, ...] = ()
        self._contexts_of = ""

    # What the caller does

    @property
    def fixed(self) -> bool:
        """Whether the server takes other options than EXPORT_NAME."""
        return bool(self._flags & HandshakeFlag.FIXED_NEWSTYLE)

    @property
    def mode(self) -> Mode:
        """The style of replies agreed on so far."""
        return self._mode

    def receive(self, data: Bytes) -> None:
        """Take bytes from the server; they are copied. Then call `next_event` until it says NEED_DATA."""
        self._inbox.put(data)

    def receive_eof(self) -> None:
        """The server closed. Raises RemoteProtocolError unless the negotiation was over."""
        if self._state is _State.DONE:
            return
        doing = f"during {word(self._option, Option)}" if self._state is _State.WAITING else "in the negotiation"
        raise self._broken(f"it closed the connection {doing}")

    def data_to_send(self) -> bytes:
        """What the server is to be sent now; empty when there is nothing."""
        data = bytes(self._outbox)
        self._outbox.clear()
        return data

    def take_leftover(self) -> bytes:
        """What came after the negotiation: the first bytes of transmission."""
        if self._state is not _State.DONE:
            raise LocalProtocolError("the negotiation has not ended")
        return self._inbox.take_all()

    def tls_started(self) -> None:
        """Go on after StartTls: nothing agreed on before it counts."""
        if self._state is not _State.TLS:
            raise LocalProtocolError("TLS was started, but the server did not agree to it")
        self._check_clear_end()
        self._encrypted = True
        self._forget()
        self._state = _State.IDLE

    # Options

    def start_tls(self) -> None:
        """Ask for TLS. StartTls comes back, or Refused."""
        if self._encrypted:
            raise LocalProtocolError("TLS is in use already")
        self._ask(Option.STARTTLS)

    def structured_replies(self) -> None:
        """Ask for replies in chunks."""
        if self._mode is Mode.EXTENDED:
            raise LocalProtocolError("extended headers are in use, they cannot be turned into structured replies")
        self._ask(Option.STRUCTURED_REPLY)

    def extended_headers(self) -> None:
        """Ask for replies in chunks with 64-bit lengths."""
        self._ask(Option.EXTENDED_HEADERS)

    def list_exports(self) -> None:
        """Ask for the names of all exports."""
        self._ask(Option.LIST)

    def list_contexts(self, name: str, queries: Iterable[str] = ()) -> None:
        """Ask which metadata contexts an export has: all, or those that match the queries."""
        self._ask_contexts(Option.LIST_META_CONTEXT, name, tuple(queries))

    def set_contexts(self, name: str, queries: Iterable[str]) -> None:
        """Select the metadata contexts of an export by their full names. Needs structured or extended replies."""
        if self._mode is Mode.SIMPLE:
            raise LocalProtocolError("metadata contexts need structured replies")
        self._contexts, self._contexts_of = (), ""
        self._ask_contexts(Option.SET_META_CONTEXT, name, tuple(queries))

    def info(self, name: str) -> None:
        """Ask what an export is like. Described comes back, or Refused."""
        self._ask_export(Option.INFO, name)

    def go(self, name: str) -> None:
        """Enter transmission. Ready comes back, or Refused; we promise to keep the block sizes."""
        self._ask_export(Option.GO, name)

    def export_name(self, name: str) -> None:
        """Enter transmission the old way. Ready comes back, or the server closes."""
        if self._mode is Mode.EXTENDED:
            raise LocalProtocolError("EXPORT_NAME must not follow extended headers")
        self._name = name
        self._ask(Option.EXPORT_NAME, check_string(name))

    def abort(self) -> None:
        """End the negotiation. Nothing comes back that matters: send what there is to send, then close."""
        if self._state is not _State.IDLE or not self.fixed:
            raise LocalProtocolError("ABORT can only be sent while the server waits for an option")
        self._outbox += encode_option(Option.ABORT)
        self._state = _State.DONE

    def _ask_export(self, option: Option, name: str) -> None:
        self._name = name
        self._ask(option, encode_export_wish(ExportWish(name, _WANTED)))

    def _ask_contexts(self, option: Option, name: str, queries: tuple[str, ...]) -> None:
        if len(queries) > MAX_QUERIES:
            raise LocalProtocolError(f"{len(queries)} queries for contexts, expected up to {MAX_QUERIES}")
        self._name, self._queries = name, queries
        self._ask(option, encode_context_wish(ContextWish(name, queries)))

    def _ask(self, option: Option, payload: bytes = b"") -> None:
        if self._state is not _State.IDLE:
            raise LocalProtocolError(f"{option.name} cannot be sent now: {self._state.value}")
        if option is not Option.EXPORT_NAME and not self.fixed:
            raise LocalProtocolError(f"{option.name} needs a server that knows fixed newstyle")
        self._outbox += encode_option(option, payload)
        self._option = option
        self._answers = Answers()
        self._state = _State.WAITING

    # What the server says

    def next_event(self) -> ClientHandshakeEvent:
        """Handle what came. Raises RemoteProtocolError when the server breaks the protocol: close then."""
        if self._state is _State.BROKEN:
            raise RemoteProtocolError("the server broke the NBD protocol before")
        try:
            if self._state is _State.GREETING:
                return self._read_greeting()
            if self._state is not _State.WAITING:
                return NEED_DATA
            if self._option == Option.EXPORT_NAME:
                return self._read_old_export()
            return self._read_answers()
        except BadPayload as bad:
            raise self._broken(str(bad)) from None

    def _read_greeting(self) -> ClientHandshakeEvent:
        fields = self._inbox.peek(GREETING)
        if fields is None:
            return NEED_DATA
        magic, kind, flags = fields
        if magic != NBD_MAGIC:
            raise self._broken(f"it greets with {magic:#018x}, expected {NBD_MAGIC:#018x}")
        if kind != OPTION_MAGIC:
            style = "speaks the oldstyle protocol" if kind == OLDSTYLE_MAGIC else f"goes on with {kind:#018x}"
            raise self._broken(f"it {style}, expected newstyle")
        self._inbox.take(GREETING.size)
        self._flags = HandshakeFlag(flags & KNOWN_HANDSHAKE_FLAGS)
        self._outbox += CLIENT_FLAGS.pack(self._flags)
        self._state = _State.IDLE
        return Greeted(self.fixed)

    def _read_old_export(self) -> ClientHandshakeEvent:
        padding = 0 if self._flags & HandshakeFlag.NO_ZEROES else OLD_PADDING
        if len(self._inbox) < OLD_EXPORT.size + padding:
            return NEED_DATA
        size, flags = self._inbox.take_fields(OLD_EXPORT) or (0, 0)
        self._inbox.skip(padding)
        self._answers.add_export(size, flags)
        return self._ready()

    def _read_answers(self) -> ClientHandshakeEvent:
        while True:
            header = self._inbox.peek(OPTION_REPLY)
            if header is None:
                return NEED_DATA
            magic, option, answer, length = header
            if magic != OPTION_REPLY_MAGIC or option != self._option:
                raise self._broken(
                    f"an answer begins with {magic:#018x} for option {word(option, Option)}, "
                    f"expected {OPTION_REPLY_MAGIC:#018x} for {word(self._option, Option)}"
                )
            self._answers.check_length(length)
            if len(self._inbox) < OPTION_REPLY.size + length:
                return NEED_DATA
            self._inbox.skip(OPTION_REPLY.size)
            payload = self._inbox.take(length) or b""
            if answer == Answer.ACK:
                return self._accepted(payload)
            if answer & ANSWER_IS_ERROR:
                return self._refused(answer, payload)
            self._answers.add(self._option, answer, payload)

    def _refused(self, answer: int, payload: bytes) -> Refused:
        self._state = _State.IDLE
        return Refused(self._option, answer, decode_error_text(payload))

    def _accepted(self, payload: bytes) -> ClientHandshakeEvent:
        if payload:
            raise self._broken(f"an ACK has {len(payload)} bytes, expected none")
        self._state = _State.IDLE
        option = self._option
        if option == Option.STARTTLS:
            self._state = _State.TLS
            self._check_clear_end()
            return StartTls()
        if option == Option.LIST:
            return ExportsListed(tuple(self._answers.exports))
        if option == Option.LIST_META_CONTEXT:
            return ContextsListed(option, tuple(self._answers.contexts))
        if option == Option.SET_META_CONTEXT:
            self._contexts = self._answers.selected(self._queries)
            self._contexts_of = self._name
            return ContextsListed(option, self._contexts)
        if option == Option.INFO:
            return Described(self._session())
        if option == Option.GO:
            return self._ready()
        self._mode = Mode.EXTENDED if option == Option.EXTENDED_HEADERS else Mode.STRUCTURED
        return Accepted(option)

    def _ready(self) -> Ready:
        session = self._session()
        self._state = _State.DONE
        return Ready(session)

    def _session(self) -> Session:
        contexts = self._contexts if self._contexts_of == self._name else ()
        return self._answers.session(self._name, mode=self._mode, contexts=contexts, tls=self._encrypted)

    def _check_clear_end(self) -> None:
        """Whoever may write into the clear connection must not get answers in behind the encryption."""
        if len(self._inbox):
            raise self._broken(f"{len(self._inbox)} bytes came in clear between STARTTLS and TLS")

    def _broken(self, reason: str) -> RemoteProtocolError:
        self._state = _State.BROKEN
        return RemoteProtocolError(f"the server broke the NBD protocol: {reason}")
