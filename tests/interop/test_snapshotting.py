"""Snapshots taken, applied and deleted between random writes: QEMU finds nothing wrong and reads every one of them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cowslice
from cowslice.format.limits import MAX_SNAPSHOTS
from cowslice.image import snapshotting
from cowslice.image.refcounts import RefcountOverflow
from cowslice.testing import peers, steps
from cowslice.testing.modeldisk import ModelDisk
from cowslice.testing.twin import Shape, Twin, judge, make_files

pytestmark = peers.needs("qemu-img", "qemu-io")

SHAPES = [
    Shape(512),
    Shape(4096, refcount_bits=2),
    Shape(65536, compression="zstd"),
    Shape(16384, extended_l2=True, backing="raw"),
    Shape(1024, version=2),
    Shape(4096, backing="qcow2", refcount_bits=64, lazy=True),
]  # fmt: skip


class Shots:
    """The snapshots that there should be, by name, and what each holds."""

    def __init__(self, most: int) -> None:
        self.held: dict[str, bytes] = {}
        self.most = most
        self.taken = 0

    def take(self, twin: Twin, chooser: random.Random) -> None:
        if len(self.held) < self.most:
            self.taken += 1
            name = f"shot{self.taken}"
            with contextlib.suppress(RefcountOverflow):  # of two bits: then nothing has changed
                assert twin.disk.snapshot(name).name == name.encode()
                self.held[name] = bytes(twin.model.content)

    def apply(self, twin: Twin, chooser: random.Random) -> None:
        if self.held:
            name = chooser.choice(list(self.held))
            with contextlib.suppress(RefcountOverflow):
                twin.disk.apply_snapshot(name)
                twin.model.write(0, self.held[name])

    def delete(self, twin: Twin, chooser: random.Random) -> None:
        if self.held:
            name = chooser.choice(list(self.held))
            twin.disk.delete_snapshot(name)
            del self.held[name]
            assert [one.name.decode() for one in twin.disk.snapshots] == list(self.held)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qemu_reads_every_snapshot_of_a_random_run(shape: Shape, seed: int, tmp_path: Path) -> None:
    files, chooser = make_files(shape, tmp_path), random.Random(seed)
    shots = Shots(2 if shape.refcount_bits == 2 else 5)
    twin = Twin(shape, ModelDisk(files.content), files.open)
    play = {**steps.STEPS, shots.take: 4, shots.apply: 2, shots.delete: 3}
    steps.play(twin, chooser, 50, play)
    twin.read_all()
    twin.close()
    judge(files, twin.model)
    for name, content in shots.held.items():
        with files.open("r", snapshot=name) as disk:
            assert disk.read(0, disk.size) == content
        peers.run("qemu-img", "convert", "-l", name, "-O", "raw", str(files.image), str(tmp_path / "shot.raw"))
        assert (tmp_path / "shot.raw").read_bytes() == content


def make(path: Path, *, options: str = "cluster_size=4096", size: int = 1 << 20) -> Path:
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), str(size))
    return path


def listed(path: Path) -> list[tuple[str, str]]:
    """(id, name) of the snapshots, as QEMU tells them."""
    lines = peers.run("qemu-img", "snapshot", "-l", str(path)).stdout
    text = lines if isinstance(lines, str) else lines.decode()
    return [(line.split()[0], line.split()[1]) for line in text.splitlines()[2:]]


def test_snapshots_that_qemu_took_are_applied_and_deleted(tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    for number in range(3):
        peers.run("qemu-io", "-c", f"write -P {number + 1} {number * 8192} 300k", str(path))
        peers.run("qemu-img", "snapshot", "-c", f"s{number}", str(path))
    with cowslice.open(path, "r+") as disk:
        disk.apply_snapshot("s1")
        assert disk.read(8192, 1) + disk.read(0, 1) == b"\2\1"
        disk.write(0, b"x" * 5000)
        disk.delete_snapshot("s0")
        disk.snapshot("ours")
    peers.run("qemu-img", "check", str(path))
    assert listed(path) == [("2", "s1"), ("3", "s2"), ("4", "ours")]


def test_qemu_applies_and_deletes_what_we_took(tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    with cowslice.open(path, "r+") as disk:
        disk.write(5, b"a" * 100_000)
        disk.snapshot("one")
        disk.write(5, b"b" * 100_000)
        disk.snapshot("two")
    peers.run("qemu-img", "snapshot", "-a", "one", str(path))
    peers.run("qemu-img", "snapshot", "-d", "two", str(path))
    peers.run("qemu-img", "check", str(path))
    with cowslice.open(path) as disk:
        assert disk.read(5, 100_000) == b"a" * 100_000


def test_deleting_the_only_snapshot_gives_its_clusters_back(tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    with cowslice.open(path, "r+") as disk:
        disk.write(0, b"a" * (1 << 20))
        disk.snapshot("one")
        disk.write(0, b"b" * (1 << 20))
        disk.delete_snapshot("one")
        length = path.stat().st_size
        disk.zero(0, 1 << 20)
        disk.flush()
        disk.write(0, b"c" * (1 << 20))
    assert path.stat().st_size <= length
    peers.run("qemu-img", "check", str(path))


def test_a_name_that_is_a_number_is_deleted_before_an_id(tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    with cowslice.open(path, "r+") as disk:
        for name in ("2", "other"):
            disk.snapshot(name)
        disk.delete_snapshot("2")
        assert [one.id for one in disk.snapshots] == [b"2"]


def test_a_snapshot_is_refused_whole_where_counts_have_no_room(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", options="refcount_bits=1,cluster_size=4096")
    with cowslice.open(path, "r+") as disk:
        disk.write(0, b"a" * 100_000)
        with pytest.raises(RefcountOverflow):
            disk.snapshot("one")
        disk.write(50_000, b"b" * 100_000)
        assert disk.snapshots == ()
    peers.run("qemu-img", "check", str(path))


def test_a_snapshot_beside_a_data_file_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", options=f"data_file={tmp_path / 'data'}")
    with cowslice.open(path, "r+") as disk, pytest.raises(cowslice.UnsupportedImage, match="data file"):
        disk.snapshot("one")


@pytest.mark.parametrize("name", ["", "x" * 256, "a\0b"], ids=["empty", "long", "zero"])
def test_an_impossible_name_is_refused(name: str, tmp_path: Path) -> None:
    with cowslice.open(make(tmp_path / "disk"), "r+") as disk, pytest.raises(cowslice.BadOption, match="name"):
        disk.snapshot(name)


def test_there_is_a_most_of_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert snapshotting.MAX_SNAPSHOTS == MAX_SNAPSHOTS
    monkeypatch.setattr(snapshotting, "MAX_SNAPSHOTS", 1)
    with cowslice.open(make(tmp_path / "disk"), "r+") as disk:
        disk.snapshot("one")
        with pytest.raises(cowslice.UnsupportedImage, match="at most"):
            disk.snapshot("two")


@pytest.mark.parametrize("act", [lambda disk: disk.apply_snapshot("x"), lambda disk: disk.delete_snapshot("x")],
                         ids=["apply", "delete"])
def test_an_unknown_snapshot_is_refused(act: Callable[[cowslice.Image], None], tmp_path: Path) -> None:
    with cowslice.open(make(tmp_path / "disk"), "r+") as disk, pytest.raises(cowslice.BadOption, match="'x'"):
        act(disk)


def test_an_apply_brings_the_size_back(tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    peers.run("qemu-io", "-c", "write -P 7 0 1M", str(path))
    peers.run("qemu-img", "snapshot", "-c", "small", str(path))
    peers.run("qemu-img", "resize", "-q", str(path), "9M")
    with cowslice.open(path, "r+") as disk:
        disk.write(8 << 20, b"z" * 4096)
        disk.apply_snapshot("small")
        assert disk.size == 1 << 20
        assert disk.read(0, 1 << 20) == b"\7" * (1 << 20)
        with pytest.raises(cowslice.OutOfRange):
            disk.write(1 << 20, b"z")
    peers.run("qemu-img", "check", str(path))


def test_writers_go_on_around_snapshots(tmp_path: Path) -> None:
    """Each thread owns a part of the disk; what it writes in one request is in a snapshot whole or not at all."""
    path, part = make(tmp_path / "disk"), 256 << 10

    def write(disk: cowslice.Image, number: int) -> None:
        for value in range(1, 40):
            disk.write(number * part, bytes([value]) * 30_000)
            if value % 8 == 0:
                disk.flush()

    with cowslice.open(path, "r+") as disk, ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, disk, number) for number in range(4)]
        for number in range(6):
            disk.snapshot(f"s{number}")
            if number % 2:
                disk.delete_snapshot(f"s{number - 1}")
        for one in writers:
            one.result(timeout=60)
        names = [one.name.decode() for one in disk.snapshots]
        assert disk.read(3 * part, 30_000) == bytes([39]) * 30_000
    peers.run("qemu-img", "check", str(path))
    for name in names:
        with cowslice.open(path, snapshot=name) as shot:
            assert all(len(set(shot.read(number * part, 30_000))) == 1 for number in range(4))
