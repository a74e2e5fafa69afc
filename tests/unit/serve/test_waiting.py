"""How a connection waits for its client: awake or asleep, it answers the same, and it does not stay awake for ever."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import BadOption
from cowslice.nbd.wire import Command
from cowslice.serve.transmission import Limits
from tests.unit.serve.rawclient import PATIENCE, RawClient, Wired, model, wired

K = 1 << 16
IMAGE = model("NNZ.N")
CONTENT = IMAGE.over(b"")
LONG = 1_000_000_000  # nanoseconds: the most that may be asked for
IN_A_ROW = 20  # more than it takes to be trusted


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[cowslice.Image]:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE.file)
    with cowslice.open(path) as opened:
        yield opened


def ask_in_a_row(client: RawClient) -> None:
    for number in range(IN_A_ROW):
        offset = number * 7919
        assert client.read(offset, 512).data == CONTENT[offset : offset + 512]


def state_of(wire: Wired) -> str:
    """What the system says of the connection's thread: R runs, S sleeps."""
    said = Path(f"/proc/self/task/{wire.thread.native_id}/stat").read_text()
    return said.rpartition(")")[2].split()[0]


@pytest.mark.parametrize("patience", [0, 1, LONG])
def test_one_thing_after_another_is_answered_right_however_it_waits(disk: cowslice.Image, patience: int) -> None:
    with wired(disk, limits=Limits(poll_max_ns=patience)) as wire:
        client = wire.client()
        ask_in_a_row(client)
        client.socket.sendall(b"".join(client.request(Command.READ, n * 512, 512) for n in range(100)))
        assert len(client.answers(100)) == 100
        ask_in_a_row(client)


def test_a_request_that_comes_in_halves_is_answered_while_it_waits_awake(disk: cowslice.Image) -> None:
    with wired(disk, limits=Limits(poll_max_ns=LONG)) as wire:
        client = wire.client()
        ask_in_a_row(client)
        request = client.request(Command.READ, 5, 7)
        wire.socket.sendall(request[:9])
        wire.socket.sendall(request[9:])
        (reply,) = client.answers(1).values()
    assert reply.data == CONTENT[5:12]


@pytest.mark.parametrize("patience", [0, 1, LONG])
def test_requests_that_trickle_in_are_answered_right_however_it_waits(disk: cowslice.Image, patience: int) -> None:
    with wired(disk, limits=Limits(poll_max_ns=patience)) as wire:
        client = wire.client()
        for number in range(100):
            wire.socket.sendall(client.request(Command.READ, number * 100, 300))
        replies = client.answers(100)
        assert [reply.data for _, reply in sorted(replies.items())] == [
            CONTENT[number * 100 : number * 100 + 300] for number in range(100)]


def over_tcp() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        theirs = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


def test_a_last_reply_reaches_a_client_that_says_goodbye_before_it_reads(disk: cowslice.Image) -> None:
    """TCP takes back what a client has not read yet when a socket is closed with something left in it."""
    with wired(disk, limits=Limits(poll_max_ns=LONG), pair=over_tcp()) as wire:
        client = wire.client()
        ask_in_a_row(client)
        client.ask(Command.READ, 3, 40_000)
        client.ask(Command.DISC)
        wire.thread.join(PATIENCE)
        ((_, reply),) = client.answers(1).items()
        assert reply.data == CONTENT[3 : 3 + 40_000]
        assert wire.socket.recv(1) == b""


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64, 200])
@pytest.mark.parametrize("length", [1, 4096, 32 << 10, (32 << 10) + 1])
def test_windows_of_any_width_are_answered_whole(disk: cowslice.Image, count: int, length: int) -> None:
    with wired(disk, limits=Limits(poll_max_ns=LONG)) as wire:
        client = wire.client()
        for width in (1, count, 1, count):
            places = [number * 4093 % (len(CONTENT) - length) for number in range(width)]
            asked = [client.request(Command.READ, place, length) for place in places]
            wire.socket.sendall(b"".join(asked))
            replies = client.answers(width)
            assert [reply.data for _, reply in sorted(replies.items())] == [CONTENT[at : at + length] for at in places]


def test_a_write_between_lone_reads_is_answered_whole(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE.file)
    with cowslice.open(path, "r+") as disk, wired(disk, limits=Limits(poll_max_ns=LONG), writable=True) as wire:
        client = wire.client()
        for number in range(IN_A_ROW):
            ask_in_a_row(client)
            content = bytes([number + 1]) * (number * 300 + 1)
            wrote = client.ask(Command.WRITE, K + number, len(content), payload=content)
            assert client.collect(wrote).error == 0
            assert client.read(K + number, len(content)).data == content
            client.ask(Command.WRITE, K + number, len(content), payload=CONTENT[K + number : K + number + len(content)])
            assert client.answer()[1].error == 0


def test_a_client_that_leaves_in_the_middle_of_many_requests_is_left(disk: cowslice.Image) -> None:
    with wired(disk, limits=Limits(poll_max_ns=LONG)) as wire:
        client = wire.client()
        wire.socket.sendall(b"".join(client.request(Command.READ, n, 300) for n in range(50)) + b"\x25\x60")
        wire.socket.close()
        wire.thread.join(PATIENCE)
        assert not wire.thread.is_alive()


def test_who_is_asked_nothing_more_goes_to_sleep(disk: cowslice.Image) -> None:
    with wired(disk, limits=Limits(poll_max_ns=1_000_000)) as wire:
        ask_in_a_row(wire.client())
        end = time.monotonic() + PATIENCE
        while state_of(wire) != "S":
            assert time.monotonic() < end, "it is awake for ever"


def test_who_waits_awake_hears_that_it_must_stop(disk: cowslice.Image) -> None:
    with wired(disk, limits=Limits(poll_max_ns=LONG)) as wire:
        ask_in_a_row(wire.client())
        wire.connection.stop()
        wire.thread.join(PATIENCE)
        assert not wire.thread.is_alive()


def test_garbage_is_recognized_while_it_waits_awake(disk: cowslice.Image) -> None:
    with wired(disk, limits=Limits(poll_max_ns=LONG)) as wire:
        client = wire.client()
        ask_in_a_row(client)
        wire.socket.sendall(struct.pack(">I", 0xBAD) + bytes(24))
        assert client.ended()


@pytest.mark.parametrize("patience", [-1, LONG + 1])
def test_an_impossible_patience_is_refused(patience: int) -> None:
    with pytest.raises(BadOption, match="poll_max_ns"):
        Limits(poll_max_ns=patience)
