"""From an NBD URI to a socket on which transmission has begun.

It does not know what is then asked. No TLS: whoever measures encryption measures something else.
"""

from __future__ import annotations

import contextlib
import socket
import time

from cowslice.errors import BadOption, RemoteProtocolError, StorageError
from cowslice.nbd import Opening, Ready, Refused, Session, Wish
from cowslice.nbd.wire import COMPACT_REQUEST, REQUEST_MAGIC, Command, shown
from cowslice.storage.nbdaddress import NbdAddress, parse_nbd_uri
from cowslice.storage.nbdchannel import Channel, dial

PATIENCE = 30.0  # seconds for the whole way
_CHUNK = 4096  # bytes of one receive: in a negotiation the server speaks in small pieces


def connect(uri: str, *, structured: bool = True) -> tuple[socket.socket, Session]:
    """A connected blocking socket and what was agreed on. Raises BadOption, StorageError, RemoteProtocolError."""
    address = parse_nbd_uri(uri)
    if address.tls:
        raise BadOption(f"URI is '{uri}', expected nbd: or nbd+unix:, because a load is not encrypted")
    with contextlib.ExitStack() as undo:
        try:
            channel = dial(address, time.monotonic() + PATIENCE)
            undo.enter_context(channel.socket)
            session = _negotiate(channel, address, structured=structured)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError.of(error, "connect to", uri) from error
        channel.socket.settimeout(None)
        undo.pop_all()
    return channel.socket, session


def disconnect(connected: socket.socket) -> None:
    """Say goodbye as the protocol wants it, and close."""
    with connected, contextlib.suppress(OSError):
        connected.sendall(COMPACT_REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0))


def _negotiate(channel: Channel, address: NbdAddress, *, structured: bool) -> Session:
    channel.set_deadline(time.monotonic() + PATIENCE)
    opening = Opening(Wish(address.export, extended=False, structured=structured, contexts=()))
    while True:
        event = opening.next_event()
        channel.send([opening.data_to_send()])
        if isinstance(event, Ready):
            break
        if isinstance(event, Refused):
            reason = f": {shown(event.reason)}" if event.reason else ""
            raise StorageError(f"the server refuses export '{shown(address.export)}'{reason}")
        got = channel.recv(_CHUNK)
        if got:
            opening.receive(got)
        else:
            opening.receive_eof()
    if opening.take_leftover():
        raise RemoteProtocolError("the server sent replies before any request")
    return event.session
