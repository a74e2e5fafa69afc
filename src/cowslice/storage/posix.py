"""Whole transfers on a descriptor, and the few calls of Linux that `os` lacks.

It does not know storages: it gets descriptors and raises OSError like `os`.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct
from collections.abc import Callable

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # FALLOC_FL_*
_BLKSSZGET = 0x1268


def pread_all(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill the buffer; return the bytes read, fewer only at the end of the file."""
    done = os.preadv(descriptor, (buffer,), offset)
    while 0 < done < len(buffer):
        more = os.preadv(descriptor, (buffer[done:],), offset + done)
        if not more:
            break
        done += more
    return done


def pwrite_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of the data."""
    done = os.pwrite(descriptor, data, offset)
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """Change how the span is allocated. Raises OSError; EOPNOTSUPP where the file system cannot."""
    call = _fallocate_call()
    while code := call(descriptor, mode, offset, length):
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def logical_block_size(descriptor: int) -> int:
    """Return the smallest unit in bytes that the block device reads and writes."""
    answer = fcntl.ioctl(descriptor, _BLKSSZGET, bytes(4))
    return int(struct.unpack("i", answer)[0])


@functools.cache
def _fallocate_call() -> Callable[[int, int, int, int], int]:
    """Return fallocate(2) as a function of (descriptor, mode, offset, length) that gives 0 or the errno."""
    import ctypes  # only who writes pays for it

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def call(descriptor: int, mode: int, offset: int, length: int) -> int:
        return ctypes.get_errno() if libc.fallocate64(descriptor, mode, offset, length) else 0

    return call
