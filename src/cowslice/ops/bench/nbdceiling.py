"""A server that does nothing: it shakes hands, and answers every read with whatever lies in memory.

What a client reaches on it, it reaches on no server that reads a disk. Run as a program it serves a disk of so many
bytes at a Unix socket until it is told to end: `python -m cowslice.ops.bench.nbdceiling -k PATH BYTES`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

from cowslice.errors import RemoteProtocolError
from cowslice.nbd import Aborted, Export, Need, Negotiated, ServerHandshake, export_flags
from cowslice.nbd.wire import Mode
from cowslice.ops.bench.nbdblank import answer_blank


def serve_nothing(place: str, size: int) -> None:
    """Serve for ever."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        while True:
            threading.Thread(target=_serve, args=(listening.accept()[0], size), daemon=True).start()


def _serve(connected: socket.socket, size: int) -> None:
    with connected, contextlib.suppress(OSError, RemoteProtocolError):
        agreed = _shake_hands(connected, size)
        if agreed is not None:
            answer_blank(connected.fileno(), *agreed)


def _shake_hands(connected: socket.socket, size: int) -> tuple[Mode, bytes] | None:
    """Which replies the client wants, and what came behind the handshake; None when the client left."""
    handshake = ServerHandshake([Export("", size, export_flags(writable=False, multi_conn=True))])
    while True:
        event = handshake.next_event()
        connected.sendall(handshake.data_to_send())
        if isinstance(event, Negotiated):
            return event.session.mode, handshake.take_leftover()
        if isinstance(event, Aborted):
            return None
        if isinstance(event, Need):
            data = connected.recv(1 << 16)
            if not data:
                return None
            handshake.receive(data)


if __name__ == "__main__":
    serve_nothing(sys.argv[2], int(sys.argv[3]))
