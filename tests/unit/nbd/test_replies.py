"""What a server answers, byte for byte where the specification says it, and what it refuses to say."""

from __future__ import annotations

from dataclasses import replace
from struct import unpack

import pytest

from cowslice.errors import LocalProtocolError
from cowslice.nbd import BlockSizes, Data, Hole, Replies, Request, Session
from cowslice.nbd.wire import MAX_STATUS_EXTENTS, Command, CommandFlag, Mode, NbdError

SIMPLE = Session("", 1 << 40, 1)
STRUCTURED = replace(SIMPLE, mode=Mode.STRUCTURED)
EXTENDED = replace(SIMPLE, mode=Mode.EXTENDED)
READ = Request(Command.READ, 0, 9, 100, 10)
STATUS = Request(Command.BLOCK_STATUS, 0, 9, 0, 1 << 20, contexts=(3,))


def said(*parts: object) -> bytes:
    return b"".join(bytes(part) for part in parts)  # type: ignore[call-overload]


def test_success_is_one_header() -> None:
    assert Replies(SIMPLE).done(READ) == bytes.fromhex("67446698 00000000 0000000000000009")
    assert Replies(STRUCTURED).done(READ) == bytes.fromhex("668e33ef 0001 0000 0000000000000009 00000000")
    assert Replies(EXTENDED).done(READ) == bytes.fromhex(
        "6e8a278c 0001 0000 0000000000000009 0000000000000064 0000000000000000"
    )


def test_an_error_has_a_sentence_where_there_is_room() -> None:
    assert Replies(SIMPLE).error(READ, NbdError.EIO, "bad") == bytes.fromhex("67446698 00000005 0000000000000009")
    assert Replies(STRUCTURED).error(READ, NbdError.EIO, "bad") == (
        bytes.fromhex("668e33ef 0001 8001 0000000000000009 00000009 00000005 0003") + b"bad"
    )
    assert Replies(STRUCTURED).error(READ, NbdError.EIO, "bad", offset=105) == (
        bytes.fromhex("668e33ef 0001 8002 0000000000000009 00000011 00000005 0003") + b"bad" + bytes(7) + b"\x69"
    )


def test_a_sentence_is_cut_between_characters() -> None:
    reply = Replies(STRUCTURED).error(READ, NbdError.EIO, "é" * 4096)
    assert len(reply) == 20 + 6 + 4096
    assert reply[26:].decode() == "é" * 2048


def test_a_simple_read_is_one_piece_with_zeroes_for_holes() -> None:
    parts = Replies(SIMPLE).read(READ, [Data(100, b"abc"), Hole(103, 5), Data(108, b"xy")])
    assert said(*parts) == bytes.fromhex("67446698 00000000 0000000000000009") + b"abc\0\0\0\0\0xy"


def test_a_structured_read_sends_data_and_describes_holes() -> None:
    parts = Replies(STRUCTURED).read(READ, [Data(100, b"abc"), Hole(103, 7)])
    assert said(*parts) == (
        bytes.fromhex("668e33ef 0000 0001 0000000000000009 0000000b 0000000000000064") + b"abc"
        + bytes.fromhex("668e33ef 0001 0002 0000000000000009 0000000c 0000000000000067 00000007")
    )  # fmt: skip


def test_an_extended_read_repeats_the_offset_of_the_request() -> None:
    parts = Replies(EXTENDED).read(READ, [Hole(100, 3), Data(103, b"abcdefg")])
    assert said(*parts) == bytes.fromhex(
        "6e8a278c 0000 0002 0000000000000009 0000000000000064 000000000000000c 0000000000000064 00000003"
        "6e8a278c 0001 0001 0000000000000009 0000000000000064 000000000000000f 0000000000000067"
    ) + b"abcdefg"


def test_a_read_that_must_not_be_fragmented_is_one_chunk() -> None:
    whole = replace(READ, flags=int(CommandFlag.DF))
    parts = Replies(STRUCTURED).read(whole, [Hole(100, 9), Data(109, b"x")])
    assert said(*parts)[-18:] == (100).to_bytes(8, "big") + bytes(9) + b"x"
    assert len(Replies(STRUCTURED).read(whole, [Hole(100, 10)])) == 1


