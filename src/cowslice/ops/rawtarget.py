"""Where a raw copy goes: a new file that appears whole or not at all, an existing file or device, or a stream.

It does not know what is copied. A new file is written under a temporary name beside its place and renamed when it is
finished, so that a name never stands for half a disk.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from types import TracebackType

from cowslice.errors import BadOption, OutOfRange, StorageError
from cowslice.storage.file import FileStorage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_ZEROS = memoryview(bytes(1 << 20))


class NewFile:
    """A raw file of `size` bytes at `path`, there only when the block it is entered by ends without an exception.

    An existing file keeps its mode and is replaced; links are followed. `sync`: make it stable before it appears.
    Raises StorageError: Locked when another program has the old file open.
    """

    ordered = False

    def __init__(self, path: str, size: int, *, sync: bool = False) -> None:
        self._path = os.path.realpath(path)
        self._sync = sync
        self._old = FileStorage(self._path, "r+") if os.path.exists(self._path) else None
        folder, name = os.path.split(self._path)
        self._temporary = os.path.join(folder, f".{name[:200]}.{os.getpid()}.part")
        try:
            self._storage = FileStorage(self._temporary, "x")
        except BaseException:
            self._close_old()
            raise
        try:
            self._prepare(size)
        except BaseException:
            self._discard()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        self._storage.pwrite(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do: the file was made of one hole."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            if self._sync:
                self._storage.sync()
            os.replace(self._temporary, self._path)
        except OSError as failure:
            self._discard()
            if isinstance(failure, StorageError):
                raise
            raise StorageError.of(failure, "create", self._path) from failure
        except BaseException:
            self._discard()
            raise
        self._storage.close()
        self._close_old()

    def _prepare(self, size: int) -> None:
        if self._old is not None:
            os.fchmod(self._storage.fileno(), stat.S_IMODE(os.fstat(self._old.fileno()).st_mode))
        self._storage.truncate(size)

    def _discard(self) -> None:
        self._storage.close()
        self._close_old()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def _close_old(self) -> None:
        if self._old is not None:
            self._old.close()


class ExistingFile:
    """A raw file or block device that is there already and is overwritten in place, and stays whatever happens.

    `is_zero`: the caller knows that it reads as zeros. Raises OutOfRange when it is smaller than `size` bytes.
    """

    ordered = False

    def __init__(self, path: str, size: int, *, is_zero: bool = False, sync: bool = False) -> None:
        self._sync = sync
        self._is_zero = is_zero
        self._storage = FileStorage(path, "r+")
        if (length := self._storage.length()) < size:
            self._storage.close()
            raise OutOfRange(f"'{path}' has {length} bytes, but the disk has {size}")

    def write(self, offset: int, data: memoryview) -> None:
        self._storage.pwrite(offset, data)

    def zero(self, offset: int, length: int) -> None:
        if not self._is_zero:
            self._storage.zero(offset, length)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._sync:
                self._storage.sync()
        finally:
            self._storage.close()


class Stream:
    """A pipe or terminal-less output that takes bytes in order. The descriptor stays open and belongs to the caller."""

    ordered = True

    def __init__(self, descriptor: int, name: str = "standard output") -> None:
        self._descriptor = descriptor
        self._name = name

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            try:
                done = os.write(self._descriptor, data)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise StorageError.of(error, "write to", self._name) from error
            data = data[done:]

    def zero(self, offset: int, length: int) -> None:
        while length:
            self.write(offset, _ZEROS[: min(length, len(_ZEROS))])
            length -= min(length, len(_ZEROS))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


def raw_target(path: str, size: int, *, existing: bool = False, is_zero: bool = False, sync: bool = False) -> (
    NewFile | ExistingFile
):
    """The target at a path: overwritten in place when `existing` says so or when it is a device."""
    if existing or _is_device(path):
        return ExistingFile(path, size, is_zero=is_zero, sync=sync)
    return NewFile(path, size, sync=sync)


def refuse_sources(path: str, descriptors: Iterable[int]) -> None:
    """Raise BadOption when the target is one of the open files that it would be copied from."""
    try:
        target = os.stat(path)
    except OSError:
        return
    for descriptor in descriptors:
        if descriptor >= 0 and os.path.samestat(target, os.fstat(descriptor)):
            raise BadOption(f"'{path}' is one of the files that are read, expected another target")


def _is_device(path: str) -> bool:
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
