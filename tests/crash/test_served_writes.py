"""What a client was told to be stable is there after any loss of power; what it was not told so may be lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowslice
from cowslice.nbd.wire import Command, CommandFlag, ExportFlag
from cowslice.serve.exports import Export
from cowslice.serve.listeners import listen_unix
from cowslice.serve.server import Server
from cowslice.testing.crash import crash_states
from cowslice.testing.crashfile import CrashFiles
from tests.unit.serve.rawclient import WAYS, RawClient, connect, wired

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


@pytest.mark.parametrize("way", WAYS)
def test_a_flush_on_one_connection_makes_stable_what_another_one_was_answered(tmp_path: Path, way: str) -> None:
    cowslice.create(tmp_path / "a", size=16 * K)
    crash, place = CrashFiles(tmp_path / "a"), tmp_path / "socket"
    with crash, cowslice.open(tmp_path / "a", "r+") as disk:
        export = Export(disk, writable=True)
        with Server([export], [listen_unix(place)], compiled=way == "compiled"), \
                connected(place) as writing, connected(place) as flushing:
            assert writing.session.flags & ExportFlag.CAN_MULTI_CONN
            for number, (offset, length, byte) in enumerate(WRITES):
                asked = writing.ask(Command.WRITE, offset, length, payload=byte * length)
                assert writing.collect(asked).error == 0
                assert flushing.collect(flushing.ask(Command.FLUSH)).error == 0
                crash.mark(str(number))
            states = list(crash_states(crash.record, limit=32))  # both are still there: nobody flushed by leaving
    marks = 0
    for state in states:
        marks = max(marks, len(state.marks))
        with cowslice.open(state.storage("a")) as disk:
            assert not is_lost(disk, len(state.marks))
    assert marks == len(WRITES)


@contextmanager
def connected(place: Path) -> Iterator[RawClient]:
    client = connect(str(place))
    with client.socket:
        yield client


def is_lost(disk: cowslice.Image, answered: int) -> bool:
    """Whether some byte is neither what the last of the answered writes put there nor what a later one would."""
    found = disk.read(0, disk.size)
    expected = bytearray(disk.size)
    for offset, length, byte in WRITES[:answered]:
        expected[offset : offset + length] = byte * length
    for offset, length, _ in WRITES[answered:]:
        expected[offset : offset + length] = found[offset : offset + length]
    return found != expected
