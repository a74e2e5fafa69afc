"""From an NBD URI to a socket on which transmission has begun.

It does not know what is then asked: the handshake is that of `cowslice.nbd`. No TLS: whoever measures encryption
measures something else. Source of the URIs: the NBD specification's page "NBD URIs" (doc/uri.md).
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from cowslice.errors import BadOption, RemoteProtocolError, StorageError
from cowslice.nbd import Need, Opening, Ready, Refused, Session, Wish
from cowslice.nbd.wire import shown

DEFAULT_PORT = 10809
PATIENCE = 30.0  # seconds for each step of the handshake
_CHUNK = 4096  # bytes of one receive: in a handshake the server speaks in small pieces


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where an export is: a socket path, or else a host and a port; and its name."""

    export: str
    path: str = ""
    host: str = ""
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


def parse_nbd_uri(uri: str) -> NbdAddress:
    """The address in `nbd://host[:port]/export` or `nbd+unix:///export?socket=PATH`. Raises BadOption."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "localhost", parts.port or DEFAULT_PORT
    except ValueError as error:
        raise BadOption(f"URI is '{uri}': {error}") from None
    export = unquote(parts.path[1:])
    if parts.scheme == "nbd" and "://" in uri:
        return NbdAddress(export, host=host, port=port)
    path = parse_qs(parts.query).get("socket", [""])[0]
    if parts.scheme == "nbd+unix" and path:
        return NbdAddress(export, path=path)
    raise BadOption(f"URI is '{uri}', expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")


def connect(address: NbdAddress, *, structured: bool = True) -> tuple[socket.socket, Session]:
    """A connected blocking socket and what was agreed on. Raises StorageError, RemoteProtocolError, BadOption."""
    wish = Wish(address.export, extended=False, structured=structured, contexts=())
    with contextlib.ExitStack() as undo:
        try:
            channel = undo.enter_context(_dial(address))
            session = _negotiate(channel, address, wish)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError.of(error, "connect to", str(address)) from error
        channel.settimeout(None)
        undo.pop_all()
    return channel, session


def disconnect(channel: socket.socket) -> None:
    """Say goodbye as the protocol wants it, and close."""
    with contextlib.suppress(OSError), channel:
        channel.sendall(b"\x25\x60\x95\x13\0\0\0\2" + bytes(20))  # NBD_CMD_DISC


def _dial(address: NbdAddress) -> socket.socket:
    if not address.path:
        channel = socket.create_connection((address.host, address.port), PATIENCE)
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return channel
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.settimeout(PATIENCE)
    try:
        channel.connect(address.path)
    except BaseException:
        channel.close()
        raise
    return channel


def _negotiate(channel: socket.socket, address: NbdAddress, wish: Wish) -> Session:
    opening = Opening(wish)
    while True:
        event = opening.next_event()
        channel.sendall(opening.data_to_send())
        if isinstance(event, Ready):
            break
        if isinstance(event, Refused):
            reason = f": {shown(event.reason)}" if event.reason else ""
            raise StorageError(f"the server at {address} refuses export '{shown(address.export)}'{reason}")
        assert isinstance(event, Need)
        got = channel.recv(_CHUNK)
        if got:
            opening.receive(got)
        else:
            opening.receive_eof()
    if opening.take_leftover():
        raise RemoteProtocolError(f"the server at {address} sent replies before any request")
    return event.session
