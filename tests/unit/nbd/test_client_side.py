"""The client's half of transmission, reply by reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cowslice.errors import LocalProtocolError, RemoteProtocolError
from cowslice.nbd import BlockSizes, ClientTransmission, Completed, Context, Session, export_flags
from cowslice.nbd.assembly import MAX_ISLANDS
from cowslice.nbd.wire import (
    ERROR,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    HOLE,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    U32,
    U64,
    Chunk,
    Command,
    CommandFlag,
    ExportFlag,
    Mode,
    NbdError,
)
from tests.unit.nbd.talk import PAYLOAD, compact, extended, feed_whole

SIZE = 1 << 20
FLAGS = export_flags(writable=True)
SIMPLE = Session("disk", SIZE, FLAGS)
CONTEXTS = (Context(3, "base:allocation"), Context(9, "x:y"))
STRUCTURED = replace(SIMPLE, mode=Mode.STRUCTURED, flags=FLAGS | ExportFlag.SEND_DF, contexts=CONTEXTS)
EXTENDED = replace(STRUCTURED, mode=Mode.EXTENDED, flags=STRUCTURED.flags | ExportFlag.BLOCK_STATUS_PAYLOAD)

Feed = Callable[[Any, bytes], list[Any]]


def simple(payload: bytes = b"", *, error: int = 0, cookie: int = 1) -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie) + payload


def chunk(kind: int, payload: bytes = b"", *, done: bool = True, cookie: int = 1) -> bytes:
    return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(payload)) + payload


def wide(kind: int, payload: bytes = b"", *, done: bool = True, cookie: int = 1, offset: int = 512) -> bytes:
    return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, done, kind, cookie, offset, len(payload)) + payload


def data(offset: int, payload: bytes) -> bytes:
    return U64.pack(offset) + payload


def failure(error: int = 5, text: bytes = b"bad", more: bytes = b"") -> bytes:
    return ERROR.pack(error, len(text)) + text + more


def status(context: int, *extents: tuple[int, int]) -> bytes:
    return U32.pack(context) + b"".join(U32.pack(length) + U32.pack(state) for length, state in extents)


def wide_status(context: int, *extents: tuple[int, int], count: int | None = None) -> bytes:
    head = U32.pack(context) + U32.pack(len(extents) if count is None else count)
    return head + b"".join(U64.pack(length) + U64.pack(state) for length, state in extents)


def sent(client: ClientTransmission) -> bytes:
    return b"".join(bytes(part) for part in client.data_to_send())


def reading(session: Session, *, df: bool = False, length: int = 6) -> tuple[ClientTransmission, bytearray]:
    """A client that waits for bytes 512 to 518, and the buffer they go to."""
    client, target = ClientTransmission(session), bytearray(b"?" * length)
    assert client.read(512, memoryview(target), df=df) == 1
    sent(client)
    return client, target


# Requests


@pytest.mark.parametrize(
    "ask, request_bytes",
    [
        (lambda c: c.read(512, memoryview(bytearray(6))), (Command.READ, 512, 6)),
        (lambda c: c.flush(), (Command.FLUSH, 0, 0)),
        (lambda c: c.trim(0, 512, fua=True), (Command.TRIM, 0, 512, CommandFlag.FUA)),
        (lambda c: c.cache(0, 512), (Command.CACHE, 0, 512)),
        (lambda c: c.block_status(0, 512), (Command.BLOCK_STATUS, 0, 512)),
        (lambda c: c.block_status(0, 512, one=True), (Command.BLOCK_STATUS, 0, 512, CommandFlag.REQ_ONE)),
        (lambda c: c.write_zeroes(0, 512, fua=True, no_hole=True, fast=True), (Command.WRITE_ZEROES, 0, 512, 0b10011)),
        (lambda c: c.read(512, memoryview(bytearray(6)), df=True), (Command.READ, 512, 6, CommandFlag.DF)),
    ],
)
def test_a_request_looks_as_the_style_wants_it(ask: Callable[[ClientTransmission], int], request_bytes: Any) -> None:
    command, offset, length, *flags = request_bytes
    for session, header in ((STRUCTURED, compact), (EXTENDED, extended)):
        client = ClientTransmission(session)
        assert ask(client) == 1
        assert sent(client) == header(command, offset, length, flags=sum(flags), cookie=1)


def test_a_write_is_sent_with_the_callers_own_buffer() -> None:
    client, content = ClientTransmission(SIMPLE), b"content"
    client.write(8, content, fua=True)
    header, payload = client.data_to_send()
    assert bytes(header) == compact(Command.WRITE, 8, 7, flags=CommandFlag.FUA, cookie=1)
    assert payload.obj is content  # type: ignore[union-attr]


def test_an_extended_write_says_that_it_has_a_payload() -> None:
    client = ClientTransmission(EXTENDED)
    client.write(8, b"content")
    assert sent(client) == extended(Command.WRITE, 8, 7, flags=PAYLOAD, cookie=1) + b"content"


def test_a_block_status_may_be_limited_to_some_contexts() -> None:
    client = ClientTransmission(EXTENDED)
    client.block_status(512, 1024, contexts=[9])
    assert sent(client) == extended(7, 512, 12, flags=PAYLOAD, cookie=1) + U64.pack(1024) + U32.pack(9)
    assert feed_whole(client, wide(Chunk.BLOCK_STATUS_EXT, wide_status(9, (1024, 0))))[0].extents == {9: ((1024, 0),)}


def test_cookies_differ_and_goodbye_is_said_once() -> None:
    client = ClientTransmission(SIMPLE)
    assert [client.flush(), client.flush()] == [1, 2]
    client.disconnect()
    client.disconnect()
    assert sent(client)[56:] == compact(Command.DISC, cookie=3)
    with pytest.raises(LocalProtocolError):
        client.flush()


READ_ONLY = replace(STRUCTURED, flags=int(ExportFlag.HAS_FLAGS | ExportFlag.READ_ONLY))
ALIGNED = replace(STRUCTURED, block_sizes=BlockSizes(512, 4096, 65536))


@pytest.mark.parametrize(
    "session, ask",
    [
        (READ_ONLY, lambda c: c.write(0, b"x")),
        (READ_ONLY, lambda c: c.trim(0, 512)),
        (READ_ONLY, lambda c: c.write_zeroes(0, 512)),
        (READ_ONLY, lambda c: c.flush()),
        (READ_ONLY, lambda c: c.read(0, memoryview(bytearray(2)), df=True)),
        (STRUCTURED, lambda c: c.read(SIZE, memoryview(bytearray(2)))),
        (STRUCTURED, lambda c: c.read(-1, memoryview(bytearray(2)))),
        (STRUCTURED, lambda c: c.read(0, memoryview(b"cannot be written"))),
        (STRUCTURED, lambda c: c.read(0, memoryview(bytearray(8))[::2])),
        (STRUCTURED, lambda c: c.write(0, memoryview(bytearray(8))[::2])),
        (STRUCTURED, lambda c: c.trim(0, -1)),
        (STRUCTURED, lambda c: c.block_status(0, 512, contexts=[9])),
        (STRUCTURED, lambda c: c.block_status(0, 0)),
        (SIMPLE, lambda c: c.block_status(0, 512)),
        (EXTENDED, lambda c: c.block_status(0, 512, contexts=[])),
        (EXTENDED, lambda c: c.block_status(0, 512, contexts=[9, 9])),
        (EXTENDED, lambda c: c.block_status(0, 512, contexts=[1])),
        (ALIGNED, lambda c: c.read(1, memoryview(bytearray(512)))),
        (ALIGNED, lambda c: c.read(0, memoryview(bytearray(1 << 17)))),
        (ALIGNED, lambda c: c.write(0, bytes(1 << 17))),
        (replace(STRUCTURED, size=1 << 40), lambda c: c.trim(0, 1 << 32)),
    ],
)
def test_what_the_session_does_not_allow_is_not_sent(
    session: Session, ask: Callable[[ClientTransmission], int]
) -> None:
    client = ClientTransmission(session)
    with pytest.raises(LocalProtocolError):
        ask(client)
    assert client.data_to_send() == []
    assert client.in_flight == 0


# Replies


def test_a_simple_read_fills_its_buffer(feed: Feed) -> None:
    client, target = reading(SIMPLE)
    assert feed(client, simple(b"abcdef")) == [Completed(1, Command.READ)]
    assert target == b"abcdef"


def test_a_simple_error_has_no_payload(feed: Feed) -> None:
    client, _ = reading(SIMPLE)
    assert feed(client, simple(error=28)) == [Completed(1, Command.READ, NbdError.ENOSPC)]


def test_an_error_that_nobody_knows_is_einval() -> None:
    client, _ = reading(SIMPLE)
    assert feed_whole(client, simple(error=4711)) == [Completed(1, Command.READ, NbdError.EINVAL)]


@pytest.mark.parametrize("session, make", [(STRUCTURED, chunk), (EXTENDED, wide)], ids=["structured", "extended"])
def test_a_read_is_put_together_in_any_order(feed: Feed, session: Session, make: Callable[..., bytes]) -> None:
    client, target = reading(session)
    reply = make(Chunk.OFFSET_DATA, data(516, b"ef"), done=False)
    reply += make(Chunk.OFFSET_HOLE, HOLE.pack(513, 3), done=False) + make(Chunk.OFFSET_DATA, data(512, b"a"))
    assert feed(client, reply) == [Completed(1, Command.READ)]
    assert target == b"a\0\0\0ef"


@pytest.mark.parametrize("session, make", [(STRUCTURED, chunk), (EXTENDED, wide)], ids=["structured", "extended"])
def test_a_failed_read_tells_where_and_why(feed: Feed, session: Session, make: Callable[..., bytes]) -> None:
    client, _ = reading(session)
    reply = make(Chunk.OFFSET_DATA, data(512, b"abc"), done=False)
    reply += make(Chunk.ERROR_OFFSET, failure(more=U64.pack(514)), done=False) + make(Chunk.NONE)
    assert feed(client, reply) == [Completed(1, Command.READ, NbdError.EIO, "bad", 514)]


def test_an_error_of_a_kind_that_nobody_knows_is_an_error() -> None:
    client, _ = reading(STRUCTURED)
    assert feed_whole(client, chunk(0x8077, failure(more=b"new fields"))) == [
        Completed(1, Command.READ, NbdError.EIO, "bad")
    ]


@pytest.mark.parametrize("session, make", [(STRUCTURED, chunk), (EXTENDED, wide)], ids=["structured", "extended"])
def test_a_status_has_each_context_once(feed: Feed, session: Session, make: Callable[..., bytes]) -> None:
    client = ClientTransmission(session)
    client.block_status(512, 4096)
    kind, say = (
        (Chunk.BLOCK_STATUS, status) if session is STRUCTURED else (Chunk.BLOCK_STATUS_EXT, wide_status)
    )
    reply = make(kind, say(9, (512, 1), (8192, 0)), done=False) + make(kind, say(3, (SIZE, 3)))
    (completed,) = feed(client, reply)
    assert completed.extents == {9: ((512, 1), (8192, 0)), 3: ((SIZE - 512, 3),)}


def test_replies_come_in_any_order_and_between_each_other() -> None:
    client = ClientTransmission(STRUCTURED)
    first, second = bytearray(2), bytearray(2)
    client.read(0, memoryview(first))
    client.read(2, memoryview(second))
    client.flush()
    reply = chunk(1, data(3, b"d"), done=False, cookie=2) + chunk(1, data(0, b"ab"), cookie=1) + simple(cookie=3)
    reply += chunk(1, data(2, b"c"), cookie=2)
    assert [completed.cookie for completed in feed_whole(client, reply)] == [1, 3, 2]
    assert first + second == b"abcd"
    client.receive_eof()


def test_payload_can_be_received_straight_into_the_buffer() -> None:
    client, target = reading(STRUCTURED)
    assert client.payload_target() is None
    feed_whole(client, chunk(1, data(512, b"abcdef"))[:30])
    view = client.payload_target()
    assert view is not None
    view[:3] = b"cde"
    client.payload_received(3)
    assert feed_whole(client, b"f") == [Completed(1, Command.READ)]
    assert target == b"abcdef"
    with pytest.raises(LocalProtocolError):
        client.payload_received(1)


def broken_read(*chunks: bytes, df: bool = False, session: Session = STRUCTURED) -> Any:
    return session, lambda client: client.read(512, memoryview(bytearray(6)), df=df), b"".join(chunks)


def broken_status(*chunks: bytes, one: bool = False, session: Session = STRUCTURED, both: bool = False) -> Any:
    """With one context, so that nothing is missing; `both` keeps the second one."""
    session = session if both else replace(session, contexts=CONTEXTS[:1])
    return session, lambda client: client.block_status(512, 1024, one=one), b"".join(chunks)


def broken_flush(*chunks: bytes, session: Session = STRUCTURED) -> Any:
    return session, lambda client: client.flush(), b"".join(chunks)


FIRST = status(3, (1024, 0))


@pytest.mark.parametrize(
    "session, ask, reply",
    [
        broken_flush(bytes(16)),
        broken_flush(simple(cookie=2)),
        broken_flush(simple() * 2),
        broken_flush(simple(), session=EXTENDED),
        broken_flush(chunk(0), session=SIMPLE),
        broken_flush(wide(0)),
        broken_flush(wide(0), session=EXTENDED),  # offset 512, asked at 0
        broken_flush(chunk(Chunk.NONE, done=False)),
        broken_flush(chunk(Chunk.NONE, b"x")),
        broken_flush(chunk(77)),
        broken_flush(chunk(Chunk.OFFSET_DATA, data(0, b"x"))),
        broken_flush(chunk(Chunk.OFFSET_HOLE, HOLE.pack(0, 1))),
        broken_flush(chunk(Chunk.BLOCK_STATUS, FIRST)),
        broken_read(simple()),
        broken_read(simple(error=5)),
        broken_read(chunk(Chunk.NONE)),
        broken_read(chunk(1, data(512, b"abc"))),
        broken_read(chunk(1, data(512, b"abcdefg"))),
        broken_read(chunk(1, data(512, b""))),
        broken_read(chunk(1, data(511, b"ab"))),
        broken_read(chunk(1, data(517, b"ab"))),
        broken_read(chunk(1, data(2**64 - 1, b"ab"))),
        broken_read(chunk(2, HOLE.pack(512, 0))),
        broken_read(chunk(1, data(512, b"abcdef"), done=False), chunk(2, HOLE.pack(518, 0))),
        broken_read(chunk(2, HOLE.pack(512, 7))),
        broken_read(chunk(2, HOLE.pack(512, 6) + b"x")),
        broken_read(chunk(1, data(512, b"abc"), done=False), chunk(1, data(514, b"abc"))),
        broken_read(chunk(1, data(515, b"abc"), done=False), chunk(2, HOLE.pack(512, 4))),
        broken_read(chunk(1, data(512, b"abc"), done=False), chunk(1, data(515, b"def")), df=True),
        broken_read(chunk(Chunk.ERROR, failure(error=0))),
        broken_read(chunk(Chunk.ERROR, ERROR.pack(5, 1))),
        broken_read(chunk(Chunk.ERROR, failure(text=b"t" * 4097))),
        broken_read(chunk(Chunk.ERROR, bytes(5))),
        broken_read(chunk(Chunk.ERROR, bytes(1 << 17))),
        broken_read(chunk(Chunk.ERROR_OFFSET, failure())),
        broken_read(chunk(Chunk.ERROR_OFFSET, failure(more=U64.pack(518)))),
        broken_read(chunk(Chunk.BLOCK_STATUS, FIRST)),
        broken_status(simple()),
        broken_status(chunk(Chunk.NONE)),
        broken_status(chunk(5, FIRST), both=True),
        broken_status(chunk(5, FIRST, done=False), chunk(5, FIRST)),
        broken_status(chunk(5, FIRST, done=False), chunk(5, status(4, (1024, 0)))),
        broken_status(chunk(5, status(3))),
        broken_status(chunk(5, status(3, (0, 0)))),
        broken_status(chunk(5, status(3, (1024, 0), (1, 1)))),
        broken_status(chunk(5, status(3, (512, 0), (512, 1))), one=True),
        broken_status(chunk(5, status(3, (1025, 0))), one=True),
        broken_status(chunk(5, FIRST + b"x")),
        broken_status(chunk(6, wide_status(3, (1024, 0)))),
        broken_status(wide(5, FIRST), session=EXTENDED),
        broken_status(wide(6, wide_status(3, (1024, 0), count=2)), session=EXTENDED),
        broken_status(wide(6, wide_status(3, (1024, 1 << 32))), session=EXTENDED),
    ],
)
def test_a_reply_that_breaks_the_rules_ends_the_connection(
    session: Session, ask: Callable[[ClientTransmission], int], reply: bytes
) -> None:
    client = ClientTransmission(session)
    ask(client)
    with pytest.raises(RemoteProtocolError):
        feed_whole(client, reply)
    with pytest.raises(RemoteProtocolError):
        client.next_event()
    with pytest.raises(LocalProtocolError):
        client.flush()


def test_a_status_that_keeps_the_rules_is_taken() -> None:
    """What the broken ones above are made from."""
    for session, reply in (
        (STRUCTURED, chunk(5, FIRST)), (EXTENDED, wide(6, wide_status(3, (512, 0), (1 << 40, 1)))),
    ):  # fmt: skip
        client = ClientTransmission(replace(session, contexts=CONTEXTS[:1]))
        client.block_status(512, 1024)
        assert feed_whole(client, reply)[0].error is None


def test_a_read_in_too_many_pieces_ends_the_connection() -> None:
    client, _ = reading(STRUCTURED, length=3 * MAX_ISLANDS)
    pieces = (chunk(2, HOLE.pack(512 + 2 * number, 1), done=False) for number in range(MAX_ISLANDS + 1))
    with pytest.raises(RemoteProtocolError, match="separate pieces"):
        feed_whole(client, b"".join(pieces))


def test_a_server_that_hangs_up_owes_no_answers_or_breaks_the_protocol() -> None:
    client, _ = reading(STRUCTURED)
    with pytest.raises(RemoteProtocolError, match="closed"):
        client.receive_eof()
