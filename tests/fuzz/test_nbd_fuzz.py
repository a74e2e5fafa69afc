"""Hostile peers: almost-right streams into both halves of the protocol. Only protocol errors come out.

The seeds are conversations in every style: of our two halves, made here, and of other people's programs with ours,
kept in corpus/nbd as they went over the wire. What is left of them after a mutation is mostly a valid stream with one
lie in it.
"""

from __future__ import annotations

import functools
import random
import re
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import RemoteProtocolError
from cowslice.nbd import (
    BadRequest,
    ClientHandshake,
    ClientTransmission,
    Completed,
    Context,
    Opening,
    Ready,
    Refused,
    Session,
    StartTls,
    TlsWish,
    Wish,
)
from cowslice.nbd.wire import (
    BASE_ALLOCATION,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Mode,
)
from tests.fuzz.nbd_corpus import (
    CONTEXTS,
    PLAIN_WISHES,
    SIZE,
    ask_everything,
    ask_what_is_allowed,
    kept,
    new_server,
)
from tests.unit.nbd.talk import drain

WISHES = (*PLAIN_WISHES, Wish("disk", tls=TlsWish.ALWAYS), Wish("nothing"))
ASKED, ANSWERED = kept("asked"), kept("answered")
ROUNDS = 3000  # of each long campaign and each wish


@functools.cache
def conversation(wish: Wish) -> tuple[bytes, bytes]:
    """What the client and what the server say from the greeting to goodbye, every option asked for first."""
    server, opening = new_server(), Opening(wish)
    asked, answered = bytearray(), bytearray(server.handshake.data_to_send())
    fresh = bytes(answered)
    while True:
        opening.receive(fresh)
        event = opening.next_event()
        said = opening.data_to_send()
        fresh = server.feed(said)
        asked, answered = asked + said, answered + fresh
        if isinstance(event, StartTls):
            server.handshake.tls_started()
            opening.tls_started()
        elif isinstance(event, Ready):
            client = ClientTransmission(event.session, opening.take_leftover())
            ask_everything(client)
            client.disconnect()
            said = b"".join(bytes(part) for part in client.data_to_send())
            return bytes(asked + said), bytes(answered + server.feed(said))
        elif isinstance(event, Refused):
            return bytes(asked), bytes(answered)


@functools.cache
def options() -> bytes:
    """A client that only negotiates, with every option."""
    server, client = new_server(), ClientHandshake()
    asked, fresh = bytearray(), server.handshake.data_to_send()
    asks: list[Callable[[], None]] = [
        client.list_exports, client.structured_replies, lambda: client.list_contexts("disk", ["base:"]),
        lambda: client.set_contexts("disk", CONTEXTS), lambda: client.info("disk"), client.extended_headers,
        lambda: client.go("nothing"), lambda: client.go("disk"),
    ]  # fmt: skip
    while True:
        client.receive(fresh)
        drain(client)
        if asks and asked:
            asks.pop(0)()
        said = client.data_to_send()
        if not said:
            return bytes(asked)
        asked += said
        fresh = server.feed(said)


MAGICS = tuple(
    magic.to_bytes(size, "big")
    for magic, size in (
        (OPTION_MAGIC, 8), (OPTION_REPLY_MAGIC, 8), (REQUEST_MAGIC, 4), (EXTENDED_REQUEST_MAGIC, 4),
        (SIMPLE_REPLY_MAGIC, 4), (STRUCTURED_REPLY_MAGIC, 4), (EXTENDED_REPLY_MAGIC, 4),
    )
)  # fmt: skip
EXTREMES = (
    *(b"\xff" * 4, b"\xff" * 8, bytes(4), bytes(8), b"\x7f" + b"\xff" * 7),
    *(b"\x02\0\0\0", b"\x02\0\0\1", b"\x80\0\0\2"),
)


