"""Compiled writes to clusters that are not there yet leave what the plain path leaves: bytes, entries, counts."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import StorageError
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.image.supply import Supply
from cowslice.image.writing import Writer
from cowslice.storage import FileStorage
from cowslice.testing import peers
from cowslice.testing.twin import Files, Shape, make_files, shape_by_chance

pytestmark = peers.needs("qemu-img")
UNIT = 512
OFFSET_MASK = 0x00FFFFFFFFFFFE00  # of an L2 entry


def copy_of(files: Files, directory: Path) -> Files:
    shutil.copytree(files.directory, directory)
    return Files(files.shape, directory, files.content)


def play(disk: cowslice.Image, chooser: random.Random, count: int) -> None:
    """Writes of all sizes, now and then what makes room for more of them."""
    for _ in range(count):
        start = chooser.randrange(disk.size)
        length = min(chooser.choice((1, UNIT, 4096, 20_000, 70_000)), disk.size - start)
        act = chooser.choice(("write",) * 6 + ("many", "zero", "discard", "flush"))
        if act == "write":
            disk.write(start, chooser.randbytes(length))
        elif act == "many":
            offsets = list(range(start // UNIT * UNIT, disk.size - UNIT, 9 * UNIT))[:8]
            disk.write_many(offsets, UNIT, chooser.randbytes(UNIT) * len(offsets))
        elif act == "zero":
            disk.zero(start, length)
        elif act == "discard":
            disk.discard(start, length)
        else:
            disk.flush()


def said(disk: cowslice.Image) -> list[tuple[int, int]]:
    """What the entries say but for the place: flags, and the bitmaps of subclusters."""
    layer = disk.layers[0]
    assert isinstance(layer, Qcow2Layer)
    step = layer.geometry.l2_entry_size
    raw = layer.slices.entries(0, layer.geometry.clusters(disk.size))  # type: ignore[attr-defined]
    words = [int.from_bytes(raw[at : at + 8], "big") for at in range(0, len(raw), 8)]
    return [(words[at] & ~OFFSET_MASK, words[at + 1] if step == 16 else 0) for at in range(0, len(words), step // 8)]


ENCRYPTED = [
    Shape(encryption="aes"), Shape(4096, encryption="luks"), Shape(512, encryption="aes", backing="short"),
    Shape(16384, encryption="aes", extended_l2=True, backing="qcow2")]  # fmt: skip
SHAPES = [*(shape_by_chance(random.Random(500 + seed)) for seed in range(12)), *ENCRYPTED]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_compiled_path_leaves_what_the_plain_one_leaves(shape: Shape, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = make_files(shape, tmp_path / "plain")
    if shape.data_file != "none":
        pytest.skip("an image names its data file by the whole path")
    seen = []
    for files, compiled in ((copy_of(plain, tmp_path / "compiled"), True), (plain, False)):
        with files.open() as disk:
            assert disk.fast_path is not None
            disk.fast_path.writes_in_place = compiled
            play(disk, random.Random(shape.size), 60)
            seen.append((disk.read(0, disk.size), said(disk)))
        files.check()
        assert files.qemu_reads() == seen[-1][0]
    assert seen[0] == seen[1]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets of the writes that the plain path was asked for."""
    asked: list[int] = []
    write: Callable[[Writer, int, memoryview], None] = Writer.write

    def noted(self: Writer, offset: int, view: memoryview) -> None:
        asked.append(offset)
        write(self, offset, view)

    monkeypatch.setattr(Writer, "write", noted)
    return asked


@pytest.mark.parametrize("shape", [
    Shape(), Shape(512, 2, backing="short"), Shape(4096, backing="raw"),
    Shape(16384, extended_l2=True, backing="qcow2")], ids=str)  # fmt: skip
def test_plain_writes_never_ask_the_plain_path(shape: Shape, tmp_path: Path, slow: list[int]) -> None:
    files = make_files(shape, tmp_path)
    with files.open() as disk:
        for at in range(100, disk.size - 700, 30_000):
            disk.write(at, b"w" * 700)
        assert not slow
    files.check()


@pytest.mark.parametrize("shape", ENCRYPTED, ids=str)
def test_whole_sectors_are_enciphered_without_the_plain_path_and_ragged_ones_by_it(
    shape: Shape, tmp_path: Path, slow: list[int]
) -> None:
    files = make_files(shape, tmp_path)
    with files.open() as disk:
        for _ in range(2):  # to new clusters, and over what is there then
            for at in range(512, disk.size - 1024, 30 * UNIT):
                disk.write(at, b"w" * 1024)
        assert not slow
        disk.write(100, b"r" * 1024)
        assert slow == [100]
    files.check()


def test_what_is_shared_or_compressed_is_left_to_the_plain_path(tmp_path: Path, slow: list[int]) -> None:
    files = make_files(Shape(4096), tmp_path)
    with files.open() as disk:
        disk.write_compressed(0, bytes(4096))
        disk.write(8192, b"s" * 4096)
        disk.snapshot("before")
        disk.write(100, b"a")
        disk.write(8200, b"b")
        assert slow == [100, 8200]
    files.check()


