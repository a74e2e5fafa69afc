"""Every error cowslice raises, sorted by whose fault it is.

It does not know how an error is shown: the command line reads `exit_code` and `hint`.
A message always names the offending value, what was expected, and where.
"""

from __future__ import annotations

import errno as codes
import os

TYPE_CHECKING = False  # typing takes longer to import than a check of a sound image
if TYPE_CHECKING:
    from typing import Any


class CowsliceError(Exception):
    """Base of all errors. `exit_code` is the process exit status, `hint` one sentence on what to do, or ''."""

    exit_code = 1
    hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        if hint:
            self.hint = hint


class ImageError(CowsliceError):
    """The file is at fault."""


class NotAnImage(ImageError):
    """The bytes are not those of the format that was asked for."""


class MalformedImage(ImageError):
    """A field breaks the format. `where` is the structure, `field` its field name."""

    def __init__(self, message: str, *, where: str = "", field: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.where = where
        self.field = field


class UnsupportedImage(ImageError):
    """Well formed, but it needs something we refuse to guess. `features` names what."""

    def __init__(self, message: str, *, features: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.features = features


class CorruptImage(ImageError):
    """A table contradicts itself. `structure` names the table, `offset` is its place in the file in bytes, or -1."""

    def __init__(self, message: str, *, structure: str = "", offset: int = -1, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.structure = structure
        self.offset = offset


class ReferenceRefused(ImageError):
    """The image names another file (backing file, data file) that the gate does not permit to be opened."""


class TraceError(CowsliceError):
    """The record of what a guest asked for is at fault."""


class MalformedTrace(TraceError):
    """A trace breaks its format. `where` is the file, `line` counts its lines, or its records, from one; 0: no line."""

    def __init__(self, message: str, *, where: str = "", line: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.where = where
        self.line = line


class RequestError(CowsliceError):
    """The caller is at fault."""


class OutOfRange(RequestError, ValueError):
    """An offset or length lies outside the disk."""


class ReadOnly(RequestError):
    """A write was asked of something opened for reading."""


class Closed(RequestError, ValueError):
    """The object was already closed."""


class BadOption(RequestError, ValueError):
    """An option has an impossible value, or contradicts another one."""

    exit_code = 64  # EX_USAGE of sysexits.h: no script can take a typing error for a result


class StorageError(CowsliceError, OSError):
    """The world is at fault. `errno` and `filename` are those of an OSError."""

    def __init__(self, message: str, *, errno: int = 0, filename: str | None = None, hint: str = "") -> None:
        CowsliceError.__init__(self, message, hint=hint)
        self.errno = errno
        self.filename = filename

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep what an OSError keeps outside its dictionary when the error travels to another process."""
        return type(self), self.args, {**self.__dict__, "errno": self.errno, "filename": self.filename}

    @classmethod
    def of(cls, error: OSError, doing: str, name: str) -> StorageError:
        """Translate an OSError met while `doing` something to the storage called `name`."""
        kind = _BY_ERRNO.get(error.errno or 0, cls)
        reason = os.strerror(error.errno) if error.errno else str(error)
        return kind(f"cannot {doing} '{name}': {reason}", errno=error.errno or 0, filename=name)


class NoSpace(StorageError):
    """The storage is full."""


class Locked(StorageError):
    """Another process holds a conflicting lock on the file."""


class ShortRead(StorageError):
    """The storage returned fewer bytes than it said it has."""


class CryptoError(CowsliceError):
    """A key is missing or wrong, or a cipher is not available."""


class ProtocolError(CowsliceError):
    """A protocol was broken."""


class LocalProtocolError(ProtocolError):
    """Our side was asked to send something the protocol forbids."""


class RemoteProtocolError(ProtocolError):
    """The other side sent something the protocol forbids."""


class InternalError(CowsliceError):
    """Our own fault: please report it."""

    exit_code = 70  # EX_SOFTWARE of sysexits.h


_BY_ERRNO: dict[int, type[StorageError]] = {codes.ENOSPC: NoSpace, codes.EDQUOT: NoSpace}
