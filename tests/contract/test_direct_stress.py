"""Threads that write neighbouring, unaligned spans with O_DIRECT lose none of each other's bytes."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cowslice.storage import FileStorage

SIZE = 1 << 20


def cut(rng: random.Random, size: int) -> list[tuple[int, int]]:
    """Cut [0, size) into spans of odd and of aligned lengths, in random order."""
    spans, at = [], 0
    while at < size:
        length = min(rng.choice([1, 100, 512, 4095, 4096, 8192, rng.randrange(1, 30_000)]), size - at)
        spans.append((at, length))
        at += length
    rng.shuffle(spans)
    return spans


def write_and_check(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    wanted = rng.randbytes(SIZE)
    with FileStorage(path, "w", direct=True) as storage, ThreadPoolExecutor(4) as threads:

        def write(span: tuple[int, int]) -> bool:
            at, length = span
            storage.pwrite(at, wanted[at : at + length])
            return storage.read(at, length) == wanted[at : at + length]

        assert all(threads.map(write, cut(rng, SIZE)))
        assert storage.read(0, SIZE + 1) == wanted + b"\0"
        assert storage.length() == SIZE
    assert path.read_bytes() == wanted


def test_neighbouring_writes_lose_nothing(tmp_path: Path) -> None:
    for seed in range(3):
        write_and_check(tmp_path / "image", seed)


@pytest.mark.long
def test_neighbouring_writes_lose_nothing_many_times(tmp_path: Path) -> None:
    for seed in range(3, 150):
        write_and_check(tmp_path / "image", seed)
