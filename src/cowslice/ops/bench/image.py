"""`qemu-img bench` for one image of the user's: how fast reads or writes go, now, here."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cowslice.errors import BadOption
from cowslice.ops.bench.engine import BATCH, BATCH_BYTES, seconds_for, walk

if TYPE_CHECKING:
    from cowslice.image.image import Image

    Offsets = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """`count` requests of `length` bytes, `depth` at once, from `offset`, `step` bytes apart (0: `length`) or random.

    With `write` they write `pattern` bytes, and every `flush_interval` of them (0: none) are flushed: when those before
    have ended, or unless `drain` while the next are under way.
    """

    count: int = 75_000
    depth: int = 64
    length: int = 4096
    step: int = 0
    offset: int = 0
    random: bool = False
    seed: int = 0
    write: bool = False
    pattern: int = 0
    flush_interval: int = 0
    drain: bool = True

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("depth", 1), ("length", 1), ("step", 0), ("offset", 0)):
            if getattr(self, name) < least:
                raise BadOption(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not 0 <= self.pattern <= 255:
            raise BadOption(f"pattern is {self.pattern}, expected a byte, 0 to 255")
        if self.flush_interval and not self.write:
            raise BadOption(f"flush interval is {self.flush_interval}, expected one only where it is written")
        if self.flush_interval and self.flush_interval < self.depth:
            raise BadOption(f"flush interval is {self.flush_interval}, expected at least the depth of {self.depth}")


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
    """Read or write as told and time it. Offsets wrap at the end of the disk. Raises BadOption and what those raise."""
    if options.length > disk.size:
        raise BadOption(f"a request of {options.length} bytes is larger than the disk of {disk.size} bytes")
    offsets = _offsets(options, disk.size)
    before = disk.cache.statistics()
    if options.write:
        took = _seconds_to_write(disk, offsets, options)
    else:
        took = seconds_for(disk, offsets, length=options.length, depth=options.depth)
    took = max(took, time.get_clock_info("perf_counter").resolution)
    after = disk.cache.statistics()
    return BenchResult(
        took,
        options.count,
        options.count * options.length,
        after["hits"] - before["hits"],
        after["misses"] - before["misses"],
        after["bytes_read"] - before["bytes_read"],
    )


def _seconds_to_write(disk: Image, offsets: Offsets, options: BenchOptions) -> float:
    """Time to write at all offsets, in batches that end where a flush is due."""
    batch = max(min(BATCH[options.depth > 1], BATCH_BYTES // options.length), 1)
    due = options.flush_interval or len(offsets)
    data = memoryview(bytes([options.pattern]) * (min(batch, due) * options.length))
    with ThreadPoolExecutor(1) as flusher:
        began, flushes = time.perf_counter(), []
        for first in range(0, len(offsets), due):
            for at in range(first, min(first + due, len(offsets)), batch):
                chosen = offsets[at : min(at + batch, first + due)]
                disk.write_many(chosen, options.length, data[: len(chosen) * options.length], depth=options.depth)
            if options.flush_interval:
                flushes.append(flusher.submit(disk.flush))
                if options.drain:
                    flushes.pop().result()
        for flush in flushes:
            flush.result()
        return time.perf_counter() - began


def _offsets(options: BenchOptions, size: int) -> Offsets:
    last = size - options.length
    if options.random:
        blocks = last // options.length + 1
        return np.random.default_rng(options.seed).integers(0, blocks, options.count, dtype=np.int64) * options.length
    walked = walk(options.step or options.length, size=size, start=0, requests=options.count, length=options.length)
    return np.minimum((walked + options.offset) % size, last)