def test_a_read_of_nothing_is_a_success() -> None:
    nothing = replace(READ, length=0)
    for session in (SIMPLE, STRUCTURED, EXTENDED):
        assert Replies(session).read(nothing, []) == [Replies(session).done(nothing)]


@pytest.mark.parametrize(
    "pieces", [[], [Data(100, b"abc")], [Data(101, b"123456789")], [Data(100, b"12345"), Data(104, b"123456")],
               [Hole(100, 11)], [Hole(100, 0), Hole(100, 10)]],
)  # fmt: skip
def test_an_answer_that_does_not_cover_the_request_is_our_own_fault(pieces: list[Data | Hole]) -> None:
    with pytest.raises(LocalProtocolError):
        Replies(STRUCTURED).read(READ, pieces)


def test_what_a_style_cannot_say_is_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError):
        Replies(SIMPLE).hole(READ, 100, 5)
    with pytest.raises(LocalProtocolError):
        Replies(SIMPLE).data_header(READ, 100, 5)
    with pytest.raises(LocalProtocolError):
        Replies(SIMPLE).block_status(STATUS, 3, [(512, 0)], done=True)
    with pytest.raises(LocalProtocolError):
        Replies(STRUCTURED).data_header(READ, 99, 2)
    with pytest.raises(LocalProtocolError):
        Replies(STRUCTURED).error(READ, NbdError.EIO, offset=111)
    with pytest.raises(LocalProtocolError):
        Replies(STRUCTURED).data_header(READ, 100, 0)
    huge = replace(READ, length=1 << 33)
    with pytest.raises(LocalProtocolError):
        Replies(STRUCTURED).data_header(huge, 100, 1 << 32)
    with pytest.raises(LocalProtocolError):
        Replies(EXTENDED).hole(huge, 100, 1 << 32)


def extents(session: Session, request: Request, found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What a client would read out of the answer."""
    reply = Replies(session).status(request, {3: found})
    skip, layout = (40, ">QQ") if session.mode is Mode.EXTENDED else (24, ">II")
    step = 16 if session.mode is Mode.EXTENDED else 8
    return [unpack(layout, reply[at : at + step]) for at in range(skip, len(reply), step)]


@pytest.mark.parametrize("session", [STRUCTURED, EXTENDED], ids=["structured", "extended"])
def test_a_block_status_joins_neighbours_and_ends_with_the_request(session: Session) -> None:
    found = [(4096, 0), (4096, 0), (8192, 3), (1 << 30, 0), (5, 1)]
    assert extents(session, STATUS, found) == [(8192, 0), (8192, 3), ((1 << 20) - 16384, 0)]


def test_a_block_status_of_one_extent_is_as_long_as_it_can_be() -> None:
    one = replace(STATUS, flags=int(CommandFlag.REQ_ONE))
    assert extents(STRUCTURED, one, [(4096, 2), (4096, 2), (4096, 0)]) == [(8192, 2)]


def test_a_block_status_says_64_bits_only_where_it_can() -> None:
    large = replace(STATUS, length=1 << 39)
    assert extents(EXTENDED, large, [(1 << 39, 3)]) == [(1 << 39, 3)]
    nearly = replace(STATUS, length=(1 << 32) - 1)
    assert extents(STRUCTURED, nearly, [(1 << 39, 3)]) == [((1 << 32) - 65536, 3)]


@pytest.mark.parametrize("maximum, most", [(1 << 25, MAX_STATUS_EXTENTS), (4096, 512)])
def test_a_block_status_has_an_end(maximum: int, most: int) -> None:
    session = replace(STRUCTURED, block_sizes=BlockSizes(maximum=maximum))
    found = [(1, number % 2) for number in range(1 << 18)]
    assert len(extents(session, STATUS, found)) == most


@pytest.mark.parametrize("found", [[], [(0, 0)], [(-1, 0)], [(512, -1)], [(512, 1 << 32)]])
def test_a_block_status_that_cannot_be_said_is_our_own_fault(found: list[tuple[int, int]]) -> None:
    with pytest.raises(LocalProtocolError):
        Replies(STRUCTURED).status(STATUS, {3: found})


def test_a_block_status_answers_exactly_what_was_asked() -> None:
    with pytest.raises(LocalProtocolError):
        Replies(STRUCTURED).status(STATUS, {0: [(512, 0)]})
