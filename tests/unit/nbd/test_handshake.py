"""The server's half of the negotiation, message by message."""

from __future__ import annotations

from typing import Any

import pytest

from cowslice.errors import LocalProtocolError, RemoteProtocolError
from cowslice.nbd import (
    Aborted,
    BlockSizes,
    Export,
    OptionAnswered,
    ServerHandshake,
    TlsPolicy,
    export_flags,
)
from cowslice.nbd.options import encode_option
from cowslice.nbd.wire import (
    CLIENT_FLAGS,
    MAX_OPTION,
    MAX_OPTION_KEPT,
    MAX_OPTIONS,
    OPTION,
    OPTION_MAGIC,
    Answer,
    ExportFlag,
    Mode,
    Option,
)
from tests.unit.nbd.handshakes import DISK, Feed, answers, go, greeted, last, negotiated
from tests.unit.nbd.talk import TRAILING, drain, feed_trailing, feed_whole


def test_the_greeting_offers_fixed_newstyle_without_zeroes() -> None:
    assert ServerHandshake([DISK]).data_to_send() == b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize("flags", [4, 0x80000001, 0xFFFFFFFF])
def test_a_client_flag_that_nobody_knows_ends_the_connection(flags: int) -> None:
    handshake = ServerHandshake([DISK])
    with pytest.raises(RemoteProtocolError, match="client flags"):
        feed_whole(handshake, CLIENT_FLAGS.pack(flags))
    with pytest.raises(RemoteProtocolError):
        handshake.next_event()


@pytest.mark.parametrize("option", [Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS, Option.LIST])
def test_an_option_without_payload_is_acknowledged(feed: Feed, option: Option) -> None:
    handshake = greeted()
    assert feed(handshake, encode_option(option)) == [OptionAnswered(option, Answer.ACK)]
    assert last(handshake) == Answer.ACK


@pytest.mark.parametrize(
    "option", [Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS, Option.LIST, Option.STARTTLS]
)
def test_an_option_that_takes_no_payload_refuses_one(feed: Feed, option: Option) -> None:
    handshake = greeted(tls=TlsPolicy.OFFERED)
    feed(handshake, encode_option(option, b"x"))
    assert last(handshake) == Answer.ERR_INVALID


def test_exports_are_listed_in_order_with_their_descriptions(feed: Feed) -> None:
    handshake = greeted()
    feed(handshake, encode_option(Option.LIST))
    assert answers(handshake) == [
        (Answer.SERVER, b"\0\0\0\4diska disk"), (Answer.SERVER, b"\0\0\0\5other"), (Answer.ACK, b"")
    ]


def test_a_server_may_keep_its_list_to_itself() -> None:
    handshake = greeted(listing=False)
    feed_whole(handshake, encode_option(Option.LIST))
    assert last(handshake) == Answer.ERR_POLICY


def test_an_unknown_option_is_skipped_with_its_payload(feed: Feed) -> None:
    handshake = greeted()
    assert feed(handshake, encode_option(4711, b"payload")) == [OptionAnswered(4711, Answer.ERR_UNSUP)]
    assert last(handshake) == Answer.ERR_UNSUP


def test_abort_is_acknowledged_and_nothing_after_it_is_read(feed: Feed) -> None:
    handshake = greeted()
    assert feed(handshake, encode_option(Option.ABORT, b"ignored")) == [Aborted()]
    assert last(handshake) == Answer.ACK
    assert feed_whole(handshake, encode_option(Option.LIST)) == []
    assert handshake.data_to_send() == b""


def test_go_tells_sizes_and_enters_transmission(feed: Feed) -> None:
    handshake = greeted()
    event = negotiated(handshake, go("disk"), feed)
    told = {payload[:2]: payload[2:] for answer, payload in answers(handshake) if answer == Answer.INFO}
    assert told == {
        b"\0\0": (1 << 20).to_bytes(8, "big") + b"\x04\x0f",
        b"\0\2": b"a disk",
        b"\0\3": bytes.fromhex("00000001 00001000 02000000"),
    }
    assert event.export is DISK
    assert event.session.mode is Mode.SIMPLE
    assert handshake.take_leftover() == (TRAILING if feed is feed_trailing else b"")


def test_info_tells_the_same_and_stays(feed: Feed) -> None:
    handshake = greeted()
    assert feed(handshake, go("other", option=Option.INFO)) == [OptionAnswered(Option.INFO, Answer.ACK)]
    informed = answers(handshake)
    handshake = greeted()
    negotiated(handshake, go("other"))
    assert answers(handshake) == informed


def test_the_name_is_told_when_it_is_asked_for() -> None:
    handshake = greeted()
    negotiated(handshake, go("disk", 1))
    assert (Answer.INFO, b"\0\1disk") in answers(handshake)


def test_an_information_that_nobody_knows_is_ignored() -> None:
    assert negotiated(greeted(), go("disk", 99, 3)).export is DISK