def test_a_supply_that_is_left_over_leaks_nothing_and_keeps_the_file_small(tmp_path: Path) -> None:
    files = make_files(Shape(4096), tmp_path)
    with files.open() as disk:
        for at in range(0, 20 * 4096, 4096):
            disk.write(at, b"a" * 4096)
            disk.flush()
    files.check()
    assert files.image.stat().st_size < 30 * 4096


def grow(disk: cowslice.Image, act: str) -> None:
    """Take host clusters by another way than the compiled one."""
    if act == "compressed":
        disk.write_compressed(65536, bytes(range(256)) * 16)
    elif act == "table":
        disk.write(disk.size - 4096, b"t" * 4096)
    elif act == "snapshot":
        disk.snapshot("kept")
    else:
        disk.resize(disk.size << 7)


@pytest.mark.parametrize("act", ["compressed", "table", "snapshot", "resize"])
def test_what_is_taken_after_a_compiled_write_leaves_no_gap_in_the_file(act: str, tmp_path: Path) -> None:
    files = make_files(Shape(4096, guest_bytes=8 << 20), tmp_path)
    with files.open() as disk:
        for at in range(3):
            disk.write(at << 12, b"a" * 4096)
        grow(disk, act)
        disk.write(5 << 12, b"a" * 4096)
    used = peers.qemu_img_json("check", files.image)["image-end-offset"]
    assert files.image.stat().st_size <= used <= 24 * 4096


def test_the_file_is_as_long_as_the_one_that_qemu_leaves(tmp_path: Path) -> None:
    """QEMU puts clusters where they were asked for one after the other; so a file cannot be shorter."""
    files = make_files(Shape(4096, guest_bytes=1 << 20), tmp_path)
    shutil.copy(files.image, tmp_path / "theirs")
    with files.open() as disk:
        disk.write(0, b"a" * 4096)
        disk.write_compressed(65536, bytes(range(256)) * 16)
        disk.write(8192, b"b" * 4096)
    peers.qemu_io(tmp_path / "theirs", "write 0 4096", "write -c 65536 4096", "write 8192 4096")
    assert files.image.stat().st_size <= (tmp_path / "theirs").stat().st_size


def test_plain_allocation_takes_from_the_supply_and_knows_what_is_fresh(tmp_path: Path) -> None:
    storage = FileStorage(make_files(Shape(4096), tmp_path).image, "r+")
    with cowslice.open(storage, "r+", format="qcow2", warmup="off") as disk:
        disk.write(0, b"a" * 4096)
        writer = disk._writes.writer  # type: ignore[union-attr]
        allocator = writer.tables.allocator
        with writer.tables.lock:
            first = allocator.fresh_from
            assert allocator.take(1) == (first, 1)
            assert allocator.take_run(2) == first + 1
            assert allocator.fresh_from == first + 3
            assert allocator.supply
            allocator.give_back(first, 3)


def test_a_fresh_cluster_stays_sparse_after_each_flush(tmp_path: Path) -> None:
    files = make_files(Shape(guest_bytes=8 << 20), tmp_path)
    with files.open() as disk:
        for cluster in range(64):
            disk.write(cluster << 16, b"a" * 4096)
            disk.flush()
    assert files.image.stat().st_blocks * 512 < 64 * 8192 + 8 * 65536


class Unsyncable(FileStorage):
    """A file with a descriptor whose syncs can begin to fail."""

    broken = False

    def sync(self) -> None:
        if self.broken:
            raise StorageError("the disk is gone")
        super().sync()


def test_after_a_failed_sync_no_compiled_write_is_taken_either(tmp_path: Path) -> None:
    """I9, for clusters that are there and for those that are not."""
    storage = Unsyncable(make_files(Shape(4096), tmp_path).image, "r+")
    disk = cowslice.open(storage, "r+", format="qcow2", warmup="off")
    disk.write(0, b"a" * 8192)
    storage.broken = True
    with pytest.raises(StorageError):
        disk.flush()
    for offset in (0, 40960):
        with pytest.raises(StorageError, match="takes no more writes"):
            disk.write(offset, b"b" * 512)
    with pytest.raises(StorageError):
        disk.close()


def test_threads_that_place_clusters_beside_each_other_lose_nothing(tmp_path: Path) -> None:
    files = make_files(Shape(512, guest_bytes=4 << 20), tmp_path)
    begin = threading.Barrier(4)

    def work(number: int) -> None:
        begin.wait()
        for at in range(number * 128, disk.size, 4 * 128):
            disk.write(at, bytes([number + 1]) * 128)
            if at % 65536 == number * 128:
                disk.flush()

    with files.open() as disk, ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result()
        assert disk.read(0, disk.size) == (b"\1" * 128 + b"\2" * 128 + b"\3" * 128 + b"\4" * 128) * (disk.size // 512)
    files.check()


def test_a_supply_gives_back_what_is_left_and_what_was_returned() -> None:
    supply = Supply()
    supply.stock(7, 5, fresh=True)
    supply.put_back(3, 2)
    assert supply
    assert supply.withdraw() == ((7, 5, True), [(3, 2)])
    assert not supply
    assert supply.withdraw()[1] == []
