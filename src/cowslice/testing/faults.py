"""Storages that misbehave on purpose: they fail, they are slow, they hold requests until the test lets go.

They know nothing of what is read through them, and measure no time. None has a descriptor: every request passes here.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cowslice.errors import StorageError
from cowslice.storage.base import Storage
from cowslice.storage.wrappers import CountingStorage, Counts, WrappedStorage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Counts", "CountingStorage", "Fault", "FaultyStorage", "HeldStorage", "SlowStorage"]

Operation = Literal["pread", "pwrite", "truncate", "sync", "zero", "discard"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What fails: an operation that touches [offset, end), after `skip` such requests succeeded, `times` times."""

    operation: Operation
    offset: int = 0
    end: int = 1 << 63
    skip: int = 0
    times: int = 1 << 63
    code: int = errno.EIO


class FaultyStorage(WrappedStorage):
    """Raise StorageError for the requests that a fault names. A failed request does nothing at all."""

    def __init__(self, inner: Storage, *faults: Fault) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._met: list[tuple[Fault, list[int]]] = []
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Let this fail too, from now on."""
        with self._lock:
            self._met.append((fault, [0]))

    def heal(self) -> None:
        """Let nothing fail from now on."""
        with self._lock:
            self._met.clear()

    @property
    def met(self) -> int:
        """How many requests a fault was about, those that it let pass too; of the fault that has the most."""
        with self._lock:
            return max((met[0] for _, met in self._met), default=0)

    def pread(self, offset: int, buffer: memoryview) -> int:
        self._meet("pread", offset, len(buffer))
        return self.inner.pread(offset, buffer)

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        view = memoryview(data).cast("B")
        self._meet("pwrite", offset, len(view))
        self.inner.pwrite(offset, view)

    def truncate(self, length: int) -> None:
        self._meet("truncate", length, 1)
        self.inner.truncate(length)

    def sync(self) -> None:
        self._meet("sync", 0, 1 << 63)
        self.inner.sync()

    def zero(self, offset: int, length: int) -> None:
        self._meet("zero", offset, length)
        self.inner.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self._meet("discard", offset, length)
        self.inner.discard(offset, length)

    def _meet(self, operation: Operation, offset: int, length: int) -> None:
        with self._lock:
            due = [fault for fault, met in self._met if _is_due(fault, met, operation, offset, length)]
        if due:
            error = OSError(due[0].code, os.strerror(due[0].code))
            raise StorageError.of(error, f"{operation} {length} bytes at offset {offset} of", self.name)


def _is_due(fault: Fault, met: list[int], operation: Operation, offset: int, length: int) -> bool:
    """Whether this request fails; counts it in `met` if it is one that the fault is about."""
    if operation != fault.operation or offset >= fault.end or offset + length <= fault.offset:
        return False
    met[0] += 1
    return fault.skip < met[0] <= fault.skip + fault.times


class SlowStorage(WrappedStorage):
    """Sleep before each read and write, without the GIL and without a lock: slow ones pass side by side."""

    def __init__(self, inner: Storage, *, read_seconds: float = 0.0, write_seconds: float = 0.0) -> None:
        super().__init__(inner)
        self.read_seconds = read_seconds
        self.write_seconds = write_seconds

    def pread(self, offset: int, buffer: memoryview) -> int:
        time.sleep(self.read_seconds)
        return self.inner.pread(offset, buffer)

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        time.sleep(self.write_seconds)
        self.inner.pwrite(offset, data)


class HeldStorage(WrappedStorage):
    """Hold every read until `release`; `wait_for(n)` returns once n of them stand waiting side by side.

    No wait is longer than `patience` seconds, so that a test which would hang fails instead.
    """

    def __init__(self, inner: Storage, *, patience: float = 60.0) -> None:
        super().__init__(inner)
        self.patience = patience
        self.held: list[tuple[int, int]] = []  # (offset, length) of the reads that wait now
        self._changed = threading.Condition()
        self._open = False
        self._releases = 0

    def pread(self, offset: int, buffer: memoryview) -> int:
        with self._changed:
            if not self._open:
                self._wait_in_line((offset, len(buffer)))
        return self.inner.pread(offset, buffer)

    def wait_for(self, number: int) -> None:
        """Wait until at least `number` reads are held. Raises AssertionError if they do not come."""
        with self._changed:
            came = self._changed.wait_for(lambda: len(self.held) >= number, self.patience)
            assert came, f"{number} reads expected to wait together, {len(self.held)} do: {self.held}"

    def release(self) -> None:
        """Let all held reads and every later one go on."""
        with self._changed:
            self._open = True
            self._releases += 1
            self._changed.notify_all()

    def hold(self) -> None:
        """Hold reads again from now on."""
        with self._changed:
            self._open = False

    def _wait_in_line(self, span: tuple[int, int]) -> None:
        before = self._releases  # not `_open`: the test may hold again before this thread has woken
        self.held.append(span)
        self._changed.notify_all()
        try:
            let_go = self._changed.wait_for(lambda: self._releases > before, self.patience)
            assert let_go, f"the read of {span[1]} bytes at offset {span[0]} was never released"
        finally:
            self.held.remove(span)
