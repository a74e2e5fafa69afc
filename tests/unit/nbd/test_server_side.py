"""The server's half of transmission, request by request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cowslice.errors import LocalProtocolError, RemoteProtocolError
from cowslice.nbd import (
    BadRequest,
    BlockSizes,
    Context,
    Disconnect,
    Request,
    ServerTransmission,
    Session,
    export_flags,
)
from cowslice.nbd.wire import MAX_PAYLOAD, U32, U64, Command, CommandFlag, ExportFlag, Mode, NbdError
from tests.unit.nbd.talk import PAYLOAD, TRAILING, compact, drain, extended, feed_trailing, feed_whole

SIZE = 1 << 20
WRITABLE = export_flags(writable=True) | ExportFlag.SEND_DF
SESSION = Session("disk", SIZE, WRITABLE, Mode.STRUCTURED, contexts=(Context(0, "base:allocation"), Context(5, "x:y")))
EXTENDED = replace(SESSION, mode=Mode.EXTENDED, flags=WRITABLE | ExportFlag.BLOCK_STATUS_PAYLOAD)
READ_ONLY = replace(SESSION, flags=export_flags(writable=False))
ALIGNED = replace(SESSION, block_sizes=BlockSizes(512, 4096, 65536), size=SIZE + 100)

Feed = Callable[[Any, bytes], list[Any]]


def only(session: Session, message: bytes, feed: Feed = feed_whole) -> Any:
    """The one event that a message makes."""
    transmission = ServerTransmission(session)
    (event,) = feed(transmission, message)
    assert transmission.take_leftover() == (TRAILING if feed is feed_trailing else b"")
    return event


def refusal(session: Session, message: bytes, feed: Feed = feed_whole) -> NbdError:
    event = only(session, message, feed)
    assert isinstance(event, BadRequest)
    assert event.reason.isprintable()
    return event.error


@pytest.mark.parametrize("session, header", [(SESSION, compact), (EXTENDED, extended)], ids=["compact", "extended"])
@pytest.mark.parametrize(
    "command, offset, length, flags",
    [
        (Command.READ, 4096, 512, 0),
        (Command.READ, 0, SIZE, CommandFlag.DF),
        (Command.READ, SIZE, 0, 0),
        (Command.FLUSH, 0, 0, CommandFlag.FUA),
        (Command.TRIM, 1, 2, CommandFlag.FUA),
        (Command.CACHE, 0, SIZE, 0),
        (Command.WRITE_ZEROES, SIZE - 1, 1, CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO),
    ],
)
def test_a_request_comes_out_as_it_was_meant(
    feed: Feed, session: Session, header: Callable[..., bytes], command: int, offset: int, length: int, flags: int
) -> None:
    event = only(session, header(command, offset, length, flags=flags, cookie=2**64 - 1), feed)
    assert event == Request(command, flags, 2**64 - 1, offset, length)


@pytest.mark.parametrize(
    "session, header, flags", [(SESSION, compact, 0), (EXTENDED, extended, PAYLOAD), (EXTENDED, extended, 0)])
def test_a_write_comes_with_its_payload(feed: Feed, session: Session, header: Callable[..., bytes], flags: int) -> None:
    message = header(Command.WRITE, 10, 5, flags=flags | CommandFlag.FUA) + b"hello"
    assert only(session, message, feed) == Request(Command.WRITE, CommandFlag.FUA, 7, 10, 5, b"hello")


def test_a_block_status_asks_for_every_context_that_was_selected(feed: Feed) -> None:
    event = only(SESSION, compact(Command.BLOCK_STATUS, 0, 512, flags=CommandFlag.REQ_ONE), feed)
    assert event == Request(Command.BLOCK_STATUS, CommandFlag.REQ_ONE, 7, 0, 512, contexts=(0, 5))


def filtered(*contexts: int, effect: int = 512) -> bytes:
    payload = U64.pack(effect) + b"".join(map(U32.pack, contexts))
    return extended(Command.BLOCK_STATUS, 1024, len(payload), flags=PAYLOAD) + payload


def test_a_block_status_may_choose_among_the_contexts(feed: Feed) -> None:
    assert only(EXTENDED, filtered(5), feed) == Request(Command.BLOCK_STATUS, 0, 7, 1024, 512, contexts=(5,))


@pytest.mark.parametrize(
    "message", [filtered(5, 5), filtered(4), filtered(), filtered(0, 5, 1), filtered(0, effect=SIZE),
                filtered(0, effect=0),
                extended(7, 0, 5, flags=PAYLOAD) + bytes(5), extended(7, 0, 14, flags=PAYLOAD) + bytes(14),
                extended(7, 0, 1 << 20, flags=PAYLOAD) + bytes(1 << 20)],
)  # fmt: skip
def test_a_choice_of_contexts_that_makes_no_sense_is_consumed_and_invalid(message: bytes) -> None:
    assert refusal(EXTENDED, message) is NbdError.EINVAL


def test_a_choice_of_contexts_needs_a_server_that_offers_it() -> None:
    assert refusal(replace(EXTENDED, flags=WRITABLE), filtered(5)) is NbdError.EINVAL


def test_a_disconnect_ends_everything(feed: Feed) -> None:
    transmission = ServerTransmission(SESSION)
    assert feed(transmission, compact(Command.DISC)) == [Disconnect()]
    assert feed_whole(transmission, compact(Command.READ, 0, 512)) == []


EINVAL, EPERM, ENOSPC, EOVERFLOW = NbdError.EINVAL, NbdError.EPERM, NbdError.ENOSPC, NbdError.EOVERFLOW
FUA = int(CommandFlag.FUA)


@pytest.mark.parametrize(
    "session, message, error",
    [
        (SESSION, compact(8, 0, 512), EINVAL),
        (SESSION, compact(0xFFFF, 0, 512), EINVAL),
        (READ_ONLY, compact(Command.WRITE, 0, 2) + b"ab", EPERM),
        (READ_ONLY, compact(Command.TRIM, 0, 2), EPERM),
        (READ_ONLY, compact(Command.WRITE_ZEROES, 0, 2), EPERM),
        (SESSION, compact(Command.READ, SIZE - 1, 2), EINVAL),
        (SESSION, compact(Command.READ, 2**64 - 1, 2), EINVAL),
        (SESSION, compact(Command.WRITE, SIZE - 1, 2) + b"ab", ENOSPC),
        (SESSION, compact(Command.WRITE_ZEROES, SIZE, 1), ENOSPC),
        (SESSION, compact(Command.TRIM, SIZE - 1, 2), EINVAL),
        (SESSION, compact(Command.CACHE, SIZE - 1, 2), EINVAL),
        (SESSION, compact(Command.BLOCK_STATUS, SIZE - 1, 2), EINVAL),
        (SESSION, compact(Command.BLOCK_STATUS, 0, 0), EINVAL),
        (replace(SESSION, contexts=()), compact(Command.BLOCK_STATUS, 0, 512), EINVAL),
        (SESSION, compact(Command.FLUSH, 0, 1), EINVAL),
        (SESSION, compact(Command.FLUSH, 1, 0), EINVAL),
        (replace(SESSION, flags=1), compact(Command.FLUSH), EINVAL),
        (replace(SESSION, flags=1), compact(Command.TRIM, 0, 512), EINVAL),
        (replace(SESSION, flags=1), compact(Command.WRITE_ZEROES, 0, 512), EINVAL),
        (replace(SESSION, flags=1), compact(Command.READ, 0, 512, flags=FUA), EINVAL),
        (replace(SESSION, flags=1), compact(Command.READ, 0, 512, flags=CommandFlag.DF), EINVAL),
        (SESSION, compact(Command.READ, 0, 512, flags=CommandFlag.NO_HOLE), EINVAL),
        (SESSION, compact(Command.TRIM, 0, 512, flags=CommandFlag.NO_HOLE), EINVAL),
        (SESSION, compact(Command.CACHE, 0, 512, flags=CommandFlag.FAST_ZERO), EINVAL),
        (SESSION, compact(Command.READ, 0, 512, flags=CommandFlag.REQ_ONE), EINVAL),
        (SESSION, compact(Command.WRITE, 0, 2, flags=CommandFlag.DF) + b"ab", EINVAL),
        (SESSION, compact(Command.READ, 0, 512, flags=0x40), EINVAL),
        (SESSION, compact(Command.READ, 0, 512, flags=0x8000), EINVAL),
        (SESSION, compact(Command.READ, 0, 512, flags=PAYLOAD), EINVAL),
        (SESSION, compact(Command.WRITE, 0, 2, flags=PAYLOAD) + b"ab", EINVAL),
        (SESSION, compact(Command.BLOCK_STATUS, 0, 12, flags=PAYLOAD), EINVAL),
        (EXTENDED, extended(Command.READ, 0, 2, flags=PAYLOAD) + b"ab", EINVAL),
        (EXTENDED, extended(99, 0, 2, flags=PAYLOAD) + b"ab", EINVAL),
        (EXTENDED, extended(Command.TRIM, 0, 0, flags=PAYLOAD), EINVAL),
        (EXTENDED, extended(Command.TRIM, 0, 2**64 - 1), EINVAL),
        (ALIGNED, compact(Command.READ, 1, 512), EINVAL),
        (ALIGNED, compact(Command.READ, 512, 100), EINVAL),
        (ALIGNED, compact(Command.WRITE, 0, 2) + b"ab", EINVAL),
        (ALIGNED, compact(Command.READ, 0, 65536 + 512), EOVERFLOW),
        (replace(ALIGNED, mode=Mode.SIMPLE), compact(Command.READ, 0, 65536 + 512), EINVAL),
        (ALIGNED, compact(Command.WRITE, 0, 65536 + 512) + bytes(65536 + 512), EINVAL),
    ],
)
def test_each_fault_has_its_error(session: Session, message: bytes, error: NbdError) -> None:
    assert refusal(session, message) is error


@pytest.mark.parametrize(
    "message", [compact(Command.WRITE, SIZE, 4) + b"data", compact(99), compact(Command.READ, SIZE, 1)]
)
def test_after_a_refused_request_the_next_one_is_read(feed: Feed, message: bytes) -> None:
    transmission = ServerTransmission(SESSION)
    (refused,) = feed_whole(transmission, message)
    assert isinstance(refused, BadRequest)
    assert refused.request.cookie == 7
    assert feed(transmission, compact(Command.READ, 0, 1, cookie=8)) == [Request(Command.READ, 0, 8, 0, 1)]


def test_a_refused_write_is_told_when_its_payload_is_over(feed: Feed) -> None:
    assert refusal(READ_ONLY, compact(Command.WRITE, 0, 100) + bytes(100), feed) is NbdError.EPERM


def test_a_refused_payload_is_not_stored() -> None:
    transmission = ServerTransmission(READ_ONLY)
    assert feed_whole(transmission, compact(Command.WRITE, 0, SIZE)) == []
    for _ in range(SIZE // 65536 - 1):
        assert feed_whole(transmission, bytes(65536)) == []
        assert len(transmission._inbox) == 0
    (refused,) = feed_whole(transmission, bytes(65536))
    assert isinstance(refused, BadRequest)


def test_the_last_block_of_an_uneven_export_can_be_reached() -> None:
    assert isinstance(only(ALIGNED, compact(Command.READ, SIZE, 100)), Request)


def test_commands_without_payload_may_be_larger_than_one() -> None:
    assert isinstance(only(ALIGNED, compact(Command.TRIM, 0, SIZE)), Request)
    assert isinstance(only(ALIGNED, compact(Command.BLOCK_STATUS, 0, SIZE)), Request)


@pytest.mark.parametrize(
    "session, message",
    [
        (SESSION, bytes(28)),
        (SESSION, extended(Command.READ)[:28]),
        (EXTENDED, compact(Command.READ) + bytes(4)),
        (SESSION, compact(Command.WRITE, 0, MAX_PAYLOAD + 1)),
        (EXTENDED, extended(Command.READ, 0, MAX_PAYLOAD + 1, flags=PAYLOAD)),
        (EXTENDED, extended(Command.WRITE, 0, 2**64 - 1, flags=PAYLOAD)),
    ],
)
def test_what_cannot_be_understood_or_held_ends_the_connection(session: Session, message: bytes) -> None:
    transmission = ServerTransmission(session)
    with pytest.raises(RemoteProtocolError):
        feed_whole(transmission, message)
    with pytest.raises(RemoteProtocolError):
        feed_whole(transmission, compact(Command.READ))


@pytest.mark.parametrize("session", [SESSION, READ_ONLY])
def test_leftover_is_whole_messages_or_nothing(session: Session) -> None:
    transmission = ServerTransmission(session)
    feed_whole(transmission, compact(Command.WRITE, 0, 4) + b"da")
    with pytest.raises(LocalProtocolError):
        transmission.take_leftover()
    feed_whole(transmission, b"ta" + TRAILING)
    assert transmission.take_leftover() == TRAILING


def test_one_event_takes_one_request_however_many_have_come() -> None:
    transmission = ServerTransmission(SESSION, compact(Command.READ, 0, 1) * 3)
    assert isinstance(transmission.next_event(), Request)
    assert len(transmission.take_leftover()) == 56


def test_a_server_that_stops_says_so_to_every_request(feed: Feed) -> None:
    for message in (compact(Command.READ, 0, 1), compact(Command.WRITE, 0, 2) + b"ab", compact(99)):
        transmission = ServerTransmission(SESSION)
        transmission.shut_down()
        (refused,) = feed(transmission, message)
        assert refused.error is NbdError.ESHUTDOWN
    assert drain(transmission) == []


def test_flags_that_a_flood_of_requests_invents_leave_nothing_behind() -> None:
    known = len(CommandFlag._value2member_map_)
    transmission = ServerTransmission(SESSION)
    for flags in range(0, 65536, 97):
        feed_whole(transmission, compact(Command.READ, 0, 1, flags=flags))
    assert len(CommandFlag._value2member_map_) < known + 100
