"""Where a raw copy goes: a new file that appears whole or not at all, an existing file or device, or a stream.

It does not know what is copied.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from types import TracebackType

from cowslice.errors import BadOption, OutOfRange, StorageError
from cowslice.storage.appearing import AppearingFile
from cowslice.storage.file import FileStorage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_ZEROS = memoryview(bytes(1 << 20))


class NewFile(AppearingFile):
    """A raw file of `size` bytes at `path`, there only when the block it is entered by ends without an exception."""

    ordered = False

    def __init__(self, path: str, size: int, *, sync: bool = False) -> None:
        self._size = size
        super().__init__(path, sync=sync)

    def write(self, offset: int, data: memoryview) -> None:
        self.storage.pwrite(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do: the file was made of one hole."""

    def fileno(self) -> int:
        return self.storage.fileno()

    def _prepare(self) -> None:
        super()._prepare()
        self.storage.truncate(self._size)


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

    def fileno(self) -> int:
        return self._storage.fileno()

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

    def fileno(self) -> int:
        """-1: what goes into a pipe has no place there."""
        return -1

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
