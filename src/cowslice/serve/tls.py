"""TLS for a server: certificates in the directory layout of QEMU, or pre-shared keys, as an SSLContext.

It opens no socket. What must hold: with `verify_peer`, the default, nobody gets past the handshake without a
certificate that our authority signed; nothing older than TLS 1.2 is spoken.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from cowslice.errors import BadOption, CryptoError
from cowslice.serve.tlskeys import keyed_context

CA, REVOKED, PSK = "ca-cert.pem", "ca-crl.pem", "keys.psk"
CERTIFICATE, KEY = "server-cert.pem", "server-key.pem"
MAX_KEY_FILE = 1 << 20
PSK_CIPHERS = "kECDHEPSK:kDHEPSK:!eNULL"  # a key that leaks later opens nothing that was said before
MIN_PSK = 16  # bytes; what gnutls' psktool makes has 32


@dataclass(frozen=True, slots=True)
class Certificates:
    """Where the certificates are: a directory with ca-cert.pem, server-cert.pem, server-key.pem (ca-crl.pem if any).

    `verify_peer` asks each client for a certificate that the authority signed.
    """

    directory: str | os.PathLike[str]
    verify_peer: bool = True


@dataclass(frozen=True, slots=True)
class PresharedKeys:
    """Where the keys are: a directory with keys.psk, or that file; each line is USERNAME:KEY, the key in hexadecimal.

    Needs CPython; before 3.13 one whose OpenSSL is a library of the system, as Debian's is.
    """

    path: str | os.PathLike[str]


Credentials = Certificates | PresharedKeys


def server_context(credentials: Credentials) -> ssl.SSLContext:
    """Load what a server needs. Raises BadOption where a file is missing, CryptoError where it cannot be used."""
    context = _of_keys(credentials) if isinstance(credentials, PresharedKeys) else _of_certificates(credentials)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    return context


def _of_certificates(credentials: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    place = Path(credentials.directory)
    _load_own(context, place)
    _load_authority(context, place)
    context.verify_mode = ssl.CERT_REQUIRED if credentials.verify_peer else ssl.CERT_NONE
    return context


def _load_own(context: ssl.SSLContext, place: Path) -> None:
    paths = _there(place / CERTIFICATE), _there(place / KEY)
    try:
        context.load_cert_chain(*paths, password=_no_password)
    except (OSError, ValueError) as fault:
        raise _unusable(place / CERTIFICATE, fault) from None


def _load_authority(context: ssl.SSLContext, place: Path) -> None:
    authority = _there(place / CA)
    try:
        context.load_verify_locations(authority)
        if (place / REVOKED).exists():
            context.load_verify_locations(place / REVOKED)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    except (OSError, ValueError) as fault:
        raise _unusable(place / CA, fault) from None


def _unusable(path: Path, fault: Exception) -> CryptoError:
    reason = getattr(fault, "reason", None) or getattr(fault, "strerror", None) or fault
    return CryptoError(f"the certificate '{path}' or its key cannot be used: {reason}")


def _no_password() -> str:
    raise ValueError("the key is encrypted, expected one without a password")


def _of_keys(credentials: PresharedKeys) -> ssl.SSLContext:
    keys = read_keys(credentials.path)

    def key_of(identity: str | None) -> bytes:
        # No key is found for a stranger: the handshake fails as it does for a wrong key.
        return keys.get(identity or "", b"")

    context = keyed_context(key_of)
    context.set_ciphers(PSK_CIPHERS)
    return context


def read_keys(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Read the lines USERNAME:KEY of a file or of keys.psk in a directory. Raises BadOption for what is none."""
    place = Path(path)
    place = _there(place / PSK if place.is_dir() else place)
    keys: dict[str, bytes] = {}
    try:
        with open(place, encoding="utf-8") as file:
            lines = file.read(MAX_KEY_FILE).splitlines()
    except (OSError, ValueError) as error:
        raise BadOption(f"the keys in '{place}' cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, key = line.strip().rpartition(":")
        keys[name] = _key(key, f"line {number} of '{place}'")
        if not name:
            raise BadOption(f"line {number} of '{place}' names nobody, expected USERNAME:KEY")
    if not keys:
        raise BadOption(f"'{place}' holds no key, expected lines USERNAME:KEY")
    return keys


def _key(text: str, where: str) -> bytes:
    """The key of one line; a bad one is never shown."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        raise BadOption(f"{where} has a key that is not hexadecimal") from None
    if len(key) < MIN_PSK:
        raise BadOption(f"{where} has a key of {len(key)} bytes, expected at least {MIN_PSK}")
    return key


def _there(path: Path) -> Path:
    if not path.is_file():
        raise BadOption(f"TLS needs '{path}', which is not there")
    return path
