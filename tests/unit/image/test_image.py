"""An open image: reading in every shape, the file object, and closing under readers."""

from __future__ import annotations

import array
import gc
import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cowslice
from cowslice.format.entries import Kind
from cowslice.ops.layout import write_populated_image
from cowslice.storage import FileStorage, MemoryStorage
from cowslice.testing import peers
from cowslice.testing.model import ModelImage
from tests.unit.image.conftest import GEOMETRY, Maker

KINDS = [Kind.NORMAL, Kind.COMPRESSED, Kind.ZERO, Kind.UNALLOCATED, Kind.NORMAL, Kind.COMPRESSED]
CLUSTER = GEOMETRY.cluster_size


@pytest.fixture
def model(make: Maker) -> ModelImage:
    return make("disk.qcow2", KINDS, size=len(KINDS) * CLUSTER - 512)


@pytest.fixture(params=["file", "memory"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, model: ModelImage) -> Any:
    """The same image by the compiled path and by the plain one, which a storage without a descriptor takes."""
    source = tmp_path / "disk.qcow2" if request.param == "file" else MemoryStorage(model.file)
    with cowslice.open(source) as image:
        yield image


def test_an_image_says_what_it_is(tmp_path: Path, model: ModelImage) -> None:
    path = str(tmp_path / "disk.qcow2")
    with cowslice.open(path) as disk:
        assert (disk.path, disk.format, disk.size, len(disk.layers)) == (path, "qcow2", model.size, 1)
        assert disk.geometry == GEOMETRY
        assert disk.header is not None
        assert disk.header.size == model.size
        assert (disk.snapshots, disk.bitmaps, disk.warnings, disk.encrypted, disk.dirty) == ((), (), (), False, False)
        assert path in repr(disk)
        assert disk.cache.statistics()["budget"] == 32 << 20


def test_a_raw_disk_has_a_format_and_nothing_of_qcow2() -> None:
    with cowslice.open(MemoryStorage(b"x" * 700), format="raw") as disk:
        assert (disk.format, disk.size, disk.header, disk.geometry) == ("raw", 1024, None, None)
        assert (disk.snapshots, disk.bitmaps, disk.first_cluster) == ((), (), None)
        assert disk.read(0, 1024) == b"x" * 700 + bytes(324)


def test_every_byte_can_be_read_alone(disk: cowslice.Image, model: ModelImage) -> None:
    content = model.over(b"")
    for offset in (0, 1, CLUSTER - 1, CLUSTER, 2 * CLUSTER - 1, 2 * CLUSTER, model.size - 1):
        assert disk.read(offset, 1) == content[offset : offset + 1]


@pytest.mark.parametrize("span", [(0, 0), (-1, 1), (0, -1), (1 << 70, 1), (-(1 << 70), 1), (0, 1 << 70)])
def test_a_span_outside_the_disk_is_refused_except_an_empty_one(disk: cowslice.Image, span: tuple[int, int]) -> None:
    if span == (0, 0):
        assert disk.read(*span) == b""
        return
    with pytest.raises(cowslice.OutOfRange):
        disk.read(*span)


def test_reading_past_the_end_is_refused_by_every_way_in(disk: cowslice.Image) -> None:
    for read in (lambda: disk.read(disk.size - 1, 2), lambda: disk.read_into(disk.size, bytearray(1)),
                 lambda: disk.read_many([0, disk.size - 1], 2, bytearray(4)), lambda: disk.extents(0, disk.size + 1),
                 lambda: disk.read_into(-1, bytearray(1)), lambda: disk.read_into(1 << 65, bytearray(1)),
                 lambda: disk.read_many([-1], 1, bytearray(1)), lambda: disk.read_many([1 << 65], 1, bytearray(1))):
        with pytest.raises(cowslice.OutOfRange):
            read()


def test_nothing_is_read_at_the_very_end(disk: cowslice.Image) -> None:
    assert disk.read(disk.size, 0) == b""
    assert list(disk.extents(disk.size)) == []


@pytest.mark.parametrize("buffer", [
    bytearray(8192), array.array("q", bytes(8192)), np.zeros((2, 512), np.int64), memoryview(bytearray(8192)),
])
def test_any_writable_contiguous_buffer_is_filled(disk: cowslice.Image, model: ModelImage, buffer: Any) -> None:
    disk.read_into(100, buffer)
    assert memoryview(buffer).tobytes() == model.over(b"")[100:8292]


def test_a_part_of_a_buffer_is_filled_and_nothing_else(disk: cowslice.Image, model: ModelImage) -> None:
    buffer = bytearray(b"\xaa" * 3000)
    disk.read_into(5000, memoryview(buffer)[1000:2000])
    assert buffer == b"\xaa" * 1000 + model.over(b"")[5000:6000] + b"\xaa" * 1000


@pytest.mark.parametrize("buffer", [b"constant", memoryview(bytearray(8))[::2], "text"])
def test_a_buffer_that_cannot_be_filled_is_refused(disk: cowslice.Image, buffer: Any) -> None:
    with pytest.raises((TypeError, BufferError, ValueError)):
        disk.read_into(0, buffer)


@pytest.mark.parametrize("depth", [1, 4, 1000])
@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda offsets: array.array("q", offsets)])
def test_many_reads_come_in_the_order_asked(
        disk: cowslice.Image, model: ModelImage, kind: Any, depth: int) -> None:
    content = model.over(b"")
    offsets = [5 * CLUSTER, 0, 4096, 100, 0, 2 * CLUSTER, model.size - 300]
    out = np.empty((len(offsets), 300), np.uint8)
    disk.read_many(kind(offsets), 300, out, depth=depth)
    assert [row.tobytes() for row in out] == [content[offset : offset + 300] for offset in offsets]


