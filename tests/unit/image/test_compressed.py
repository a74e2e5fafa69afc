"""The cache of decompressed clusters: what is read, what is shared, what is kept, and what happens when it fails."""

from __future__ import annotations

import os
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cowslice
from cowslice.codec.compression import Compression, compress_cluster
from cowslice.errors import BadOption, CorruptImage, OutOfRange, StorageError, UnsupportedImage
from cowslice.image import compressed
from cowslice.image.compressed import CompressedClusters, Part
from cowslice.image.decompressed import DecompressedCache
from cowslice.storage.memory import MemoryStorage
from cowslice.testing import peers

CLUSTER = 4096
COUNT = 40


def content(number: int) -> bytes:
    chance = random.Random(number)
    words = [chance.randbytes(6) for _ in range(40)]
    return b"".join(chance.choice(words) for _ in range(CLUSTER // 6 + 1))[:CLUSTER]


def pack(kind: Compression, clusters: list[bytes], start: int = 1000) -> tuple[bytes, list[tuple[int, int]]]:
    """Streams back to back from byte `start`, and the span of each as a descriptor has it, to a sector's end."""
    blob, spans = bytearray(start), []
    for cluster in clusters:
        payload = compress_cluster(kind, cluster)
        assert payload is not None
        offset = len(blob)
        blob += payload
        spans.append((offset, (len(blob) + 511) // 512 * 512 - offset))
    return bytes(blob), spans


CLUSTERS = [content(number) for number in range(COUNT)]
BLOB, SPANS = pack(Compression.DEFLATE, CLUSTERS)


class Watched(MemoryStorage):
    """Notes every read; `before` may delay it or raise."""

    def __init__(self, blob: bytes = BLOB) -> None:
        super().__init__(blob)
        self.reads: list[tuple[int, int]] = []
        self.before: Callable[[int, int], None] = lambda offset, length: None

    def pread(self, offset: int, buffer: memoryview) -> int:
        self.reads.append((offset, len(buffer)))
        self.before(offset, len(buffer))
        return super().pread(offset, buffer)


@pytest.fixture
def storage() -> Watched:
    return Watched()


@pytest.fixture(params=[1, 2, 4], ids=lambda n: f"{n} cores", autouse=True)
def number_of_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(compressed, "cores", lambda: request.param)
    monkeypatch.setattr(compressed, "LEAST_BATCH", 1)
    compressed._pool.cache_clear()
    yield request.param
    compressed._pool().shutdown()
    compressed._pool.cache_clear()


def layer(storage: Watched, shared: DecompressedCache | None = None, kind: int = 0) -> CompressedClusters:
    return CompressedClusters(storage, kind=kind, cluster_size=CLUSTER, shared=shared or DecompressedCache())


def in_threads(*works: Callable[[], object]) -> list[BaseException]:
    """Run all at once; return what they raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return errors


@pytest.mark.parametrize("kind", list(Compression))
def test_clusters_come_back_in_the_order_asked(kind: Compression) -> None:
    blob, spans = pack(kind, CLUSTERS)
    order = random.Random(1).sample(range(COUNT), COUNT)
    found = layer(Watched(blob), kind=kind).clusters([spans[n] for n in order])
    assert found == [CLUSTERS[n] for n in order]


def test_one_cluster_asked_twice_in_a_call_is_loaded_once(storage: Watched) -> None:
    shared = DecompressedCache()
    assert layer(storage, shared).clusters([SPANS[3], SPANS[4], SPANS[3]]) == [CLUSTERS[3], CLUSTERS[4], CLUSTERS[3]]
    assert (shared.statistics().misses, shared.statistics().joined) == (2, 1)


def test_parts_fill_exactly_their_targets(storage: Watched) -> None:
    out = bytearray(b"\xee" * 3000)
    view = memoryview(out)
    layer(storage).fill(
        [
            Part(*SPANS[0], skip=4000, target=view[0:96]),
            Part(*SPANS[9], skip=0, target=view[96:2000]),
            Part(*SPANS[0], skip=1, target=view[2000:2001]),
        ]
    )
    assert out[:96] == CLUSTERS[0][4000:]
    assert out[96:2000] == CLUSTERS[9][:1904]
    assert out[2000:] == CLUSTERS[0][1:2] + b"\xee" * 999


@pytest.mark.parametrize("gap", [10_000, 300])
def test_a_gap_is_read_through_only_if_the_storage_prefers_that(storage: Watched, gap: int) -> None:
    storage.read_gap = gap
    near = [SPANS[0], SPANS[2]]
    assert 300 < near[1][0] - sum(near[0]) < 10_000
    assert layer(storage).clusters(near) == [CLUSTERS[0], CLUSTERS[2]]
    assert len(storage.reads) == (1 if gap == 10_000 else 2)


def test_neighbours_are_read_together(storage: Watched, number_of_cores: int) -> None:
    layer(storage).clusters(SPANS)
    assert len(storage.reads) <= 2 * number_of_cores
    assert sum(length for _, length in storage.reads) < len(BLOB) + 512 * len(storage.reads)


def test_a_kept_cluster_is_not_read_again(storage: Watched) -> None:
    shared = DecompressedCache()
    clusters = layer(storage, shared)
    assert clusters.cluster(*SPANS[5]) is clusters.cluster(*SPANS[5])
    assert len(storage.reads) == 1
    seen = shared.statistics()
    assert (seen.hits, seen.misses, seen.reads, seen.read_bytes, seen.used) == (1, 1, 1, SPANS[5][1], CLUSTER)


def test_without_keep_nothing_stays(storage: Watched) -> None:
    shared = DecompressedCache()
    layer(storage, shared).clusters(SPANS, keep=False)
    assert shared.statistics().used == 0


def test_the_budget_is_never_exceeded_and_the_oldest_goes_first(storage: Watched) -> None:
    shared = DecompressedCache(3 * CLUSTER + 100)
    clusters = layer(storage, shared)
    for number in (0, 1, 2, 0, 3):
        clusters.cluster(*SPANS[number])
        assert shared.statistics().used <= shared.statistics().budget
    assert shared.statistics().evictions == 1
    storage.reads.clear()
    for number in (0, 2, 3):
        clusters.cluster(*SPANS[number])
    assert not storage.reads
    clusters.cluster(*SPANS[1])
    assert len(storage.reads) == 1


@pytest.mark.parametrize("budget", [0, CLUSTER - 1])
def test_a_budget_below_one_cluster_keeps_nothing_and_still_works(storage: Watched, budget: int) -> None:
    shared = DecompressedCache(budget)
    assert layer(storage, shared).clusters(SPANS) == CLUSTERS
    assert shared.statistics().used == 0


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(BadOption, match="-1"):
        DecompressedCache(-1)


def test_trim_gives_everything_back(storage: Watched) -> None:
    shared = DecompressedCache()
    layer(storage, shared).clusters(SPANS)
    assert shared.trim() == COUNT * CLUSTER
    assert shared.statistics().used == 0
    assert layer(storage, shared).clusters(SPANS) == CLUSTERS


def test_layers_that_share_a_cache_do_not_mix_their_clusters() -> None:
    other_clusters = [content(number + 1000) for number in range(COUNT)]
    blob, spans = pack(Compression.DEFLATE, other_clusters)
    shared = DecompressedCache()
    one, other = layer(Watched(), shared), layer(Watched(blob), shared)
    both = set(SPANS) & set(spans)
    assert both
    for span in both:
        assert one.cluster(*span) == CLUSTERS[SPANS.index(span)]
        assert other.cluster(*span) == other_clusters[spans.index(span)]


def test_two_threads_that_want_one_cluster_decompress_it_once(storage: Watched) -> None:
    shared, reading, may_go_on = DecompressedCache(0), threading.Event(), threading.Event()
    clusters = layer(storage, shared)

    def slow(offset: int, length: int) -> None:
        reading.set()
        assert may_go_on.wait(30)

    storage.before = slow

    def second() -> None:
        assert reading.wait(30)
        threading.Timer(0.05, may_go_on.set).start()
        assert clusters.cluster(*SPANS[7]) == CLUSTERS[7]

    assert not in_threads(lambda: clusters.cluster(*SPANS[7]), second)
    assert len(storage.reads) == 1
    assert shared.statistics().joined == 1


def test_a_slow_cluster_does_not_hold_up_another(storage: Watched) -> None:
    clusters, may_go_on = layer(storage), threading.Event()

    def slow(offset: int, length: int) -> None:
        if offset == SPANS[7][0]:
            assert may_go_on.wait(30)

    storage.before = slow

    def second() -> None:
        assert clusters.cluster(*SPANS[20]) == CLUSTERS[20]
        may_go_on.set()

    assert not in_threads(lambda: clusters.cluster(*SPANS[7]), second)


def test_threads_that_want_overlapping_clusters_never_wait_in_a_circle(storage: Watched) -> None:
    clusters = layer(storage, DecompressedCache(0))
    wrong: list[int] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(30):
            numbers = chance.choices(range(COUNT), k=10)
            if clusters.clusters([SPANS[n] for n in numbers]) != [CLUSTERS[n] for n in numbers]:
                wrong.append(seed)

    assert not in_threads(*(lambda seed=seed: work(seed) for seed in range(6)))
    assert not wrong


@pytest.mark.parametrize("damaged", [b"", b"\xff" * 200, bytes(200)])
def test_a_damaged_stream_is_named_by_its_place(damaged: bytes) -> None:
    blob = bytearray(BLOB)
    blob[SPANS[4][0] : SPANS[4][0] + len(damaged)] = damaged
    if not damaged:
        del blob[SPANS[4][0] + 10 :]  # the file ends inside the stream
    clusters = layer(Watched(bytes(blob)))
    with pytest.raises(CorruptImage, match=f"{SPANS[4][0]:#x}") as caught:
        clusters.cluster(*SPANS[4])
    assert caught.value.offset == SPANS[4][0]
    assert caught.value.structure == "compressed cluster"


def test_a_damaged_stream_fails_only_those_who_want_it() -> None:
    blob = bytearray(BLOB)
    blob[SPANS[4][0]] = 0xFF
    clusters = layer(Watched(bytes(blob)))
    with pytest.raises(CorruptImage):
        clusters.clusters(SPANS)
    assert clusters.clusters(SPANS[:4] + SPANS[5:]) == CLUSTERS[:4] + CLUSTERS[5:]


def test_a_failed_read_is_forgotten_and_spares_the_neighbours(storage: Watched) -> None:
    shared = DecompressedCache()
    clusters = layer(storage, shared)
    bad = SPANS[6][0] + 50  # inside the stream of 6 and in no other's span

    def broken(offset: int, length: int) -> None:
        if offset <= bad < offset + length:
            raise StorageError("the disk is gone", errno=5)

    storage.before = broken
    with pytest.raises(StorageError, match="gone"):
        clusters.clusters(SPANS)
    assert shared.statistics().used >= (COUNT - 2) * CLUSTER
    storage.before = lambda offset, length: None
    assert clusters.clusters(SPANS) == CLUSTERS


def test_all_who_wait_for_a_failed_read_hear_of_it(storage: Watched) -> None:
    clusters, reading, may_fail = layer(storage), threading.Event(), threading.Event()

    def broken(offset: int, length: int) -> None:
        reading.set()
        assert may_fail.wait(30)
        raise StorageError("the disk is gone", errno=5)

    storage.before = broken

    def second() -> None:
        assert reading.wait(30)
        threading.Timer(0.05, may_fail.set).start()
        clusters.cluster(*SPANS[7])

    errors = in_threads(lambda: clusters.cluster(*SPANS[7]), second)
    assert [type(error) for error in errors] == [StorageError] * 2


def test_who_waited_for_an_interrupted_load_loads_it_himself(storage: Watched) -> None:
    clusters, reading = layer(storage), threading.Event()
    waiting = threading.Event()

    def interrupted(offset: int, length: int) -> None:
        storage.before = lambda offset, length: None
        reading.set()
        assert waiting.wait(30)
        raise KeyboardInterrupt

    storage.before = interrupted
    found: list[bytes] = []

    def second() -> None:
        assert reading.wait(30)
        threading.Timer(0.05, waiting.set).start()
        found.append(clusters.cluster(*SPANS[7]))

    errors = in_threads(lambda: clusters.cluster(*SPANS[7]), second)
    assert [type(error) for error in errors] == [KeyboardInterrupt]
    assert found == [CLUSTERS[7]]


def test_an_unknown_kind_is_unsupported(storage: Watched) -> None:
    with pytest.raises(UnsupportedImage, match="type 9"):
        layer(storage, kind=9).cluster(*SPANS[0])


@pytest.mark.parametrize("span", [(-1, 512), (0, 0), (0, -5)])
def test_a_span_that_cannot_hold_a_stream_is_refused(storage: Watched, span: tuple[int, int]) -> None:
    with pytest.raises(OutOfRange):
        layer(storage).cluster(*span)


def test_a_forked_child_decompresses_with_threads_of_its_own(storage: Watched) -> None:
    clusters = layer(storage, DecompressedCache(0))
    assert clusters.clusters(SPANS) == CLUSTERS
    child = os.fork()
    if child == 0:
        os._exit(0 if clusters.clusters(SPANS) == CLUSTERS else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_large_request_holds_no_clusters_that_nobody_else_wants() -> None:
    large = [content(number % 4) * 16 for number in range(COUNT)]
    blob, spans = pack(Compression.DEFLATE, large)
    clusters = CompressedClusters(MemoryStorage(blob), kind=0, cluster_size=16 * CLUSTER, shared=DecompressedCache(0))
    target = memoryview(bytearray(16 * CLUSTER))
    parts = [Part(*span, skip=0, target=target) for span in spans]
    tracemalloc.start()
    clusters.fill(parts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < COUNT * 16 * CLUSTER // 2


@peers.needs("qemu-img")
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_read_over_many_clusters_of_an_image_loads_them_together(kind: str, tmp_path: Path) -> None:
    """Compressed runs broken by a hole and by clusters of the backing file, as qemu-img lays them out."""
    base, top, raw = tmp_path / "base.qcow2", tmp_path / "top.qcow2", tmp_path / "raw"
    chunks = [content(number) * 16 if number != 11 else bytes(65536) for number in range(24)]
    raw.write_bytes(b"".join(chunks))
    options = f"compression_type={kind}"
    peers.qemu_img("convert", "-c", "-O", "qcow2", "-o", options, raw, base)
    chunks[5] = content(99) * 16
    raw.write_bytes(b"".join(chunks))
    peers.qemu_img("convert", "-c", "-O", "qcow2", "-o", options, "-B", base, "-F", "qcow2", raw, top)
    with cowslice.open(top) as disk:
        assert disk.read(100, disk.size - 200) == raw.read_bytes()[100:-100]
        seen = disk.decompressed.statistics()
        assert (seen.hits, seen.misses) == (0, 23)
        assert seen.reads < 23 or disk.decompressed.inflated.counters()["misses"] == 23  # each by itself there
        assert disk.read(0, disk.size) == raw.read_bytes()
        assert disk.decompressed.statistics().misses == 23
    with cowslice.open(top, decompressed_cache_size=0) as disk:
        assert disk.read(0, disk.size) == raw.read_bytes()
        assert disk.decompressed.statistics().used == 0
