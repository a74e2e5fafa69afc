"""From an address to a session: dial, negotiate, start TLS where it is asked for.

It reads no data. The whole of it has one deadline, however the server spreads what it says.
"""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import dataclass

from cowslice.errors import BadOption, CowsliceError, StorageError
from cowslice.nbd.client_side import ClientTransmission
from cowslice.nbd.events import Ready, Refused, Session, StartTls
from cowslice.nbd.opening import Opening, TlsWish, Wish
from cowslice.nbd.wire import Answer, Option, shown, word
from cowslice.storage.nbdaddress import NbdAddress
from cowslice.storage.nbdchannel import Channel, dial
from cowslice.storage.nbdlink import NbdLink

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl

_CHUNK = 4096  # bytes of one receive: while negotiating the server speaks in small pieces
_CODES = {
    Answer.ERR_POLICY: errno.EACCES,
    Answer.ERR_TLS_REQD: errno.EACCES,
    Answer.ERR_UNKNOWN: errno.ENOENT,
    Answer.ERR_SHUTDOWN: errno.ESHUTDOWN,
}
_HINTS = {
    Answer.ERR_TLS_REQD: "The server wants TLS: write nbds: instead of nbd:.",
    Answer.ERR_UNKNOWN: "Ask which exports there are: cowslice serve --list.",
}


@dataclass(frozen=True, slots=True)
class Connector:
    """All that is needed to connect, more than once. `name` is for people; `tls` is None where the address has none."""

    address: NbdAddress
    name: str
    timeout: float
    tls: ssl.SSLContext | None = None

    def connect(self) -> NbdLink:
        """Open a session of its own. Raises StorageError, RemoteProtocolError, CryptoError, BadOption."""
        channel: Channel | None = None
        deadline = time.monotonic() + self.timeout
        try:
            channel = dial(self.address, deadline)
            channel.set_deadline(deadline)
            opening = Opening(Wish(self.address.export, tls=TlsWish.ALWAYS if self.tls else TlsWish.NEVER))
            channel, session = self._negotiate(channel, opening, deadline)
            transmission = ClientTransmission(session, opening.take_leftover())
            return NbdLink(channel, transmission, name=self.name, timeout=self.timeout)
        except BaseException as error:
            if channel is not None:
                channel.socket.close()
            if isinstance(error, (OSError, ValueError)) and not isinstance(error, CowsliceError):
                raise self._translated(error) from error
            raise

    def _negotiate(self, channel: Channel, opening: Opening, deadline: float) -> tuple[Channel, Session]:
        while True:
            event = opening.next_event()
            channel.send([opening.data_to_send()])
            if isinstance(event, Ready):
                return channel, event.session
            if isinstance(event, Refused):
                raise self._refused(event)
            if isinstance(event, StartTls):
                channel = self._start_tls(channel, deadline)
                opening.tls_started()
                continue
            received = channel.recv(_CHUNK)
            if received:
                opening.receive(received)
            else:
                opening.receive_eof()

    def _start_tls(self, channel: Channel, deadline: float) -> Channel:
        from cowslice.storage.nbdtls import TlsChannel

        if self.tls is None:
            raise BadOption(f"the server at '{self.name}' starts TLS, nobody asked for it")
        encrypted = TlsChannel(channel, self.tls, hostname=self.address.hostname, name=self.name)
        encrypted.shake_hands(deadline)
        return encrypted

    def _refused(self, event: Refused) -> StorageError:
        what = "TLS" if event.option == Option.STARTTLS else f"export '{shown(self.address.export)}'"
        reason = shown(event.reason) or word(event.answer, Answer)
        return StorageError(
            f"cannot open '{self.name}': the server refuses {what}: {reason}",
            errno=_CODES.get(event.answer, errno.ECONNREFUSED),  # type: ignore[call-overload]  # any number may come
            filename=self.name, hint=_HINTS.get(event.answer, ""))  # type: ignore[call-overload]

    def _translated(self, error: OSError | ValueError) -> CowsliceError:
        if isinstance(error, ValueError):
            return BadOption(f"cannot open '{self.name}': {error}")
        if isinstance(error, TimeoutError) and not error.errno:
            return StorageError(f"cannot open '{self.name}': the server did not answer for {self.timeout:g} seconds",
                                errno=errno.ETIMEDOUT, filename=self.name)
        if isinstance(error, socket.gaierror):
            return StorageError(f"cannot open '{self.name}': {error.strerror}", errno=errno.ENXIO, filename=self.name)
        return StorageError.of(error, "open", self.name)
