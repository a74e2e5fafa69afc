"""Copy disks into one raw target: read in parallel, skip what is known to be zero, leave holes where zeros are found.

It does not know paths or terminals: the target is a storage or a stream that the caller made (rawtarget.py). On any
failure it raises, and whatever it wrote by then is the caller's to throw away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cowslice.errors import BadOption, CowsliceError
from cowslice.image.image import Image
from cowslice.image.layer import fill_zeros
from cowslice.ops.bytescan import data_runs
from cowslice.ops.offload import Offload
from cowslice.ops.pace import Pace, paced
from cowslice.ops.pump import Pump
from cowslice.ops.sources import zeros_at
from cowslice.processors import cores
from cowslice.units import SECTOR, MiB

# One request: large enough that Python costs nothing beside it, small enough to stay in the processor's caches.
CHUNK = 1 * MiB
MAX_WORKERS = 16
REMOTE_WORKERS = 8
MAX_SPARSE = 16 * MiB
SPARSE = 4096

Progress = Callable[[int, int], None]
Warn = Callable[[str], None]


class Target(Protocol):
    """What is written to. Offsets are bytes of the target; one call at a time per span, any number of threads."""

    ordered: bool

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`."""

    def zero(self, offset: int, length: int) -> None:
        """Make the span read as zeros."""

    def fileno(self) -> int:
        """A descriptor that holds the same bytes at the same offsets, -1 for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How to copy. `sparse`: bytes of zeros that become a hole, 0 for none. `salvage`: unreadable sectors become zeros.

    `workers` 0 chooses: as many as there are processors for local files, 8 where each read has to travel. `rate`: bytes
    of data in a second, 0 for any. `offload`: the system copies what lies plainly in files; zeros there stay data.
    """

    workers: int = 0
    sparse: int = SPARSE
    salvage: bool = False
    rate: int = 0
    offload: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= MAX_WORKERS:
            raise BadOption(f"the number of workers is {self.workers}, expected 0 to {MAX_WORKERS}")
        if self.rate < 0:
            raise BadOption(f"the rate is {self.rate} bytes in a second, expected 0 or more")
        if self.offload and self.salvage:
            raise BadOption("copy offload and salvage exclude each other: what cannot be read is found only by reading")
        if self.sparse % SECTOR or not 0 <= self.sparse <= MAX_SPARSE:
            raise BadOption(f"sparse size is {self.sparse}, expected 0 or a multiple of {SECTOR} up to {MAX_SPARSE}")


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`length` bytes at `start` of a source; `zero` when nothing need be read. `base` is where the source begins."""

    image: Image
    base: int
    start: int
    length: int
    zero: bool


def convert(
    sources: Sequence[Image], target: Target, options: ConvertOptions | None = None, *,
    progress: Progress | None = None, warn: Warn | None = None,
) -> None:
    """Copy the sources one behind another. `progress(done, total)` counts bytes.

    Raises the errors of reading and writing; the first one stops everything.
    """
    options = options or ConvertOptions()
    total = sum(image.size for image in sources)
    count = Count(total, progress)
    chunks = paced(_chunks(sources, count), Pace(options.rate), lambda chunk: 0 if chunk.zero else chunk.length,
                   lambda: pump.stopped)
    make = (lambda: _Offloader(target, count)) if options.offload and not target.ordered else (
        lambda: _Copier(target, options, pump, count, warn))
    pump: Pump[_Chunk] = Pump(chunks, make, workers_for(sources, options))
    count.add(0)
    pump.run()


def workers_for(sources: Sequence[Image], options: ConvertOptions) -> int:
    if options.workers:
        return options.workers
    local = all(layer.data.fileno() >= 0 for image in sources for layer in image.layers)
    return min(REMOTE_WORKERS, cores()) if local else REMOTE_WORKERS


class Count:
    """How much is done, told to the caller by whichever thread gets there."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, length: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done += length
            self._progress(self._done, self._total)


def _chunks(sources: Sequence[Image], count: Count) -> Iterator[_Chunk]:
    """Cut all sources into chunks that end at multiples of CHUNK; a long span of zeros is one chunk."""
    base = 0
    for image in sources:
        offset = 0
        while offset < image.size:
            zeros = zeros_at(image, offset)
            end = offset + zeros if zeros >= CHUNK or offset + zeros == image.size else offset
            if end > offset:
                yield _Chunk(image, base, offset, end - offset, True)
            else:
                end = min((offset // CHUNK + 1) * CHUNK, image.size)
                yield _Chunk(image, base, offset, end - offset, False)
            offset = end
        base += image.size


class _Copier:
    """One worker: its buffer is made once and reused for every chunk."""

    def __init__(
        self, target: Target, options: ConvertOptions, pump: Pump[_Chunk], count: Count, warn: Warn | None
    ) -> None:
        self._target = target
        self._options = options
        self._pump = pump
        self._count = count
        self._warn = warn
        self._buffer = memoryview(bytearray(CHUNK))

    def __call__(self, number: int, chunk: _Chunk) -> None:
        view = self._buffer[: 0 if chunk.zero else chunk.length]
        if not chunk.zero:
            self._read(chunk, view)
        if self._target.ordered:
            self._pump.wait_turn(number)
        self._write(chunk, view)
        if self._target.ordered:
            self._pump.end_turn()
        self._count.add(chunk.length)

    def _write(self, chunk: _Chunk, view: memoryview) -> None:
        at, sparse = chunk.base + chunk.start, self._options.sparse
        if not sparse or self._target.ordered:
            self._write_all(at, chunk, view)
            return
        done = 0
        for start, end in data_runs(view, sparse):
            if start > done:
                self._target.zero(at + done, start - done)
            self._target.write(at + start, view[start:end])
            done = end
        if done < chunk.length:
            self._target.zero(at + done, chunk.length - done)

    def _write_all(self, at: int, chunk: _Chunk, view: memoryview) -> None:
        """Write zeros too: to a stream, or because no holes are wanted."""
        if not chunk.zero:
            self._target.write(at, view)
            return
        for start in range(0, chunk.length, CHUNK):
            self._target.write(at + start, _ZEROS[: min(CHUNK, chunk.length - start)])

    def _read(self, chunk: _Chunk, view: memoryview) -> None:
        try:
            chunk.image.read_into(chunk.start, view)
        except CowsliceError:
            if not self._options.salvage:
                raise
            self._salvage(chunk, view)

    def _salvage(self, chunk: _Chunk, view: memoryview) -> None:
        """Read sector by sector; what cannot be read becomes zeros and is told once per run."""
        lost = 0
        for start in range(0, chunk.length, SECTOR):
            part = view[start : start + SECTOR]
            try:
                chunk.image.read_into(chunk.start + start, part)
            except CowsliceError:
                fill_zeros(part)
                lost += len(part)
        if lost and self._warn:
            self._warn(f"{lost} bytes between {chunk.start} and {chunk.start + chunk.length} of '{chunk.image.path}' "
                       "cannot be read and became zeros")


class _Offloader:
    """One worker that lets the system copy."""

    def __init__(self, target: Target, count: Count) -> None:
        self._target = target
        self._count = count
        self._offload = Offload(target.fileno(), target.write)

    def __call__(self, number: int, chunk: _Chunk) -> None:
        at = chunk.base + chunk.start
        if chunk.zero:
            self._target.zero(at, chunk.length)
        else:
            self._offload.copy(chunk.image, chunk.start, chunk.length, at)
        self._count.add(chunk.length)


_ZEROS = memoryview(bytes(CHUNK))
