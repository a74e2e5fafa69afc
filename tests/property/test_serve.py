"""The compiled loop and the plain Python transmission say the same, whatever a client asks, and it is the truth."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

import cowslice
from cowslice.nbd.wire import BASE_ALLOCATION, Command, CommandFlag, Mode, NbdError
from cowslice.serve.transmission import Limits
from cowslice.testing.model import ModelImage
from tests.unit.serve.rawclient import RawClient, Reply, in_memory, model, wired

LARGEST = 1 << 16
COMMANDS = (Command.READ, Command.READ, Command.READ, Command.BLOCK_STATUS, Command.CACHE, Command.FLUSH, Command.WRITE,
            Command.TRIM, Command.WRITE_ZEROES, 8, 65535)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a conversation; `command` is any number."""

    command: int
    flags: int
    offset: int
    length: int


@st.composite
def requests(draw: st.DrawFn, size: int) -> Asked:
    """Mostly sound, about the edges of clusters and of the disk; sometimes absurd."""
    command = draw(st.sampled_from(COMMANDS))
    flags = draw(st.sampled_from((0, 0, 0, 0, CommandFlag.FUA, CommandFlag.DF, CommandFlag.REQ_ONE, 1 << 9)))
    if command == Command.FLUSH and draw(st.booleans()):
        return Asked(command, 0, 0, 0)
    edge = draw(st.integers(0, size >> 12)) << 12
    offset = max(edge + draw(st.sampled_from((0, 0, 1, -1, 511))), 0)
    length = draw(st.sampled_from((0, 1, 512, 4096, 4097, 12345, LARGEST, LARGEST + 1)))
    if draw(st.integers(0, 19)) == 0:
        offset = draw(st.sampled_from((1 << 63, (1 << 64) - 1, size)))
    return Asked(int(command), int(flags), offset, length)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[ModelImage, Mode, list[Asked], bool]:
    """A disk, a style of replies, requests, and whether the disk lies in a file that the compiled path can read."""
    cells = draw(st.text("NNNZ.C", min_size=1, max_size=40))
    image = model(cells, cluster_bits=draw(st.sampled_from((9, 12, 13))))
    mode = draw(st.sampled_from(tuple(Mode)))
    return image, mode, draw(st.lists(requests(image.size), max_size=25)), draw(st.booleans())


@settings(max_examples=40)
@given(conversations())
def test_both_ways_of_serving_say_the_same_and_the_truth(talk: tuple[ModelImage, Mode, list[Asked], bool]) -> None:
    image, mode, asked, in_file = talk
    with opened(image, in_file) as disk:
        compiled = said(disk, "compiled", mode, asked)
        python = said(disk, "python", mode, asked)
    content = image.over(b"")
    for number, one in enumerate(asked, 1):
        assert meaning(compiled[number]) == meaning(python[number]), one
        if one.command == Command.READ and not python[number].error:
            assert python[number].data == content[one.offset : one.offset + one.length], one
        if python[number].error:
            assert python[number].error in set(NbdError)


@contextmanager
def opened(image: ModelImage, in_file: bool) -> Iterator[cowslice.Image]:
    with tempfile.NamedTemporaryFile(suffix=".qcow2") as file:
        file.write(image.file)
        file.flush()
        with cowslice.open(file.name if in_file else in_memory(image)) as disk:
            yield disk


def said(disk: cowslice.Image, way: str, mode: Mode, asked: list[Asked]) -> dict[int, Reply]:
    """Everything asked at once, and the reply to each request by its number."""
    with wired(disk, way=way, limits=Limits(max_request=LARGEST)) as wire:
        client = RawClient(wire.socket, mode=mode, contexts=(BASE_ALLOCATION,))
        wire.socket.sendall(b"".join(encoded(client, one) for one in asked))
        replies = client.answers(len(asked))
        assert wire.reports == []
        return replies


def encoded(client: RawClient, one: Asked) -> bytes:
    """A write brings its payload, at most as long as both sides agreed."""
    if one.command != Command.WRITE:
        return client.request(one.command, one.offset, one.length, flags=one.flags)
    length = min(one.length, LARGEST)
    says_so = client.mode is Mode.EXTENDED and one.offset % 2 == 0  # not every client does
    flags = one.flags | (CommandFlag.PAYLOAD_LEN if says_so else 0)
    return client.request(one.command, one.offset, length, flags=flags, payload=b"w" * length)


def meaning(reply: Reply) -> tuple[int, bytes, dict[int, list[tuple[int, int]]]]:
    """What a client learns, however it was cut into chunks."""
    return reply.error, reply.data, reply.extents
