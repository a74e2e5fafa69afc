"""A storage in memory: for tests, small images and anything that comes from elsewhere as bytes.

It does not know holes: every byte is stored.
Reads take no lock: array and length are swapped together, so no reader ever sees one half resized.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cowslice.errors import NoSpace
from cowslice.storage.base import Storage, check_span

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class MemoryStorage(Storage):
    """Hold a copy of `content` in memory. Raises NoSpace when memory for a write is not there."""

    def __init__(self, content: ReadableBuffer = b"", *, name: str = "memory", writable: bool = True) -> None:
        self.name = name
        self.writable = writable
        array = bytearray(content)
        self._held: tuple[bytearray, int] | None = (array, len(array))  # bytes past the length are always zeros
        self._lock = threading.Lock()

    def pread(self, offset: int, buffer: memoryview) -> int:
        check_span(offset, len(buffer))
        array, length = self._open("read")
        size = max(min(length - offset, len(buffer)), 0)
        buffer[:size] = memoryview(array)[offset : offset + size]
        return size

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        self._check_writable("write to")
        view = memoryview(data).cast("B")
        check_span(offset, len(view))
        with self._lock:
            array, length = self._open("write to")
            if view and offset + len(view) > length:
                array = self._resize(offset + len(view))
            array[offset : offset + len(view)] = view

    def truncate(self, length: int) -> None:
        self._check_writable("resize")
        check_span(0, length)
        with self._lock:
            self._resize(length)

    def sync(self) -> None:
        self._open("sync")

    def length(self) -> int:
        return self._open("measure")[1]

    def allocated(self) -> int:
        return self.length()

    def close(self) -> None:
        self._held = None

    def _open(self, doing: str) -> tuple[bytearray, int]:
        held = self._held
        if held is None:
            raise self._closed(doing)
        return held

    def _check_writable(self, doing: str) -> None:
        if not self.writable:
            raise self._read_only(doing)

    def _resize(self, length: int) -> bytearray:
        array, before = self._open("resize")
        if length < before:
            array[length:before] = bytes(before - length)
        elif length > len(array):
            array = self._larger(array, length)
        self._held = (array, length)
        return array

    def _larger(self, array: bytearray, length: int) -> bytearray:
        try:
            grown = bytearray(max(length, min(2 * len(array), length + (64 << 20))))  # appending stays linear
        except (MemoryError, OverflowError):
            raise NoSpace(f"cannot grow '{self.name}' to {length} bytes: not enough memory", errno=28) from None
        grown[: len(array)] = array
        return grown
