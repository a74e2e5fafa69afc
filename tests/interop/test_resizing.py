"""Disks that grow and shrink between writes and snapshots: QEMU finds nothing wrong and reads the same bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowslice
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice as cowslice_command
from cowslice.units import SECTOR, KiB, MiB

pytestmark = peers.needs("qemu-img", "qemu-io")

GRID = [
    "cluster_size=512",
    "cluster_size=4096,refcount_bits=64",
    "cluster_size=65536",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=4096,lazy_refcounts=on",
    "cluster_size=4096,compat=0.10",
]  # fmt: skip


def make(path: Path, options: str, size: int, *extra: str) -> Path:
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *extra, str(path), str(size))
    return path


def content_of(path: Path) -> bytes:
    """The disk as QEMU reads it, after it has found nothing wrong."""
    peers.run("qemu-img", "check", str(path))
    raw = path.with_suffix(".raw")
    peers.run("qemu-img", "convert", "-O", "raw", str(path), str(raw))
    return raw.read_bytes()


def any_size(chooser: random.Random, now: int) -> int:
    """Near the size there is, around a cluster's end, or far from it."""
    wanted = chooser.choice((now + 512, now - 512, now // 2, now * 2, chooser.randrange(2 * MiB), 64 * KiB))
    return min(max(wanted, 0), 4 * MiB) // SECTOR * SECTOR


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("options", GRID)
def test_qemu_reads_what_grew_and_shrank_at_random(options: str, seed: int, tmp_path: Path) -> None:
    chooser, path = random.Random(seed), make(tmp_path / "disk", options, 1 * MiB)
    model = bytearray(MiB)
    held: dict[str, bytes] = {}
    disk = cowslice.open(path, "r+")
    for number in range(60):
        act = chooser.choice("wwwwrrrso" if "0.10" not in options else "wwwwrrro")
        if act == "w" and model:
            data = chooser.randbytes(chooser.choice((1, 3000, 70_000)))
            offset = chooser.randrange(len(model))
            data = data[: len(model) - offset]
            disk.write(offset, data)
            model[offset : offset + len(data)] = data
        elif act == "r":
            size = any_size(chooser, len(model))
            grows = size > len(model)
            disk.resize(size, shrink=True,
                        preallocation=chooser.choice(("off", "off", "metadata", "falloc")) if grows else "off")
            model = model[:size] + bytearray(max(size - len(model), 0))
        elif act == "s" and len(held) < 4:
            disk.snapshot(f"s{number}")
            held[f"s{number}"] = bytes(model)
        elif act == "s":
            name = chooser.choice(list(held))
            disk.apply_snapshot(name)
            model = bytearray(held[name])
            disk.delete_snapshot(name)
            del held[name]
        elif act == "o":
            disk.close()
            disk = cowslice.open(path, "r+")
        assert disk.size == len(model)
        assert disk.read(0, disk.size) == model
    disk.close()
    assert content_of(path) == model
    for name, content in held.items():
        with cowslice.open(path, snapshot=name) as shot:
            assert shot.read(0, shot.size) == content


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("options", ["cluster_size=4096", "cluster_size=65536,extended_l2=on",
                                     "cluster_size=65536,data_file={}/data",
                                     "cluster_size=65536,data_file={}/data,data_file_raw=on"])
def test_what_a_disk_grows_by_reads_as_zeros(options: str, preallocation: str, tmp_path: Path) -> None:
    path = make(tmp_path / "disk", options.format(tmp_path), MiB)
    with cowslice.open(path, "r+") as disk:
        disk.write(0, b"a" * MiB)
        disk.resize(3 * MiB + 512, preallocation=preallocation)
        assert disk.read(MiB, 2 * MiB + 512) == bytes(2 * MiB + 512)
        disk.write(2 * MiB, b"b" * 512)
    assert content_of(path) == b"a" * MiB + bytes(MiB) + b"b" * 512 + bytes(MiB)
    if preallocation != "off":
        assert all(part.present for part in cowslice.open(path).extents())


def test_a_longer_backing_file_does_not_come_to_light(tmp_path: Path) -> None:
    (tmp_path / "below").write_bytes(b"x" * 2 * MiB)
    path = make(tmp_path / "disk", "cluster_size=4096", MiB, "-b", str(tmp_path / "below"), "-F", "raw")
    with cowslice.open(path, "r+") as disk:
        disk.resize(3 * MiB)
    assert content_of(path) == b"x" * MiB + bytes(2 * MiB)


def test_what_was_cut_off_does_not_come_back(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "cluster_size=65536", MiB)
    with cowslice.open(path, "r+") as disk:
        disk.write(0, b"x" * MiB)
        disk.resize(100_352, shrink=True)
    peers.run("qemu-img", "resize", "-q", str(path), "1M")
    assert content_of(path) == b"x" * 100_352 + bytes(MiB - 100_352)


def test_a_file_really_shrinks(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "preallocation=metadata", 5 << 30)
    with cowslice.open(path, "r+") as disk:
        disk.resize(64 * MiB, shrink=True)
    assert path.stat().st_size < 66 * MiB
    peers.run("qemu-img", "check", str(path))


def test_less_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    with cowslice.open(make(tmp_path / "disk", "cluster_size=4096", MiB), "r+") as disk:
        with pytest.raises(cowslice.RequestError, match="would be lost"):
            disk.resize(MiB // 2)
        assert disk.size == MiB


@pytest.mark.parametrize("size", [-512, 513, 1 << 62])
def test_an_impossible_size_is_refused(size: int, tmp_path: Path) -> None:
    with (cowslice.open(make(tmp_path / "disk", "cluster_size=4096", MiB), "r+") as disk,
          pytest.raises(cowslice.BadOption, match=str(size))):
        disk.resize(size, shrink=True)


def test_a_version_2_image_with_snapshots_keeps_its_size(tmp_path: Path) -> None:
    with cowslice.open(make(tmp_path / "disk", "compat=0.10", MiB), "r+") as disk:
        disk.snapshot("one")
        with pytest.raises(cowslice.UnsupportedImage, match="version 2"):
            disk.resize(2 * MiB)


@pytest.mark.parametrize("words", [
    ["--preallocation=full", "512k"], ["--shrink", "--preallocation=metadata", "512k"], ["512k"], ["--", "-512k"],
    ["--shrink", "--", "-2M"], ["--shrink", "512k"], ["--shrink", "--", "-512k"], ["+0"], ["1M"], ["+512"],
    ["--preallocation=metadata", "+1M"], ["--preallocation=falloc", "+1M"], ["--preallocation=full", "+1M"],
    ["--preallocation=none", "+1M"], [],
], ids=" ".join)  # fmt: skip
@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_the_command_refuses_and_does_what_qemus_does(words: list[str], kind: str, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        peers.run("qemu-img", "create", "-q", "-f", kind, path, str(MiB))
        peers.qemu_io(path, f"write -P 7 0 {MiB}", image_format=kind)
    place = next((n for n, word in enumerate(words) if not word.startswith("--p") and word != "--shrink"), len(words))
    said = cowslice_command("resize", "-f", kind, *words[:place], ours, *words[place:])
    expected = peers.run("qemu-img", "resize", "-f", kind, *words[:place], theirs, *words[place:], expect=None)
    assert (said.status == 0) == (expected.returncode == 0), said.err
    mine, other = (peers.run("qemu-img", "info", "-f", kind, path).stdout for path in (ours, theirs))
    assert [line for line in mine.splitlines() if b"virtual size" in line] == [
        line for line in other.splitlines() if b"virtual size" in line]
    peers.run("qemu-img", "compare", "-f", kind, "-F", kind, ours, theirs)
    assert ours.stat().st_size <= theirs.stat().st_size


@pytest.mark.parametrize("options", ["", "compat=0.10"])
def test_snapshots_of_other_sizes_stay_what_they_were(options: str, tmp_path: Path) -> None:
    ours, theirs = (make(tmp_path / name, options or "cluster_size=64k", MiB) for name in ("ours", "theirs"))
    for path in (ours, theirs):
        peers.qemu_io(path, f"write -P 7 0 {MiB}")
        peers.run("qemu-img", "snapshot", "-c", "before", path)
    for size in ("512k", "3M"):
        said = cowslice_command("resize", "--shrink", ours, size)
        expected = peers.run("qemu-img", "resize", "-q", "--shrink", theirs, size, expect=None)
        assert said.status == expected.returncode == (1 if options else 0)
    peers.run("qemu-img", "compare", ours, theirs)
    peers.run("qemu-img", "check", ours)
    with cowslice.open(ours, snapshot="before") as disk:
        assert disk.read(0, MiB) == b"\7" * MiB
    peers.run("qemu-img", "snapshot", "-a", "before", ours)
    assert content_of(ours) == b"\7" * MiB


def test_a_bitmap_that_cannot_be_used_keeps_the_size_as_with_qemu(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "cluster_size=64k", MiB)
    peers.run("qemu-img", "bitmap", "--add", path, "day")
    with cowslice.open(path) as disk:
        assert disk.first_cluster is not None
        assert disk.first_cluster.bitmaps is not None
        at = disk.first_cluster.bitmaps.directory_offset
    with path.open("r+b") as file:  # a writer did not finish it
        file.seek(at + 15)
        file.write(b"\3")
    before = path.read_bytes()
    for words in (["2M"], ["--shrink", "512k"]):
        said = cowslice_command("resize", *words[:-1], path, words[-1])
        assert said.status == 1
        assert "bitmap 'day' cannot be used" in said.err
        peers.run("qemu-img", "resize", *words[:-1], path, words[-1], expect=1)
    assert path.read_bytes() == before
    assert cowslice_command("bitmap", "--remove", path, "day").status == 0
    assert cowslice_command("resize", path, "2M").status == 0
    assert content_of(path) == bytes(2 * MiB)


def test_a_file_is_no_longer_than_qemu_leaves_it(tmp_path: Path) -> None:
    ours, theirs = (make(tmp_path / name, "cluster_size=4k", 256 * MiB) for name in ("ours", "theirs"))
    for path in (ours, theirs):
        peers.qemu_io(path, "write 0 1M", "write 200M 16M")
    assert cowslice_command("resize", "--shrink", ours, "64M").status == 0
    peers.run("qemu-img", "resize", "-q", "--shrink", theirs, "64M")
    assert ours.stat().st_size <= min(theirs.stat().st_size, 3 * MiB)
    peers.run("qemu-img", "compare", ours, theirs)
    peers.run("qemu-img", "check", ours)


def test_a_raw_file_grows_and_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"a" * MiB)
    with cowslice.open(path, "r+", format="raw") as disk:
        disk.resize(2 * MiB, preallocation="full")
        disk.write(2 * MiB - 1, b"z")
        assert disk.read(MiB - 1, 2) == b"a\0"
        disk.resize(512, shrink=True)
    assert path.read_bytes() == b"a" * 512
