"""An NBD URI as a record: which server, which export, and how TLS is done.

It opens nothing. Sources: the NBD project's page "NBD URIs" (doc/uri.md); the parameters of TLS are those of libnbd.
A parameter that is not understood is refused: it may be the one that makes the connection safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from cowslice.errors import BadOption

DEFAULT_PORT = 10809  # registered with IANA
FORMS = "nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, or with TLS nbds: and nbds+unix:"
_SCHEMES = {"nbd": (False, False), "nbd+unix": (False, True), "nbds": (True, False), "nbds+unix": (True, True)}
_TLS_PARAMETERS = ("tls-certificates", "tls-hostname", "tls-verify-peer")
_SWITCH = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where an export is: the path of a socket, or else a host and a port; and its name.

    `certificates` is a directory with ca-cert.pem and perhaps client-cert.pem and client-key.pem, or ''. `hostname` is
    what the server's certificate must be for.
    """

    export: str
    path: str = ""
    host: str = ""
    port: int = DEFAULT_PORT
    tls: bool = False
    certificates: str = ""
    hostname: str = "localhost"
    verify_peer: bool = True


def parse_nbd_uri(uri: str) -> NbdAddress:
    """Read a URI. Raises BadOption."""
    if not uri.isprintable():
        raise BadOption(f"URI is {uri!r}, expected one without control characters")
    try:
        parts = urlsplit(uri)
        host, port = unquote(parts.hostname or "", errors="strict"), parts.port
    except ValueError as error:
        raise BadOption(f"URI is '{uri}': {error}") from None
    if parts.scheme not in _SCHEMES or "://" not in uri:
        raise BadOption(f"URI is '{uri}', expected {FORMS}")
    if parts.fragment or parts.username is not None:
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # a user may have a password
        raise BadOption(f"URI is '{shown}' and has a user or a fragment, expected {FORMS}")
    return _address(uri, parts, host, DEFAULT_PORT if port is None else port)


def _address(uri: str, parts: SplitResult, host: str, port: int) -> NbdAddress:
    tls, local = _SCHEMES[parts.scheme]
    given = _parameters(uri, parts.query, tls=tls, local=local)
    path = given.get("socket", "")
    if local and (not path or parts.netloc):
        raise BadOption(f"URI is '{uri}', expected nbd+unix:///EXPORT?socket=PATH, the path behind 'socket='")
    verify = given.get("tls-verify-peer", "true")
    if verify not in _SWITCH:
        raise BadOption(f"URI is '{uri}': tls-verify-peer is '{verify}', expected true or false")
    host = "" if local else host or "localhost"
    return NbdAddress(
        _export(uri, parts.path), path=path, host=host, port=port, tls=tls,
        certificates=given.get("tls-certificates", ""), hostname=given.get("tls-hostname") or host or "localhost",
        verify_peer=_SWITCH[verify])


def _export(uri: str, path: str) -> str:
    try:
        return unquote(path[1:], errors="strict")
    except UnicodeDecodeError:
        raise BadOption(f"URI is '{uri}', expected the name of an export in UTF-8") from None


def _parameters(uri: str, query: str, *, tls: bool, local: bool) -> dict[str, str]:
    """What stands behind the question mark. A plus sign is a plus sign."""
    allowed = (*(("socket",) if local else ()), *(_TLS_PARAMETERS if tls else ()))
    given: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in allowed or key in given:
            expected = ", ".join(allowed) or "none"
            raise BadOption(f"URI is '{uri}': parameter '{key}' is unknown here or there twice, expected {expected}")
        given[key] = unquote(value, errors="surrogateescape")
    return given
