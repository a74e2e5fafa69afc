"""The client's half of the negotiation, answer by answer, and the way it takes by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cowslice.errors import LocalProtocolError, RemoteProtocolError
from cowslice.nbd import (
    NEED_DATA,
    Accepted,
    BlockSizes,
    ClientHandshake,
    Context,
    ContextsListed,
    Described,
    Export,
    ExportsListed,
    Greeted,
    ListedExport,
    Opening,
    Ready,
    Refused,
    StartTls,
    TlsPolicy,
    TlsWish,
    Wish,
    export_flags,
)
from cowslice.nbd.answers import MAX_ANSWER, MAX_ANSWERS
from cowslice.nbd.options import encode_answer, encode_block_sizes, encode_context, encode_export_info, encode_server
from cowslice.nbd.wire import (
    BASE_ALLOCATION,
    GREETING,
    NBD_MAGIC,
    OLD_EXPORT,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Answer,
    ExportFlag,
    Mode,
    Option,
)
from tests.unit.nbd.talk import TRAILING, Disk, Server, drain, feed_bytes, feed_trailing, feed_whole

Feed = Callable[[Any, bytes], list[Any]]
HELLO = GREETING.pack(NBD_MAGIC, OPTION_MAGIC, 3)
SIZED = encode_answer(Option.GO, Answer.INFO, encode_export_info(4096, 1))


def greeted(hello: bytes = HELLO) -> ClientHandshake:
    handshake = ClientHandshake()
    feed_whole(handshake, hello)
    handshake.data_to_send()
    return handshake


def ack(option: int) -> bytes:
    return encode_answer(option, Answer.ACK)


@pytest.mark.parametrize("offered, taken", [(3, 3), (1, 1), (0, 0), (0xFFFF, 3)])
def test_the_greeting_is_answered_with_what_both_know(feed: Feed, offered: int, taken: int) -> None:
    handshake = ClientHandshake()
    assert feed(handshake, GREETING.pack(NBD_MAGIC, OPTION_MAGIC, offered)) == [Greeted(bool(offered & 1))]
    assert handshake.data_to_send() == taken.to_bytes(4, "big")


@pytest.mark.parametrize(
    "hello, why",
    [(b"HTTP/1.1 400 Bad Request", "greets with"), (GREETING.pack(NBD_MAGIC, OLDSTYLE_MAGIC, 3), "oldstyle"),
     (GREETING.pack(NBD_MAGIC, 0, 3), "goes on with")],
)  # fmt: skip
def test_a_stranger_is_not_talked_to(hello: bytes, why: str) -> None:
    handshake = ClientHandshake()
    with pytest.raises(RemoteProtocolError, match=why):
        feed_whole(handshake, hello)
    with pytest.raises(RemoteProtocolError):
        handshake.next_event()


@pytest.mark.parametrize(
    "ask, option, mode",
    [(ClientHandshake.structured_replies, Option.STRUCTURED_REPLY, Mode.STRUCTURED),
     (ClientHandshake.extended_headers, Option.EXTENDED_HEADERS, Mode.EXTENDED)],
)  # fmt: skip
def test_a_style_of_replies_is_agreed_on(
    feed: Feed, ask: Callable[[ClientHandshake], None], option: Option, mode: Mode
) -> None:
    handshake = greeted()
    ask(handshake)
    assert feed(handshake, ack(option)) == [Accepted(option)]
    assert handshake.mode is mode


def test_a_refusal_is_told_with_its_sentence(feed: Feed) -> None:
    handshake = greeted()
    handshake.extended_headers()
    refusal = encode_answer(Option.EXTENDED_HEADERS, Answer.ERR_UNSUP, "not\x1b[31m here ü".encode())
    assert feed(handshake, refusal) == [Refused(Option.EXTENDED_HEADERS, Answer.ERR_UNSUP, "not [31m here ü")]
    assert handshake.mode is Mode.SIMPLE


def test_exports_are_listed(feed: Feed) -> None:
    handshake = greeted()
    handshake.list_exports()
    first = encode_answer(Option.LIST, Answer.SERVER, encode_server("a", "first"))
    second = encode_answer(Option.LIST, Answer.SERVER, encode_server("ü", ""))
    listed = (ListedExport("a", "first"), ListedExport("ü", ""))
    assert feed(handshake, first + second + ack(Option.LIST)) == [ExportsListed(listed)]


def test_contexts_are_listed_and_selected(feed: Feed) -> None:
    handshake = greeted()
    handshake.list_contexts("a", ["base:"])
    one = encode_context(0, BASE_ALLOCATION)
    option = Option.LIST_META_CONTEXT
    assert feed(handshake, encode_answer(option, Answer.META_CONTEXT, one) + ack(option)) == [
        ContextsListed(option, (Context(0, BASE_ALLOCATION),))
    ]


def test_info_describes_an_export(feed: Feed) -> None:
    handshake = greeted()
    handshake.info("a")
    sizes = encode_answer(Option.INFO, Answer.INFO, encode_block_sizes(512, 4096, 65536))
    sized = encode_answer(Option.INFO, Answer.INFO, encode_export_info(4096, 3))
    unknown = encode_answer(Option.INFO, Answer.INFO, b"\0\x63whatever")
    (event,) = feed(handshake, sizes + unknown + sized + ack(Option.INFO))
    assert isinstance(event, Described)
    assert (event.session.size, event.session.flags) == (4096, 3)
    assert event.session.block_sizes == BlockSizes(512, 4096, 65536)


def test_go_enters_transmission(feed: Feed) -> None:
    handshake = greeted()
    handshake.go("a")
    handshake.receive(SIZED)
    assert drain(handshake) == []
    (event,) = feed(handshake, ack(Option.GO))
    assert isinstance(event, Ready)
    assert handshake.take_leftover() == (TRAILING if feed is feed_trailing else b"")


@pytest.mark.parametrize("flags, padding", [(3, 0), (1, 124), (0, 124)])
def test_export_name_enters_transmission(feed: Feed, flags: int, padding: int) -> None:
    handshake = greeted(GREETING.pack(NBD_MAGIC, OPTION_MAGIC, flags))
    handshake.export_name("a")
    (event,) = feed(handshake, OLD_EXPORT.pack(4096, 3) + bytes(padding))
    assert event.session.size == 4096
    assert handshake.take_leftover() == (TRAILING if feed is feed_trailing else b"")


def test_flags_that_contradict_the_session_are_dropped() -> None:
    handshake = greeted()
    handshake.go("a")
    flags = ExportFlag.HAS_FLAGS | ExportFlag.SEND_DF | ExportFlag.SEND_FAST_ZERO | ExportFlag.BLOCK_STATUS_PAYLOAD
    told = encode_answer(Option.GO, Answer.INFO, encode_export_info(4096, flags))
    (event,) = feed_whole(handshake, told + ack(Option.GO))
    assert event.session.flags == ExportFlag.HAS_FLAGS


@pytest.mark.parametrize("feed", [feed_whole, feed_bytes])
def test_starttls_upgrades_and_forgets(feed: Feed) -> None:
    """Something behind the answer would be a fault: nothing in clear may come there."""
    handshake = greeted()
    handshake.structured_replies()
    feed(handshake, ack(Option.STRUCTURED_REPLY))
    handshake.start_tls()
    assert feed(handshake, ack(Option.STARTTLS)) == [StartTls()]
    handshake.tls_started()
    assert handshake.mode is Mode.SIMPLE
    with pytest.raises(LocalProtocolError):
        handshake.start_tls()


def test_answers_in_clear_behind_starttls_are_never_taken_for_encrypted_ones() -> None:
    handshake = greeted()
    handshake.start_tls()
    with pytest.raises(RemoteProtocolError, match="in clear"):
        feed_whole(handshake, ack(Option.STARTTLS) + ack(Option.STRUCTURED_REPLY))


def go(*answers: bytes) -> tuple[Callable[[ClientHandshake], None], bytes]:
    return lambda handshake: handshake.go("a"), b"".join(answers)


def selecting(*answers: bytes) -> tuple[Callable[[ClientHandshake], None], bytes]:
    def ask(handshake: ClientHandshake) -> None:
        handshake.structured_replies()
        feed_whole(handshake, ack(Option.STRUCTURED_REPLY))
        handshake.set_contexts("a", ["x:a", "x:b"])

    selected = (encode_answer(Option.SET_META_CONTEXT, Answer.META_CONTEXT, answer) for answer in answers)
    return ask, b"".join(selected) + ack(Option.SET_META_CONTEXT)


@pytest.mark.parametrize(
    "ask, answer",
    [
        go(ack(Option.INFO)),
        go(OPTION_REPLY.pack(OPTION_REPLY_MAGIC + 1, Option.GO, Answer.ACK, 0)),
        go(ack(Option.GO)),
        go(SIZED, encode_answer(Option.GO, Answer.ACK, b"x")),
        go(encode_answer(Option.GO, Answer.SERVER, encode_server("a", ""))),
        go(encode_answer(Option.GO, 99, b"")),
        go(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, Option.GO, Answer.INFO, MAX_ANSWER + 1)),
        go(encode_answer(Option.GO, Answer.INFO, b"")),
        go(encode_answer(Option.GO, Answer.INFO, encode_export_info(4096, 1) + b"x")),
        go(encode_answer(Option.GO, Answer.INFO, encode_export_info(1 << 63, 1))),
        go(encode_answer(Option.GO, Answer.INFO, encode_export_info(4096, 2))),
        go(encode_answer(Option.GO, Answer.INFO, encode_block_sizes(3, 4096, 65536))),
        go(encode_answer(Option.GO, Answer.INFO, b"\0\1\xff\xfe")),
        selecting(encode_context(1, "x:c")),
        selecting(encode_context(1, "x:a"), encode_context(1, "x:b")),
        selecting(encode_context(1, "x:a"), encode_context(2, "x:a")),
        selecting(b"\0\0"),
    ],
)
def test_an_answer_that_breaks_the_rules_ends_the_connection(
    ask: Callable[[ClientHandshake], None], answer: bytes
) -> None:
    handshake = greeted()
    ask(handshake)
    with pytest.raises(RemoteProtocolError):
        feed_whole(handshake, answer)


def test_a_list_that_never_ends_is_left() -> None:
    handshake = greeted()
    handshake.list_exports()
    one = encode_answer(Option.LIST, Answer.SERVER, encode_server("a", ""))
    feed_whole(handshake, one * MAX_ANSWERS)
    with pytest.raises(RemoteProtocolError, match="more than"):
        feed_whole(handshake, one)


def test_options_go_one_by_one_and_not_to_a_server_that_knows_none() -> None:
    with pytest.raises(LocalProtocolError):
        ClientHandshake().list_exports()
    handshake = greeted()
    handshake.list_exports()
    with pytest.raises(LocalProtocolError):
        handshake.go("a")
    old = greeted(GREETING.pack(NBD_MAGIC, OPTION_MAGIC, 0))
    with pytest.raises(LocalProtocolError):
        old.go("a")
    old.export_name("a")


def test_what_the_protocol_forbids_is_not_sent() -> None:
    handshake = greeted()
    for wrong in ("n" * 4097, "a\0b", "\ud800"):
        with pytest.raises(LocalProtocolError):
            handshake.go(wrong)
    with pytest.raises(LocalProtocolError):
        handshake.set_contexts("a", ["base:allocation"])
    handshake.extended_headers()
    feed_whole(handshake, ack(Option.EXTENDED_HEADERS))
    for ask in (lambda: handshake.export_name("a"), handshake.structured_replies, handshake.take_leftover):
        with pytest.raises(LocalProtocolError):
            ask()


def test_a_server_that_hangs_up_is_told_apart_from_a_client_that_was_done() -> None:
    handshake = greeted()
    with pytest.raises(RemoteProtocolError, match="closed"):
        handshake.receive_eof()
    handshake = greeted()
    handshake.abort()
    handshake.receive_eof()


# The way a client takes by itself


DISK = Export("disk", 4096, export_flags(writable=True), contexts=(BASE_ALLOCATION, "qemu:allocation-depth"))


def opened(wish: Wish, **policy: Any) -> tuple[Any, list[Any]]:
    """The event that ends an opening against our own server, and the events before it."""
    server = Server([DISK], {"disk": Disk(bytearray(4096))}, **policy)
    opening, before = Opening(wish), []
    answer = server.handshake.data_to_send()
    while True:
        opening.receive(answer)
        event = opening.next_event()
        answer = server.feed(opening.data_to_send())
        if isinstance(event, (Ready, Refused)):
            return event, before
        if isinstance(event, StartTls):
            before.append(event)
            server.handshake.tls_started()
            opening.tls_started()


def test_an_opening_takes_the_best_that_there_is() -> None:
    event, _ = opened(Wish("disk", contexts=(BASE_ALLOCATION, "x:unknown")))
    assert event.session.mode is Mode.EXTENDED
    assert event.session.contexts == (Context(0, BASE_ALLOCATION),)


@pytest.mark.parametrize(
    "wish, mode, contexts",
    [(Wish("disk", extended=False), Mode.STRUCTURED, 1),
     (Wish("disk", extended=False, contexts=()), Mode.STRUCTURED, 0),
     (Wish("disk", extended=False, structured=False), Mode.SIMPLE, 0)],
)  # fmt: skip
def test_an_opening_takes_no_more_than_it_wishes(wish: Wish, mode: Mode, contexts: int) -> None:
    event, _ = opened(wish)
    assert (event.session.mode, len(event.session.contexts)) == (mode, contexts)


def test_an_opening_says_why_it_was_refused() -> None:
    event, _ = opened(Wish("nothing"))
    assert event == Refused(Option.GO, Answer.ERR_UNKNOWN, "there is no export 'nothing'")


@pytest.mark.parametrize("policy", [TlsPolicy.OFFERED, TlsPolicy.REQUIRED])
def test_an_opening_with_tls_says_nothing_before_it(policy: TlsPolicy) -> None:
    event, before = opened(Wish("disk", tls=TlsWish.ALWAYS), tls=policy)
    assert before == [StartTls()]
    assert event.session.tls
    assert event.session.mode is Mode.EXTENDED


def test_an_opening_goes_on_without_tls_only_where_it_may() -> None:
    assert opened(Wish("disk", tls=TlsWish.IF_OFFERED))[0].session.tls is False
    assert opened(Wish("disk", tls=TlsWish.ALWAYS))[0].option == Option.STARTTLS


def test_an_opening_without_tls_is_refused_where_it_is_required() -> None:
    event, _ = opened(Wish("disk"), tls=TlsPolicy.REQUIRED)
    assert event.answer == Answer.ERR_TLS_REQD


def test_an_opening_falls_back_to_export_name() -> None:
    opening = Opening(Wish("disk", extended=False, structured=False))
    assert feed_whole(opening, HELLO) == []
    opening.data_to_send()
    assert feed_whole(opening, encode_answer(Option.GO, Answer.ERR_UNSUP)) == []
    assert opening.data_to_send().endswith(b"\0\0\0\1\0\0\0\4disk")
    (event,) = feed_whole(opening, OLD_EXPORT.pack(4096, 1))
    assert isinstance(event, Ready)


def test_an_opening_that_is_hung_up_on_says_during_what() -> None:
    opening = Opening(Wish("disk", extended=False, structured=False))
    feed_whole(opening, HELLO)
    with pytest.raises(RemoteProtocolError, match="during GO"):
        opening.receive_eof()
    event, _ = opened(Wish("nothing"))
    assert isinstance(event, Refused)


def test_an_opening_that_is_over_does_not_mind_the_end() -> None:
    opening = Opening(Wish("disk", extended=False, structured=False))
    feed_whole(opening, HELLO)
    feed_whole(opening, encode_answer(Option.GO, Answer.ERR_UNKNOWN))
    opening.receive_eof()
    assert opening.next_event() is NEED_DATA


def test_an_opening_to_a_server_without_fixed_newstyle_uses_export_name_or_gives_up() -> None:
    opening = Opening(Wish("disk"))
    feed_whole(opening, GREETING.pack(NBD_MAGIC, OPTION_MAGIC, 0))
    assert opening.data_to_send() == bytes(4) + b"IHAVEOPT\0\0\0\1\0\0\0\4disk"
    opening = Opening(Wish("disk", tls=TlsWish.ALWAYS))
    (event,) = feed_whole(opening, GREETING.pack(NBD_MAGIC, OPTION_MAGIC, 0))
    assert event.option == Option.STARTTLS
