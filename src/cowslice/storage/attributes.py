"""What a file system can be told about a new file: no copy on write, and how large its extents should be.

Both are wishes. A file system that does not know them makes the file all the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import struct

_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS of linux/fs.h
_NOCOW = 0x00800000  # FS_NOCOW_FL
_FSGETXATTR, _FSSETXATTR = 0x801C581F, 0x401C5820  # FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR
_XATTR = struct.Struct("IIIII8x")  # struct fsxattr: flags, extent size, extents, project, copy-on-write extent size
_EXTSIZE = 0x00000800  # FS_XFLAG_EXTSIZE


def switch_off_copy_on_write(descriptor: int) -> None:
    """Ask that the file, still empty, is overwritten in place (btrfs)."""
    with contextlib.suppress(OSError):
        flags = struct.unpack("i", fcntl.ioctl(descriptor, _GETFLAGS, bytes(4)))[0]
        fcntl.ioctl(descriptor, _SETFLAGS, struct.pack("i", flags | _NOCOW))


def hint_extent_size(descriptor: int, size: int) -> None:
    """Ask that space is given to the file, still empty, in pieces of `size` bytes (XFS)."""
    with contextlib.suppress(OSError):
        flags, _, extents, project, cow = _XATTR.unpack(fcntl.ioctl(descriptor, _FSGETXATTR, bytes(_XATTR.size)))
        fcntl.ioctl(descriptor, _FSSETXATTR, _XATTR.pack(flags | _EXTSIZE, size, extents, project, cow))
