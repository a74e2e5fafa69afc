"""A new file that has its name only when it is complete: written beside its place, renamed at the end.

It does not know what is written. Until the block ends well, whatever had the name before is untouched; if it ends
otherwise, Ctrl-C included, nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import stat
import weakref
from types import TracebackType

from cowslice.errors import StorageError
from cowslice.storage.file import FileStorage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class AppearingFile:
    """An empty file to write through `storage`, found at `path` only after the block that it is entered by ended well.

    An existing file keeps its mode and is replaced; links are followed. `sync`: make it stable before it appears.
    Raises StorageError: Locked when another program has the old file open.
    """

    def __init__(self, path: str, *, sync: bool = False) -> None:
        self._path = os.path.realpath(path)
        self._sync = sync
        # Open, and so locked, until the end: nobody may begin to use the file that is about to be replaced.
        self._old = FileStorage(self._path, "r+") if os.path.exists(self._path) else None
        self._folder, name = os.path.split(self._path)
        self._temporary = os.path.join(self._folder, f".{name[:200]}.{os.getpid()}.part")
        # A signal may come before the block is entered, or any reference is left: then nobody calls `abandon`.
        self._remove = weakref.finalize(self, _removed, self._temporary)
        try:
            self.storage = FileStorage(self._temporary, "x")
        except BaseException as error:
            if isinstance(error, StorageError):
                self._remove.detach()  # it is not ours
            self._close_old()
            raise
        try:
            self._prepare()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Remove what was written; the old file stays as it was."""
        self.storage.close()
        self._close_old()
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
            return
        try:
            self._appear()
        except OSError as failure:
            self.abandon()
            if isinstance(failure, StorageError):
                raise
            raise StorageError.of(failure, "create", self._path) from failure
        except BaseException:
            self.abandon()
            raise
        self.storage.close()
        self._close_old()

    def _appear(self) -> None:
        if self._sync:
            self.storage.sync()
        os.replace(self._temporary, self._path)
        self._remove.detach()
        if self._sync:
            _sync_folder(self._folder)

    def _prepare(self) -> None:
        """Give the file what the old one had. A subclass adds what it needs before anything is written."""
        if self._old is not None:
            os.fchmod(self.storage.fileno(), stat.S_IMODE(os.fstat(self._old.fileno()).st_mode))

    def _close_old(self) -> None:
        if self._old is not None:
            self._old.close()


def _removed(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _sync_folder(folder: str) -> None:
    """Make the name itself stable. A file system that cannot do that for folders has nothing to make stable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
