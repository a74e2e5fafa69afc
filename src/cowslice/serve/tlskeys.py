"""Pre-shared keys for TLS: Python's own call where it has one (3.13), OpenSSL's through ctypes on the two before it.

It reads no key file. What must hold: nothing is reached into but an SSLContext whose layout is known, and what is
found there has to answer as that context before it is changed.
"""

from __future__ import annotations

import _ssl
import ctypes
import ssl
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from cowslice.errors import BadOption

KeyOf = Callable[[str | None], bytes]

KNOWN_LAYOUTS = ((3, 11), (3, 12))  # of CPython: SSL_CTX* is the first word behind the object's head
GET_MAX_VERSION = 131  # SSL_CTRL_GET_MAX_PROTO_VERSION
Callback = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint)


class KeyedContext(ssl.SSLContext):
    """A server's context that keeps alive what OpenSSL calls."""

    callback: Any = None


def keyed_context(key_of: KeyOf) -> ssl.SSLContext:
    """A context for a server whose clients show that they have a key, in TLS 1.2.

    `key_of` is given a name and returns its key, b"" for a stranger. Raises BadOption where Python can't do it.
    """
    context = KeyedContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in 1.3 OpenSSL takes keys of this kind with one hash only
    own: Any = getattr(context, "set_psk_server_callback", None)
    if own is not None:
        own(key_of)
        return context
    openssl = _openssl()
    if openssl is None:
        raise BadOption("TLS with pre-shared keys needs CPython 3.13, or 3.11 or 3.12 with the system's OpenSSL",
                        hint="Use certificates, or run cowslice with another Python.")
    inner = _inner(context, openssl)
    context.callback = _callback(key_of)
    openssl.SSL_CTX_set_psk_server_callback(inner, context.callback)
    return context


@cache
def _openssl() -> ctypes.CDLL | None:
    """The OpenSSL that Python's module is linked with; None where it can't be reached or the layout is unknown."""
    if sys.implementation.name != "cpython" or sys.version_info[:2] not in KNOWN_LAYOUTS:
        return None
    try:
        library = ctypes.CDLL(getattr(_ssl, "__file__", None))  # a name is looked for in all that the module needs
        library.SSL_CTX_ctrl.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p]
        library.SSL_CTX_ctrl.restype = ctypes.c_long
        library.SSL_CTX_set_psk_server_callback.argtypes = [ctypes.c_void_p, Callback]
        library.SSL_CTX_set_psk_server_callback.restype = None
    except (OSError, AttributeError):
        return None
    return library


def _inner(context: ssl.SSLContext, openssl: ctypes.CDLL) -> int:
    """The SSL_CTX of a context, once it has said the highest version that was set through Python."""
    inner = ctypes.c_void_p.from_address(id(context) + object.__basicsize__).value
    if not inner or openssl.SSL_CTX_ctrl(inner, GET_MAX_VERSION, 0, None) != context.maximum_version:
        raise BadOption("pre-shared keys can't be set up: this Python's SSLContext is not laid out as expected",
                        hint="Use certificates, or run cowslice with Python 3.13 or newer.")
    return inner


def _callback(key_of: KeyOf) -> Any:
    def answer(session: int | None, identity: bytes | None, key: int | None, room: int) -> int:
        found = key_of(identity.decode("utf-8", "replace") if identity else None)
        if not found or not key or len(found) > room:
            return 0  # ends the handshake
        ctypes.memmove(key, found, len(found))
        return len(found)

    return Callback(answer)
