"""The bytes of a trace file in order, wherever it lies and however it is compressed.

It does not know what the bytes mean. Memory is bounded by a block and a decompressor's window, whatever a file claims.
"""

from __future__ import annotations

import io
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from cowslice.errors import CowsliceError, MalformedTrace, StorageError
from cowslice.storage.locate import local_path, locate
from cowslice.units import MiB

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from cowslice.storage.base import Storage

BLOCK = MiB  # large enough that parsing is paid per byte and not per call, small enough to stay in a processor's cache
REMOTE_BLOCK = 8 * MiB  # one range request; at 100 Mbit/s it hides the wait for the next
GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = tuple(bytes((0x50 + n, 0x2A, 0x4D, 0x18)) for n in range(16))
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")


def blocks(source: str | os.PathLike[str], size: int = BLOCK) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file or URL, `size` at a time, the last block shorter.

    gzip and zstd, of one or several members, are told by their first bytes. Raises StorageError, MalformedTrace where
    the compressed stream is damaged or ends too early.
    """
    name = name_of(source)
    done = 0
    with _raw(source) as raw, _decompressed(raw) as stream:
        while True:
            try:
                block = stream.read(size)
            except CowsliceError:
                raise
            except _damages() as fault:
                raise MalformedTrace(
                    f"'{name}' is damaged: after {done} bytes of content its compressed stream breaks off or is wrong "
                    f"({fault})", where=name) from None
            except OSError as error:
                raise StorageError.of(error, "read", name) from error
            if not block:
                return
            done += len(block)
            yield block


def name_of(source: str | os.PathLike[str]) -> str:
    """What to call a source in messages: without the password that a URL may carry."""
    return _PASSWORD.sub(r"\1:***@", os.fsdecode(os.fspath(source)))


def _raw(source: str | os.PathLike[str]) -> BinaryIO:
    path = local_path(source)
    if path is None:
        return cast(BinaryIO, io.BufferedReader(_StorageStream(locate(source)), REMOTE_BLOCK))
    try:
        file = open(path, "rb", buffering=BLOCK)  # noqa: SIM115 - it is the caller's
    except OSError as error:
        raise StorageError.of(error, "open", path) from error
    mode = os.fstat(file.fileno()).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        file.close()
        raise StorageError(f"cannot open '{path}' as a trace: it is no regular file, and it is read more than once",
                           filename=path, hint="Write the stream to a file first.")
    return file


def _decompressed(raw: Any) -> BinaryIO:
    magic = raw.peek(4)[:4]
    if magic.startswith(GZIP):
        return cast(BinaryIO, _gzip_file()(fileobj=raw, mode="rb"))
    if magic.startswith(ZSTD) or magic in ZSTD_SKIPPABLE:
        return cast(BinaryIO, _zstd().ZstdFile(raw, "rb"))
    return cast(BinaryIO, raw)


@cache
def _gzip_file() -> Any:
    """ISA-L's reader is twice as fast as the one that Python has."""
    try:
        from isal.igzip import IGzipFile
    except ImportError:
        from gzip import GzipFile

        return GzipFile
    return IGzipFile


@cache
def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


@cache
def _damages() -> Any:
    """What decompressors raise for a stream that is not theirs; gzip's own error is an OSError too."""
    from gzip import BadGzipFile

    found: list[Any] = [EOFError, zlib.error, BadGzipFile, _zstd().ZstdError]
    try:
        from isal import isal_zlib
    except ImportError:
        return tuple(found)
    return (*found, isal_zlib.error)


class _StorageStream(io.RawIOBase):
    """A storage from its beginning to its end."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        done = self._storage.pread(self._at, memoryview(buffer).cast("B"))
        self._at += done
        return done

    def close(self) -> None:
        self._storage.close()
        super().close()
