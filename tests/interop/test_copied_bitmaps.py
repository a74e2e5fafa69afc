"""`convert --bitmaps` and `measure` treat persistent bitmaps as qemu-img does."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import cowslice as library
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")

MiB = 1 << 20
SIZE = 9 * MiB + 512


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A disk with an enabled bitmap, a disabled one, one that marks nothing and one that marks everything."""
    path = tmp_path / "source"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, SIZE)
    for words in (["-g", "512", "fine"], ["-g", "4k", "all"], ["-g", "2M", "coarse"]):
        peers.qemu_img("bitmap", "--add", *words[:2], path, words[2])
    peers.qemu_io(path, "write 1M 64k", "write 0 512", f"write {SIZE - 512} 512")
    peers.qemu_img("bitmap", "--disable", path, "coarse")
    peers.qemu_img("bitmap", "--disable", path, "fine")
    peers.qemu_io(path, f"write -z 0 {SIZE}", "write 3M 1M")
    peers.qemu_img("bitmap", "--add", path, "none")
    return path


def killed(path: Path) -> Path:
    """Let a server be killed while the image is open, so that its bitmaps stay in use."""
    socket = path.with_suffix(".sock")
    with subprocess.Popen(["qemu-nbd", "-f", "qcow2", "--persistent", f"--socket={socket}", str(path)]) as server:
        while not socket.exists():
            pass
        peers.run("nbdinfo", "--size", f"nbd+unix:///?socket={socket}")  # answered when the image is open
        server.kill()
    return path


def listed(path: Path) -> list[dict[str, Any]]:
    return peers.qemu_img_json("info", path)["format-specific"]["data"].get("bitmaps", [])  # type: ignore[no-any-return]


def marked(path: Path, name: str) -> list[tuple[int, int]]:
    """What a bitmap marks as QEMU serves it."""
    with peers.qemu_nbd(path, "-r", "-B", name) as uri:
        found = peers.nbdinfo_json(uri, f"--map=qemu:dirty-bitmap:{name}")
    return [(one["offset"], one["length"]) for one in found if one["type"] == 1]


def hold_equal(ours: Path, theirs: Path) -> None:
    assert listed(ours) == listed(theirs)
    for bitmap in listed(ours):
        assert marked(ours, bitmap["name"]) == marked(theirs, bitmap["name"])
    assert "No errors" in peers.qemu_img("check", ours)
    peers.qemu_img("compare", ours, theirs)


@pytest.mark.parametrize("options", [
    [], ["-c"], ["-o", "cluster_size=512"], ["-o", "cluster_size=2M,extended_l2=on"], ["-o", "preallocation=metadata"],
], ids=" ".join)
def test_a_new_image_has_the_bitmaps_that_qemu_gives_it(source: Path, options: list[str], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    said = cowslice("convert", "--bitmaps", "-O", "qcow2", *options, source, ours)
    assert said.status == 0, said.err
    peers.qemu_img("convert", "--bitmaps", "-O", "qcow2", *options, source, theirs)
    hold_equal(ours, theirs)
    with library.open(ours, "r+") as disk:  # they are kept
        disk.write(8 * MiB, b"x")
        assert list(disk.dirty_extents("none")) == [(8 * MiB, 4096)]
    assert "No errors" in peers.qemu_img("check", ours)


@pytest.mark.parametrize("compress", [[], ["-c"]], ids=["plain", "compressed"])
def test_an_image_that_is_there_gets_the_bitmaps(source: Path, compress: list[str], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        peers.qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    assert cowslice("convert", "--bitmaps", "-n", *compress, "-O", "qcow2", source, ours).status == 0
    peers.qemu_img("convert", "--bitmaps", "-n", *compress, "-O", "qcow2", source, theirs)
    hold_equal(ours, theirs)


def test_a_target_that_cannot_take_them_is_refused_before_anything_is_copied(source: Path, tmp_path: Path) -> None:
    taken, larger, old, raw = (tmp_path / name for name in ("taken", "larger", "old", "raw"))
    peers.qemu_img("create", "-q", "-f", "qcow2", taken, SIZE)
    peers.qemu_img("bitmap", "--add", taken, "coarse")
    peers.qemu_img("create", "-q", "-f", "qcow2", larger, 2 * SIZE)
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", old, SIZE)
    for target, why in ((taken, "has a bitmap 'coarse' already"), (larger, "expected the"), (old, "version 2")):
        before = target.read_bytes()
        said = cowslice("convert", "--bitmaps", "-n", "-O", "qcow2", source, target)
        assert said.status in (1, 64)
        assert why in said.err
        assert target.read_bytes() == before
        peers.qemu_img("convert", "--bitmaps", "-n", "-O", "qcow2", source, target, expect=1)
    for words, why in ((["-O", "raw", source, raw], "for qcow2 targets"),
                       (["-O", "qcow2", "-o", "compat=0.10", source, raw], "version 3"),
                       (["-O", "qcow2", source, source, raw], "several sources"),
                       (["-f", "raw", "-O", "qcow2", source, raw], "raw or of version 2"),
                       (["-O", "qcow2", old, raw], "raw or of version 2")):
        said = cowslice("convert", "--bitmaps", *words)
        assert said.status != 0
        assert why in said.err
        assert not raw.exists()
    assert cowslice("convert", "--skip-broken-bitmaps", "-O", "qcow2", source, raw).status != 0


def test_broken_bitmaps_stop_a_copy_or_are_skipped_with_a_warning(source: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    killed(source)
    peers.qemu_img("bitmap", "--remove", source, "none")
    peers.qemu_img("bitmap", "--add", "--disable", source, "none")
    said = cowslice("convert", "--bitmaps", "-O", "qcow2", source, ours)
    assert said.status == 1
    assert "--skip-broken-bitmaps" in said.err
    assert not ours.exists()
    said = cowslice("convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", source, ours)
    assert said.status == 0
    assert "bitmap 'fine' cannot be used and is not copied" in said.err
    peers.run("qemu-img", "convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", source, theirs)
    hold_equal(ours, theirs)
    assert [one["name"] for one in listed(ours)] == ["none"]


@pytest.mark.parametrize("target", [[], ["-o", "cluster_size=512"], ["-o", "compat=0.10"]], ids=" ".join)
def test_bitmaps_measure_and_are_told_as_by_qemu(source: Path, target: list[str], tmp_path: Path) -> None:
    for state in (lambda path: path, killed):
        state(source)
        for words in (["measure", "-O", "qcow2", *target], ["info"]):
            said = cowslice(*words[:1], "--output=json", *words[1:], source)
            theirs = peers.qemu_img_json(*words, source)
            ours = said.json
            ours.pop("cowslice", None)
            assert ours == theirs
