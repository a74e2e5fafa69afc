"""Clusters inflated in compiled code: right bytes, loaded once, within the budget, and nothing of damaged streams."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowslice.codec import inflate, unzstd
from cowslice.codec.compression import Compression, compress_cluster
from cowslice.image.inflated import InflatedClusters

pytestmark = pytest.mark.skipif(not (inflate.available() and unzstd.available()),
                                reason="libdeflate or libzstd is not here")
SIZE = 4096
COUNT = 200


def content(number: int) -> bytes:
    chance = random.Random(number)
    words = [chance.randbytes(6) for _ in range(40)]
    return b"".join(chance.choice(words) for _ in range(SIZE // 6 + 1))[:SIZE]


CLUSTERS = [content(number) for number in range(COUNT)]


class Streams:
    """A file of streams back to back; `read` asks for a part of one."""

    def __init__(self, path: Path, kind: Compression) -> None:
        self.zstd = kind is Compression.ZSTD
        blob = bytearray(b"\xff" * 100)
        self.spans: list[tuple[int, int]] = []
        for cluster in CLUSTERS:
            payload = compress_cluster(kind, cluster)
            assert payload is not None
            self.spans.append((len(blob), len(payload) + 300))
            blob += payload
        path.write_bytes(blob)
        self.descriptor = os.open(path, os.O_RDWR)

    def read(self, cache: InflatedClusters, number: int, skip: int = 0, length: int = SIZE, *,
             layer: int = 0) -> bytes | None:
        out = bytearray(length)
        host, stored = self.spans[number]
        done = cache.read_part(self.descriptor, 1, layer, SIZE, host, stored, skip, memoryview(out), zstd=self.zstd)
        return bytes(out) if done else None


@pytest.fixture(params=Compression, ids=lambda kind: kind.name.lower())
def streams(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Streams]:
    made = Streams(tmp_path / "streams", request.param)
    yield made
    os.close(made.descriptor)


def test_any_part_of_a_cluster_is_read(streams: Streams) -> None:
    cache = InflatedClusters(10 * SIZE)
    for skip, length in ((0, SIZE), (0, 1), (4000, 96), (1, 4095), (7, 0)):
        assert streams.read(cache, 3, skip, length) == CLUSTERS[3][skip : skip + length]
    assert cache.counters()["reads"] == 1


def test_a_part_beyond_the_cluster_is_refused(streams: Streams) -> None:
    cache = InflatedClusters(10 * SIZE)
    assert streams.read(cache, 3, 4000, 97) is None
    assert streams.read(cache, 3, SIZE + 1, 0) is None


def test_the_least_recently_used_goes_first(streams: Streams) -> None:
    cache = InflatedClusters(3 * SIZE + 100)
    for number in (0, 1, 2, 0, 3):
        assert streams.read(cache, number) == CLUSTERS[number]
        assert cache.counters()["used"] <= 3 * SIZE
    before = cache.counters()
    for number in (0, 2, 3):
        assert streams.read(cache, number) == CLUSTERS[number]
    assert cache.counters()["misses"] == before["misses"]
    assert streams.read(cache, 1) == CLUSTERS[1]
    assert cache.counters()["misses"] == before["misses"] + 1


@pytest.mark.parametrize("budget", [0, SIZE - 1])
def test_a_budget_below_one_cluster_keeps_nothing_and_still_works(streams: Streams, budget: int) -> None:
    cache = InflatedClusters(budget)
    assert [streams.read(cache, number) for number in range(COUNT)] == CLUSTERS
    assert cache.counters()["used"] == 0


def test_more_clusters_than_first_buckets_are_all_found_again(streams: Streams) -> None:
    cache = InflatedClusters(COUNT * SIZE)
    for _ in range(2):
        assert [streams.read(cache, number) for number in range(COUNT)] == CLUSTERS
    assert (cache.counters()["hits"], cache.counters()["misses"]) == (COUNT, COUNT)


def test_trim_gives_everything_back(streams: Streams) -> None:
    cache = InflatedClusters(COUNT * SIZE)
    for number in range(20):
        streams.read(cache, number)
    assert cache.trim() == 20 * SIZE
    assert cache.counters()["used"] == 0
    assert streams.read(cache, 5) == CLUSTERS[5]


def test_a_smaller_budget_holds_at_once(streams: Streams) -> None:
    cache = InflatedClusters(COUNT * SIZE)
    for number in range(20):
        streams.read(cache, number)
    cache.limit(5 * SIZE)
    assert cache.counters()["used"] == 5 * SIZE


def test_layers_do_not_mix_their_clusters(streams: Streams, tmp_path: Path) -> None:
    cache = InflatedClusters(10 * SIZE)
    assert streams.read(cache, 0, layer=0) == CLUSTERS[0]
    os.pwrite(streams.descriptor, bytes(streams.spans[0][1]), streams.spans[0][0])
    assert streams.read(cache, 0, layer=0) == CLUSTERS[0]
    assert streams.read(cache, 0, layer=1) is None


def test_a_damaged_stream_is_refused_and_not_remembered(streams: Streams) -> None:
    cache = InflatedClusters(10 * SIZE)
    host, stored = streams.spans[4]
    whole = os.pread(streams.descriptor, stored, host)
    os.pwrite(streams.descriptor, bytes(50), host)
    assert streams.read(cache, 4) is None
    assert cache.counters()["used"] == 0
    os.pwrite(streams.descriptor, whole, host)
    assert streams.read(cache, 4) == CLUSTERS[4]


def test_a_file_that_cannot_be_read_is_refused(streams: Streams) -> None:
    cache = InflatedClusters(10 * SIZE)
    assert not cache.read_part(-1, 1, 0, SIZE, *streams.spans[0], 0, memoryview(bytearray(SIZE)))


@pytest.mark.parametrize("budget", [0, 2 * SIZE, 50 * SIZE])
def test_threads_read_right_bytes_while_clusters_come_and_go(streams: Streams, budget: int) -> None:
    cache = InflatedClusters(budget)
    wrong: list[int] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(1500):
            number, skip = chance.randrange(30), chance.randrange(SIZE)
            if streams.read(cache, number, skip, SIZE - skip) != CLUSTERS[number][skip:]:
                wrong.append(number)
            if chance.random() < 0.01:
                cache.trim()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    seen = cache.counters()
    assert not wrong
    assert seen["hits"] + seen["misses"] + seen["joined"] == 6 * 1500
    assert seen["used"] <= budget
