"""Whole transfers on a descriptor, and the few calls of Linux that `os` lacks.

It does not know storages: it gets descriptors and raises OSError like `os`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import struct

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
    libc = _libc()
    while libc.fallocate64(descriptor, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def logical_block_size(descriptor: int) -> int:
    """Return the smallest unit in bytes that the block device reads and writes."""
    answer = fcntl.ioctl(descriptor, _BLKSSZGET, bytes(4))
    return int(struct.unpack("i", answer)[0])


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return libc
