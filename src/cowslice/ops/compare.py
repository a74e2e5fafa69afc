"""Tell whether two disks have the same content, reading in parallel only what cannot be known from the maps.

It does not know terminals. A longer disk is the same as a shorter one when the rest of it reads as zeros.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cowslice.errors import CowsliceError
from cowslice.image.image import Image
from cowslice.image.mapping import Extent
from cowslice.ops.bytescan import data_runs, first_difference
from cowslice.ops.pump import Pump
from cowslice.storage.base import Storage
from cowslice.units import SECTOR, MiB

CHUNK = 1 * MiB  # two buffers of it for each worker
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first one found: `what` is "content", "status" or "size"; `offset` in bytes, at the start of its sector."""

    what: str
    offset: int


@dataclass(frozen=True, slots=True)
class CompareResult:
    """`difference` is None for equal disks. `sizes_differ` may be true all the same: then the rest is zeros."""

    difference: Difference | None
    sizes_differ: bool


class MapFailed(Exception):
    """A map could not be read; the cause is the CowsliceError."""


class ReadFailed(Exception):
    """Content could not be read; the cause is the CowsliceError."""


def compare(
    one: Image, other: Image, *, strict: bool = False, workers: int = 2, progress: Progress | None = None
) -> CompareResult:
    """Compare two disks. `strict`: sizes and the state of every extent must be the same too.

    Raises MapFailed or ReadFailed. `progress(done, total)` counts bytes.
    """
    sizes_differ = one.size != other.size
    if strict and sizes_differ:
        return CompareResult(Difference("size", min(one.size, other.size)), True)
    run = _Run(one, other, strict=strict, progress=progress)
    Pump(run.work(), lambda: _Comparer(run), workers).run()
    return CompareResult(run.difference, sizes_differ)


@dataclass(frozen=True, slots=True)
class _Work:
    """Guest bytes to read: of both disks, or of one that must be all zeros (`second` None)."""

    first: Image
    second: Image | None
    start: int
    length: int


class _Run:
    """One comparison under way: the walk over both maps, and the first difference so far."""

    def __init__(self, one: Image, other: Image, *, strict: bool, progress: Progress | None) -> None:
        self.one = one
        self.other = other
        self.strict = strict
        self.difference: Difference | None = None
        self._progress = progress
        self._lock = threading.Lock()
        self._total = max(one.size, other.size)
        self._files = [[_identity(layer.data) for layer in image.layers] for image in (one, other)]

    def work(self) -> Iterator[_Work]:
        """Walk both maps and yield what must be read, in order; ends behind a difference."""
        common = min(self.one.size, self.other.size)
        for start, left, right in _paired(_extents(self.one, 0, common), _extents(self.other, 0, common)):
            if self.difference is not None:
                return
            self._tell(start)
            if self.strict and _state(left) != _state(right):
                self.found("status", start)
                return
            yield from self._to_read(start, left, right)
        longer = self.one if self.one.size > common else self.other
        for extent in _extents(longer, common, longer.size - common):
            self._tell(extent.start)
            if extent.present and not extent.zero:
                yield from _cut(longer, None, extent.start, extent.length)
        self._tell(self._total)

    def _to_read(self, start: int, left: Extent, right: Extent) -> Iterator[_Work]:
        length = min(left.end, right.end) - start
        if (left.zero and right.zero) or self._same_bytes(left, right):
            return
        if left.zero:
            yield from _cut(self.other, None, start, length)
        elif right.zero:
            yield from _cut(self.one, None, start, length)
        else:
            yield from _cut(self.one, self.other, start, length)

    def _same_bytes(self, left: Extent, right: Extent) -> bool:
        """Whether both are the same bytes of the same file, as with two overlays of one backing file."""
        if left.offset is None or right.offset is None:
            return False
        file = self._files[0][left.depth]
        same = file is not None and file == self._files[1][right.depth]
        return same and left.offset - left.start == right.offset - right.start

    def found(self, what: str, offset: int) -> None:
        """Keep the lowest difference. Work before it goes on: it began earlier."""
        with self._lock:
            if self.difference is None or offset < self.difference.offset:
                self.difference = Difference(what, offset)

    def _tell(self, done: int) -> None:
        if self._progress:
            self._progress(done, self._total)


class _Comparer:
    """One worker with its two buffers."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._left = memoryview(bytearray(CHUNK))
        self._right = memoryview(bytearray(CHUNK))

    def __call__(self, number: int, work: _Work) -> None:
        if self._run.difference is not None and self._run.difference.offset <= work.start:
            return
        left = self._left[: work.length]
        _read(work.first, work.start, left)
        if work.second is None:
            runs = data_runs(left, SECTOR)
            at = runs[0][0] if runs else -1
        else:
            right = self._right[: work.length]
            _read(work.second, work.start, right)
            at = first_difference(left, right)
        if at >= 0:
            self._run.found("content", work.start + at // SECTOR * SECTOR)


def _read(image: Image, start: int, view: memoryview) -> None:
    try:
        image.read_into(start, view)
    except CowsliceError as error:
        raise ReadFailed(str(error)) from error


def _extents(image: Image, start: int, length: int) -> Iterator[Extent]:
    try:
        yield from image.extents(start, length)
    except CowsliceError as error:
        raise MapFailed(str(error)) from error


def _paired(left: Iterator[Extent], right: Iterator[Extent]) -> Iterator[tuple[int, Extent, Extent]]:
    """(start, extent of the one, extent of the other) for each span in which both stay the same."""
    one, other, start = next(left, None), next(right, None), 0
    while one is not None and other is not None:
        yield start, one, other
        start = min(one.end, other.end)
        if one.end == start:
            one = next(left, None)
        if other.end == start:
            other = next(right, None)


def _cut(first: Image, second: Image | None, start: int, length: int) -> Iterator[_Work]:
    end = start + length
    while start < end:
        step = min(end - start, CHUNK - start % CHUNK)
        yield _Work(first, second, start, step)
        start += step


def _identity(storage: Storage) -> tuple[int, int] | None:
    """What tells an open local file from every other; None for what is no local file."""
    descriptor = storage.fileno()
    if descriptor < 0:
        return None
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _state(extent: Extent) -> tuple[bool, ...]:
    return extent.present, extent.zero, extent.data, extent.compressed, extent.offset is not None
