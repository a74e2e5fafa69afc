"""`cowslice snapshot` and `cowslice resize` do what qemu-img does with the same words."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M")
    peers.run("qemu-io", "-c", "write -P 1 0 100k", str(path))
    return path


def size_of(path: Path) -> int:
    return int(peers.qemu_img_json("info", path)["virtual-size"])


def test_a_snapshot_is_taken_listed_applied_and_deleted(disk: Path) -> None:
    assert (said := cowslice("snapshot", "-c", "one", disk)).status == 0, said.err
    assert said.out == ""
    peers.run("qemu-io", "-c", "write -P 2 0 100k", str(disk))
    expected = peers.qemu_img_json("info", disk)["snapshots"]
    assert cowslice("snapshot", "-l", "--output=json", disk).json == expected
    assert cowslice("snapshot", "-l", "--json", disk).json == expected
    assert cowslice("snapshot", "-a", "one", disk).status == 0
    peers.run("qemu-io", "-c", "read -P 1 0 100k", str(disk))
    assert cowslice("snapshot", "-d", "one", disk).status == 0
    assert "snapshots" not in peers.qemu_img_json("info", disk)
    peers.run("qemu-img", "check", str(disk))


def test_snapshots_are_listed_for_people(disk: Path) -> None:
    assert cowslice("snapshot", disk).out == ""
    peers.run("qemu-img", "snapshot", "-c", "one", str(disk))
    assert "one" in cowslice("snapshot", disk).out
    assert cowslice("snapshot", "-q", "-l", disk).out == ""


def test_an_unknown_snapshot_ends_with_a_complaint(disk: Path) -> None:
    said = cowslice("snapshot", "-d", "nothing", disk)
    assert said.status != 0
    assert "'nothing'" in said.err


@pytest.mark.parametrize("words", ["-l -c x", "-a x -d y", "--json -c x", "-U -d x"])
def test_words_that_contradict_each_other_are_refused(words: str, disk: Path) -> None:
    assert cowslice("snapshot", *words.split(), disk).status == 64


@pytest.mark.parametrize("flag,wanted,size", [
    ("-q", "2M", 2 << 20), ("--shrink", "-512K", 512 << 10), ("--preallocation=full", "+513", (1 << 20) + 1024)])
def test_the_disk_has_the_size_that_was_asked(flag: str, wanted: str, size: int, disk: Path) -> None:
    said = cowslice("resize", flag, "--", disk, wanted)
    assert (said.status, said.out) == (0, "" if flag == "-q" else "Image resized.\n")
    assert size_of(disk) == size
    peers.run("qemu-img", "check", str(disk))


def test_a_smaller_disk_needs_the_flag(disk: Path) -> None:
    said = cowslice("resize", disk, "512k")
    assert said.status == 1
    assert "--shrink" in said.err
    assert size_of(disk) == 1 << 20


def test_a_size_below_nothing_is_refused(disk: Path) -> None:
    assert cowslice("resize", "--shrink", "--", disk, "-2M").status == 64
    assert size_of(disk) == 1 << 20
