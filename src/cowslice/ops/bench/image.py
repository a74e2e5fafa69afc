"""`qemu-img bench` for one image of the user's: how fast reads go, now, here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cowslice.errors import BadOption
from cowslice.ops.bench.engine import seconds_for, walk

if TYPE_CHECKING:
    from cowslice.image.image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """`count` reads of `length` bytes, `depth` at once, from `offset`, `step` bytes apart (0: `length`) or random."""

    count: int = 75_000
    depth: int = 64
    length: int = 4096
    step: int = 0
    offset: int = 0
    random: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("depth", 1), ("length", 1), ("step", 0), ("offset", 0)):
            if getattr(self, name) < least:
                raise BadOption(f"{name} is {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Seconds for all requests, and what the metadata cache did."""

    seconds: float
    requests: int
    bytes: int
    hits: int
    misses: int
    metadata_bytes: int

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def bench_image(disk: Image, options: BenchOptions) -> BenchResult:
    """Read as told and time it. Offsets wrap at the end of the disk. Raises BadOption and what reading raises."""
    if options.length > disk.size:
        raise BadOption(f"a read of {options.length} bytes is larger than the disk of {disk.size} bytes")
    offsets = _offsets(options, disk.size)
    before = disk.cache.statistics()
    took = max(
        seconds_for(disk, offsets, length=options.length, depth=options.depth),
        time.get_clock_info("perf_counter").resolution,
    )
    after = disk.cache.statistics()
    return BenchResult(
        took,
        options.count,
        options.count * options.length,
        after["hits"] - before["hits"],
        after["misses"] - before["misses"],
        after["bytes_read"] - before["bytes_read"],
    )


def _offsets(options: BenchOptions, size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    last = size - options.length
    if options.random:
        blocks = last // options.length + 1
        return np.random.default_rng(options.seed).integers(0, blocks, options.count, dtype=np.int64) * options.length
    walked = walk(options.step or options.length, size=size, start=0, requests=options.count, length=options.length)
    return np.minimum((walked + options.offset) % size, last)
