"""What a client sees of a server that ends: answers to all that it had asked, then ESHUTDOWN, then the end."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowslice
from cowslice.nbd.wire import Command, NbdError
from cowslice.serve.exports import Export
from cowslice.serve.listeners import listen_tcp
from cowslice.serve.server import Server, serve
from tests.unit.serve.rawclient import PATIENCE, WAYS, KiB, RawClient, connect, in_memory, model, wired

IMAGE = model("N" * 16)
CONTENT = IMAGE.over(b"")


@pytest.fixture
def disk() -> Iterator[cowslice.Image]:
    with cowslice.open(in_memory(IMAGE)) as opened:
        yield opened


def over_tcp(server: Server, *, room: int = 0) -> RawClient:
    """A client whose system takes about `room` bytes that nobody has received yet."""
    port = int(server.uri.rpartition(":")[2].rstrip("/"))
    connected = socket.socket()
    if room:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connected.connect(("127.0.0.1", port))
    return RawClient(connected)


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_after_a_server_began_to_end_is_refused_with_eshutdown(tmp_path: Path, way: str) -> None:
    cowslice.create(tmp_path / "disk", 1 << 20)
    with cowslice.open(tmp_path / "disk", "r+") as opened, wired(opened, way=way, writable=True) as wire:
        client = wire.client()
        assert client.read(0, 4 * KiB).error == 0
        wire.connection.refuse()
        for command, payload in ((Command.READ, b""), (Command.WRITE, b"a" * 512), (Command.FLUSH, b""),
                                 (Command.BLOCK_STATUS, b"")):
            length = 0 if command == Command.FLUSH else 512
            assert client.collect(client.ask(command, 0, length, payload=payload)).error == NbdError.ESHUTDOWN
        wire.connection.stop()
        assert client.ended()
        assert opened.read(0, 512) == bytes(512)


def test_who_negotiates_is_told_as_well(disk: cowslice.Image) -> None:
    with wired(disk) as wire:
        greeting = wire.socket.recv(18)
        wire.connection.refuse()
        wire.socket.sendall(b"\0\0\0\3" + b"IHAVEOPT" + (3).to_bytes(4, "big") + bytes(4))
        answer = wire.socket.recv(20)
    assert greeting.startswith(b"NBDMAGIC")
    assert int.from_bytes(answer[12:16], "big") == 0x80000007, "NBD_REP_ERR_SHUTDOWN"


@pytest.mark.parametrize("way", WAYS)
def test_a_tcp_client_under_load_gets_every_answer_before_the_end(disk: cowslice.Image, way: str) -> None:
    server = Server([Export(disk)], listen_tcp("127.0.0.1", 0), compiled=way == "compiled")
    client = over_tcp(server, room=4 * KiB)
    asked = {client.ask(Command.READ, 0, 64 * KiB) for _ in range(60)}
    closing = threading.Thread(target=server.close)
    closing.start()
    assert server.wait(PATIENCE)
    while asked:
        with contextlib.suppress(ConnectionError):
            client.ask(Command.READ, 0, 512)  # it goes on asking, also when nobody listens any more
        cookie, reply = client.answer()
        assert reply.data == CONTENT[: 64 * KiB] or reply.error == NbdError.ESHUTDOWN or cookie > 60
        asked.discard(cookie)
    closing.join(PATIENCE)
    assert not closing.is_alive()


def test_a_client_that_goes_on_asking_is_told(disk: cowslice.Image, tmp_path: Path) -> None:
    place = str(tmp_path / "s")
    server = serve(disk, unix=place)
    client = connect(place)
    assert client.read(0, 512).error == 0
    closing = threading.Thread(target=server.close)
    closing.start()
    errors = []
    with contextlib.suppress(ConnectionError, EOFError):
        while True:
            errors.append(client.read(0, 512).error)
    closing.join(PATIENCE)
    assert set(errors) <= {0, NbdError.ESHUTDOWN}
    assert errors[-1] == NbdError.ESHUTDOWN
