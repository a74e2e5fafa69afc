"""`cowslice convert` writes the bytes that `qemu-img convert` writes, and leaves nothing half done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice
from cowslice.testing.damage import make_worn_image

pytestmark = peers.needs("qemu-img", "qemu-io")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "9M")
    peers.qemu_io(path, "write -P 1 100k 3M", "write -P 0 1M 1M", "write -z 5M 64k", "write -c -P 7 6M 64k")
    return path


def _expected(path: Path, *options: str) -> bytes:
    target = path.with_suffix(".expected")
    peers.qemu_img("convert", *options, "-O", "raw", path, target)
    return target.read_bytes()


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cowslice.cli.main", *map(str, arguments)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("workers", [1, 4])
def test_the_bytes_are_those_of_qemu(tmp_path: Path, seed: int, workers: int) -> None:
    path = tmp_path / "disk.qcow2"
    make_worn_image(path, random.Random(seed))
    assert cowslice("convert", "-m", workers, path, tmp_path / "disk.raw").status == 0
    assert (tmp_path / "disk.raw").read_bytes() == _expected(path)


@pytest.mark.parametrize("sparse", ["0", "4k", "512", "1M"])
def test_zeros_become_holes_as_asked(disk: Path, sparse: str) -> None:
    target = disk.with_suffix(".raw")
    assert cowslice("convert", "-S", sparse, disk, target).status == 0
    assert target.read_bytes() == _expected(disk)
    taken = target.stat().st_blocks * 512
    assert taken >= 9 << 20 if sparse == "0" else taken < 6 << 20


def test_standard_output_gets_the_whole_disk(disk: Path) -> None:
    done = subprocess.run(_command("convert", disk, "-"), capture_output=True, check=True)
    assert done.stdout == _expected(disk)


def test_several_sources_follow_each_other(disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    peers.qemu_img("create", "-f", "qcow2", other, "1M")
    peers.qemu_io(other, "write -P 9 512k 512k")
    assert cowslice("convert", disk, other, tmp_path / "both.raw").status == 0
    assert (tmp_path / "both.raw").read_bytes() == _expected(disk) + _expected(other)


def test_a_snapshot_is_copied_as_it_was(disk: Path) -> None:
    before = _expected(disk)
    peers.qemu_img("snapshot", "-c", "before", disk)
    peers.qemu_io(disk, "write -P 77 0 9M")
    for name in ("before", "1", "snapshot.name=before"):
        assert cowslice("convert", "-l", name, disk, disk.with_suffix(".raw")).status == 0
        assert disk.with_suffix(".raw").read_bytes() == before


def test_an_existing_target_is_overwritten_in_place(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "there.raw"
    target.write_bytes(b"\xff" * (10 << 20))
    inode = target.stat().st_ino
    assert cowslice("convert", "-n", disk, target).status == 0
    assert target.stat().st_ino == inode
    assert target.read_bytes() == _expected(disk) + b"\xff" * (1 << 20)


def test_a_target_that_is_too_small_is_refused(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(512))
    assert cowslice("convert", "-n", disk, tmp_path / "small").status == 1


def test_a_source_is_never_its_own_target(disk: Path) -> None:
    before = disk.read_bytes()
    assert cowslice("convert", disk, disk).status == 64
    assert disk.read_bytes() == before


def test_another_format_is_refused_with_a_sentence(disk: Path, tmp_path: Path) -> None:
    said = cowslice("convert", "-O", "vmdk", disk, tmp_path / "copy.vmdk")
    assert said.status == 64
    assert "-O is 'vmdk'" in said.err
    assert not (tmp_path / "copy.vmdk").exists()


def test_a_failed_copy_leaves_nothing_behind(disk: Path, tmp_path: Path) -> None:
    _break_compressed_cluster(disk)
    old = tmp_path / "old.raw"
    old.write_bytes(b"precious")
    names = set(os.listdir(tmp_path))
    for target in (tmp_path / "new.raw", old):
        said = cowslice("convert", disk, target)
        assert said.status == 1
        assert said.err.startswith("cowslice: ")
    assert set(os.listdir(tmp_path)) == names
    assert old.read_bytes() == b"precious"


def test_salvage_copies_what_can_be_read(disk: Path) -> None:
    expected = bytearray(_expected(disk))
    expected[6 << 20 : (6 << 20) + 65536] = bytes(65536)
    _break_compressed_cluster(disk)
    said = cowslice("convert", "--salvage", disk, disk.with_suffix(".raw"))
    assert said.status == 0
    assert "became zeros" in said.err
    assert disk.with_suffix(".raw").read_bytes() == expected


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, status: int) -> None:
    source = tmp_path / "disk.raw"
    with source.open("wb") as file:
        file.truncate(6 << 30)
    target = tmp_path / "out"
    target.mkdir()
    running = subprocess.Popen(_command("convert", "-f", "raw", "-S", "0", source, target / "disk.raw"))
    try:
        deadline = time.monotonic() + 30
        while not any(target.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(number)
        assert running.wait(timeout=60) == status
    finally:
        running.kill()
        running.wait()
    assert list(target.iterdir()) == []


def test_a_closed_pipe_is_quiet(disk: Path) -> None:
    running = subprocess.Popen(_command("convert", disk, "-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == b""
    running.stderr.close()
    assert running.wait(timeout=60) == 141


def _break_compressed_cluster(disk: Path) -> None:
    """Overwrite the stream of the compressed cluster with what no decoder takes."""
    word = next(extent for extent in cowslice("map", "--output=json", disk).json if extent["compressed"])
    data = bytearray(disk.read_bytes())
    l2 = int.from_bytes(data[3 * 65536 : 3 * 65536 + 8], "big") & 0x00FFFFFFFFFFFE00
    entry = l2 + word["start"] // 65536 * 8
    at = int.from_bytes(data[entry : entry + 8], "big") & ((1 << 54) - 1)
    data[at : at + 16] = b"\xff" * 16
    disk.write_bytes(data)
