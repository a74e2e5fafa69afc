"""What a remote NBD server offers: its exports, asked for one after another over one connection.

It reads no data. Nothing that the server says is trusted: its list is bounded, and so is the time that it may take.
"""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass

from cowslice.errors import CryptoError, RemoteProtocolError, StorageError
from cowslice.nbd.client_handshake import ClientHandshake, ClientHandshakeEvent
from cowslice.nbd.events import ContextsListed, Described, ExportsListed, Greeted, Need, Refused, Session, StartTls
from cowslice.nbd.wire import Option, word
from cowslice.serve.stream import Stream, TlsStream

TIMEOUT = 30.0  # seconds for everything
MOST_DESCRIBED = 1000  # exports that are asked about; more than that only have their names listed
RECEIVED_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class RemoteExport:
    """One export as the server describes it. `session` is what it would be like, None where nothing is told."""

    name: str
    description: str
    session: Session | None
    contexts: tuple[str, ...]


def list_exports(
    address: str | tuple[str, int], *, tls: ssl.SSLContext | None = None, hostname: str | None = None,
    timeout: float = TIMEOUT,
) -> list[RemoteExport]:
    """Ask the server at a Unix socket's path, or at (host, port), for its exports.

    `hostname` is the name that its certificate must have, where the context checks one. Raises StorageError where it
    cannot be reached, RemoteProtocolError where it does not say, CryptoError where TLS fails.
    """
    shown = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
    try:
        with _connect(address, timeout) as connected:
            return _Listing(Stream(connected), time.monotonic() + timeout).run(tls, hostname)
    except ssl.SSLError as fault:
        raise CryptoError(f"TLS with '{shown}' failed: {fault.reason or fault}") from None
    except TimeoutError:
        raise StorageError(f"'{shown}' did not answer within {timeout:g} seconds", filename=shown) from None
    except OSError as fault:
        if isinstance(fault, StorageError):
            raise
        raise StorageError.of(fault, "list the exports of", shown) from fault


def _connect(address: str | tuple[str, int], timeout: float) -> socket.socket:
    if not isinstance(address, str):
        return socket.create_connection(address, timeout)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(timeout)
        connected.connect(address)
    except OSError:
        connected.close()
        raise
    return connected


class _Listing:
    """The conversation."""

    def __init__(self, stream: Stream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline
        self._handshake = ClientHandshake()

    def run(self, tls: ssl.SSLContext | None, hostname: str | None) -> list[RemoteExport]:
        greeted = self._next()
        if not isinstance(greeted, Greeted) or not greeted.fixed:
            raise RemoteProtocolError("the server is too old to list its exports")
        try:
            if tls is not None:
                self._start_tls(tls, hostname)
            return self._all()
        finally:
            self._stream.close()

    def _all(self) -> list[RemoteExport]:
        handshake = self._handshake
        handshake.extended_headers()
        if isinstance(self._next(), Refused):
            handshake.structured_replies()
            self._next()
        handshake.list_exports()
        listed = self._next()
        if not isinstance(listed, ExportsListed):
            raise _refusal(listed)
        found = [self._one(one.name, one.description, ask=number < MOST_DESCRIBED)
                 for number, one in enumerate(listed.exports)]
        handshake.abort()
        self._send()
        return found

    def _one(self, name: str, description: str, *, ask: bool) -> RemoteExport:
        if not ask:
            return RemoteExport(name, description, None, ())
        self._handshake.info(name)
        described = self._next()
        session = described.session if isinstance(described, Described) else None
        self._handshake.list_contexts(name)
        listed = self._next()
        contexts = tuple(one.name for one in listed.contexts) if isinstance(listed, ContextsListed) else ()
        return RemoteExport(name, (session.description if session else "") or description, session, contexts)

    def _start_tls(self, tls: ssl.SSLContext, hostname: str | None) -> None:
        self._handshake.start_tls()
        answer = self._next()
        if not isinstance(answer, StartTls):
            raise _refusal(answer)
        wrapped = tls.wrap_socket(self._stream.socket, server_hostname=hostname, do_handshake_on_connect=False)
        stream = self._stream = TlsStream(wrapped)
        stream.shake_hands(self._deadline)
        self._handshake.tls_started()

    def _next(self) -> ClientHandshakeEvent:
        while True:
            event = self._handshake.next_event()
            if not isinstance(event, Need):
                return event
            self._send()
            self._stream.set_deadline(self._deadline)
            data = self._stream.recv(RECEIVED_AT_ONCE)
            if not data:
                self._handshake.receive_eof()
            self._handshake.receive(data)

    def _send(self) -> None:
        self._stream.set_deadline(self._deadline)
        self._stream.send([self._handshake.data_to_send()])


def _refusal(event: ClientHandshakeEvent) -> RemoteProtocolError:
    """Why the server does not go on, as a sentence."""
    if not isinstance(event, Refused):
        return RemoteProtocolError("the server answered something that was not asked")
    reason = f": {event.reason}" if event.reason else ""
    return RemoteProtocolError(f"the server refused {word(event.option, Option)}{reason}")
