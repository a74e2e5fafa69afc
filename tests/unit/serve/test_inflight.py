"""What one connection has under way: whatever is slow, fails or is refused, holds up and harms nothing else of it."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cowslice
from cowslice.errors import CowsliceError
from cowslice.nbd.events import BadRequest, Request
from cowslice.nbd.wire import Command, CommandFlag, Mode, NbdError
from cowslice.serve.answers import Answer, Answers
from cowslice.serve.metrics import Counts, ExportMeter, Source
from cowslice.serve.transmission import Limits
from cowslice.storage import FileStorage
from cowslice.storage.wrappers import WrappedStorage
from cowslice.testing.faults import Fault, FaultyStorage, HeldStorage
from tests.unit.serve.rawclient import PATIENCE, WAYS, RawClient, Wired, model, wired

K = 1 << 16
CELLS = "NNZ.CNNN" + "." * 40
SIZE = len(CELLS) * K
IMAGE = model(CELLS)
CONTENT = IMAGE.over(b"")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk.qcow2"
    made.write_bytes(IMAGE.file)
    return made


@pytest.fixture
def writable(tmp_path: Path) -> Path:
    """The same content in an image that can be written, whose clusters a snapshot keeps."""
    made = tmp_path / "writable.qcow2"
    cowslice.create(made, size=SIZE)
    with cowslice.open(made, "r+") as disk:
        disk.write(0, CONTENT[: 8 * K])
        disk.snapshot("kept")
    return made


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def held_disk(path: Path, mode: str = "r") -> Iterator[tuple[HeldStorage, cowslice.Image]]:
    """A disk whose map is in memory, and the storage that may hold what is read of it from now on."""
    held = HeldStorage(FileStorage(path, mode))
    held.release()
    with cowslice.open(held, mode, warmup="full") as disk:
        disk.wait_warm()
        try:
            yield held, disk
        finally:
            held.release()


class Gate:
    """Lets no answer to one command, of that many bytes or more, be made until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch, command: int, *, at_least: int = 0) -> None:
        self.open = threading.Event()
        answer = Answers.answer

        def held(answers: Answers, request: Request | BadRequest) -> Answer:
            if isinstance(request, Request) and request.command == command and request.length >= at_least:
                assert self.open.wait(PATIENCE)
            return answer(answers, request)

        patch.setattr(Answers, "answer", held)


def metered(wire: Wired, disk: cowslice.Image) -> ExportMeter:
    meter = wire.connection._service.meters[""] = ExportMeter("", disk.size, disk)  # type: ignore[index]
    return meter


