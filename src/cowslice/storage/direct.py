"""Transfers on a descriptor opened with O_DIRECT, for callers whose spans are not aligned.

It does not know storages. Whole blocks go straight to the caller's memory where the kernel accepts its address, and
through an aligned bounce buffer of the thread where it does not. Writes that are not whole blocks go through the page
cache: the kernel keeps both views of one file the same, because `alignment` is never smaller than a page.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading

from cowslice.storage.posix import logical_block_size, pwrite_all
from cowslice.units import KiB, round_up

BOUNCE = 512 * KiB  # bytes a thread keeps; larger transfers go in pieces of it


def aligned_buffer(length: int) -> memoryview:
    """Return a zeroed buffer of `length` bytes on a page boundary, fit for O_DIRECT without a copy."""
    return memoryview(mmap.mmap(-1, max(length, 1)))[:length]


class DirectIO:
    """Reads and writes of any span over a descriptor that accepts only aligned ones. Owns its second descriptor."""

    def __init__(self, descriptor: int, *, device: bool, writable: bool) -> None:
        self.alignment = max(mmap.PAGESIZE, logical_block_size(descriptor) if device else 0)
        self._fd = descriptor
        self._buffered = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC) if writable else -1
        self._thread = threading.local()

    def close(self) -> None:
        descriptor, self._fd, self._buffered = self._buffered, -1, -1
        if descriptor >= 0:
            os.close(descriptor)

    def pread(self, offset: int, buffer: memoryview) -> int:
        """Fill the buffer; return the bytes read, fewer only at the end of the file."""
        if self._is_aligned(offset, len(buffer)):
            try:
                return self._pread_blocks(offset, buffer)
            except OSError as error:
                if error.errno != errno.EINVAL:  # the address was not aligned either
                    raise
        return self._pread_bounced(offset, buffer)

    def pwrite(self, offset: int, data: memoryview) -> None:
        """Write all of the data: whole blocks around the page cache, the pieces before and after through it."""
        end = offset + len(data)
        first = min(round_up(offset, self.alignment), end)
        last = max(end - end % self.alignment, first)
        if first > offset:
            pwrite_all(self._buffered, data[: first - offset], offset)
        if last > first:
            self._pwrite_blocks(first, data[first - offset : last - offset])
        if end > last:
            pwrite_all(self._buffered, data[last - offset :], last)

    def _is_aligned(self, offset: int, length: int) -> bool:
        return not (offset | length) & (self.alignment - 1)

    def _pread_blocks(self, offset: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            more = os.preadv(self._fd, (buffer[done:],), offset + done)
            done += more
            if not more or done % self.alignment:  # a piece of a block: the file ends in it
                break
        return done

    def _pread_bounced(self, offset: int, buffer: memoryview) -> int:
        bounce, done = self._bounce(), 0
        while done < len(buffer):
            start = offset + done - (offset + done) % self.alignment
            skip = offset + done - start
            wanted = min(round_up(skip + len(buffer) - done, self.alignment), len(bounce))
            got = self._pread_blocks(start, bounce[:wanted])
            piece = max(min(got - skip, len(buffer) - done), 0)
            buffer[done : done + piece] = bounce[skip : skip + piece]
            done += piece
            if got < wanted:
                break
        return done

    def _pwrite_blocks(self, offset: int, data: memoryview) -> None:
        try:
            done = os.pwrite(self._fd, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._pwrite_bounced(offset, data)
            return
        if done < len(data):  # the rest may start inside a block
            pwrite_all(self._buffered, data[done:], offset + done)

    def _pwrite_bounced(self, offset: int, data: memoryview) -> None:
        bounce = self._bounce()
        for at in range(0, len(data), len(bounce)):
            piece = data[at : at + len(bounce)]
            bounce[: len(piece)] = piece
            done = os.pwrite(self._fd, bounce[: len(piece)], offset + at)
            if done < len(piece):
                pwrite_all(self._buffered, piece[done:], offset + at + done)

    def _bounce(self) -> memoryview:
        bounce: memoryview | None = getattr(self._thread, "bounce", None)
        if bounce is None:
            bounce = self._thread.bounce = aligned_buffer(round_up(BOUNCE, self.alignment))
        return bounce


