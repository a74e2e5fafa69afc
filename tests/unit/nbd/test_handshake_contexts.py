"""Which metadata contexts a server lists and selects."""

from __future__ import annotations

import pytest

from cowslice.nbd import (
    Context,
    Export,
    ServerHandshake,
)
from cowslice.nbd.options import encode_option
from cowslice.nbd.wire import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    MAX_CONTEXTS,
    MAX_QUERIES,
    Answer,
    ExportFlag,
    Option,
)
from tests.unit.nbd.handshakes import BITMAP, DISK, Feed, answers, contexts, go, greeted, last, negotiated
from tests.unit.nbd.talk import feed_whole


@pytest.mark.parametrize(
    "queries, listed",
    [
        ((), DISK.contexts),
        (("base:",), (BASE_ALLOCATION,)),
        (("base:allocation",), (BASE_ALLOCATION,)),
        (("qemu:",), (ALLOCATION_DEPTH, BITMAP)),
        (("qemu:dirty-bitmap:",), (BITMAP,)),
        ((BITMAP, BITMAP, "qemu:"), (ALLOCATION_DEPTH, BITMAP)),
        (("qemu:dirty-bitmap:mon", "base", "", "x:", "base:alloc"), ()),
    ],
)
def test_contexts_are_listed_by_name_and_by_prefix(
    feed: Feed, queries: tuple[str, ...], listed: tuple[str, ...]
) -> None:
    handshake = greeted()
    feed(handshake, contexts(Option.LIST_META_CONTEXT, "disk", *queries))
    *found, end = answers(handshake)
    assert found == [(Answer.META_CONTEXT, bytes(4) + name.encode()) for name in listed]
    assert end == (Answer.ACK, b"")


def structured() -> ServerHandshake:
    handshake = greeted()
    feed_whole(handshake, encode_option(Option.STRUCTURED_REPLY))
    handshake.data_to_send()
    return handshake


def test_contexts_are_selected_by_name_only(feed: Feed) -> None:
    handshake = structured()
    feed(handshake, contexts(Option.SET_META_CONTEXT, "disk", "base:", "qemu:", BITMAP, BASE_ALLOCATION, BITMAP, "?"))
    assert answers(handshake) == [
        (Answer.META_CONTEXT, b"\0\0\0\0base:allocation"), (Answer.META_CONTEXT, b"\0\0\0\2" + BITMAP.encode()),
        (Answer.ACK, b""),
    ]  # fmt: skip


def test_selected_contexts_go_into_the_session() -> None:
    handshake = structured()
    feed_whole(handshake, contexts(Option.SET_META_CONTEXT, "disk", BITMAP))
    assert negotiated(handshake, go("disk")).session.contexts == (Context(2, BITMAP),)


def test_contexts_with_extended_headers_allow_to_choose_among_them() -> None:
    handshake = greeted()
    feed_whole(handshake, encode_option(Option.EXTENDED_HEADERS))
    feed_whole(handshake, contexts(Option.SET_META_CONTEXT, "disk", BITMAP))
    assert negotiated(handshake, go("disk")).session.flags & ExportFlag.BLOCK_STATUS_PAYLOAD


@pytest.mark.parametrize(
    "second", [contexts(Option.SET_META_CONTEXT, "disk"), contexts(Option.SET_META_CONTEXT, "nothing", "base:x"),
               encode_option(Option.SET_META_CONTEXT, b"broken")],
)  # fmt: skip
def test_every_new_selection_replaces_the_old_one_even_when_it_fails(second: bytes) -> None:
    handshake = structured()
    feed_whole(handshake, contexts(Option.SET_META_CONTEXT, "disk", BITMAP))
    feed_whole(handshake, second)
    assert negotiated(handshake, go("disk")).session.contexts == ()


def test_contexts_of_another_export_are_dropped() -> None:
    handshake = structured()
    feed_whole(handshake, contexts(Option.SET_META_CONTEXT, "other", BASE_ALLOCATION))
    assert negotiated(handshake, go("disk")).session.contexts == ()


def test_contexts_need_structured_replies_to_be_selected_not_to_be_listed() -> None:
    handshake = greeted()
    feed_whole(handshake, contexts(Option.LIST_META_CONTEXT, "disk"))
    assert last(handshake) == Answer.ACK
    feed_whole(handshake, contexts(Option.SET_META_CONTEXT, "disk", BASE_ALLOCATION))
    assert last(handshake) == Answer.ERR_INVALID


def test_contexts_of_an_unknown_export_are_refused() -> None:
    handshake = structured()
    for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        feed_whole(handshake, contexts(option, "nothing"))
        assert last(handshake) == Answer.ERR_UNKNOWN


@pytest.mark.parametrize(
    "payload", [b"", b"\0\0\0\4disk", b"\0\0\0\4disk\0\0\0\1", b"\0\0\0\4disk\0\0\0\1\0\0\0\5base",
                b"\0\0\0\4disk\0\0\0\0x", b"\0\0\0\4disk\xff\xff\xff\xff"],
)  # fmt: skip
def test_malformed_queries_are_refused(payload: bytes) -> None:
    handshake = structured()
    feed_whole(handshake, encode_option(Option.LIST_META_CONTEXT, payload))
    assert last(handshake) in (Answer.ERR_INVALID, Answer.ERR_TOO_BIG)


def test_too_many_queries_and_too_many_contexts_are_too_big() -> None:
    names = tuple(f"x:{number}" for number in range(MAX_CONTEXTS + 1))
    handshake = greeted(Export("many", 512, contexts=names))
    feed_whole(handshake, encode_option(Option.STRUCTURED_REPLY))
    feed_whole(handshake, contexts(Option.SET_META_CONTEXT, "many", *names))
    assert last(handshake) == Answer.ERR_TOO_BIG
    feed_whole(handshake, contexts(Option.LIST_META_CONTEXT, "many", *["x:1"] * (MAX_QUERIES + 1)))
    assert last(handshake) == Answer.ERR_TOO_BIG
