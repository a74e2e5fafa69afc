"""What a client was told to be stable is there after any loss of power; what it was not told so may be lost."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowslice
from cowslice.nbd.wire import Command, CommandFlag
from cowslice.testing.crash import crash_states
from cowslice.testing.crashfile import CrashFiles
from tests.unit.serve.rawclient import WAYS, wired

K = 1 << 16
# New clusters, the same ones again, and one that reaches into the next.
WRITES = ((0, 512, b"a"), (512, 512, b"b"), (0, 512, b"c"), (5 * K - 700, 1500, b"d"), (9 * K, K, b"e"))


@pytest.mark.parametrize("flags, writethrough, safe", [
    (CommandFlag.FUA, False, True), (0, True, True), (0, False, False),
])
@pytest.mark.parametrize("way", WAYS)
def test_a_write_is_stable_when_it_is_answered_if_the_client_or_the_export_wants_it_so(
    tmp_path: Path, way: str, flags: int, writethrough: bool, safe: bool
) -> None:
    cowslice.create(tmp_path / "a", size=16 * K)
    crash = CrashFiles(tmp_path / "a")
    with crash, cowslice.open(tmp_path / "a", "r+") as disk, wired(
        disk, way=way, writable=True, writethrough=writethrough
    ) as wire:
        client = wire.client()
        for number, (offset, length, byte) in enumerate(WRITES):
            asked = client.ask(Command.WRITE, offset, length, flags=flags, payload=byte * length)
            assert client.collect(asked).error == 0
            crash.mark(str(number))
    losses = 0
    for state in crash_states(crash.record, limit=32):
        with cowslice.open(state.storage("a")) as disk:
            losses += is_lost(disk, len(state.marks))
    assert (losses == 0) == safe


def is_lost(disk: cowslice.Image, answered: int) -> bool:
    """Whether some byte is neither what the last of the answered writes put there nor what a later one would."""
    found = disk.read(0, disk.size)
    expected = bytearray(disk.size)
    for offset, length, byte in WRITES[:answered]:
        expected[offset : offset + length] = byte * length
    for offset, length, _ in WRITES[answered:]:
        expected[offset : offset + length] = found[offset : offset + length]
    return found != expected
