"""Many reads and writes under way at once, from a client that waits for none of them: each finds what it must."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import CowsliceError
from cowslice.nbd.wire import Command, CommandFlag, Mode, NbdError
from cowslice.serve.transmission import Limits
from tests.unit.serve.rawclient import WAYS, RawClient, wired

KiB = 1 << 10
SLOT = 256 * KiB  # of one request: what is under way at once never meets
SIZE = 24 * SLOT
ROUNDS = 12
LUKS = {"encryption": "luks", "iter_time": 1}


def populated(path: Path, chance: random.Random, secret: bytes | None) -> bytearray:
    """Half of the disk is there, and a snapshot keeps it; returns the content."""
    content = bytearray(SIZE)
    cowslice.create(path, size=SIZE, secret=secret, **(LUKS if secret else {}))  # type: ignore[arg-type]
    with cowslice.open(path, "r+", secret=secret) as disk:
        for start in range(0, SIZE, 2 * SLOT):
            content[start : start + SLOT] = chance.randbytes(SLOT)
            disk.write(start, content[start : start + SLOT])
        disk.snapshot("kept")
    return content


def opened(path: Path, *, direct: bool, secret: bytes | None) -> cowslice.Image:
    try:
        return cowslice.open(path, "r+", direct=direct, secret=secret)
    except CowsliceError as fault:
        pytest.skip(f"no direct access here: {fault}")


def converse(client: RawClient, content: bytearray, chance: random.Random) -> None:
    """Ask about every third slot at once; `content` becomes what the disk has then."""
    said, expected = b"", {}
    for start in range(chance.randrange(3) * SLOT, SIZE, 3 * SLOT):
        offset = start + chance.choice((0, 64 * KiB, chance.randrange(SLOT - 1)))
        end = min(offset + chance.choice((1, 512, 4096, 5000, 70_000, SLOT)), start + SLOT)
        length, kind = end - offset, chance.choice(("read", "write", "write", "fua", "zero", "beyond"))
        error, data = 0, b""
        if kind == "read":
            said += client.request(Command.READ, offset, length)
            data = bytes(content[offset:end])
        elif kind == "zero":
            said += client.request(Command.WRITE_ZEROES, offset, length)
            content[offset:end] = bytes(length)
        elif kind == "beyond":
            said += client.request(Command.WRITE, SIZE - 5, 100_000, payload=bytes(100_000))
            error = NbdError.ENOSPC
        else:
            content[offset:end] = chance.randbytes(length)
            said += client.request(Command.WRITE, offset, length, flags=CommandFlag.FUA if kind == "fua" else 0,
                                   payload=bytes(content[offset:end]))
        expected[client._cookie] = error, data
    sending = threading.Thread(target=client.socket.sendall, args=(said,))
    sending.start()
    replies = client.answers(len(expected))
    sending.join()
    assert {cookie: (reply.error, reply.data) for cookie, reply in replies.items()} == expected


@pytest.mark.parametrize("mode, direct, secret, limits", [
    (Mode.SIMPLE, False, None, Limits()),
    (Mode.STRUCTURED, True, None, Limits(most_requests=3)),
    (Mode.EXTENDED, True, None, Limits()),
    (Mode.STRUCTURED, False, None, Limits(most_bytes=64 * KiB)),
    (Mode.STRUCTURED, False, b"secret", Limits()),
])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_under_way_at_once_is_done_right(
    tmp_path: Path, way: str, mode: Mode, direct: bool, secret: bytes | None, limits: Limits
) -> None:
    chance = random.Random(7)
    content = populated(tmp_path / "a", chance, secret)
    with (opened(tmp_path / "a", direct=direct, secret=secret) as disk,
          wired(disk, way=way, writable=True, limits=limits) as wire):
        client = wire.client(mode=mode)
        for _ in range(ROUNDS):
            converse(client, content, chance)
    with cowslice.open(tmp_path / "a", secret=secret) as disk:
        assert disk.read(0, SIZE) == content
