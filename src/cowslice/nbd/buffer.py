"""Bytes that came in and were not understood yet.

It knows no message. Memory is bounded by whoever takes from it: nothing is kept beyond what was put in.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

Bytes = bytes | bytearray | memoryview


class Inbox:
    """A queue of bytes: put at the end, take whole fields from the front."""

    __slots__ = ("_bytes", "_skip")

    def __init__(self, leftover: Bytes = b"") -> None:
        self._bytes = bytearray(leftover)
        self._skip = 0

    def __len__(self) -> int:
        return len(self._bytes)

    def put(self, data: Bytes) -> None:
        """Add bytes; they are copied. Those that are to be skipped are never stored."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = memoryview(data)[skipped:]
        self._bytes += data

    def skip(self, length: int) -> None:
        """Throw away the next `length` bytes, those that are here and those that still come."""
        here = min(length, len(self._bytes))
        del self._bytes[:here]
        self._skip += length - here

    @property
    def skipping(self) -> bool:
        """True while bytes that are to be thrown away have not all come."""
        return self._skip > 0

    def take(self, length: int) -> bytes | None:
        """The next `length` bytes, or None while they are not all here."""
        if len(self._bytes) < length:
            return None
        taken = bytes(memoryview(self._bytes)[:length])
        del self._bytes[:length]
        return taken

    def take_into(self, target: memoryview) -> int:
        """Move as many bytes as are here and fit to the start of `target`; their number."""
        moved = min(len(target), len(self._bytes))
        target[:moved] = memoryview(self._bytes)[:moved]
        del self._bytes[:moved]
        return moved

    def peek(self, layout: Struct) -> tuple[Any, ...] | None:
        """The fields at the front, which stay, or None while they are not all here."""
        return layout.unpack_from(self._bytes) if len(self._bytes) >= layout.size else None

    def take_fields(self, layout: Struct) -> tuple[Any, ...] | None:
        """The fields at the front, or None while they are not all here."""
        fields = self.peek(layout)
        if fields is not None:
            del self._bytes[: layout.size]
        return fields

    def take_all(self) -> bytes:
        """Everything that is left."""
        taken = bytes(self._bytes)
        self._bytes.clear()
        return taken
