"""Our side of the measurement: the same walk through `read_many`, and through a plain file of equal size.

It does not know tables or peers. Requests go in batches into memory that is used again and again, as the peer's do.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cowslice.image.image import open_image
from cowslice.ops.bench.cells import Cell
from cowslice.units import MiB

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = {False: 256, True: 8192}  # requests handed over at once: alone, and with many under way
BATCH_BYTES = 32 * MiB  # that they may fill


class Reader(Protocol):
    """What is timed."""

    def read_many(self, offsets: NDArray[np.int64], length: int, out: memoryview, *, depth: int = 1) -> None: ...


@dataclass(frozen=True, slots=True)
class Timing:
    """Reads per second of a stretch, and what the metadata cache did meanwhile."""

    rate: float
    hit_ratio: float = 1.0
    metadata_bytes: int = 0


def walk(stride: int, *, size: int, start: int, requests: int, length: int) -> NDArray[np.int64]:
    """Offsets of requests number `start` and on: the multiples of `stride`, modulo the last place that fits."""
    numbers = np.arange(start, start + requests, dtype=np.uint64)
    return (numbers * np.uint64(stride) % np.uint64(size - size % length)).astype(np.int64)


def seconds_for(reader: Reader, offsets: NDArray[np.int64], *, length: int, depth: int) -> float:
    """Time to read at all offsets. The memory is aligned, so that unbuffered files are read straight into it."""
    batch = max(min(BATCH[depth > 1], BATCH_BYTES // length), 1)
    with mmap.mmap(-1, max(batch * length, mmap.PAGESIZE)) as memory:
        out = memoryview(memory)
        out[:] = bytes(len(out))  # first touch is not what we measure
        began = time.perf_counter()
        for first in range(0, len(offsets), batch):
            chosen = offsets[first : first + batch]
            reader.read_many(chosen, length, out[: len(chosen) * length], depth=depth)
        took = time.perf_counter() - began
        out.release()
    return took


def engine_timing(
    image: str, cell: Cell, offsets: NDArray[np.int64], *, length: int, depth: int, warm: int, direct: bool = False
) -> tuple[Timing, Timing]:
    """(cold, warm): the first `warm` requests on a cold map without warm-up; the rest after warm-up and those."""
    options: dict[str, Any] = {
        "l2_cache_size": cell.cache_bytes,
        "l2_cache_entry_size": cell.entry_bytes,
        "force_share": True,
        "direct": direct,
    }
    with open_image(image, warmup="off", **options) as disk:
        cold = _timed(disk, offsets[:warm], length=length, depth=depth)
    with open_image(image, warmup="full", **options) as disk:
        disk.wait_warm()
        seconds_for(disk, offsets[:warm], length=length, depth=depth)
        return cold, _timed(disk, offsets[warm:], length=length, depth=depth)


def ceiling_rate(raw: str, offsets: NDArray[np.int64], *, length: int, depth: int, direct: bool = False) -> float:
    """The same loop of plain reads on a raw file: no translation at all."""
    with open_image(raw, format="raw", warmup="off", force_share=True, direct=direct) as disk:
        seconds_for(disk, offsets[: len(offsets) // 8], length=length, depth=depth)
        return len(offsets) / seconds_for(disk, offsets, length=length, depth=depth)


def make_raw(path: str, size: int) -> None:
    """A hole of `size` bytes."""
    with open(path, "wb") as file:
        os.truncate(file.fileno(), size)


def _timed(disk: object, offsets: NDArray[np.int64], *, length: int, depth: int) -> Timing:
    before = disk.cache.statistics()  # type: ignore[attr-defined]
    took = seconds_for(disk, offsets, length=length, depth=depth)  # type: ignore[arg-type]
    after = disk.cache.statistics()  # type: ignore[attr-defined]
    looked = after["hits"] + after["misses"] - before["hits"] - before["misses"]
    hits = after["hits"] - before["hits"]
    return Timing(len(offsets) / took, hits / max(looked, 1), after["bytes_read"] - before["bytes_read"])
