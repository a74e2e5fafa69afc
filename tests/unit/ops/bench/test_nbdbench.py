"""Loads on real servers: that every answer comes, that it is compared, and what is refused before it begins."""

from __future__ import annotations

import gc
import json
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cowslice.cli.benchnbd import bench_nbd, format_time
from cowslice.errors import BadOption, StorageError
from cowslice.ops.bench.nbdbench import LoadOptions, LoadResult, run_load
from cowslice.ops.bench.nbdload import LATENCY_BUCKETS, latency_floor
from cowslice.testing.peers import nbdkit, needs, qemu_nbd

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(5).randbytes(SIZE // 2) + bytes(SIZE // 2))
    return path


@pytest.fixture
def uri(disk: Path) -> Iterator[str]:
    with nbdkit("--readonly", "file", disk) as served:
        yield served


def options(**chosen: Any) -> LoadOptions:
    return LoadOptions(**({"count": 300} | chosen))


@needs("nbdkit")
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("connections, depth", [(1, 1), (1, 32), (4, 8)])
def test_every_answer_is_right(uri: str, disk: Path, structured: bool, connections: int, depth: int) -> None:
    result = run_load(
        uri, options(connections=connections, depth=depth, content=str(disk), structured=structured)
    )  # fmt: skip
    assert (result.requests, result.errors, result.bytes) == (300, 0, 300 * 4096)
    assert result.mode == ("structured" if structured else "simple")
    assert 0 < result.percentile(50) <= result.percentile(99) <= result.seconds * 1.05


@needs("qemu-nbd")
def test_the_answers_of_qemu_are_right_holes_and_all(disk: Path) -> None:
    with qemu_nbd(disk, "--read-only", image_format="raw") as uri:
        result = run_load(uri, options(step=8192, length=8192, content=str(disk), connections=2))
    assert (result.requests, result.errors, result.mode) == (300, 0, "structured")


@needs("nbdkit")
def test_other_bytes_end_the_load(uri: str, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE))
    with pytest.raises(StorageError, match="are not those expected"):
        run_load(uri, options(content=str(other), connections=3))


@needs("nbdkit")
def test_writing_the_expected_bytes_leaves_the_disk_as_it_is(disk: Path, tmp_path: Path) -> None:
    served = tmp_path / "served.raw"
    served.write_bytes(disk.read_bytes())
    with nbdkit("file", served) as uri:
        result = run_load(uri, options(writes=50, content=str(disk), connections=2))
    assert 0 < result.writes < 300
    assert served.read_bytes() == disk.read_bytes()