def mutate(stream: bytes, chance: random.Random) -> bytes:
    """A few lies in a stream. Most keep its messages apart, so that what follows is still understood."""
    frames = _frames(stream)
    honest = chance.choice((0, len(frames) // 2, len(frames) - 1))  # often the negotiation is fine
    lying = frames[honest:]
    for _ in range(chance.randint(1, 3)):
        lie = chance.choice((_lie_in_a_header, _lie_in_a_header, _lie_about_order, _lie_anywhere))
        lie(lying, chance)
    return b"".join(frames[:honest] + lying)


def _frames(stream: bytes) -> list[bytearray]:
    """The stream cut before every magic."""
    cuts = sorted({0, *(match.start() for match in re.finditer(b"|".join(map(re.escape, MAGICS)), stream))})
    return [bytearray(stream[at:end]) for at, end in zip(cuts, [*cuts[1:], len(stream)], strict=True)]


def _lie_in_a_header(frames: list[bytearray], chance: random.Random) -> None:
    """One field behind a magic: numbers next to what they were, and those at the ends."""
    frame = chance.choice(frames)
    at = chance.randrange(4, max(5, min(len(frame), 56)))
    if chance.random() < 0.5:
        frame[at : at + 1] = bytes([chance.choice((0, 1, 2, 5, 6, 7, 0x40, 0x80, 0xFF))])
    elif chance.random() < 0.5:
        near = (int.from_bytes(frame[at : at + 1], "big") + chance.choice((-1, 1))) % 256
        frame[at : at + 1] = bytes([near])
    else:
        extreme = chance.choice(EXTREMES)
        frame[at : at + len(extreme)] = extreme


def _lie_about_order(frames: list[bytearray], chance: random.Random) -> None:
    """A message left out, sent twice, or sent too early."""
    at, other = chance.randrange(len(frames)), chance.randrange(len(frames))
    kind = chance.randrange(3)
    if kind == 0 and len(frames) > 1:
        del frames[at]
    elif kind == 1:
        frames.insert(other, bytearray(frames[at]))
    else:
        frames[at], frames[other] = frames[other], frames[at]


def _lie_anywhere(frames: list[bytearray], chance: random.Random) -> None:
    """Bytes replaced, left out, repeated, or a magic where none belongs."""
    frame = chance.choice(frames)
    at, length = chance.randrange(len(frame) + 1), chance.randint(1, 40)
    kind = chance.randrange(4)
    if kind == 0:
        frame[at : at + 1] = bytes([chance.randrange(256)])
    elif kind == 1:
        del frame[at : at + length]
    elif kind == 2:
        frame[at:at] = frame[at : at + length] * chance.randint(1, 3)
    else:
        frame[at:at] = chance.choice(MAGICS)


def pieces(stream: bytes, chance: random.Random) -> Iterator[bytes]:
    """The stream as a network might deliver it."""
    at = 0
    while at < len(stream):
        length = chance.choice((1, 16, 200, 1 << 16))
        yield stream[at : at + length]
        at += length


def attack_server(stream: bytes, chance: random.Random) -> None:
    server = new_server()
    server.handshake.data_to_send()
    try:
        for piece in pieces(stream, chance):
            server.feed(piece)
            if server.tls_wanted:
                server.tls_wanted = False
                server.handshake.tls_started()
            if server.closed:
                return
    except RemoteProtocolError as error:
        assert str(error).isprintable()


def attack_client(wish: Wish, stream: bytes, chance: random.Random) -> None:
    """Everything a server says comes from the stream; the client asks what it always asks."""
    opening = Opening(wish)
    client: ClientTransmission | None = None
    try:
        for piece in pieces(stream, chance):
            if client is None:
                opening.receive(piece)
                event = opening.next_event()
                if isinstance(event, StartTls):
                    opening.tls_started()
                    event = opening.next_event()
                if isinstance(event, Refused):
                    return
                if not isinstance(event, Ready):
                    continue
                client = ClientTransmission(event.session, opening.take_leftover())
                ask_what_is_allowed(client)
            else:
                client.receive(piece)
            drain(client)
    except RemoteProtocolError as error:
        assert str(error).isprintable()


_CHANCES = st.integers(0, 1 << 62).map(random.Random)


def said_by_clients() -> list[bytes]:
    """Every seed against the server."""
    return [options(), *(conversation(wish)[0] for wish in WISHES), *ASKED.values()]


def said_by_servers() -> list[tuple[Wish, bytes]]:
    """Every seed against the client, with what the client wished for."""
    ours = [(wish, conversation(wish)[1]) for wish in WISHES]
    return ours + [(PLAIN_WISHES[int(name.split("-")[1])], stream) for name, stream in ANSWERED.items()]


@given(st.deferred(lambda: st.sampled_from(said_by_clients())), _CHANCES)
def test_a_lying_client_is_answered_or_left(stream: bytes, chance: random.Random) -> None:
    attack_server(mutate(stream, chance), chance)


@given(st.deferred(lambda: st.sampled_from(said_by_servers())), _CHANCES)
def test_a_lying_server_is_believed_or_left(seed: tuple[Wish, bytes], chance: random.Random) -> None:
    wish, stream = seed
    attack_client(wish, mutate(stream, chance), chance)


@given(st.binary(max_size=300), _CHANCES)
def test_noise_is_no_client(noise: bytes, chance: random.Random) -> None:
    attack_server(noise, chance)
    attack_server(b"\0\0\0\3" + OPTION_MAGIC.to_bytes(8, "big") + noise, chance)


@given(st.sampled_from(Mode), st.binary(max_size=300), _CHANCES)
def test_noise_is_no_reply(mode: Mode, noise: bytes, chance: random.Random) -> None:
    magic = (SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, EXTENDED_REPLY_MAGIC)[mode]
    client = ClientTransmission(Session("", SIZE, 1, mode, contexts=(Context(0, BASE_ALLOCATION),)))
    client.read(0, memoryview(bytearray(SIZE)))
    try:
        for piece in pieces(magic.to_bytes(4, "big") + noise, chance):
            client.receive(piece)
            drain(client)
    except RemoteProtocolError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("cut", [1, 3, 1 << 20], ids=["byte by byte", "by three bytes", "whole"])
@pytest.mark.parametrize("wish", [*PLAIN_WISHES, Wish("nothing")], ids=str)
def test_every_request_is_understood_however_it_is_cut(wish: Wish, cut: int) -> None:
    """Whole, each message also has others behind it."""
    asked, answered = conversation(wish)
    server = new_server()
    said = bytearray(server.handshake.data_to_send())
    for at in range(0, len(asked), cut):
        said += server.feed(asked[at : at + cut])
    assert bytes(said) == answered


@pytest.mark.parametrize("cut", [1, 3, 1 << 20], ids=["byte by byte", "by three bytes", "whole"])
@pytest.mark.parametrize("wish", PLAIN_WISHES, ids=str)
def test_every_reply_is_understood_however_it_is_cut(wish: Wish, cut: int) -> None:
    client, completed = understood(wish, conversation(wish)[1], cut)
    assert client.in_flight == 0
    assert [event.error for event in completed] == [None] * len(completed)
    assert len(completed) == {Mode.SIMPLE: 7, Mode.STRUCTURED: 9, Mode.EXTENDED: 10}[client.session.mode]


@pytest.mark.parametrize("name", ASKED)
def test_what_other_clients_asked_is_understood(name: str) -> None:
    server = new_server()
    server.feed(ASKED[name])
    assert server.closed
    assert not [event for event in server.disks["disk"].log if isinstance(event, BadRequest)]


@pytest.mark.parametrize("name", ANSWERED)
def test_what_other_servers_answered_is_understood(name: str) -> None:
    client, completed = understood(PLAIN_WISHES[int(name.split("-")[1])], ANSWERED[name], 1 << 20)
    assert client.in_flight == 0
    assert len(completed) > 5
    assert all(event.error is None for event in completed)


def understood(wish: Wish, stream: bytes, cut: int) -> tuple[ClientTransmission, list[Completed]]:
    """A client that asks for everything and hears the stream in pieces of `cut` bytes, and what it was answered."""
    opening = Opening(wish)
    client: ClientTransmission | None = None
    events: list[Completed] = []
    for at in range(0, len(stream), cut):
        if client is None:
            opening.receive(stream[at : at + cut])
            event = opening.next_event()
            if isinstance(event, Ready):
                client = ClientTransmission(event.session, opening.take_leftover())
                ask_what_is_allowed(client)
        else:
            client.receive(stream[at : at + cut])
        events += [event for event in (drain(client) if client else []) if isinstance(event, Completed)]
    assert client is not None
    return client, events


def test_a_flood_of_claims_takes_no_memory() -> None:
    """Headers that announce the largest payloads there are, and never bring them."""
    claims = [
        b"\0\0\0\3" + OPTION_MAGIC.to_bytes(8, "big") + b"\0\0\0\7" + length.to_bytes(4, "big")
        for length in (1 << 20, (1 << 20) + 1, 1 << 25)
    ]
    tracemalloc.start()
    try:
        servers = [new_server() for _ in claims]
        before = tracemalloc.get_traced_memory()[0]
        for server, claim in zip(servers, claims, strict=True):
            server.feed(claim)
        assert tracemalloc.get_traced_memory()[0] - before < 1 << 16
    finally:
        tracemalloc.stop()


@pytest.mark.long
def test_a_campaign_against_the_server() -> None:
    for stream in said_by_clients():
        for number in range(ROUNDS):
            chance = random.Random(number)
            attack_server(mutate(stream, chance), chance)


@pytest.mark.long
def test_a_campaign_against_the_client() -> None:
    for wish, stream in said_by_servers():
        for number in range(ROUNDS):
            chance = random.Random(number)
            attack_client(wish, mutate(stream, chance), chance)
