"""One client from its first byte to its last: negotiation, then transmission, in a thread of its own.

It does not know who listens, nor how many clients there are. What must hold: whatever the client does, `run` returns
with the socket closed and no thread left; only `report` hears of what went wrong.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from cowslice.errors import CowsliceError, RemoteProtocolError
from cowslice.nbd.events import Aborted, Need, Negotiated, StartTls, TlsPolicy
from cowslice.nbd.handshake import ServerHandshake
from cowslice.serve.answers import Answers
from cowslice.serve.compiled import CompiledTransmission
from cowslice.serve.exports import Export
from cowslice.serve.metrics import Counters, ExportMeter
from cowslice.serve.stream import Stream, TlsStream
from cowslice.serve.transmission import Limits, Transmission

LINGER = 0.5  # seconds that a client's system has to take the last answers
NEGOTIATED_AT_ONCE = 4096  # bytes of one recv: a negotiation is a few hundred


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What all connections of a server share. `compiled` False keeps to plain Python.

    `meters` hold what is counted, by export name; `tls` makes TLS a duty; `report` hears a sentence at a time, from any
    thread.
    """

    exports: Mapping[str, Export]
    tls: ssl.SSLContext | None = None
    limits: Limits = field(default_factory=Limits)
    meters: Mapping[str, ExportMeter] = field(default_factory=dict)
    report: Callable[[str], None]
    compiled: bool = True

    def tell(self, what: str) -> None:
        """Let `report` hear it. Where it fails, nobody could be told; least of all may a client suffer from that."""
        with suppress(Exception):
            self.report(what)


class Connection:
    """Serve one connected socket, which becomes ours. `negotiated` says whether the client came to ask for data."""

    def __init__(self, connected: socket.socket, service: Service, name: str) -> None:
        self.name = name
        self.negotiated = False
        self._service = service
        self._stream: Stream = Stream(connected)
        self._leaving = threading.Lock()  # whoever holds it finds the descriptor open, or `_closed` set
        self._closed = False
        self._stopped = False
        self._refuse: Callable[[], None] = lambda: None  # of what speaks with the client now

    def run(self) -> None:
        """Serve until the client is gone. Never raises."""
        try:
            agreed = self._negotiate()
            if agreed is not None:
                self._transmit(*agreed)
        except TimeoutError:
            self._tell("nothing came or went for too long")
        except RemoteProtocolError as fault:
            self._tell(str(fault))
        except ssl.SSLError as fault:
            self._tell(f"TLS failed: {fault.reason or fault}")
        except OSError:
            pass  # the client vanished: that is its right
        except CowsliceError as fault:
            self._tell(str(fault))
        except Exception as fault:
            self._tell(f"internal error: {type(fault).__name__}: {fault}")
        finally:
            if self._stopped:
                self._stream.settle(LINGER)
            with self._leaving:
                self._closed = True
                self._stream.close()

    def refuse(self) -> None:
        """Tell the client that the server is about to stop, in answer to whatever it asks from now on."""
        self._refuse()

    def stop(self) -> None:
        """Take no more requests; what has come is still answered."""
        with self._leaving:
            self._stopped = True
            if not self._closed:
                self._stream.stop_reading()

    def abort(self) -> None:
        """Cut the connection."""
        with self._leaving:
            self._stopped = True
            if not self._closed:
                self._stream.abort()

    def _tell(self, what: str) -> None:
        if not self._stopped:
            self._service.tell(f"{self.name}: {what}")

    def _negotiate(self) -> tuple[Negotiated, bytes] | None:
        """Negotiate; None when the client only looked or left."""
        limit = self._service.limits.handshake_timeout
        deadline = time.monotonic() + limit if limit else None
        policy = TlsPolicy.OFF if self._service.tls is None else TlsPolicy.REQUIRED
        handshake = ServerHandshake([export.offer for export in self._service.exports.values()], tls=policy)
        self._refuse = handshake.shut_down
        while True:
            event = handshake.next_event()
            self.negotiated = isinstance(event, Negotiated)  # before the client hears it: from then on it counts
            self._stream.set_deadline(deadline)
            self._stream.send([handshake.data_to_send()])
            if isinstance(event, Negotiated):
                return event, handshake.take_leftover()
            if isinstance(event, Aborted):
                return None
            if isinstance(event, StartTls):
                self._start_tls(deadline)
                handshake.tls_started()
            elif isinstance(event, Need):
                self._stream.set_deadline(deadline)
                data = self._stream.recv(NEGOTIATED_AT_ONCE)
                if not data:
                    return None
                handshake.receive(data)

    def _start_tls(self, deadline: float | None) -> None:
        context = self._service.tls
        assert context is not None
        with self._leaving:
            wrapped = context.wrap_socket(self._stream.socket, server_side=True, do_handshake_on_connect=False)
            stream = self._stream = TlsStream(wrapped)
        stream.shake_hands(deadline)

    def _transmit(self, agreed: Negotiated, leftover: bytes) -> None:
        export = self._service.exports[agreed.session.name]
        limits = self._service.limits
        answers = Answers(export, agreed.session, self._tell)
        counters = Counters(agreed.session.size)
        self._stream.begin_transmission(limits.idle_timeout)
        fast = export.fast if self._service.compiled and not isinstance(self._stream, TlsStream) else None
        transmission: Transmission | CompiledTransmission
        if fast is None:
            transmission = Transmission(self._stream, agreed.session, answers, limits=limits, counters=counters,
                                        name=self.name)
        else:
            transmission = CompiledTransmission(self._stream, agreed.session, answers, fast, limits=limits,
                                                counters=counters, name=self.name)
        self._refuse = transmission.refuse
        meter = self._service.meters.get(export.name)
        if meter is None:
            transmission.run(leftover)
            return
        meter.attach(transmission)
        try:
            transmission.run(leftover)
        finally:
            meter.detach(transmission)