@needs("nbdkit")
def test_writes_reach_the_disk(tmp_path: Path) -> None:
    served = tmp_path / "served.raw"
    served.write_bytes(bytes(SIZE))
    with nbdkit("file", served) as uri:
        run_load(uri, options(writes=100, step=4096, count=SIZE // 4096, connections=2))
    blocks = {served.read_bytes()[at : at + 4096] for at in range(0, SIZE, 4096)}
    assert len(blocks) == 1
    assert bytes(4096) not in blocks


@needs("nbdkit")
def test_several_connections_walk_the_disk_together(uri: str, disk: Path) -> None:
    result = run_load(uri, options(connections=3, step=4096, count=SIZE // 4096, content=str(disk)))
    assert result.bytes == SIZE


@needs("nbdkit")
def test_fewer_requests_than_connections_need_fewer(uri: str) -> None:
    assert run_load(uri, options(connections=8, count=3)).requests == 3


@needs("nbdkit")
def test_errors_are_counted() -> None:
    with nbdkit("--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=100%") as uri:
        result = run_load(uri, options(count=10))
    assert (result.errors, result.first_error, result.bytes) == (10, 5, 0)


@needs("nbdkit")
@pytest.mark.parametrize(
    "chosen, word",
    [({"writes": 1}, "read-only"), ({"offset": SIZE}, "past the end"), ({"span": SIZE + 1}, "past the end")],
)
def test_what_the_export_cannot_take_is_refused(uri: str, chosen: dict[str, int], word: str) -> None:
    with pytest.raises(BadOption, match=word):
        run_load(uri, options(**chosen))


@needs("nbdkit")
@pytest.mark.parametrize("chosen, word", [({"length": 100}, "length is 100"), ({"offset": 1}, "offset is 1"),
                                          ({"length": 1 << 20}, "largest request")])  # fmt: skip
def test_the_block_sizes_of_an_export_are_kept(chosen: dict[str, int], word: str) -> None:
    blocks = ("blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=65536")
    with (
        nbdkit("--filter=blocksize-policy", "memory", "2M", *blocks) as uri,
        pytest.raises(BadOption, match=word),
    ):
        run_load(uri, options(**chosen))


@needs("nbdkit")
def test_a_content_that_cannot_be_read_is_told(uri: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="to compare with"):
        run_load(uri, options(content=str(tmp_path / "none")))


@needs("nbdkit")
def test_no_thread_or_descriptor_is_left(uri: str) -> None:
    gc.collect()  # what other tests forgot would go meanwhile
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    run_load(uri, options(connections=5))
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


@needs("nbdkit")
def test_an_interrupt_ends_a_load_and_leaves_nothing() -> None:
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    with nbdkit("--filter=delay", "memory", "1M", "rdelay=60") as uri:
        alarm = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            with pytest.raises(KeyboardInterrupt):
                run_load(uri, options(connections=3))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


@pytest.mark.parametrize(
    "chosen", [{"connections": 0}, {"depth": 0}, {"depth": 9999}, {"writes": 101}, {"count": 0}, {"step": -1},
               {"length": 1 << 26}, {"seconds": -1.0}],
)  # fmt: skip
def test_an_impossible_option_is_named(chosen: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=next(iter(chosen))):
        options(**chosen)


def test_a_percentile_is_that_of_the_counted_latencies() -> None:
    latencies = [0] * LATENCY_BUCKETS
    latencies[400], latencies[500] = 90, 10
    result = LoadResult(1.0, 100, 0, 0, 0, 0, 0.5, "simple", tuple(latencies))
    assert latency_floor(400) <= result.percentile(90) * 1e9 <= latency_floor(401)
    assert latency_floor(500) <= result.percentile(90.1) * 1e9 <= latency_floor(501)
    assert result.percentile(100) == result.percentile(99)


def test_without_requests_there_is_no_latency() -> None:
    assert LoadResult(1.0, 0, 0, 0, 0, 0, 0.0, "simple", (0,) * LATENCY_BUCKETS).percentile(50) == 0.0


@needs("nbdkit")
def test_the_command_tells_programs_everything(uri: str, disk: Path) -> None:
    done = CliRunner().invoke(
        bench_nbd, ["--output=json", "-c", "100", "--verify", str(disk), uri], standalone_mode=False
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert (done.return_value, told["requests"], told["errors"]) == (0, 100, 0)
    assert told["latency"]["p50"] <= told["latency"]["p99.99"]


@needs("nbdkit")
def test_the_command_tells_people_rate_and_latency(uri: str) -> None:
    done = CliRunner().invoke(bench_nbd, ["-t", "0.05", "--sequential", uri], standalone_mode=False)
    assert done.return_value == 0
    assert "requests/s:" in done.stdout
    assert "p99.9 " in done.stdout


@needs("nbdkit")
def test_the_command_fails_when_the_server_does() -> None:
    with nbdkit("--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=100%") as uri:
        done = CliRunner().invoke(bench_nbd, ["-c", "5", uri], standalone_mode=False)
    assert done.return_value == 1
    assert "5, the first of them 5" in done.stdout


def test_two_ways_to_walk_are_refused() -> None:
    done = CliRunner().invoke(bench_nbd, ["--sequential", "-S", "8k", "nbd://localhost"], standalone_mode=False)
    assert isinstance(done.exception, BadOption)


@pytest.mark.parametrize("seconds, text", [(0.0, "0 us"), (12.34e-6, "12.3 us"), (4.5e-3, "4.5 ms"), (2.0, "2 s")])
def test_times_are_shown_for_people(seconds: float, text: str) -> None:
    assert format_time(seconds) == text
