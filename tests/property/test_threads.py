"""Many threads read one image through a cache that is far too small, and every byte is right."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cowslice
from cowslice.ops.layout import Layout, populated_content, write_populated_image
from cowslice.testing import peers, recipes
from cowslice.testing.fixtures import ORDINARY, Fixture
from cowslice.units import KiB, MiB

THREADS = 8
READS = 250
SIZE = 48 * MiB + 512
TINY = 16 * KiB  # of about 100 KiB of tables, with the directory and the policy's own memory inside
LENGTHS = (1, 512, 513, 4096, 8192, 100_000)


@pytest.fixture(scope="module", params=["sequential", "random", "fragments"])
def populated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("threads") / "image"
    layout: Layout = request.param
    write_populated_image(path, size=SIZE, cluster_bits=12, layout=layout, fragment_bytes=16 * KiB, populate=True)
    yield path
    path.unlink()


def read_from_many_threads(read: Callable[[random.Random], None], threads: int = THREADS) -> None:
    """Start them all at one moment; the first error of any of them is raised."""
    together = threading.Barrier(threads)

    def work(number: int) -> None:
        chooser = random.Random(number)
        together.wait()
        for _ in range(READS):
            read(chooser)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, number) for number in range(threads)]:
            done.result()


def _verify(disk: cowslice.Image, chooser: random.Random) -> None:
    length = chooser.choice(LENGTHS)
    offset = chooser.randrange(disk.size - length + 1)
    assert disk.read(offset, length) == populated_content(offset, length), (offset, length)


@pytest.mark.parametrize("policy", ["clock2q+", "lru"])
@pytest.mark.parametrize("warmup", ["off", "full"])
def test_every_byte_is_right_through_a_tiny_cache(populated: Path, policy: str, warmup: str) -> None:
    with cowslice.open(
        populated, l2_cache_size=TINY, l2_cache_entry_size=512, policy=policy, warmup=warmup
    ) as disk:
        read_from_many_threads(lambda chooser: _verify(disk, chooser))
        told = disk.cache.statistics()
    assert told["bytes_used"] <= told["budget"]


def test_a_cache_that_is_too_small_evicts_and_is_right_all_the_same(tmp_path: Path) -> None:
    write_populated_image(tmp_path / "image", size=SIZE, cluster_bits=12, layout="random", populate=True)
    with cowslice.open(tmp_path / "image", l2_cache_size=TINY, l2_cache_entry_size=512, warmup="off") as disk:
        read_from_many_threads(lambda chooser: _verify(disk, chooser))
        assert disk.cache.statistics()["evictions"] > 100


def test_batches_from_many_threads_are_right(populated: Path) -> None:
    with cowslice.open(populated, l2_cache_size=TINY, l2_cache_entry_size=512, warmup="off") as disk:

        def read(chooser: random.Random) -> None:
            offsets = np.array([chooser.randrange(SIZE // 4096) * 4096 for _ in range(32)], dtype=np.int64)
            out = bytearray(32 * 4096)
            disk.read_many(offsets, 4096, out, depth=chooser.choice((1, 4)))
            assert bytes(out) == b"".join(populated_content(offset, 4096) for offset in offsets.tolist())

        read_from_many_threads(read)


def test_memory_given_back_meanwhile_costs_only_time(populated: Path) -> None:
    with cowslice.open(populated, l2_cache_size=256 * KiB, l2_cache_entry_size=512) as disk:

        def read(chooser: random.Random) -> None:
            if chooser.random() < 0.05:
                disk.cache.trim()
            _verify(disk, chooser)

        read_from_many_threads(read)


def test_extents_and_bytes_agree_while_others_read(populated: Path) -> None:
    with cowslice.open(populated, l2_cache_size=TINY, l2_cache_entry_size=512, warmup="off") as disk, cowslice.open(
        populated
    ) as calm:
        expected = list(calm.extents(0, 4 * MiB))

        def read(chooser: random.Random) -> None:
            if chooser.random() < 0.05:
                assert list(disk.extents(0, 4 * MiB)) == expected
            _verify(disk, chooser)

        read_from_many_threads(read, threads=4)


def test_closing_meanwhile_ends_every_reader_with_closed_and_nothing_else(populated: Path) -> None:
    for seed in range(20):
        disk = cowslice.open(populated, l2_cache_size=TINY, l2_cache_entry_size=512)
        errors: list[BaseException] = []
        readers = [threading.Thread(target=_read_until_closed, args=(disk, seed * 4 + n, errors)) for n in range(4)]
        for reader in readers:
            reader.start()
        _verify(disk, random.Random(seed))
        disk.close()
        for reader in readers:
            reader.join(timeout=60)
        assert not any(reader.is_alive() for reader in readers)
        assert errors == []


def _read_until_closed(disk: cowslice.Image, seed: int, errors: list[BaseException]) -> None:
    chooser = random.Random(seed)
    try:
        while True:
            _verify(disk, chooser)
    except cowslice.Closed:
        return
    except BaseException as error:
        errors.append(error)


RICH = replace(
    ORDINARY, cluster_size=4096, compression="zstd", backing="chain", snapshots="one", ending="partial", content="zeros"
)
SUBCLUSTERS = replace(
    ORDINARY, cluster_size=16384, compression="zlib", l2="extended", backing="chain", content="discards"
)
NARROW: dict[str, Any] = {"l2_cache_size": TINY, "l2_cache_entry_size": 512, "warmup": "off"}


@pytest.mark.parametrize("fixture", [RICH, SUBCLUSTERS], ids=lambda fixture: fixture.name)
@pytest.mark.parametrize("options", [{}, NARROW], ids=["default", "tiny"])
@peers.needs("qemu-img", "qemu-io")
def test_a_chain_with_everything_in_it_is_right_from_many_threads(
    tmp_path: Path, fixture: Fixture, options: dict[str, Any]
) -> None:
    made = recipes.make(fixture, tmp_path)
    truth = bytes(made.guest.content)
    with cowslice.open(made.path, **options) as disk:

        def read(chooser: random.Random) -> None:
            length = chooser.choice(LENGTHS)
            offset = chooser.randrange(disk.size - length + 1)
            assert disk.read(offset, length) == truth[offset : offset + length], (offset, length)

        read_from_many_threads(read)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
def test_sixteen_threads_for_long(tmp_path: Path, seed: int) -> None:
    bits = (9, 12, 14, 16, 12, 9)[seed]
    path = tmp_path / "image"
    write_populated_image(
        path, size=96 * MiB, cluster_bits=bits, layout="random", extended_l2=bits >= 14, populate=True, seed=seed
    )
    with cowslice.open(path, l2_cache_size=64 * KiB, l2_cache_entry_size=512, warmup="off") as disk:

        def read(chooser: random.Random) -> None:
            for _ in range(40):
                offset = chooser.randrange(disk.size - 4096)
                assert disk.read(offset, 4096) == populated_content(offset, 4096, seed=seed)

        read_from_many_threads(read, threads=16)
