"""A local file or block device, through the page cache or around it (O_DIRECT).

It does not know image formats. Positions are never shared: each read and write carries its own offset, so many
threads use one descriptor with no lock. With O_DIRECT, spans that are not whole blocks take a bounce or the page cache.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from cowslice.errors import BadOption, CowsliceError, StorageError
from cowslice.storage.base import Storage, check_span
from cowslice.storage.direct import DirectIO
from cowslice.storage.locks import lock_image
from cowslice.storage.posix import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate, pread_all, pwrite_all
from cowslice.storage.spans import Span
from cowslice.units import SECTOR

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Mode = Literal["r", "r+", "w", "x"]
Locking = bool | Literal["force-share"]

# Without O_NONBLOCK, opening a named pipe that a stranger put there would wait for ever.
_COMMON = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_FLAGS = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_RDWR | os.O_CREAT,
    "x": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}
_CANNOT = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY}


class FileStorage(Storage):
    """Open a regular file or block device.

    `mode`: "r", "r+" (must exist), "w" (made or emptied), "x" (must not exist).
    `locking`: True excludes other writers as QEMU does, "force-share" (reading only) tolerates them, False locks not.
    Raises StorageError (Locked where another program forbids it) or BadOption.
    """

    def __init__(
        self, path: str | os.PathLike[str], mode: Mode = "r", *, direct: bool = False, locking: Locking = True
    ) -> None:
        self.name = os.fspath(path)
        self.writable = mode != "r"
        self._fd = -1
        self._direct: DirectIO | None = None
        self._fd = self._open(mode, direct)
        try:
            self._device = self._is_device()
            self._begin(mode, direct, locking)
        except BaseException:
            self.close()
            raise

    def _open(self, mode: Mode, direct: bool) -> int:
        if mode not in _FLAGS:
            raise BadOption(f"mode is '{mode}', expected 'r', 'r+', 'w' or 'x'")
        try:
            return os.open(self.name, _FLAGS[mode] | _COMMON | (os.O_DIRECT if direct else 0), 0o666)
        except ValueError as error:
            raise BadOption(f"path is {self.name!r}, expected one without zero bytes") from error
        except OSError as error:
            fault = StorageError.of(error, "open", self.name)
            if direct and error.errno == errno.EINVAL:
                fault.hint = "Its file system may not support O_DIRECT; open it without direct."
            raise fault from error

    def _is_device(self) -> bool:
        kind = os.fstat(self._fd).st_mode
        if stat.S_ISDIR(kind):
            raise StorageError.of(OSError(errno.EISDIR, ""), "open", self.name)
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise StorageError(
                f"cannot open '{self.name}': expected a regular file or a block device",
                errno=errno.EINVAL,
                filename=self.name,
            )
        return stat.S_ISBLK(kind)

    def _begin(self, mode: Mode, direct: bool, locking: Locking) -> None:
        if locking not in (True, False, "force-share"):
            raise BadOption(f"locking is {locking!r}, expected True, False or 'force-share'")
        if locking:
            lock_image(self._fd, self.name, writing=self.writable, force_share=locking == "force-share")
        try:
            if mode == "w" and not self._device:
                os.ftruncate(self._fd, 0)  # only now, that the lock is ours
            if direct:
                self._direct = DirectIO(self._fd, device=self._device, writable=self.writable)
                self.alignment = self._direct.alignment
        except OSError as error:
            raise StorageError.of(error, "open", self.name) from error

    def pread(self, offset: int, buffer: memoryview) -> int:
        check_span(offset, len(buffer))
        try:
            return self._direct.pread(offset, buffer) if self._direct else pread_all(self._fd, buffer, offset)
        except OSError as error:
            raise self._fault(error, "read") from error

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        self._check_writable("write to")
        view = memoryview(data).cast("B")
        check_span(offset, len(view))
        try:
            if self._direct:
                self._direct.pwrite(offset, view)
            else:
                pwrite_all(self._fd, view, offset)
        except OSError as error:
            raise self._fault(error, "write to") from error

    def length(self) -> int:
        try:
            return os.lseek(self._fd, 0, os.SEEK_END) if self._device else os.fstat(self._fd).st_size
        except OSError as error:
            raise self._fault(error, "measure") from error

    def truncate(self, length: int) -> None:
        self._check_writable("resize")
        check_span(0, length)
        if self._device:
            self._check_device_length(length)
            return
        try:
            os.ftruncate(self._fd, length)
        except OSError as error:
            raise self._fault(error, "resize") from error

    def sync(self) -> None:
        try:
            os.fdatasync(self.fileno())
        except OSError as error:
            raise self._fault(error, "sync") from error

    def zero(self, offset: int, length: int) -> None:
        self._check_writable("write to")
        check_span(offset, length)
        if length and not self._zeroed_by_kernel(offset, length):
            super().zero(offset, length)

    def punch(self, offset: int, length: int) -> None:
        self._check_writable("write to")
        check_span(offset, length)
        if length and (self._device or not self._punched(offset, length)):
            self.zero(offset, length)

    def allocate(self, offset: int, length: int) -> None:
        self._check_writable("write to")
        check_span(offset, length)
        if self._device:
            super().allocate(offset, length)
        elif length:
            try:
                os.posix_fallocate(self._fd, offset, length)
            except OSError as error:
                raise self._fault(error, "take space for") from error

    def discard(self, offset: int, length: int) -> None:
        self._check_writable("discard from")
        check_span(offset, length)
        if length:
            self._fallocate(PUNCH_HOLE | KEEP_SIZE, offset, length, "discard from")

    def extents(self, offset: int, length: int) -> Iterator[Span]:
        check_span(offset, length)
        if self._device:
            yield from super().extents(offset, length)
            return
        at, end = offset, offset + length
        while at < end:
            data = min(self._seek(at, os.SEEK_DATA, end), end)
            if data > at:
                yield Span(at, data - at, False)
            at = min(self._seek(data, os.SEEK_HOLE, end), end) if data < end else end
            if at > data:
                yield Span(data, at - data, True)

    def is_hole(self, offset: int, length: int) -> bool:
        end = offset + length
        return not self._device and self._seek(offset, os.SEEK_DATA, end) >= end

    def allocated(self) -> int | None:
        if self._device:
            return None
        try:
            return os.fstat(self._fd).st_blocks * SECTOR
        except OSError as error:
            raise self._fault(error, "measure") from error

    def fileno(self) -> int:
        if self._fd < 0:
            raise self._closed("use")
        return self._fd

    def close(self) -> None:
        descriptor, self._fd = self._fd, -1
        direct, self._direct = self._direct, None
        try:
            if direct:
                direct.close()
            if descriptor >= 0:
                os.close(descriptor)
        except OSError as error:
            raise StorageError.of(error, "close", self.name) from error

    def _zeroed_by_kernel(self, offset: int, length: int) -> bool:
        return self._fallocate(ZERO_RANGE, offset, length, "write to") or self._punched(offset, length)

    def _punched(self, offset: int, length: int) -> bool:
        if not self._fallocate(PUNCH_HOLE | KEEP_SIZE, offset, length, "write to"):
            return False
        if offset + length > self.length():
            self.pwrite(offset + length - 1, b"\0")  # grows; a truncate could cut off what another thread appends
        return True

    def _fallocate(self, mode: int, offset: int, length: int, doing: str) -> bool:
        try:
            fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno in _CANNOT:
                return False
            raise self._fault(error, doing) from error
        return True

    def _seek(self, at: int, whence: int, end: int) -> int:
        """Return where data or a hole begins; a file system that knows no holes has data up to its length."""
        try:
            return os.lseek(self._fd, at, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # at or beyond the end of the file, where all is a hole
                return end if whence == os.SEEK_DATA else at
            if error.errno not in _CANNOT:
                raise self._fault(error, "read the holes of") from error
        length = self.length()
        return at if whence == os.SEEK_DATA and at < length else max(length, end if at >= length else at)

    def _check_writable(self, doing: str) -> None:
        if not self.writable:
            raise self._read_only(doing)

    def _check_device_length(self, length: int) -> None:
        has = self.length()
        if length != has:
            raise StorageError(
                f"cannot resize '{self.name}' to {length} bytes: it is a block device of {has} bytes",
                errno=errno.EINVAL,
                filename=self.name,
            )

    def _fault(self, error: OSError, doing: str) -> CowsliceError:
        return self._closed(doing) if self._fd < 0 else StorageError.of(error, doing, self.name)
