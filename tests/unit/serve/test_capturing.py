"""A capture has what clients asked a server once, whichever half of it answered."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowslice
from cowslice.nbd.wire import Command, CommandFlag, Mode
from cowslice.tune.requests import Operation
from cowslice.tune.trace import open_trace
from tests.unit.serve.rawclient import WAYS, RawClient, model, wired

K = 1 << 16
IMAGE = model("N" * 20 + "Z.CC" + "N" * 16)
SIZE = 40 * K
READ, WRITE, FLUSH, DISCARD, ZERO = Operation


def done(client: RawClient, command: int, offset: int = 0, length: int = 0, **more: object) -> None:
    assert client.collect(client.ask(command, offset, length, **more)).error == 0  # type: ignore[arg-type]


def asked(path: Path) -> list[tuple[int, int, int]]:
    found = [row for chunk in open_trace(path) for row in zip(chunk.operation, chunk.offset, chunk.length, strict=True)]
    return [(int(kind), int(offset), int(length)) for kind, offset, length in found]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("way", WAYS)
def test_what_a_client_reads_is_recorded_once(tmp_path: Path, way: str, mode: Mode) -> None:
    (tmp_path / "a").write_bytes(IMAGE.file)
    with cowslice.open(tmp_path / "a") as disk, disk.capture(tmp_path / "c"), wired(disk, way=way) as server:
        client = server.client(mode=mode, contexts=() if mode is Mode.SIMPLE else ("base:allocation",))
        for offset, length in ((0, 4096), (0, SIZE), (22 * K, 4096), (22 * K + 9, 2 * K - 9), (20 * K, 2 * K)):
            assert client.read(offset, length).error == 0
        done(client, Command.CACHE, 0, SIZE)
        assert client.read(SIZE, 1).error
        done(client, Command.FLUSH)
    assert asked(tmp_path / "c") == [
        (READ, 0, 4096), (READ, 0, SIZE), (READ, 22 * K, 4096), (READ, 22 * K + 9, 2 * K - 9), (READ, 20 * K, 2 * K),
        (READ, 0, SIZE), (FLUSH, 0, 0)]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_client_changes_is_recorded_once(tmp_path: Path, way: str) -> None:
    cowslice.create(tmp_path / "a", size=SIZE)
    with cowslice.open(tmp_path / "a", "r+") as disk:
        disk.write(0, b"w" * 20 * K)
    with (cowslice.open(tmp_path / "a", "r+") as disk, disk.capture(tmp_path / "c"),
          wired(disk, way=way, writable=True) as server):
        client = server.client()
        done(client, Command.WRITE, K, 4096, payload=b"x" * 4096)
        done(client, Command.WRITE, 19 * K, 4 * K, payload=b"x" * 4 * K)  # some of it in place
        done(client, Command.WRITE, 2 * K, 512, payload=b"y" * 512, flags=CommandFlag.FUA)
        done(client, Command.WRITE_ZEROES, 3 * K, K)
        done(client, Command.TRIM, 5 * K, K)
        done(client, Command.BLOCK_STATUS, 0, K)
        assert client.read(19 * K, K).error == 0
    assert asked(tmp_path / "c") == [
        (WRITE, K, 4096), (WRITE, 19 * K, 4 * K), (WRITE, 2 * K, 512), (FLUSH, 0, 0), (ZERO, 3 * K, K),
        (DISCARD, 5 * K, K), (READ, 19 * K, K)]


def test_requests_that_come_together_are_all_recorded(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(IMAGE.file)
    with cowslice.open(tmp_path / "a") as disk, disk.capture(tmp_path / "c"), wired(disk) as server:
        client = server.client()
        spans = [(n * 37 * 512 % (SIZE - K), 512 + n % 7 * 9000) for n in range(300)]
        client.socket.sendall(b"".join(client.request(Command.READ, *span) for span in spans))
        assert not any(reply.error for reply in client.answers(len(spans)).values())
    assert sorted(asked(tmp_path / "c")) == sorted((READ, *span) for span in spans)
