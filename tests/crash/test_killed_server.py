"""A server with writing clients is killed, again and again: nothing is corrupt, nothing that was flushed is lost."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowslice.errors import CowsliceError
from cowslice.ops.opening import mend_dirty
from cowslice.storage.nbd import NbdStorage
from cowslice.testing import peers
from cowslice.testing.modeldisk import ModelDisk
from cowslice.testing.twin import Files, Shape, make_files
from cowslice.units import SECTOR

CLIENTS = 3
SHAPES = [Shape(512), Shape(64 * 1024, extended_l2=True, backing="raw"), Shape(4096, lazy=True)]


class Client:
    """Writes its own part of the disk over a connection of its own until the server is gone."""

    def __init__(self, number: int, seed: int, content: bytes) -> None:
        self.dice = random.Random(f"{number}/{seed}")
        part = len(content) // CLIENTS // SECTOR * SECTOR
        self.begin, self.end = number * part, (number + 1) * part
        self.model = ModelDisk(content)
        self.flushed: list[str] = []

    def work(self, uri: str, done: threading.Semaphore) -> None:
        with contextlib.suppress(CowsliceError), NbdStorage(uri, "r+", connections=1, timeout=20) as disk:
            while True:
                self.act(disk)
                done.release()

    def act(self, disk: NbdStorage) -> None:
        """The model has it before the server does: what is cut off may be there."""
        choice = self.dice.choice(("write",) * 6 + ("zero", "discard", "flush", "flush"))
        units = (self.end - self.begin) // SECTOR
        start = self.dice.randrange(units)
        length = min(self.dice.choice((1, 2, 7, 40)), units - start) * SECTOR
        offset = self.begin + start * SECTOR
        if choice == "flush":
            label = self.model.flush()
            disk.sync()
            self.flushed.append(label)
        elif choice == "write":
            data = self.dice.randbytes(length)
            self.model.write(offset, data)
            disk.pwrite(offset, data)
        elif choice == "zero":
            self.model.zero(offset, length)
            disk.zero(offset, length)
        else:
            self.discard(disk, offset, length)

    def discard(self, disk: NbdStorage, offset: int, length: int) -> None:
        """Any sector of it may be zeros or not."""
        self.model.fail(offset, bytes(length))
        disk.discard(offset, length)

    def lost(self, seen: bytes) -> int | None:
        """Offset of a sector that holds neither what was flushed nor anything later, or None."""
        whole = bytearray(self.model.content)
        whole[self.begin : self.end] = seen[self.begin : self.end]
        return self.model.after_crash(bytes(whole), tuple(self.flushed))


@contextmanager
def served(files: Files, socket: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "cowslice.cli.main", "serve", "-t", "--writable", "-k", socket, files.image]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline().startswith("nbd+unix")
            yield server, f"nbd+unix:///?socket={socket}"
        finally:
            server.kill()
            socket.unlink(missing_ok=True)


def kill_again_and_again(files: Files, times: int) -> None:
    dice, content = random.Random(times), files.content
    for number in range(times):
        clients = [Client(one, number, content) for one in range(CLIENTS)]
        done = threading.Semaphore(0)
        with ThreadPoolExecutor(CLIENTS) as pool, served(files, files.directory / f"{number}.sock") as (server, uri):
            work = [pool.submit(client.work, uri, done) for client in clients]
            for _ in range(dice.randrange(1, 200)):
                assert done.acquire(timeout=60)
            server.send_signal(signal.SIGKILL)
            for one in work:
                one.result()
        mend_dirty(str(files.image))
        files.check(leaks=True)
        with files.open("r", warmup="off") as disk:
            content = disk.read(0, disk.size)
        for client in clients:
            assert client.lost(content) is None, f"kill {number} lost the sector at byte {client.lost(content)}"


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@peers.needs("qemu-img")
def test_a_killed_server_loses_nothing_that_a_client_flushed(shape: Shape, tmp_path: Path) -> None:
    kill_again_and_again(make_files(shape, tmp_path), 5)


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@peers.needs("qemu-img")
def test_a_server_that_is_killed_two_hundred_times_loses_nothing_that_a_client_flushed(
    shape: Shape, tmp_path: Path
) -> None:
    kill_again_and_again(make_files(shape, tmp_path), 200)
