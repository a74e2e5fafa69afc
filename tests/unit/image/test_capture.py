"""A capture holds every request that threads told it, or the count of those it lost."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import Closed, RequestError
from cowslice.format.entries import Kind
from cowslice.image.capture import Capture
from cowslice.image.recorder import Recorder
from cowslice.tune.requests import Operation
from cowslice.tune.trace import open_trace
from tests.unit.image.conftest import Maker

K = 1 << 12  # a cluster
READ, WRITE, FLUSH, DISCARD, ZERO = Operation
CELLS = [Kind.NORMAL, Kind.COMPRESSED, Kind.COMPRESSED, Kind.ZERO, Kind.UNALLOCATED, *[Kind.NORMAL] * 3]


def asked(path: Path) -> list[tuple[int, int, int]]:
    """What a closed capture holds: kind, offset, length."""
    trace = open_trace(path)
    found = [row for chunk in trace for row in zip(chunk.operation, chunk.offset, chunk.length, strict=True)]
    assert trace.notes == ()
    return [(int(kind), int(offset), int(length)) for kind, offset, length in found]


def test_requests_of_many_threads_are_all_there(tmp_path: Path) -> None:
    recorder = Recorder()
    with Capture(tmp_path / "c", recorder, size=1 << 40) as capture:
        threads = [threading.Thread(target=lambda: [recorder.note(0, n, 512) for n in range(5000)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    trace = open_trace(tmp_path / "c")
    there = sum(len(chunk) for chunk in trace)
    assert (there + capture.lost, trace.notes) == (15000, () if not capture.lost else trace.notes)


def test_a_request_longer_than_a_record_can_say_keeps_its_length(tmp_path: Path) -> None:
    recorder = Recorder()
    with Capture(tmp_path / "c", recorder, size=1 << 40):
        recorder.note(4, 512, 1 << 39)
    assert [chunk.length.tolist() for chunk in open_trace(tmp_path / "c")] == [[1 << 39]]


def test_a_request_takes_sixteen_bytes(make: Maker, tmp_path: Path) -> None:
    make("a", CELLS)
    with cowslice.open(tmp_path / "a") as disk:
        disk.read(0, K)
        with disk.capture(tmp_path / "c"):
            for _ in range(10):
                disk.read(0, K)
        disk.read(0, K)
    header, end = 64, 16
    assert (tmp_path / "c").stat().st_size == header + 10 * 16 + end


def test_a_second_capture_of_a_disk_is_refused(tmp_path: Path) -> None:
    recorder = Recorder()
    with Capture(tmp_path / "c", recorder, size=1), pytest.raises(RequestError, match="under way"):
        Capture(tmp_path / "d", recorder, size=1)


def test_every_way_to_read_is_recorded_once(make: Maker, tmp_path: Path) -> None:
    make("a", CELLS)
    with cowslice.open(tmp_path / "a") as disk:
        with disk.capture(tmp_path / "c") as capture:
            disk.read(0, 8 * K)
            disk.read_into(K, bytearray(2 * K))
            disk.read_many([0, K, 3 * K], 2 * K, bytearray(6 * K), depth=2)
            disk.file().read(100)
            disk.read(5, 0)
            disk.flush()
        disk.read(0, 1)
    assert asked(tmp_path / "c") == [
        (READ, 0, 8 * K), (READ, K, 2 * K), (READ, 0, 2 * K), (READ, K, 2 * K), (READ, 3 * K, 2 * K), (READ, 0, 100),
        (FLUSH, 0, 0)]
    assert capture.recorded == 7


@pytest.mark.parametrize("detect_zeroes", ["off", "unmap"])
def test_every_way_to_change_is_recorded_once(tmp_path: Path, detect_zeroes: str) -> None:
    cowslice.create(tmp_path / "a", size=8 * K, cluster_size=K)
    with cowslice.open(tmp_path / "a", "r+") as disk:
        disk.write(K, b"w" * K)
    with cowslice.open(tmp_path / "a", "r+", detect_zeroes=detect_zeroes) as disk, disk.capture(tmp_path / "c"):
        disk.write(0, b"x" * 8 * K)  # partly in place
        disk.write(6 * K, bytes(K))
        disk.write_many([0, 4 * K], K, b"y" * 2 * K)
        disk.write_compressed(2 * K, b"z" * K)
        disk.zero(K, 2 * K)
        disk.discard(3 * K, K)
        disk.write(9, b"")
    assert asked(tmp_path / "c") == [
        (WRITE, 0, 8 * K), (WRITE, 6 * K, K), (WRITE, 0, K), (WRITE, 4 * K, K), (WRITE, 2 * K, K), (ZERO, K, 2 * K),
        (DISCARD, 3 * K, K)]


def test_a_raw_disk_is_captured_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(K))
    with cowslice.open(tmp_path / "a", format="raw") as disk, disk.capture(tmp_path / "c"):
        disk.read(512, 512)
    assert asked(tmp_path / "c") == [(READ, 512, 512)]


def test_closing_the_image_ends_its_capture(make: Maker, tmp_path: Path) -> None:
    make("a", CELLS)
    disk = cowslice.open(tmp_path / "a")
    disk.capture(tmp_path / "c")
    disk.read(0, 1)
    disk.close()
    assert asked(tmp_path / "c") == [(READ, 0, 1)]


def test_a_forgotten_image_ends_its_capture(make: Maker, tmp_path: Path) -> None:
    make("a", CELLS)
    disk = cowslice.open(tmp_path / "a")
    disk.capture(tmp_path / "c")
    disk.read(0, 1)
    del disk
    gc.collect()
    assert asked(tmp_path / "c") == [(READ, 0, 1)]


def test_one_capture_can_follow_another(make: Maker, tmp_path: Path) -> None:
    make("a", CELLS)
    with cowslice.open(tmp_path / "a") as disk:
        for name in "cd":
            with disk.capture(tmp_path / name):
                disk.read(ord(name), 1)
    assert [asked(tmp_path / name) for name in "cd"] == [[(READ, 99, 1)], [(READ, 100, 1)]]


def test_what_cannot_be_read_cannot_be_captured(make: Maker, tmp_path: Path) -> None:
    make("a", CELLS)
    with cowslice.open(tmp_path / "a", metadata_only=True) as disk, pytest.raises(RequestError, match="metadata only"):
        disk.capture(tmp_path / "c")
    disk = cowslice.open(tmp_path / "a")
    disk.close()
    with pytest.raises(Closed):
        disk.capture(tmp_path / "c")
    assert not (tmp_path / "c").exists()
