"""`bench IMAGE`: the requests are those that were asked for."""

from pathlib import Path

import pytest

import cowslice
from cowslice.errors import BadOption
from cowslice.ops.bench.image import BenchOptions, _offsets, bench_image
from cowslice.ops.layout import write_populated_image


def test_steps_go_from_the_offset_and_wrap_at_the_end() -> None:
    options = BenchOptions(count=5, length=10, step=40, offset=20)
    assert _offsets(options, 100).tolist() == [20, 60, 0, 40, 80]


def test_without_a_step_reads_follow_each_other() -> None:
    assert _offsets(BenchOptions(count=4, length=16), 48).tolist() == [0, 16, 32, 0]


def test_random_reads_are_aligned_and_inside() -> None:
    offsets = _offsets(BenchOptions(count=1000, length=4096, random=True), 10 * 4096 + 100)
    assert set(offsets.tolist()) == {4096 * n for n in range(10)}


def test_the_result_counts_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    write_populated_image(path, size=1 << 26)
    with cowslice.open(path, warmup="off") as disk:
        result = bench_image(disk, BenchOptions(count=300, depth=3))
    assert (result.requests, result.bytes) == (300, 300 * 4096)
    assert min(result.hits, result.misses, result.metadata_bytes, result.rate) > 0


def test_writes_leave_the_pattern_at_each_offset(tmp_path: Path) -> None:
    cowslice.create(tmp_path / "disk.qcow2", 1 << 20, format="qcow2")
    with cowslice.open(tmp_path / "disk.qcow2", "r+") as disk:
        result = bench_image(disk, BenchOptions(count=20, depth=4, length=512, step=4096, write=True, pattern=0xA5))
        assert result.bytes == 20 * 512
        assert disk.read(0, 1 << 20) == (b"\xa5" * 512 + bytes(3584)) * 20 + bytes((1 << 20) - 20 * 4096)


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("interval, flushes", [(0, 0), (8, 3), (10, 2), (32, 1)])
def test_writes_are_flushed_as_often_as_was_asked(
    interval: int, flushes: int, drain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cowslice.create(tmp_path / "disk.qcow2", 1 << 20, format="qcow2")
    with cowslice.open(tmp_path / "disk.qcow2", "r+") as disk:
        flush, seen = disk.flush, []
        monkeypatch.setattr(disk, "flush", lambda: (seen.append(1), flush()))
        bench_image(disk, BenchOptions(count=20, depth=2, write=True, flush_interval=interval, drain=drain))
        assert len(seen) == flushes


@pytest.mark.parametrize("options, named", [
    ({"write": True, "pattern": 256}, "pattern"), ({"flush_interval": 100}, "flush interval"),
    ({"write": True, "flush_interval": 3, "depth": 4}, "flush interval"),
])
def test_an_impossible_way_to_write_is_named(options: dict[str, int], named: str) -> None:
    with pytest.raises(BadOption, match=named):
        BenchOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"count": 0}, {"depth": 0}, {"length": 0}, {"step": -1}, {"offset": -1}])
def test_an_impossible_option_is_named(options: dict[str, int]) -> None:
    with pytest.raises(BadOption, match=next(iter(options))):
        BenchOptions(**options)  # type: ignore[arg-type]


def test_a_read_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    write_populated_image(path, size=1 << 20)
    with cowslice.open(path) as disk, pytest.raises(BadOption, match="larger than the disk"):
        bench_image(disk, BenchOptions(length=1 << 21))
