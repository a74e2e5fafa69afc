"""Servers to negotiate with, options to send, answers to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cowslice.nbd import (
    NEED_DATA,
    Export,
    Negotiated,
    ServerHandshake,
    export_flags,
)
from cowslice.nbd.options import ContextWish, ExportWish, encode_context_wish, encode_export_wish, encode_option
from cowslice.nbd.wire import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    OPTION_REPLY,
    Option,
)
from tests.unit.nbd.talk import FIXED, feed_whole

BITMAP = "qemu:dirty-bitmap:monday"
DISK = Export("disk", 1 << 20, description="a disk", contexts=(BASE_ALLOCATION, ALLOCATION_DEPTH, BITMAP))
OTHER = Export("other", 4096, export_flags(writable=True, multi_conn=True))

Feed = Callable[[Any, bytes], list[Any]]


def greeted(*exports: Export, flags: bytes = FIXED, **policy: Any) -> ServerHandshake:
    """A server that has the client's flags."""
    handshake = ServerHandshake(exports or (DISK, OTHER), **policy)
    handshake.data_to_send()
    handshake.receive(flags)
    assert handshake.next_event() is NEED_DATA
    return handshake


def answers(handshake: ServerHandshake) -> list[tuple[int, bytes]]:
    """Type and payload of every answer that waits to be sent."""
    data, found = handshake.data_to_send(), []
    while data:
        _, _, answer, length = OPTION_REPLY.unpack_from(data)
        found.append((answer, data[OPTION_REPLY.size : OPTION_REPLY.size + length]))
        data = data[OPTION_REPLY.size + length :]
    return found


def last(handshake: ServerHandshake) -> int:
    return answers(handshake)[-1][0]


def go(name: str, *wanted: int, option: Option = Option.GO) -> bytes:
    return encode_option(option, encode_export_wish(ExportWish(name, frozenset(wanted))))


def contexts(option: Option, name: str, *queries: str) -> bytes:
    return encode_option(option, encode_context_wish(ContextWish(name, queries)))


def negotiated(handshake: ServerHandshake, message: bytes, feed: Feed = feed_whole) -> Negotiated:
    (event,) = feed(handshake, message)
    assert isinstance(event, Negotiated)
    return event
