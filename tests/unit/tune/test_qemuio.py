"""Reads replayed by QEMU: how many, how long, and how often its map was read."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowslice.errors import StorageError
from cowslice.ops.layout import write_populated_image
from cowslice.testing.peers import needs
from cowslice.tune import qemuio
from cowslice.units import GiB, KiB, MiB

pytestmark = needs("qemu-io")


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "a disk, with a comma.qcow2"
    write_populated_image(path, size=GiB)
    return str(path)


def target(image: str, cache_bytes: int) -> str:
    return qemuio.qcow2_target(image, cache_bytes=cache_bytes, entry_bytes=4 * KiB, direct=False)


@pytest.mark.parametrize("depth", [1, 8])
def test_each_slice_that_was_not_there_is_one_miss(image: str, depth: int) -> None:
    spans = [(number % 32 * 32 * MiB, 4096) for number in range(64)]
    found = qemuio.replay(target(image, 32 * 4 * KiB), spans, depth=depth, count=True)
    assert (found.requests, found.misses) == (64, 32)
    assert found.rate > 0


def test_a_cache_of_two_entries_cannot_hold_three(image: str) -> None:
    spans = [(number % 3 * 32 * MiB, 4096) for number in range(60)]
    assert qemuio.replay(target(image, 1), spans, depth=1, count=True).misses == 60


def test_misses_are_counted_only_when_that_is_asked(image: str) -> None:
    assert qemuio.replay(target(image, MiB), [(0, 4096)], depth=1).misses is None


def test_a_read_that_cannot_be_is_told(image: str) -> None:
    with pytest.raises(StorageError, match="qemu-io could not read"):
        qemuio.replay(target(image, MiB), [(2 * GiB, 4096)], depth=1)


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(StorageError, match="qemu-io could not read"):
        qemuio.replay(target("/nowhere/at/all", MiB), [(0, 512)], depth=1)


def test_without_the_program_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert qemuio.version() == ""
    with pytest.raises(StorageError, match="cannot run 'qemu-io'"):
        qemuio.replay(qemuio.null_target(GiB), [(0, 512)], depth=1)
