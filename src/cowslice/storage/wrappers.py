"""Storages over another storage: one that sees a window of it, one that may not grow, one that counts.

They know nothing of what lies below but its contract, so they stack in any order.
A wrapper owns what it wraps: closing it closes both.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cowslice.errors import BadOption, NoSpace, StorageError
from cowslice.storage.base import Storage, check_span
from cowslice.storage.spans import Span

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class WrappedStorage(Storage):
    """Pass everything on to `inner`, except its descriptor: who reads that would pass the wrapper by."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.name = inner.name
        self.writable = inner.writable
        self.alignment = inner.alignment
        self.read_gap = inner.read_gap

    def pread(self, offset: int, buffer: memoryview) -> int:
        return self.inner.pread(offset, buffer)

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        self.inner.pwrite(offset, data)

    def length(self) -> int:
        return self.inner.length()

    def truncate(self, length: int) -> None:
        self.inner.truncate(length)

    def sync(self) -> None:
        self.inner.sync()

    def zero(self, offset: int, length: int) -> None:
        self.inner.zero(offset, length)

    def allocate(self, offset: int, length: int) -> None:
        self.inner.allocate(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self.inner.discard(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Span]:
        return self.inner.extents(offset, length)

    def allocated(self) -> int | None:
        return self.inner.allocated()

    def close(self) -> None:
        self.inner.close()


class WindowStorage(WrappedStorage):
    """See `size` bytes of `inner` from `offset`, or all from there on, growing with it, if `size` is None.

    Raises BadOption for a window that does not lie inside. A window with a size does not grow: NoSpace.
    """

    def __init__(self, inner: Storage, *, offset: int = 0, size: int | None = None) -> None:
        super().__init__(inner)
        end, has = offset + (size or 0), inner.length()
        if offset < 0 or (size is not None and size < 0) or end > has:
            raise BadOption(
                f"window is {'the rest' if size is None else size} from offset {offset} (bytes), "
                f"expected one inside the {has} bytes of '{inner.name}'"
            )
        self._offset = offset
        self._size = size

    def pread(self, offset: int, buffer: memoryview) -> int:
        check_span(offset, len(buffer))
        inside = len(buffer) if self._size is None else max(min(len(buffer), self._size - offset), 0)
        return self.inner.pread(self._offset + offset, buffer[:inside]) if inside else 0

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        view = memoryview(data).cast("B")
        self._check_inside(offset, len(view))
        self.inner.pwrite(self._offset + offset, view)

    def length(self) -> int:
        has = self.inner.length()
        return max(has - self._offset, 0) if self._size is None else self._size

    def truncate(self, length: int) -> None:
        check_span(0, length)
        if self._size is None or not self.writable:
            self.inner.truncate(self._offset + length)
        elif length != self._size:
            raise StorageError(
                f"cannot resize '{self.name}' to {length} bytes: it is a window of {self._size} bytes",
                errno=errno.EINVAL,
                filename=self.name,
            )

    def zero(self, offset: int, length: int) -> None:
        self._check_inside(offset, length)
        self.inner.zero(self._offset + offset, length)

    def allocate(self, offset: int, length: int) -> None:
        self._check_inside(offset, length)
        self.inner.allocate(self._offset + offset, length)

    def discard(self, offset: int, length: int) -> None:
        check_span(offset, length)
        inside = max(min(length, self.length() - offset), 0)
        self.inner.discard(self._offset + offset, inside)

    def extents(self, offset: int, length: int) -> Iterator[Span]:
        check_span(offset, length)
        inside = max(min(length, self.length() - offset), 0)
        if inside:
            for span in self.inner.extents(self._offset + offset, inside):
                yield Span(span.offset - self._offset, span.length, span.data)
        if length > inside:
            yield Span(offset + inside, length - inside, False)

    def allocated(self) -> int | None:
        return self.inner.allocated() if not self._offset and self._size is None else None

    def fileno(self) -> int:
        return self.inner.fileno() if not self._offset and self._size is None else -1

    def _check_inside(self, offset: int, length: int) -> None:
        check_span(offset, length)
        if not self.writable:
            raise self._read_only("write to")
        if self._size is not None and offset + length > self._size:
            raise _no_space(self.name, offset + length, self._size)


class LimitedStorage(WrappedStorage):
    """Refuse, with NoSpace, whatever would make `inner` longer than `limit` bytes."""

    def __init__(self, inner: Storage, limit: int) -> None:
        super().__init__(inner)
        self.limit = limit

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        view = memoryview(data).cast("B")
        self._check_limit(offset, len(view))
        self.inner.pwrite(offset, view)

    def truncate(self, length: int) -> None:
        self._check_limit(0, length)
        self.inner.truncate(length)

    def zero(self, offset: int, length: int) -> None:
        self._check_limit(offset, length)
        self.inner.zero(offset, length)

    def allocate(self, offset: int, length: int) -> None:
        self._check_limit(offset, length)
        self.inner.allocate(offset, length)

    def _check_limit(self, offset: int, length: int) -> None:
        check_span(offset, length)
        if self.writable and length and offset + length > self.limit:
            raise _no_space(self.name, offset + length, self.limit)


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests and bytes since the storage was wrapped; a failed request is one too."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    zeros: int = 0
    discards: int = 0
    syncs: int = 0


class CountingStorage(WrappedStorage):
    """Count what passes through to `inner`."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._counts = Counts()
        self._lock = threading.Lock()

    def counts(self) -> Counts:
        """Return the counts as they are now, all of one moment."""
        return self._counts

    def pread(self, offset: int, buffer: memoryview) -> int:
        self._count(reads=1, read_bytes=len(buffer))
        return self.inner.pread(offset, buffer)

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        view = memoryview(data).cast("B")
        self._count(writes=1, written_bytes=len(view))
        self.inner.pwrite(offset, view)

    def zero(self, offset: int, length: int) -> None:
        self._count(zeros=1)
        self.inner.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self._count(discards=1)
        self.inner.discard(offset, length)

    def sync(self) -> None:
        self._count(syncs=1)
        self.inner.sync()

    def _count(self, **more: int) -> None:
        with self._lock:
            now = self._counts
            self._counts = replace(now, **{field: getattr(now, field) + n for field, n in more.items()})


def _no_space(name: str, end: int, limit: int) -> NoSpace:
    return NoSpace(
        f"cannot write to '{name}' up to byte {end}: it has {limit} bytes", errno=errno.ENOSPC, filename=name
    )
