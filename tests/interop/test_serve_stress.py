"""Many clients at once, most of them rude: every byte is right for those who wait for it, and nothing stays behind."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowslice
from cowslice.nbd.wire import Command, CommandFlag, Mode
from cowslice.serve.exports import Export
from cowslice.serve.listeners import listen_unix
from cowslice.serve.server import Server
from cowslice.serve.transmission import Limits
from tests.unit.serve.rawclient import PATIENCE, WAYS, RawClient, connect, connected_to, model

CLUSTER = 1 << 16
CELLS = "NNZ.CNNN..ZZCCNN" * 8
IMAGE = model(CELLS)
CONTENT = IMAGE.over(b"")
SIZE = len(CONTENT)
CLIENTS = 8
SLACK = 1 << 20  # bytes: a leak of one byte for each of some 400,000 reads is not far below it
SLACK_OBJECTS = 5000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stress") / "disk.qcow2"
    made.write_bytes(IMAGE.file)
    return made


@pytest.fixture
def place() -> Iterator[str]:
    name = f"/tmp/cowslice-stress-{os.getpid()}"
    yield name
    assert not os.path.lexists(name)


class Rude:
    """One client that comes, reads at random, leaves in some way, and comes again, until the time is over."""

    def __init__(self, place: str, seed: int, until: float) -> None:
        self.rng = random.Random(seed)
        self.place = place
        self.until = until
        self.read = 0
        self.fault: BaseException | None = None
        self.thread = threading.Thread(target=self.run, name=f"rude {seed}")
        self.thread.start()

    def run(self) -> None:
        try:
            while time.monotonic() < self.until:
                with connected_to(self.place) as connected:
                    self.visit(connected)
        except BaseException as fault:
            self.fault = fault

    def visit(self, connected: socket.socket) -> None:
        rng = self.rng
        if rng.random() < 0.1:
            connected.sendall(rng.randbytes(rng.choice((0, 3, 100))))  # gone before it was ready
            return
        client = RawClient(connected, mode=rng.choice(tuple(Mode)))
        for _ in range(rng.randrange(8)):
            self.batch(client, rng.randrange(1, 40))
            if time.monotonic() > self.until:
                return
        self.leave(client)

    def batch(self, client: RawClient, count: int) -> None:
        """Some reads at once, each of whose bytes is looked at."""
        asked: dict[int, tuple[int, int]] = {}
        sent = b""
        for _ in range(count):
            offset = self.rng.randrange(SIZE)
            length = min(self.rng.choice((1, 512, 4096, 5000, 3 * CLUSTER)), SIZE - offset)
            flags = self.rng.choice((0, CommandFlag.DF)) if client.mode else 0
            sent += client.request(Command.READ, offset, length, flags=flags)
            asked[client._cookie] = offset, length
        client.socket.sendall(sent)
        replies = client.answers(count)
        for cookie, (offset, length) in asked.items():
            assert replies[cookie].data == CONTENT[offset : offset + length], f"{length} bytes at {offset}"
        self.read += count

    def leave(self, client: RawClient) -> None:
        """Say goodbye, or go in the middle of a request, of the replies, or with a curse."""
        way = self.rng.randrange(4)
        if way == 0:
            client.ask(Command.DISC)
        elif way == 1:
            client.socket.sendall(client.request(Command.READ, 0, 9)[: self.rng.randrange(1, 28)])
        elif way == 2:
            client.socket.sendall(b"".join(client.request(Command.READ, 0, 9 * CLUSTER) for _ in range(9)))
            client.socket.recv(self.rng.randrange(1, 4096))
        else:
            client.socket.sendall(b"\xde\xad" * 40)


def storm(path: Path, place: str, *, compiled: bool, seconds: float, seed: int) -> int:
    """Let rude clients at a server; the number of reads that were right. What is left afterwards is a failure."""
    with (
        cowslice.open(path, l2_cache_size="64k") as disk,
        Server([Export(disk)], [listen_unix(place)], compiled=compiled, report=lambda what: None) as server,
    ):
        until = time.monotonic() + seconds
        rude = [Rude(place, seed * 100 + n, until) for n in range(CLIENTS)]
        for one in rude:
            one.thread.join(seconds + PATIENCE)
            assert not one.thread.is_alive()
            assert one.fault is None, one.fault
        assert server.wait(0) is False
    return sum(one.read for one in rude)


def left() -> list[str]:
    threads = [one.name for one in threading.enumerate() if "cleaner" not in one.name]
    return sorted(os.listdir("/proc/self/fd")) + sorted(threads)


class Mallinfo(ctypes.Structure):
    """What glibc says of its memory (`man mallinfo2`)."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def in_use() -> tuple[int, int]:
    """Bytes that were allocated and not freed, and objects of Python.

    Not what is resident: glibc keeps what was freed for the next one, as much as many clients once needed at once.
    """
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo
    said = mallinfo2()
    return said.uordblks + said.hblkhd, sys.getallocatedblocks()


@pytest.mark.parametrize("way", WAYS)
def test_rude_clients_get_every_byte_right_and_leave_nothing(path: Path, place: str, way: str) -> None:
    storm(path, place, compiled=way == "compiled", seconds=0.1, seed=1)
    before = left()
    assert storm(path, place, compiled=way == "compiled", seconds=1.5, seed=2) > 0
    assert left() == before


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_minute_of_rude_clients_leaves_no_memory_behind(path: Path, place: str, way: str) -> None:
    storm(path, place, compiled=way == "compiled", seconds=10, seed=3)
    before, (memory, objects) = left(), in_use()
    assert storm(path, place, compiled=way == "compiled", seconds=60, seed=4) > 1000
    assert left() == before
    still, living = in_use()
    assert still < memory + SLACK
    assert living < objects + SLACK_OBJECTS


@pytest.mark.parametrize("way", WAYS)
def test_who_behaves_does_not_notice_who_does_not(path: Path, place: str, way: str) -> None:
    """Stalled, flooding and half-connected clients beside one that reads the whole disk."""
    limits = Limits(most_requests=16)
    with cowslice.open(path) as disk:
        server = Server([Export(disk)], [listen_unix(place)], compiled=way == "compiled", limits=limits,
                        report=lambda what: None)
        with server:
            bad = [connected_to(place) for _ in range(6)]
            stalled = [RawClient(connected) for connected in bad[:3]]
            for client in stalled:
                client.socket.setblocking(False)
                flood = b"".join(client.request(Command.READ, 0, 2 * CLUSTER) for _ in range(2000))
                try:
                    while flood:
                        flood = flood[client.socket.send(flood) :]
                except BlockingIOError:
                    pass  # the server stopped listening to it: so it must be
            good = connect(place)
            for offset in range(0, SIZE, 4 * CLUSTER):
                assert good.read(offset, 4 * CLUSTER).data == CONTENT[offset : offset + 4 * CLUSTER]
            assert server.connections == 7
            for one in (*bad, good.socket):
                one.close()
