"""When a server asks for TLS, what it hides until then, and what it forgets."""

from __future__ import annotations

import pytest

from cowslice.errors import LocalProtocolError, RemoteProtocolError
from cowslice.nbd import (
    Aborted,
    Export,
    ServerHandshake,
    StartTls,
    TlsPolicy,
)
from cowslice.nbd.options import encode_option
from cowslice.nbd.wire import (
    BASE_ALLOCATION,
    Answer,
    Mode,
    Option,
)
from tests.unit.nbd.handshakes import DISK, Feed, answers, contexts, go, greeted, last, negotiated
from tests.unit.nbd.talk import feed_whole


def test_tls_is_refused_where_it_is_off(feed: Feed) -> None:
    handshake = greeted()
    feed(handshake, encode_option(Option.STARTTLS))
    assert last(handshake) == Answer.ERR_POLICY


@pytest.mark.parametrize("policy", [TlsPolicy.OFFERED, TlsPolicy.REQUIRED])
def test_starttls_asks_for_the_upgrade_and_forgets_what_was_agreed_on(policy: TlsPolicy) -> None:
    handshake = greeted(tls=policy)
    feed_whole(handshake, encode_option(Option.STRUCTURED_REPLY))
    feed_whole(handshake, contexts(Option.SET_META_CONTEXT, "disk", BASE_ALLOCATION))
    assert feed_whole(handshake, encode_option(Option.STARTTLS)) == [StartTls()]
    assert last(handshake) == Answer.ACK
    handshake.tls_started()
    session = negotiated(handshake, go("disk")).session
    assert (session.mode, session.contexts, session.tls) == (Mode.SIMPLE, (), True)


@pytest.mark.parametrize("option", set(Option) - {Option.STARTTLS, Option.ABORT, Option.EXPORT_NAME} | {77})
def test_where_tls_is_required_every_other_option_says_so(option: int) -> None:
    handshake = greeted(tls=TlsPolicy.REQUIRED)
    feed_whole(handshake, encode_option(option, b"whatever"))
    assert last(handshake) == Answer.ERR_TLS_REQD


def test_where_tls_is_required_abort_works_and_export_name_ends_the_connection() -> None:
    assert feed_whole(greeted(tls=TlsPolicy.REQUIRED), encode_option(Option.ABORT)) == [Aborted()]
    with pytest.raises(RemoteProtocolError, match="TLS"):
        feed_whole(greeted(tls=TlsPolicy.REQUIRED), encode_option(Option.EXPORT_NAME, b"disk"))


def test_bytes_behind_starttls_in_clear_are_never_taken_for_encrypted_ones() -> None:
    handshake = greeted(tls=TlsPolicy.REQUIRED)
    with pytest.raises(RemoteProtocolError, match="in clear"):
        feed_whole(handshake, encode_option(Option.STARTTLS) + go("disk"))


def test_bytes_before_the_tls_handshake_in_clear_are_never_taken_for_encrypted_ones() -> None:
    handshake = greeted(tls=TlsPolicy.REQUIRED)
    feed_whole(handshake, encode_option(Option.STARTTLS))
    handshake.receive(go("disk"))
    with pytest.raises(RemoteProtocolError, match="in clear"):
        handshake.tls_started()


def test_tls_starts_once() -> None:
    handshake = greeted(tls=TlsPolicy.OFFERED)
    with pytest.raises(LocalProtocolError):
        handshake.tls_started()
    feed_whole(handshake, encode_option(Option.STARTTLS))
    handshake.tls_started()
    feed_whole(handshake, encode_option(Option.STARTTLS))
    assert last(handshake) == Answer.ERR_INVALID


SECRET = Export("secret", 512, tls_only=True)


def test_an_export_for_tls_only_cannot_be_told_from_none_in_clear() -> None:
    handshake = greeted(DISK, SECRET, tls=TlsPolicy.OFFERED)
    for name in ("secret", "nothing"):
        feed_whole(handshake, go(name))
        assert answers(handshake) == [(Answer.ERR_TLS_REQD, b"this needs TLS")]
    feed_whole(handshake, encode_option(Option.LIST))
    assert len(answers(handshake)) == 2
    feed_whole(handshake, contexts(Option.LIST_META_CONTEXT, "secret"))
    assert last(handshake) == Answer.ERR_UNKNOWN
    assert negotiated(handshake, go("disk")).export is DISK


def test_an_export_for_tls_only_is_had_with_tls() -> None:
    handshake = greeted(DISK, SECRET, tls=TlsPolicy.OFFERED)
    feed_whole(handshake, encode_option(Option.STARTTLS))
    handshake.tls_started()
    assert negotiated(handshake, go("secret")).export is SECRET


def test_an_export_for_tls_only_needs_a_server_with_tls() -> None:
    with pytest.raises(LocalProtocolError):
        ServerHandshake([SECRET])
