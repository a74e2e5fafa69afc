"""TLS on the way to an NBD server: the TLS library sees memory only, so nothing waits while its lock is held.

It knows no message of NBD. What must hold: unless the caller said otherwise, nobody gets past the handshake without a
certificate for the host's name that the authority signed; nothing older than TLS 1.2 is spoken.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cowslice.errors import BadOption, CryptoError
from cowslice.nbd.buffer import Bytes
from cowslice.storage.nbdaddress import NbdAddress
from cowslice.storage.nbdchannel import Channel

RECEIVED_AT_ONCE = 1 << 16
MOST_AT_ONCE = 1 << 18  # bytes that the library is given: its lock must not be held for long


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the authority, '' for those that the system trusts; our certificate and its key, '' for none."""

    ca: str = ""
    cert: str = ""
    key: str = ""


def context_for(address: NbdAddress, given: TlsFiles) -> ssl.SSLContext:
    """What the URI says of TLS, or else the files given. Raises BadOption, CryptoError."""
    if not address.certificates:
        return client_context(given, verify_peer=address.verify_peer)
    if given != TlsFiles():
        raise BadOption("certificates are given twice, expected them in the URI or as options")
    return client_context(find_tls_files(address.certificates), verify_peer=address.verify_peer)


def find_tls_files(directory: str) -> TlsFiles:
    """The files in a directory that is laid out as QEMU wants it. The authority's must be there."""
    ca, cert, key = (os.path.join(directory, name) for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"))
    return TlsFiles(ca, cert, key) if os.path.exists(cert) else TlsFiles(ca)


def client_context(files: TlsFiles, *, verify_peer: bool) -> ssl.SSLContext:
    """Load what is needed. Raises BadOption for a missing file, CryptoError for one that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    for path in filter(None, (files.ca, files.cert, files.key)):
        if not os.path.exists(path):
            raise BadOption(f"there is no '{path}', which TLS needs")
    if files.ca:
        _load(files.ca, lambda: context.load_verify_locations(files.ca))
    else:
        context.load_default_certs()
    if files.cert:
        _load(files.cert, lambda: context.load_cert_chain(files.cert, files.key or None, password=_no_password))
    if not verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _load(path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "reason", None) or getattr(fault, "strerror", None) or fault
        raise CryptoError(f"the certificate '{path}' or its key cannot be used: {reason}") from None


def _no_password() -> str:
    raise ValueError("the key is encrypted, expected one without a password")


class TlsChannel(Channel):
    """A connection inside TLS. It takes the socket of a plain one over."""

    def __init__(self, plain: Channel, context: ssl.SSLContext, *, hostname: str, name: str) -> None:
        super().__init__(plain.socket)
        self._name = name
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self._tls = context.wrap_bio(self._arrived, self._leaving, server_hostname=hostname)
        except ValueError as error:
            raise BadOption(f"the host name for TLS is '{hostname}': {error}") from None
        self._session = threading.Lock()

    def shake_hands(self, deadline: float) -> None:
        """Do the TLS handshake. Raises CryptoError, OSError, or TimeoutError at the deadline."""
        self.set_deadline(deadline)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send_leaving()
                self._take()
                continue
            except ssl.SSLError as fault:
                with contextlib.suppress(OSError):
                    self._send_leaving()  # the alert that says why
                raise self._failed(fault) from None
            self._send_leaving()
            return

    def recv(self, most: int) -> bytes:
        target = bytearray(most)
        return bytes(memoryview(target)[: self.recv_into(memoryview(target))])

    def recv_into(self, target: memoryview) -> int:
        while True:
            try:
                with self._session:
                    count: int = self._tls.read(len(target), target)  # type: ignore[assignment]
                    return count
            except ssl.SSLWantReadError:
                self._take()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0
            except ssl.SSLError as fault:
                raise self._failed(fault) from None

    def send(self, parts: Sequence[Bytes]) -> None:
        # Small parts together: a header in a TLS record of its own would cost as much as a page behind it.
        total = sum(memoryview(part).nbytes for part in parts)
        for part in [b"".join(parts)] if total <= MOST_AT_ONCE else parts:
            view = memoryview(part)
            for at in range(0, len(view), MOST_AT_ONCE):
                self._encrypt(view[at : at + MOST_AT_ONCE])
                self._send_leaving()

    def say_last(self, parts: Sequence[Bytes]) -> None:
        """Also says goodbye as TLS wants it, without waiting for the answer."""
        with contextlib.suppress(OSError, CryptoError):
            self._encrypt(memoryview(b"".join(parts)))
            with self._session, contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            super().say_last([self._leaving.read()])

    def _encrypt(self, part: memoryview) -> None:
        try:
            with self._session:
                while len(part):
                    part = part[self._tls.write(part) :]
        except ssl.SSLError as fault:
            raise self._failed(fault) from None

    def _send_leaving(self) -> None:
        with self._session:
            encrypted = self._leaving.read()
        super().send([encrypted])

    def _take(self) -> None:
        arrived = super().recv(RECEIVED_AT_ONCE)
        with self._session:
            if arrived:
                self._arrived.write(arrived)
            else:
                self._arrived.write_eof()

    def _failed(self, fault: ssl.SSLError) -> CryptoError:
        reason = getattr(fault, "verify_message", "") or fault.reason or str(fault)
        return CryptoError(f"TLS with '{self._name}' failed: {reason}")
