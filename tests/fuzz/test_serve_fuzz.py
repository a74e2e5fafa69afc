"""A server's connection fed with spoiled conversations: it always ends, leaves nothing, and is never surprised."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cowslice
from cowslice.nbd.wire import BASE_ALLOCATION, Option
from cowslice.serve.transmission import Limits
from tests.unit.serve.rawclient import PATIENCE, WAYS, model, wired

IMAGE = model("NNZ.CNNN", cluster_bits=12)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cowslice.Image]:
    path = tmp_path_factory.mktemp("fuzz") / "disk.qcow2"
    path.write_bytes(IMAGE.file)
    with cowslice.open(path) as opened:
        yield opened


def option(number: int, payload: bytes = b"") -> bytes:
    return struct.pack(">QII", 0x49484156454F5054, number, len(payload)) + payload


def name(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


OPTIONS = (
    option(Option.LIST), option(Option.STRUCTURED_REPLY), option(Option.EXTENDED_HEADERS), option(Option.STARTTLS),
    option(Option.INFO, name(b"") + struct.pack(">HHH", 2, 0, 3)), option(Option.INFO, name(b"x") + b"\0\0"),
    option(Option.LIST_META_CONTEXT, name(b"") + struct.pack(">I", 1) + name(b"base:")),
    option(Option.SET_META_CONTEXT, name(b"") + struct.pack(">I", 1) + name(BASE_ALLOCATION.encode())),
    option(77, b"?" * 50),
)  # fmt: skip
GO = (option(Option.GO, name(b"") + b"\0\0"), option(Option.EXPORT_NAME), option(Option.GO, name(b"x") + b"\0\0"))


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """Client flags, options, a way in, requests; then some bytes of it spoiled, cut out or doubled."""
    parts = [struct.pack(">I", draw(st.sampled_from((3, 3, 3, 1, 0, 7))))]
    parts += draw(st.lists(st.sampled_from(OPTIONS), max_size=4))
    parts += [draw(st.sampled_from(GO))]
    parts += draw(st.lists(requests(), max_size=6))
    talk = bytearray(b"".join(parts))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(talk) - 1))
        how = draw(st.integers(0, 2))
        if how == 0:
            talk[at] = draw(st.integers(0, 255))
        elif how == 1:
            del talk[at : at + draw(st.integers(1, 9))]
        else:
            talk[at:at] = talk[at : at + 32]
        if not talk:
            break
    return bytes(talk)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    extended = draw(st.booleans())
    magic, layout = (0x21E41C71, ">IHHQQQ") if extended else (0x25609513, ">IHHQQI")
    command = draw(st.integers(0, 9))
    length = draw(st.sampled_from((0, 1, 512, 40_000, 1 << 20, (1 << 32) - 1)))
    payload = draw(st.sampled_from((b"", b"p" * 20, b"p" * 600)))
    return struct.pack(layout, magic, draw(st.sampled_from((0, 0, 1, 4, 8, 32))), command, draw(st.integers(0, 9)),
                       draw(st.sampled_from((0, 4096, 30_000, 1 << 40))), length) + payload


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=80)
@given(talk=conversations())
def test_a_spoiled_conversation_ends_and_surprises_nobody(disk: cowslice.Image, way: str, talk: bytes) -> None:
    with wired(disk, way=way, limits=Limits(max_request=1 << 16)) as wire:
        wire.socket.settimeout(PATIENCE)
        with suppress(ConnectionError):
            wire.socket.sendall(talk)
            wire.socket.shutdown(socket.SHUT_WR)
            while wire.socket.recv(1 << 16):
                pass
    assert not [report for report in wire.reports if "internal" in report]
