"""A server with writing clients is told to end, and told again while it ends: no acknowledged write is lost.

No client flushes. What it was answered must be in the image all the same, because the server had the time to close it.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import CowsliceError
from cowslice.storage.nbd import NbdStorage
from cowslice.testing import peers
from cowslice.units import KiB, MiB

BLOCK = 4 * KiB
PART = 32 * MiB
CLIENTS = 2
TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


class Client:
    """Writes blocks of its part over a connection of its own, each with a content of its own, until it is cut off."""

    def __init__(self, number: int) -> None:
        self.begin = number * PART
        self.dice = random.Random(number)
        self.answered: dict[int, bytes] = {}
        self.under_way = (-1, b"")

    def work(self, uri: str, busy: threading.Semaphore) -> None:
        with contextlib.suppress(CowsliceError), NbdStorage(uri, "r+", connections=1, timeout=20) as disk:
            while True:
                offset = self.begin + self.dice.randrange(PART // BLOCK) * BLOCK
                content = self.dice.randbytes(16) * (BLOCK // 16)
                self.under_way = offset, content
                disk.pwrite(offset, content)
                self.answered[offset] = content
                busy.release()

    def lost(self, disk: cowslice.Image) -> list[int]:
        """Offsets of blocks that do not hold what was answered last, nor what was on its way."""
        return [offset for offset, content in self.answered.items()
                if (seen := disk.read(offset, BLOCK)) != content and (offset, seen) != self.under_way]


@contextmanager
def serve(image: Path, socket: Path) -> Iterator[subprocess.Popen[str]]:
    command = (sys.executable, "-m", "cowslice.cli.main", "serve", "-t", "-e", "0", "--writable", "-k", socket, image)
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("nbd+unix")
            yield server
        finally:
            server.kill()


def send(server: subprocess.Popen[str], numbers: Sequence[int], gap: float) -> None:
    for number in numbers:
        server.send_signal(number)
        time.sleep(gap)


@pytest.mark.parametrize("gap", [0, 0.002, 0.01, 0.05], ids="{} s".format)
@pytest.mark.parametrize("numbers", [(TERM, TERM), (INT, INT, INT), (TERM, HUP)], ids=["TERM", "Ctrl-C", "TERM, HUP"])
@peers.needs("qemu-img")
def test_a_server_that_is_told_again_to_end_keeps_all_that_it_answered(
    numbers: tuple[int, ...], gap: float, tmp_path: Path
) -> None:
    image, socket = tmp_path / "disk.qcow2", tmp_path / "server.sock"
    cowslice.create(image, CLIENTS * PART, format="qcow2", cluster_size=4 * KiB)
    clients, busy = [Client(number) for number in range(CLIENTS)], threading.Semaphore(0)
    with ThreadPoolExecutor(CLIENTS) as pool, serve(image, socket) as server:
        work = [pool.submit(client.work, f"nbd+unix:///?socket={socket}", busy) for client in clients]
        for _ in range(500):
            assert busy.acquire(timeout=60)
        send(server, numbers, gap)
        _, said = server.communicate(timeout=60)
        for one in work:
            one.result()
    assert server.returncode == 0
    assert "Traceback" not in said
    assert not socket.exists()
    peers.qemu_img("check", image)  # leaks too
    with cowslice.open(image) as disk:
        assert [client.lost(disk) for client in clients] == [[]] * CLIENTS


def test_a_signal_that_was_ignored_before_stays_ignored(tmp_path: Path) -> None:
    image, socket = tmp_path / "disk.qcow2", tmp_path / "server.sock"
    cowslice.create(image, MiB, format="qcow2")
    with ExitStack() as stack:
        before = signal.signal(HUP, signal.SIG_IGN)
        stack.callback(signal.signal, HUP, before)
        server = stack.enter_context(serve(image, socket))
        send(server, (HUP, HUP), 0.05)
        with NbdStorage(f"nbd+unix:///?socket={socket}", timeout=20) as disk:
            assert disk.length() == MiB
        server.send_signal(TERM)
        assert server.wait(60) == 0
