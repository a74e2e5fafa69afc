"""Reads replayed by QEMU: how many, how long, and how often its map was read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cowslice.errors import StorageError
from cowslice.ops.layout import write_populated_image
from cowslice.testing.peers import needs, qemu_img
from cowslice.tune import qemuio
from cowslice.units import GiB, KiB, MiB

pytestmark = needs("qemu-io", "qemu-img")


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


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("encrypted") / "disk.qcow2")
    qemu_img("create", "--object", "secret,id=key,data=sesame", "-f", "qcow2", "-o",
             "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", path, "64M")
    return path


def test_an_encrypted_image_is_read_and_its_passphrase_stands_on_no_command_line(
    encrypted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, told = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **more: told.extend(words) or began(words, **more))
    found = qemuio.replay(target(encrypted, MiB), [(0, 4096)], depth=1, key=qemuio.Key("luks", b"sesame"))
    assert found.requests == 1
    assert "qemu-io" in told
    assert not [word for word in told if "sesame" in word]


def test_a_wrong_passphrase_is_told(encrypted: str) -> None:
    with pytest.raises(StorageError, match="Invalid password, cannot unlock"):
        qemuio.replay(target(encrypted, MiB), [(0, 4096)], depth=1, key=qemuio.Key("luks", b"please"))


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(StorageError, match="qemu-io could not read"):
        qemuio.replay(target("/nowhere/at/all", MiB), [(0, 512)], depth=1)


def test_without_the_program_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert qemuio.version() == ""
    with pytest.raises(StorageError, match="cannot run 'qemu-io'"):
        qemuio.replay(qemuio.null_target(GiB), [(0, 512)], depth=1)