@pytest.mark.parametrize("option", [Option.GO, Option.INFO])
def test_an_unknown_export_is_refused_and_another_may_follow(feed: Feed, option: Option) -> None:
    handshake = greeted()
    feed(handshake, go("nothing", option=option))
    assert last(handshake) == Answer.ERR_UNKNOWN


def test_the_empty_name_means_the_default_export_by_its_own_name() -> None:
    handshake = greeted(default="other")
    event = negotiated(handshake, go(""))
    assert event.session.name == "other"
    assert (Answer.INFO, b"\0\1other") in answers(handshake)


def test_without_a_default_the_empty_name_is_a_name_like_any_other() -> None:
    handshake = greeted()
    feed_whole(handshake, go(""))
    assert last(handshake) == Answer.ERR_UNKNOWN
    assert negotiated(greeted(Export("", 512)), go("")).session.size == 512


@pytest.mark.parametrize(
    "payload",
    [b"", b"\0\0\0", b"\0\0\0\4disk", b"\0\0\0\5disk\0\0", b"\0\0\0\4disk\0\1", b"\0\0\0\4disk\0\0x",
     b"\xff\xff\xff\xffdisk\0\0", b"\0\0\0\4di\0k\0\0", b"\0\0\0\2\xc3\x28\0\0"],
)  # fmt: skip
def test_a_malformed_go_is_refused_as_invalid(payload: bytes) -> None:
    handshake = greeted()
    feed_whole(handshake, encode_option(Option.GO, payload))
    assert last(handshake) == Answer.ERR_INVALID


def test_a_name_beyond_the_string_limit_is_too_big() -> None:
    handshake = greeted()
    feed_whole(handshake, encode_option(Option.GO, b"\0\0\x10\1" + b"n" * 4097 + b"\0\0"))
    assert last(handshake) == Answer.ERR_TOO_BIG