@pytest.mark.parametrize("arguments", [
    ([0], 2, bytearray(1)), ([0], -1, bytearray(1)), ([0, 1], 1, bytearray(3)),
    (np.zeros(2, np.int32), 1, bytearray(2)), (np.zeros((1, 2), np.int64), 1, bytearray(2)),
    (np.zeros(1, np.float64), 1, bytearray(1)),
])
def test_sizes_and_types_that_do_not_fit_are_refused(disk: cowslice.Image, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(cowslice.BadOption):
        disk.read_many(*arguments)


def test_no_reads_or_empty_reads_do_nothing(disk: cowslice.Image) -> None:
    disk.read_many([], 512, bytearray())
    disk.read_many([0, 5], 0, bytearray())


def test_a_depth_of_zero_is_refused(disk: cowslice.Image) -> None:
    with pytest.raises(cowslice.BadOption, match="depth"):
        disk.read_many([0], 1, bytearray(1), depth=0)


def test_the_file_object_reads_like_a_file(disk: cowslice.Image, model: ModelImage) -> None:
    content = model.over(b"")
    with disk.file() as file:
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        assert file.read(10) == content[:10]
        assert file.seek(-20, io.SEEK_END) == model.size - 20
        assert file.read() == content[-20:]
        assert file.read(5) == b""
        assert file.seek(100) == file.tell() == 100
        assert file.seek(50, io.SEEK_CUR) == 150
        assert file.seek(model.size + 5) == model.size + 5
        assert file.read(1) == b""
        file.seek(0)
        assert io.BufferedReader(file).read() == content


def test_closing_the_file_object_leaves_the_image_open(disk: cowslice.Image) -> None:
    file = disk.file()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    with pytest.raises(ValueError, match="closed"):
        file.tell()
    assert disk.read(0, 1)


def test_the_file_object_refuses_impossible_seeks_and_writes(disk: cowslice.Image) -> None:
    with disk.file() as file:
        with pytest.raises(cowslice.OutOfRange):
            file.seek(-1)
        with pytest.raises(ValueError, match="whence"):
            file.seek(0, 9)
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")


def test_a_closed_image_answers_nothing(disk: cowslice.Image) -> None:
    walk = disk.extents()
    next(walk)
    file = disk.file()
    disk.close()
    disk.close()
    assert disk.closed
    for use in (lambda: disk.read(0, 1), lambda: disk.read_into(0, bytearray(1)), lambda: next(walk),
                lambda: disk.read_many([0], 1, bytearray(1)), lambda: disk.snapshots, lambda: disk.bitmaps,
                lambda: next(disk.extents()), lambda: file.read(1), lambda: disk.read(CLUSTER, CLUSTER)):
        with pytest.raises(cowslice.Closed):
            use()


def test_an_unfinished_walk_over_extents_does_not_keep_the_image_open(disk: cowslice.Image) -> None:
    walk = disk.extents()
    next(walk)
    disk.close()
    assert disk.closed


def test_an_image_can_be_closed_while_others_read(tmp_path: Path, model: ModelImage) -> None:
    content = model.over(b"")
    wrong: list[object] = []
    for _ in range(20):
        disk = cowslice.open(tmp_path / "disk.qcow2", l2_cache_size="64k")
        running = threading.Barrier(5)

        def read(disk: cowslice.Image = disk, running: threading.Barrier = running) -> None:
            running.wait()
            try:
                while True:
                    wrong.extend(offset for offset in range(0, model.size - 600, 4000)
                                 if disk.read(offset, 600) != content[offset : offset + 600])
            except cowslice.Closed:
                pass
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        running.wait()
        disk.close()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_many_threads_read_one_image_through_a_tiny_cache(tmp_path: Path, make: Maker) -> None:
    model = make("wide.qcow2", [Kind.NORMAL, Kind.UNALLOCATED, Kind.COMPRESSED, Kind.ZERO] * 500)
    content = model.over(b"")
    wrong: list[object] = []
    options = {"l2_cache_size": 1024, "l2_cache_entry_size": 512, "warmup": "off", "policy": "lru"}
    with cowslice.open(tmp_path / "wide.qcow2", **options) as disk:
        def read(seed: int) -> None:
            offsets = np.random.default_rng(seed).integers(0, model.size - 5000, 150).tolist()
            wrong.extend(offset for offset in offsets if disk.read(offset, 5000) != content[offset : offset + 5000])

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_an_unknown_mode_is_refused_with_those_that_exist(tmp_path: Path, model: ModelImage) -> None:
    with pytest.raises(cowslice.BadOption, match=r"mode is 'w', expected 'r' or 'r\+'"):
        cowslice.open(tmp_path / "disk.qcow2", mode="w")


def test_what_was_opened_for_reading_is_not_written(tmp_path: Path, model: ModelImage) -> None:
    with cowslice.open(tmp_path / "disk.qcow2") as disk:
        for change in (lambda: disk.write(0, b"x"), lambda: disk.zero(0, 1), lambda: disk.discard(0, 1)):
            with pytest.raises(cowslice.ReadOnly, match="opened for reading only"):
                change()
        assert not disk.writable


def test_an_unknown_option_is_refused_with_those_that_exist(tmp_path: Path, model: ModelImage) -> None:
    with pytest.raises(cowslice.BadOption, match=r"cache_sise.*l2_cache_size"):
        cowslice.open(tmp_path / "disk.qcow2", cache_sise="1M")


def test_a_cache_that_cannot_work_is_refused(tmp_path: Path, model: ModelImage) -> None:
    with pytest.raises(cowslice.BadOption, match="l2-cache-entry-size"):
        cowslice.open(tmp_path / "disk.qcow2", l2_cache_entry_size=1000)


@pytest.mark.parametrize("warmup", ["auto", "off", "full"])
def test_warm_up_can_be_waited_for(tmp_path: Path, model: ModelImage, warmup: str) -> None:
    with cowslice.open(tmp_path / "disk.qcow2", warmup=warmup) as disk:
        assert disk.wait_warm(30)
        loads = disk.cache.statistics()["loads"]
        disk.read(0, 1)
        assert disk.cache.statistics()["loads"] == (1 if warmup == "off" else loads)


@pytest.mark.parametrize("policy", ["clock2q+", "lru"])
def test_the_policy_can_be_chosen(tmp_path: Path, model: ModelImage, policy: str) -> None:
    with cowslice.open(tmp_path / "disk.qcow2", policy=policy) as disk:
        assert disk.cache.statistics()["policy"] == policy


def test_an_image_that_is_forgotten_leaves_no_thread_and_no_file(tmp_path: Path, model: ModelImage) -> None:
    path = tmp_path / "disk.qcow2"
    threads = threading.active_count()
    disk = cowslice.open(path)
    assert str(path) in {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    del disk
    gc.collect()
    assert str(path) not in {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert threading.active_count() <= threads  # those of an earlier test may be ending


def test_a_bad_table_is_refused_with_its_place_and_the_file(tmp_path: Path, model: ModelImage) -> None:
    path = tmp_path / "disk.qcow2"
    l1 = int.from_bytes(model.file[40:48], "big")
    path.write_bytes(model.file[:l1] + (1 << 63 | 0x1200).to_bytes(8, "big") + model.file[l1 + 8 :])
    with cowslice.open(path) as disk, pytest.raises(cowslice.CorruptImage) as refusal:
        disk.read(0, 1)
    assert (refusal.value.structure, refusal.value.offset) == ("L1 table", l1)
    assert str(path) in str(refusal.value)


def test_unbuffered_reads_of_any_span_are_the_same(tmp_path: Path, model: ModelImage) -> None:
    content = model.over(b"")
    with cowslice.open(tmp_path / "disk.qcow2", direct=True) as disk:
        for offset, length in ((0, model.size), (1, 4096), (511, 3), (4095, 8194), (model.size - 7, 7)):
            assert disk.read(offset, length) == content[offset : offset + length]


def test_an_image_in_use_is_opened_only_with_force_share(tmp_path: Path, model: ModelImage) -> None:
    path = tmp_path / "disk.qcow2"
    with FileStorage(path, "r+"):
        with pytest.raises(cowslice.Locked):
            cowslice.open(path)
        with cowslice.open(path, force_share=True) as disk:
            assert disk.read(0, disk.size) == model.over(b"")


@peers.needs("nginx")
def test_a_chain_is_read_over_http_with_names_beside_the_image(tmp_path: Path, make: Maker) -> None:
    base = make("sub/base.qcow2", [Kind.NORMAL, Kind.COMPRESSED], salt=2)
    top = make("top.qcow2", [Kind.UNALLOCATED, Kind.UNALLOCATED, Kind.NORMAL], backing="sub/base.qcow2")
    make("out.qcow2", [Kind.UNALLOCATED], backing="../base.qcow2")
    with peers.nginx(tmp_path) as url:
        with cowslice.open(f"{url}/top.qcow2") as disk:
            assert disk.read(0, disk.size) == top.over(base.over(b""))
        with pytest.raises(cowslice.ReferenceRefused):
            cowslice.open(f"{url}/sub/../out.qcow2", gate=cowslice.DenyGate())


def test_reading_ahead_saves_a_sequential_reader_metadata_reads(tmp_path: Path) -> None:
    path, slices, span = tmp_path / "disk.qcow2", 16, 1 << 25
    write_populated_image(path, size=slices * span)

    def loads(*, readahead: bool) -> int:
        options: dict[str, Any] = {"l2_cache_size": "64k", "l2_cache_entry_size": 4096, "warmup": "off"}
        with cowslice.open(path, readahead=readahead, **options) as disk:
            for number in range(slices):
                disk.read(number * span, 512)
            return int(disk.cache.statistics()["loads"])

    assert loads(readahead=False) == slices
    assert loads(readahead=True) < slices
