"""The server's half of the negotiation: one small function per option, from the greeting to transmission.

It does not know sockets or how TLS is done: it says when. Bytes go in by `receive`, one event comes out of each
`next_event`, and what is to be sent waits in `data_to_send` - drain it after every event, then memory is bounded by one
option and its answer. After a RemoteProtocolError the connection is only good for closing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from cowslice.errors import LocalProtocolError, RemoteProtocolError
from cowslice.nbd.buffer import Bytes, Inbox
from cowslice.nbd.events import (
    NEED_DATA,
    Aborted,
    Context,
    Export,
    Need,
    Negotiated,
    OptionAnswered,
    Session,
    StartTls,
    TlsPolicy,
)
from cowslice.nbd.options import (
    BadPayload,
    ExportWish,
    decode_context_wish,
    decode_export_wish,
    decode_string,
    encode_answer,
    encode_block_sizes,
    encode_context,
    encode_export_info,
    encode_server,
    encode_text_info,
    unknown_export,
)
from cowslice.nbd.wire import (
    CLIENT_FLAGS,
    GREETING,
    KNOWN_HANDSHAKE_FLAGS,
    MAX_CONTEXTS,
    MAX_OPTION,
    MAX_OPTION_KEPT,
    MAX_OPTIONS,
    MAX_STRING,
    NBD_MAGIC,
    OLD_EXPORT,
    OLD_PADDING,
    OPTION,
    OPTION_MAGIC,
    Answer,
    ExportFlag,
    HandshakeFlag,
    InfoType,
    Mode,
    Option,
    cut,
    word,
)

ServerHandshakeEvent = Need | OptionAnswered | StartTls | Aborted | Negotiated


class _State(Enum):
    CLIENT_FLAGS = "client flags"
    OPTIONS = "options"
    TLS = "TLS"
    DONE = "done"
    BROKEN = "broken"


class ServerHandshake:
    """Negotiate with one client.

    `exports` in the order in which they are listed, with distinct names; `default` is the name that the empty name
    stands for, where no export has the empty name itself. `listing` False refuses LIST.
    """

    def __init__(self, exports: Iterable[Export], *, tls: TlsPolicy = TlsPolicy.OFF, default: str | None = None,
                 listing: bool = True) -> None:
        self._exports = _by_name(exports)
        if tls is TlsPolicy.OFF and any(export.tls_only for export in self._exports.values()):
            raise LocalProtocolError("an export is for TLS only, but TLS is off")
        self._default = default
        self._tls = tls
        self._listing = listing
        self._encrypted = False
        self._stopping = False
        self._client = HandshakeFlag(0)
        self._options = 0
        self._state = _State.CLIENT_FLAGS
        self._inbox = Inbox()
        self._outbox = bytearray(GREETING.pack(NBD_MAGIC, OPTION_MAGIC, KNOWN_HANDSHAKE_FLAGS))
        self._too_big: tuple[int, int] | None = None
        self._forget()

    def _forget(self) -> None:
        """Drop what was agreed on, as TLS demands."""
        self._mode = Mode.SIMPLE
        self._contexts: tuple[Context, ...] = ()
        self._contexts_of = ""

    # What the caller does

    def receive(self, data: Bytes) -> None:
        """Take bytes from the client; they are copied. Then call `next_event` until it says NEED_DATA."""
        self._inbox.put(data)

    def data_to_send(self) -> bytes:
        """What the client is to be sent now; empty when there is nothing."""
        data = bytes(self._outbox)
        self._outbox.clear()
        return data

    def shut_down(self) -> None:
        """Refuse every option from now on but ABORT: the server is about to stop."""
        self._stopping = True

    def tls_started(self) -> None:
        """Go on after StartTls: everything from here on came through TLS, and nothing agreed on before it counts."""
        if self._state is not _State.TLS:
            raise LocalProtocolError("TLS was started, but no client asked for it")
        if len(self._inbox):
            raise self._broken(f"{len(self._inbox)} bytes came in clear between STARTTLS and TLS")
        self._encrypted = True
        self._forget()
        self._state = _State.OPTIONS

    def take_leftover(self) -> bytes:
        """What came after the negotiation: the first bytes of transmission."""
        if self._state is not _State.DONE:
            raise LocalProtocolError("the negotiation has not ended")
        return self._inbox.take_all()

    def next_event(self) -> ServerHandshakeEvent:
        """Handle one message. Raises RemoteProtocolError when the client breaks the protocol: close then."""
        if self._state is _State.BROKEN:
            raise RemoteProtocolError("the client broke the protocol before")
        if self._state is _State.CLIENT_FLAGS and not self._read_client_flags():
            return NEED_DATA
        if self._state is not _State.OPTIONS:
            return NEED_DATA
        return self._next_option()

    # Messages

    def _read_client_flags(self) -> bool:
        fields = self._inbox.take_fields(CLIENT_FLAGS)
        if fields is None:
            return False
        (flags,) = fields
        if flags & ~KNOWN_HANDSHAKE_FLAGS:
            raise self._broken(f"client flags are {flags:#x}, expected no other bits than {KNOWN_HANDSHAKE_FLAGS:#x}")
        self._client = HandshakeFlag(flags)
        self._state = _State.OPTIONS
        return True

    def _next_option(self) -> ServerHandshakeEvent:
        if self._inbox.skipping:
            return NEED_DATA
        if self._too_big:
            option, length = self._too_big
            self._too_big = None
            return self._answer_unread(option, length)
        header = self._inbox.peek(OPTION)
        if header is None:
            return NEED_DATA
        magic, option, length = header
        self._check_header(magic, option, length)
        if length > MAX_OPTION_KEPT:
            self._begin(option)
            self._inbox.skip(OPTION.size + length)
            self._too_big = option, length
            return self._next_option()
        if len(self._inbox) < OPTION.size + length:
            return NEED_DATA
        self._begin(option)
        self._inbox.skip(OPTION.size)
        return self._answer(option, self._inbox.take(length) or b"")

    def _check_header(self, magic: int, option: int, length: int) -> None:
        if magic != OPTION_MAGIC:
            raise self._broken(f"an option begins with {magic:#018x}, expected {OPTION_MAGIC:#018x}")
        if length > MAX_OPTION:
            raise self._broken(f"option {word(option, Option)} has {length} bytes, expected up to {MAX_OPTION}")
        if option == Option.EXPORT_NAME and length > MAX_STRING:
            raise self._broken(f"the name of an export has {length} bytes, expected up to {MAX_STRING}")
        if option != Option.EXPORT_NAME and not self._client & HandshakeFlag.FIXED_NEWSTYLE:
            raise self._broken(f"option {word(option, Option)} came from a client that does not know fixed newstyle")

    def _begin(self, option: int) -> None:
        self._options += 1
        if self._options > MAX_OPTIONS:
            raise self._broken(f"more than {MAX_OPTIONS} options, the last one {word(option, Option)}")
        if option == Option.SET_META_CONTEXT:
            # It replaces what was selected before, also where it fails.
            self._contexts, self._contexts_of = (), ""

    def _answer(self, option: int, payload: bytes) -> ServerHandshakeEvent:
        if option not in (Option.ABORT, Option.EXPORT_NAME):
            refusal = self._refused_whatever_it_says(option)
            if refusal:
                return self._refuse(option, *refusal)
        handler = _HANDLERS.get(option)
        if handler is None:
            return self._refuse(option, Answer.ERR_UNSUP, f"option {option} is not known")
        try:
            return handler(self, payload)
        except BadPayload as bad:
            if option == Option.EXPORT_NAME:
                raise self._broken(str(bad)) from None
            return self._refuse(option, bad.answer, str(bad))

    def _answer_unread(self, option: int, length: int) -> ServerHandshakeEvent:
        """Answer an option whose payload was thrown away. ABORT does not care what it brings."""
        if option == Option.ABORT:
            return self._on_abort(b"")
        refusal = self._refused_whatever_it_says(option)
        return self._refuse(option, *(refusal or (Answer.ERR_TOO_BIG, f"{length} bytes are too many for an option")))

    def _refused_whatever_it_says(self, option: int) -> tuple[Answer, str] | None:
        if self._stopping:
            return Answer.ERR_SHUTDOWN, "the server is shutting down"
        if self._tls is TlsPolicy.REQUIRED and not self._encrypted and option != Option.STARTTLS:
            return Answer.ERR_TLS_REQD, "this server speaks only with TLS"
        return None

    # Options

    def _on_export_name(self, payload: bytes) -> ServerHandshakeEvent:
        """It cannot be refused by an answer, so everything that speaks against it ends the connection."""
        name = decode_string(payload, "EXPORT_NAME")
        export = self._find(name)
        if self._stopping:
            raise self._broken("EXPORT_NAME came while the server is shutting down")
        if self._tls is TlsPolicy.REQUIRED and not self._encrypted:
            raise self._broken("EXPORT_NAME came without TLS, which this server requires")
        if self._mode is Mode.EXTENDED:
            raise self._broken("EXPORT_NAME came after extended headers, expected GO")
        if export is None or self._hidden(export):
            raise self._broken(unknown_export(name))
        if export.sizes_required:
            raise self._broken("EXPORT_NAME cannot promise the block sizes that the export requires, expected GO")
        session = self._session(export)
        self._outbox += OLD_EXPORT.pack(session.size, session.flags)
        if not self._client & HandshakeFlag.NO_ZEROES:
            self._outbox += bytes(OLD_PADDING)
        return self._negotiated(session, export)

    def _on_abort(self, _payload: bytes) -> ServerHandshakeEvent:
        self._send(Option.ABORT, Answer.ACK)
        self._state = _State.DONE
        return Aborted()

    def _on_list(self, payload: bytes) -> ServerHandshakeEvent:
        _expect_empty(payload, "LIST")
        if not self._listing:
            return self._refuse(Option.LIST, Answer.ERR_POLICY, "this server does not list its exports")
        for export in self._exports.values():
            if not self._hidden(export):
                self._send(Option.LIST, Answer.SERVER, encode_server(export.name, export.description))
        return self._acknowledge(Option.LIST)

    def _on_starttls(self, payload: bytes) -> ServerHandshakeEvent:
        _expect_empty(payload, "STARTTLS")
        if self._tls is TlsPolicy.OFF:
            return self._refuse(Option.STARTTLS, Answer.ERR_POLICY, "this server is not set up for TLS")
        if self._encrypted:
            return self._refuse(Option.STARTTLS, Answer.ERR_INVALID, "TLS is in use already")
        if len(self._inbox):
            # Whoever may write into the clear connection must not get options in behind the encryption.
            raise self._broken(f"{len(self._inbox)} bytes follow STARTTLS in clear, expected to wait for the answer")
        self._send(Option.STARTTLS, Answer.ACK)
        self._state = _State.TLS
        return StartTls()

    def _on_info(self, payload: bytes) -> ServerHandshakeEvent:
        wish = decode_export_wish(payload, "INFO")
        return self._describe(Option.INFO, wish) or self._acknowledge(Option.INFO)

    def _on_go(self, payload: bytes) -> ServerHandshakeEvent:
        wish = decode_export_wish(payload, "GO")
        refused = self._describe(Option.GO, wish)
        export = self._find(wish.name)
        if refused or export is None:
            return refused or self._refuse(Option.GO, Answer.ERR_UNKNOWN, unknown_export(wish.name))
        self._send(Option.GO, Answer.ACK)
        return self._negotiated(self._session(export), export)

    def _describe(self, option: Option, wish: ExportWish) -> OptionAnswered | None:
        """Send what GO and INFO tell alike. A value means that the option was refused."""
        export = self._find(wish.name)
        if self._hidden(export) if export else any(map(self._hidden, self._exports.values())):
            # The same for both, so that nobody learns in clear which hidden exports there are.
            return self._refuse(option, Answer.ERR_TLS_REQD, "this needs TLS")
        if export is None:
            return self._refuse(option, Answer.ERR_UNKNOWN, unknown_export(wish.name))
        sizes = export.block_sizes
        self._send(option, Answer.INFO, encode_block_sizes(sizes.minimum, sizes.preferred, sizes.maximum))
        if option is Option.GO and export.sizes_required and InfoType.BLOCK_SIZE not in wish.wanted:
            return self._refuse(option, Answer.ERR_BLOCK_SIZE_REQD, "ask for the block sizes and keep them")
        # INFO tells what contexts would allow, which may be selected later.
        can_choose = self._mode is Mode.EXTENDED and option is Option.INFO and bool(export.contexts)
        flags = self._session(export).flags | (ExportFlag.BLOCK_STATUS_PAYLOAD if can_choose else 0)
        self._send(option, Answer.INFO, encode_export_info(export.size, flags))
        if InfoType.NAME in wish.wanted or wish.name != export.name:
            self._send(option, Answer.INFO, encode_text_info(InfoType.NAME, export.name))
        if export.description:
            self._send(option, Answer.INFO, encode_text_info(InfoType.DESCRIPTION, export.description))
        return None

    def _on_structured_reply(self, payload: bytes) -> ServerHandshakeEvent:
        _expect_empty(payload, "STRUCTURED_REPLY")
        if self._mode is Mode.EXTENDED:
            return self._refuse(Option.STRUCTURED_REPLY, Answer.ERR_EXT_HEADER_REQD, "extended headers are in use")
        self._mode = Mode.STRUCTURED
        return self._acknowledge(Option.STRUCTURED_REPLY)

    def _on_extended_headers(self, payload: bytes) -> ServerHandshakeEvent:
        _expect_empty(payload, "EXTENDED_HEADERS")
        self._mode = Mode.EXTENDED
        return self._acknowledge(Option.EXTENDED_HEADERS)

    def _on_list_meta_context(self, payload: bytes) -> ServerHandshakeEvent:
        option = Option.LIST_META_CONTEXT
        wish = decode_context_wish(payload, option.name)
        export = self._find(wish.name)
        if export is None or self._hidden(export):
            return self._refuse(option, Answer.ERR_UNKNOWN, unknown_export(wish.name))
        for name in export.contexts:
            if not wish.queries or any(_lists(query, name) for query in wish.queries):
                self._send(option, Answer.META_CONTEXT, encode_context(0, name))
        return self._acknowledge(option)

    def _on_set_meta_context(self, payload: bytes) -> ServerHandshakeEvent:
        option = Option.SET_META_CONTEXT
        wish = decode_context_wish(payload, option.name)
        if self._mode is Mode.SIMPLE:
            return self._refuse(option, Answer.ERR_INVALID, "metadata contexts need structured replies")
        export = self._find(wish.name)
        if export is None or self._hidden(export):
            return self._refuse(option, Answer.ERR_UNKNOWN, unknown_export(wish.name))
        wanted = set(wish.queries)
        selected = tuple(Context(number, name) for number, name in enumerate(export.contexts) if name in wanted)
        if len(selected) > MAX_CONTEXTS:
            return self._refuse(option, Answer.ERR_TOO_BIG, f"{len(selected)} contexts, expected up to {MAX_CONTEXTS}")
        self._contexts, self._contexts_of = selected, export.name
        for context in selected:
            self._send(option, Answer.META_CONTEXT, encode_context(context.id, context.name))
        return self._acknowledge(option)

    # Parts

    def _find(self, name: str) -> Export | None:
        if not name and "" not in self._exports and self._default is not None:
            name = self._default
        return self._exports.get(name)

    def _hidden(self, export: Export) -> bool:
        """Whether the export is not to be seen without TLS."""
        return export.tls_only and not self._encrypted

    def _session(self, export: Export) -> Session:
        contexts = self._contexts if self._contexts_of == export.name else ()
        flags = export.flags & ~int(ExportFlag.SEND_DF | ExportFlag.BLOCK_STATUS_PAYLOAD) | ExportFlag.HAS_FLAGS
        if self._mode is not Mode.SIMPLE:
            flags |= ExportFlag.SEND_DF
        if self._mode is Mode.EXTENDED and contexts:
            flags |= ExportFlag.BLOCK_STATUS_PAYLOAD
        return Session(name=export.name, size=export.size, flags=int(flags), mode=self._mode, contexts=contexts,
                       block_sizes=export.block_sizes, description=export.description, tls=self._encrypted)

    def _negotiated(self, session: Session, export: Export) -> Negotiated:
        self._state = _State.DONE
        return Negotiated(session, export)

    def _send(self, option: Option | int, answer: Answer, payload: bytes = b"") -> None:
        self._outbox += encode_answer(option, answer, payload)

    def _acknowledge(self, option: Option) -> OptionAnswered:
        self._send(option, Answer.ACK)
        return OptionAnswered(option, Answer.ACK)

    def _refuse(self, option: int, answer: Answer, reason: str) -> OptionAnswered:
        self._send(option, answer, cut(reason))
        return OptionAnswered(option, answer)

    def _broken(self, reason: str) -> RemoteProtocolError:
        self._state = _State.BROKEN
        return RemoteProtocolError(f"the client broke the NBD protocol: {reason}")


_HANDLERS: dict[int, Callable[[ServerHandshake, bytes], ServerHandshakeEvent]] = {
    Option.EXPORT_NAME: ServerHandshake._on_export_name,
    Option.ABORT: ServerHandshake._on_abort,
    Option.LIST: ServerHandshake._on_list,
    Option.STARTTLS: ServerHandshake._on_starttls,
    Option.INFO: ServerHandshake._on_info,
    Option.GO: ServerHandshake._on_go,
    Option.STRUCTURED_REPLY: ServerHandshake._on_structured_reply,
    Option.LIST_META_CONTEXT: ServerHandshake._on_list_meta_context,
    Option.SET_META_CONTEXT: ServerHandshake._on_set_meta_context,
    Option.EXTENDED_HEADERS: ServerHandshake._on_extended_headers,
}


def _by_name(exports: Iterable[Export]) -> dict[str, Export]:
    named: dict[str, Export] = {}
    for export in exports:
        if export.name in named:
            raise LocalProtocolError(f"two exports have the name '{export.name}'")
        named[export.name] = export
    return named


def _expect_empty(payload: bytes, option: str) -> None:
    if payload:
        raise BadPayload(f"{option} has {len(payload)} bytes, expected none")


def _lists(query: str, name: str) -> bool:
    """Whether a query of LIST_META_CONTEXT means this context: its name, or a prefix that ends in a colon."""
    return query == name or (query.endswith(":") and name.startswith(query))