def test_the_best_style_wins_and_decides_the_flags() -> None:
    handshake = greeted()
    for option in (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
        feed_whole(handshake, encode_option(option))
    session = negotiated(handshake, go("other")).session
    assert session.mode is Mode.EXTENDED
    assert session.flags & ExportFlag.SEND_DF
    assert not session.flags & ExportFlag.BLOCK_STATUS_PAYLOAD  # no contexts


@pytest.mark.parametrize("option, told", [(Option.INFO, True), (Option.GO, False)])
def test_only_info_tells_what_contexts_would_allow_that_are_not_selected(option: Option, told: bool) -> None:
    handshake = greeted()
    for asked in (encode_option(Option.EXTENDED_HEADERS), go("disk", option=option)):
        feed_whole(handshake, asked)
    (flags,) = [int.from_bytes(payload[10:12], "big") for answer, payload in answers(handshake)
                if answer == Answer.INFO and payload[:2] == b"\0\0"]
    assert bool(flags & ExportFlag.BLOCK_STATUS_PAYLOAD) == told


def test_extended_headers_cannot_be_turned_into_structured_replies() -> None:
    handshake = greeted()
    for option in (Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY):
        feed_whole(handshake, encode_option(option))
    assert last(handshake) == Answer.ERR_EXT_HEADER_REQD
    assert negotiated(handshake, go("disk")).session.mode is Mode.EXTENDED


# EXPORT_NAME


@pytest.mark.parametrize("flags, padding", [(3, 0), (1, 124), (0, 124), (2, 0)])
def test_export_name_enters_transmission(feed: Feed, flags: int, padding: int) -> None:
    handshake = greeted(flags=CLIENT_FLAGS.pack(flags))
    event = negotiated(handshake, encode_option(Option.EXPORT_NAME, b"disk"), feed)
    assert handshake.data_to_send() == (1 << 20).to_bytes(8, "big") + b"\x04\x0f" + bytes(padding)
    assert event.session.size == 1 << 20


@pytest.mark.parametrize("name", [b"nothing", b"di\0k", b"\xff", b"n" * 4097])
def test_export_name_of_nothing_ends_the_connection(name: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        feed_whole(greeted(), encode_option(Option.EXPORT_NAME, name))


def test_export_name_after_extended_headers_ends_the_connection() -> None:
    handshake = greeted()
    feed_whole(handshake, encode_option(Option.EXTENDED_HEADERS))
    with pytest.raises(RemoteProtocolError, match="expected GO"):
        feed_whole(handshake, encode_option(Option.EXPORT_NAME, b"disk"))


@pytest.mark.parametrize("option", set(Option) - {Option.EXPORT_NAME})
def test_a_client_without_fixed_newstyle_has_no_other_option(option: Option) -> None:
    with pytest.raises(RemoteProtocolError, match="fixed newstyle"):
        feed_whole(greeted(flags=bytes(4)), encode_option(option))


# Block sizes


STRICT = Export("strict", 1 << 20, block_sizes=BlockSizes(4096, 65536, 1 << 20), sizes_required=True)


def test_an_export_that_requires_its_sizes_tells_them_and_refuses_who_does_not_ask() -> None:
    handshake = greeted(STRICT)
    feed_whole(handshake, go("strict"))
    assert [answer for answer, _ in answers(handshake)] == [Answer.INFO, Answer.ERR_BLOCK_SIZE_REQD]
    assert negotiated(handshake, go("strict", 3)).session.block_sizes == STRICT.block_sizes


def test_an_export_that_requires_its_sizes_cannot_be_had_by_export_name() -> None:
    with pytest.raises(RemoteProtocolError, match="block sizes"):
        feed_whole(greeted(STRICT), encode_option(Option.EXPORT_NAME, b"strict"))


@pytest.mark.parametrize(
    "sizes", [(0, 512, 4096), (3, 512, 4096), (1 << 17, 1 << 17, 1 << 20), (1, 256, 4096), (4096, 512, 4096),
              (1, 4096, 512), (1, 4096, 1 << 32), (1, 5000, 65536)],
)  # fmt: skip
def test_impossible_block_sizes_are_our_own_fault(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(LocalProtocolError):
        BlockSizes(*sizes)


# Limits and endings


def test_a_server_that_stops_says_so_to_everything_but_abort() -> None:
    handshake = greeted()
    handshake.shut_down()
    feed_whole(handshake, go("disk"))
    assert last(handshake) == Answer.ERR_SHUTDOWN
    assert feed_whole(handshake, encode_option(Option.ABORT)) == [Aborted()]


def test_a_server_that_stops_leaves_a_client_that_cannot_be_told() -> None:
    handshake = greeted()
    handshake.shut_down()
    with pytest.raises(RemoteProtocolError, match="shutting down"):
        feed_whole(handshake, encode_option(Option.EXPORT_NAME, b"disk"))


def test_a_large_option_is_refused_without_being_stored() -> None:
    handshake = greeted()
    length = MAX_OPTION_KEPT + 1
    handshake.receive(OPTION.pack(OPTION_MAGIC, Option.LIST, length))
    for _ in range(length // 4096):
        assert drain(handshake) == []
        handshake.receive(bytes(4096))
        assert len(handshake._inbox) == 0
    assert feed_whole(handshake, bytes(length % 4096)) == [OptionAnswered(Option.LIST, Answer.ERR_TOO_BIG)]
    assert negotiated(handshake, go("disk")).export is DISK


@pytest.mark.parametrize(
    "option, answer", [(Option.ABORT, Answer.ACK), (Option.LIST, Answer.ERR_TLS_REQD), (4711, Answer.ERR_TLS_REQD)]
)
def test_what_an_option_means_counts_more_than_its_size(option: int, answer: Answer) -> None:
    handshake = greeted(tls=TlsPolicy.REQUIRED)
    feed_whole(handshake, encode_option(option, bytes(MAX_OPTION_KEPT + 1)))
    assert last(handshake) == answer


@pytest.mark.parametrize(
    "header", [OPTION.pack(OPTION_MAGIC, Option.LIST, MAX_OPTION + 1), OPTION.pack(OPTION_MAGIC + 1, 3, 0),
               OPTION.pack(OPTION_MAGIC, Option.EXPORT_NAME, 4097)],
)  # fmt: skip
def test_a_header_beyond_reason_ends_the_connection_at_once(header: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        feed_whole(greeted(), header)


def test_a_client_that_never_stops_asking_is_left() -> None:
    handshake = greeted()
    for _ in range(MAX_OPTIONS):
        feed_whole(handshake, encode_option(4711))
        handshake.data_to_send()
    with pytest.raises(RemoteProtocolError, match="options"):
        feed_whole(handshake, encode_option(4711))


def test_one_event_answers_one_option_however_many_have_come() -> None:
    handshake = greeted()
    handshake.receive(encode_option(Option.LIST) * 1000)
    handshake.next_event()
    assert len(answers(handshake)) == 3


@pytest.mark.parametrize(
    "wrong", [{"name": "n" * 4097}, {"name": "a\0b"}, {"size": -1}, {"size": 1 << 63}, {"flags": 1 << 16},
              {"contexts": ("nocolon",)},
              {"contexts": ("a:b", "a:b")}, {"description": "\ud800"}],
)  # fmt: skip
def test_an_export_that_cannot_be_offered_is_our_own_fault(wrong: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        Export(**{"name": "x", "size": 512} | wrong)


def test_two_exports_of_one_name_are_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError):
        ServerHandshake([DISK, DISK])


def test_leftover_is_there_only_after_the_end() -> None:
    with pytest.raises(LocalProtocolError):
        greeted().take_leftover()


@pytest.mark.parametrize("writable, flags", [(False, 0x40F), (True, 0xC6D)])
def test_flags_are_those_of_qemu_nbd(writable: bool, flags: int) -> None:
    assert export_flags(writable=writable) == flags