# -- faults of ours ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command, length", [(Command.FLUSH, 0), (Command.READ, 512), (Command.WRITE, 512)])
def test_a_fault_of_ours_ends_the_connection_and_is_told(
    writable: Path, way: str, command: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = FaultyStorage(FileStorage(writable, "r+"))
    with cowslice.open(faulty, "r+", warmup="full") as disk, wired(disk, way=way, writable=True) as wire:
        disk.wait_warm()
        faulty.add(Fault("pread"))
        client = wire.client()
        monkeypatch.setattr(Answers, "answer", lambda answers, request: 1 // 0)
        client.ask(command, 4 * K if length else 0, length, payload=b"x" * length * (command == Command.WRITE))
        assert client.ended()
        wire.thread.join(PATIENCE)
        assert not wire.thread.is_alive()
        faulty.heal()
    assert [report.partition(":")[2] for report in wire.reports] == [
        " internal error: ZeroDivisionError: integer division or modulo by zero"]


def test_a_system_without_threads_answers_one_thing_after_another(
    path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_disk(path) as (_, disk), wired(disk, way=way) as wire:
        client = wire.client()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("none")))
            for offset in (0, 5 * K, 6 * K):
                assert client.read(offset, 4096).data == CONTENT[offset : offset + 4096]
            assert client.collect(client.ask(Command.FLUSH)).error == 0
        assert client.read(0, 9).data == CONTENT[:9]


# -- counts ------------------------------------------------------------------------------------------------------------


def test_a_read_that_waits_is_counted_with_all_its_time(path: Path, way: str) -> None:
    with held_disk(path) as (held, disk), wired(disk, way=way) as wire:
        meter = metered(wire, disk)
        client = wire.client()
        held.hold()
        asked = [client.ask(Command.READ, offset, 4096) for offset in (0, K)]
        held.wait_for(2)
        assert sum(meter.reading().counts["latency"]) == 0, "what is not answered is not counted"
        time.sleep(0.1)
        held.release()
        assert client.answers(2).keys() == set(asked)
        client.socket.close()
        wire.thread.join(PATIENCE)
    counts = meter.reading().counts
    assert (counts["requests"]["read"], counts["bytes"]["read"], sum(counts["latency"])) == (2, 8192, 2)
    assert counts["latency_ns"] >= 2 * 100_000_000
    assert (counts["heat"][0], sum(counts["heat"])) == (1, 2)


def test_a_read_that_fails_is_counted_as_an_error_that_moved_nothing(path: Path, way: str) -> None:
    faulty = FaultyStorage(FileStorage(path))
    with cowslice.open(faulty, warmup="full") as disk, wired(disk, way=way) as wire:
        disk.wait_warm()
        meter = metered(wire, disk)
        client = wire.client()
        faulty.add(Fault("pread"))
        assert client.read(0, 4096).error == NbdError.EIO
        faulty.heal()
    counts = meter.reading().counts
    assert counts_of(counts) == (1, 0, 1, 1, 0)


def counts_of(counts: Counts) -> tuple[int, int, int, int, int]:
    return (counts["requests"]["read"], counts["bytes"]["read"], counts["errors"], sum(counts["latency"]),
            sum(counts["heat"]))


# -- time --------------------------------------------------------------------------------------------------------------


def read_slowly(client: RawClient, held: HeldStorage, seconds: float) -> bytes:
    """The first 512 bytes, which the storage keeps back for so long."""
    held.hold()
    slow = client.ask(Command.READ, 0, 512)
    held.wait_for(1)
    time.sleep(seconds)
    held.release()
    return client.collect(slow).data


def test_a_slow_answer_is_no_idleness(path: Path, way: str) -> None:
    with held_disk(path) as (held, disk), wired(disk, way=way, limits=Limits(idle_timeout=0.2)) as wire:
        client = wire.client()
        assert read_slowly(client, held, 0.5) == CONTENT[:512]
        assert client.read(K, 9).data == CONTENT[K : K + 9], "the connection goes on"


def test_a_client_has_all_its_time_again_after_a_slow_answer(path: Path, way: str) -> None:
    with held_disk(path) as (held, disk), wired(disk, way=way, limits=Limits(idle_timeout=0.6)) as wire:
        client = wire.client()
        # The limit is met once while it waits for us, and next 0.3 seconds after the answer.
        assert read_slowly(client, held, 0.9) == CONTENT[:512]
        time.sleep(0.4)
        assert client.read(K, 9).data == CONTENT[K : K + 9]


def test_the_longest_limit_is_no_short_one(path: Path, way: str) -> None:
    with cowslice.open(path) as disk, wired(disk, way=way, limits=Limits(idle_timeout=1 << 30)) as wire:
        client = wire.client()
        for offset in (0, K):
            assert client.read(offset, 9).data == CONTENT[offset : offset + 9]
            wire.thread.join(0.1)
            assert wire.thread.is_alive()


def test_the_shortest_limit_is_one(path: Path, way: str) -> None:
    with cowslice.open(path) as disk, wired(disk, way=way, limits=Limits(idle_timeout=1e-7)) as wire:
        wire.client()
        wire.thread.join(PATIENCE)
        assert not wire.thread.is_alive()
    assert wire.reports == ["client 1: nothing came or went for too long"]


def test_a_client_that_leaves_without_its_answers_was_not_idle(path: Path, way: str) -> None:
    with cowslice.open(path) as disk, wired(disk, way=way, limits=Limits(idle_timeout=100)) as wire:
        client = wire.client()
        client.ask(Command.READ, 0, 512)
        client.socket.recv(1)
        client.socket.close()
        wire.thread.join(PATIENCE)
        assert not wire.thread.is_alive()
    assert wire.reports == []


# -- who waits for whom ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [Command.BLOCK_STATUS, Command.CACHE, Command.TRIM, Command.WRITE_ZEROES])
def test_what_touches_much_holds_little_and_keeps_nobody_waiting(
    writable: Path, way: str, command: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_disk(writable, "r+") as (_, disk):
        gate = Gate(monkeypatch, command)
        with wired(disk, way=way, writable=True, limits=Limits(most_bytes=2 << 20)) as wire:
            client = wire.client()
            slow = client.ask(command, 0, SIZE)
            assert client.read(0, 4096).data == CONTENT[:4096]
            gate.open.set()
            assert client.collect(slow).error == 0


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no memory file system here")
def test_a_long_read_that_compiled_code_cannot_do_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, so that the loop's own thread would do it, but in a cipher that compiled code does not know."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "disk.qcow2"
        cowslice.create(path, size=SIZE, encryption="luks", iter_time=1, secret=b"s", cipher_alg="cast5-128",
                        cipher_mode="cbc")
        with cowslice.open(path, "r+", secret=b"s") as disk:
            disk.write(0, CONTENT[: 8 * K])
        gate = Gate(monkeypatch, Command.READ, at_least=4 * K)
        with cowslice.open(path, secret=b"s") as disk, wired(disk) as wire:
            client = wire.client()
            slow = client.ask(Command.READ, 0, 4 * K)
            assert client.read(5, 512).data == CONTENT[5:517]
            gate.open.set()
            assert client.collect(slow).data == CONTENT[: 4 * K]


class HeldSync(WrappedStorage):
    """Hold every sync until `released`."""

    def __init__(self, inner: FileStorage) -> None:
        super().__init__(inner)
        self.asked, self.released = threading.Event(), threading.Event()

    def sync(self) -> None:
        self.asked.set()
        assert self.released.wait(PATIENCE)
        self.inner.sync()


def test_a_write_that_must_be_stable_keeps_nobody_else_waiting(writable: Path, way: str) -> None:
    storage = HeldSync(FileStorage(writable, "r+"))
    with cowslice.open(storage, "r+", warmup="full") as disk, wired(disk, way=way, writable=True) as wire:
        client = wire.client()
        slow = client.ask(Command.WRITE, 0, 4096, flags=CommandFlag.FUA, payload=b"x" * 4096)
        assert storage.asked.wait(PATIENCE)
        assert client.read(K, 4096).data == CONTENT[K : K + 4096]
        storage.released.set()
        assert client.collect(slow).error == 0


def test_a_write_that_waits_for_what_stands_beside_it_keeps_nobody_else_waiting(writable: Path, way: str) -> None:
    with held_disk(writable, "r+") as (held, disk), wired(disk, way=way, writable=True) as wire:
        client = wire.client()
        held.hold()
        slow = client.ask(Command.WRITE, 4 * K + 512, 512, payload=b"x" * 512)  # the rest is copied
        held.wait_for(1)
        assert client.read(20 * K, 4096).data == bytes(4096)
        held.release()
        assert client.collect(slow).error == 0
        assert client.read(4 * K, 1024).data == CONTENT[4 * K : 4 * K + 512] + b"x" * 512


@pytest.mark.parametrize("length", [1, 512, K, K + 1, 3 * K])
def test_writes_of_all_kinds_of_clusters_leave_what_stands_beside_them(writable: Path, way: str, length: int) -> None:
    with cowslice.open(writable, "r+", warmup="off") as disk, wired(disk, way=way, writable=True) as wire:
        client = wire.client()
        expected = bytearray(CONTENT)
        for round in range(2):  # the first copies what the snapshot keeps, the second finds its own
            for offset in (0, K - 1, 3 * K + 700, 7 * K + 5, 20 * K + 9, SIZE - length):
                payload = bytes([round + 1, offset % 251]) * length
                expected[offset : offset + length] = payload[:length]
                assert client.collect(client.ask(Command.WRITE, offset, length, payload=payload[:length])).error == 0
        assert client.read(0, SIZE).data == expected


def test_direct_writes_are_done_and_read_back(writable: Path, way: str) -> None:
    try:
        disk = cowslice.open(writable, "r+", direct=True)
    except CowsliceError as fault:
        pytest.skip(str(fault))
    with disk, wired(disk, way=way, writable=True) as wire:
        client = wire.client()
        spans = [(5 * K + n * 5000, 1 + n * 777 % 5000) for n in range(38)] + [(20 * K + 7, 3 * K)]
        wire.socket.sendall(b"".join(
            client.request(Command.WRITE, offset, length, payload=bytes([n]) * length)
            for n, (offset, length) in enumerate(spans)))
        assert not any(reply.error for reply in client.answers(len(spans)).values())
        for n, (offset, length) in enumerate(spans):
            assert client.read(offset, length).data == bytes([n]) * length


# -- payloads that are refused -----------------------------------------------------------------------------------------


LARGE = 200_000
REFUSED = [
    (Mode.STRUCTURED, False, Command.WRITE, 0, 0, NbdError.EPERM),
    (Mode.SIMPLE, True, Command.WRITE, 0, SIZE - LARGE + 1, NbdError.ENOSPC),
    (Mode.EXTENDED, True, Command.WRITE, CommandFlag.PAYLOAD_LEN, 0, NbdError.EINVAL),
    (Mode.STRUCTURED, True, Command.WRITE, CommandFlag.PAYLOAD_LEN, 0, NbdError.EINVAL),
    (Mode.EXTENDED, True, Command.READ, CommandFlag.PAYLOAD_LEN, 0, NbdError.EINVAL),
    (Mode.EXTENDED, True, Command.BLOCK_STATUS, CommandFlag.PAYLOAD_LEN, 0, NbdError.EINVAL),
    (Mode.EXTENDED, True, 99, CommandFlag.PAYLOAD_LEN, 0, NbdError.EINVAL),
]


@pytest.mark.parametrize("mode, writes, command, flags, offset, error", REFUSED)
@pytest.mark.parametrize("piece", [1 << 20, 99_991, 4099])
def test_a_large_payload_that_is_refused_goes_by(
    writable: Path, way: str, mode: Mode, writes: bool, command: int, flags: int, offset: int, error: int, piece: int
) -> None:
    limits = Limits(max_request=K) if error == NbdError.EINVAL else None
    with cowslice.open(writable, "r+") as disk, wired(disk, way=way, writable=writes, limits=limits) as wire:
        client = wire.client(mode=mode)
        said = client.request(Command.READ, 3, 5)
        for _ in range(2):
            said += client.request(command, offset, LARGE, flags=flags, payload=b"\x25\x60\x95\x13" * (LARGE // 4))
        said += client.request(Command.READ, 9, 9)
        for start in range(0, len(said), piece):
            wire.socket.sendall(said[start : start + piece])
        replies = client.answers(4)
        assert [replies[n].error for n in (2, 3)] == [error, error]
        assert (replies[1].data, replies[4].data) == (CONTENT[3:8], CONTENT[9:18])
        assert disk.read(0, SIZE) == CONTENT


class Seen(ExportMeter):
    """Remembers the connection that counts."""

    def attach(self, *sources: Source) -> None:
        super().attach(*sources)
        self.loop: Any = sources[0]._loop  # type: ignore[attr-defined]


def seen(wire: Wired, disk: cowslice.Image) -> Seen:
    meter = wire.connection._service.meters[""] = Seen("", disk.size, disk)  # type: ignore[index]
    return meter


def test_a_payload_that_is_refused_takes_no_memory(path: Path) -> None:
    with cowslice.open(path) as disk, wired(disk) as wire:
        meter = seen(wire, disk)
        client = wire.client()
        assert client.read(0, 1).error == 0  # the connection counts by now
        said = client.request(Command.WRITE, 0, 8 << 20, payload=bytes(8 << 20))
        for start in range(0, len(said), 1 << 20):
            wire.socket.sendall(said[start : start + (1 << 20)])
            assert meter.loop.room <= 256 << 10
        assert client.answer()[1].error == NbdError.EPERM


@pytest.mark.parametrize("large", [1 << 20, 8 << 20])
def test_memory_of_a_large_payload_is_given_back(tmp_path: Path, large: int) -> None:
    cowslice.create(tmp_path / "a", size=16 << 20)
    with cowslice.open(tmp_path / "a", "r+") as disk, wired(disk, writable=True) as wire:
        meter = seen(wire, disk)
        client = wire.client()
        assert client.collect(client.ask(Command.WRITE, 0, large, payload=b"x" * large)).error == 0
        for offset in (0, 512):
            assert client.read(offset, 512).data == b"x" * 512
        client.read(0, 1)
        assert meter.loop.room == 256 << 10
        assert client.read(0, large).data == b"x" * large
