"""A read-only storage over fsspec: HTTP, S3 and everything else that fsspec opens, by byte ranges.

It does not know protocols or credentials, which fsspec takes from `options` and its own configuration.
fsspec is imported only when something is opened; the length is that of the moment of opening.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from cowslice.errors import BadOption, CowsliceError, StorageError
from cowslice.storage.base import Storage, check_span
from cowslice.storage.spans import MergedRead, batches
from cowslice.units import KiB, MiB

IN_FLIGHT = 32 * MiB  # bounds the memory of merged reads that are under way together
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")
_NO_RANGES = "Copy the file here first, or serve it with a server that answers Range requests."


class FsspecStorage(Storage):
    """Open a URL for reading. `options` go to the fsspec file system (`key`, `secret`, `client_kwargs`, ...).

    Raises StorageError if fsspec or its back end is not installed, nothing is there, its size is unknown, or the server
    does not answer byte ranges; BadOption for an unknown protocol.
    """

    read_gap = 256 * KiB  # what a 100 Mbit/s line carries while it waits 20 ms for another answer

    def __init__(self, url: str, *, options: Mapping[str, Any] | None = None) -> None:
        self.name = _PASSWORD.sub(r"\1:***@", url)
        self._system, self._path = self._connect(url, dict(options or {}))
        self._length = self._measure()
        self._probe()

    def pread(self, offset: int, buffer: memoryview) -> int:
        check_span(offset, len(buffer))
        end = min(offset + len(buffer), self.length())
        if offset >= end:
            return 0
        try:
            fetched = self._file_system("read").cat_file(self._path, start=offset, end=end)
        except Exception as error:
            self._fail(error, "read")
        buffer[: end - offset] = self._checked(fetched, offset, end - offset)
        return end - offset

    def length(self) -> int:
        self._file_system("measure")
        return self._length

    def close(self) -> None:
        self._system = None

    def _fetch(self, reads: Sequence[MergedRead]) -> Iterator[tuple[MergedRead, bytes]]:
        """Fetch many ranges side by side, as many as may be in memory together."""
        for batch in batches(reads, IN_FLIGHT):
            ends = [min(one.offset + one.length, self._length) for one in batch]
            asked = [(one.offset, end) for one, end in zip(batch, ends, strict=True) if end > one.offset]
            fetched = iter(self._fetch_ranges(asked))
            for one, end in zip(batch, ends, strict=True):
                content = next(fetched) if end > one.offset else b""
                yield one, content.ljust(one.length, b"\0")

    def _fetch_ranges(self, asked: list[tuple[int, int]]) -> list[bytes]:
        if not asked:
            return []
        starts, ends = [start for start, _ in asked], [end for _, end in asked]
        try:
            pieces = self._file_system("read").cat_ranges(
                [self._path] * len(asked), starts, ends, on_error="raise"
            )
        except Exception as error:
            self._fail(error, "read")
        return [self._checked(piece, start, end - start) for piece, (start, end) in zip(pieces, asked, strict=True)]

    def _checked(self, fetched: bytes, offset: int, length: int) -> bytes:
        if len(fetched) == length:
            return fetched
        if len(fetched) < length:
            raise self._short(offset, length, len(fetched))
        raise self._without_ranges(f"{len(fetched)} bytes came where {length} were asked at offset {offset}")

    def _connect(self, url: str, options: dict[str, Any]) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise self._not_installed("fsspec") from error
        if url.startswith(("http://", "https://")):
            options["client_kwargs"] = _without_compression(options.get("client_kwargs") or {})
        try:
            system, path = url_to_fs(url, **options)
        except ImportError as error:
            raise self._not_installed(str(error)) from error
        except (ValueError, TypeError) as error:
            raise BadOption(f"cannot open '{self.name}': {error}") from error
        except Exception as error:
            self._fail(error, "open")
        return system, str(path)

    def _measure(self) -> int:
        try:
            found = self._file_system("open").info(self._path)
        except Exception as error:
            self._fail(error, "open")
        if found.get("type") == "directory":
            raise StorageError.of(IsADirectoryError(errno.EISDIR, ""), "open", self.name)
        if found.get("size") is None:
            raise StorageError(f"cannot open '{self.name}': its size is not known", filename=self.name, hint=_NO_RANGES)
        if found.get("partial") is False:
            raise self._without_ranges("it says so itself")
        return int(found["size"])

    def _probe(self) -> None:
        """Read the last byte alone, as a file: unlike the bulk calls this stops before a whole body is fetched."""
        if not self._length:
            return
        try:
            with self._file_system("open").open(self._path, "rb", block_size=4096, cache_type="none") as file:
                file.seek(self._length - 1)
                got = file.read(1)
        except ValueError as error:
            raise self._without_ranges(str(error)) from error
        except Exception as error:
            self._fail(error, "open")
        self._checked(got, self._length - 1, 1)

    def _file_system(self, doing: str) -> Any:
        system = self._system
        if system is None:
            raise self._closed(doing)
        return system

    def _fail(self, error: Exception, doing: str) -> NoReturn:
        """Raise what an error of any back end means: each has exceptions of its own."""
        if isinstance(error, CowsliceError):
            raise error
        if isinstance(error, OSError) and error.errno:
            raise StorageError.of(error, doing, self.name) from error
        cause = error.__cause__ or error
        code = getattr(cause, "errno", None) or (errno.ENOENT if isinstance(error, FileNotFoundError) else 0)
        reason = _reason(cause)
        raise StorageError(f"cannot {doing} '{self.name}': {reason}", errno=code, filename=self.name) from error

    def _not_installed(self, what: str) -> StorageError:
        return StorageError(
            f"cannot open '{self.name}': a Python package for it is missing ({what})",
            filename=self.name,
            hint="Install it with: pip install 'cowslice[remote]'",
        )

    def _without_ranges(self, why: str) -> StorageError:
        return StorageError(
            f"cannot read '{self.name}' by ranges: the server does not support it ({why})",
            errno=errno.EOPNOTSUPP,
            filename=self.name,
            hint=_NO_RANGES,
        )


def _reason(error: BaseException) -> str:
    """What went wrong, without the URL that many back ends repeat: it may carry a password."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if status := getattr(error, "status", 0):
        return f"the server answered {status} {getattr(error, 'message', '')}".rstrip()
    return _PASSWORD.sub(r"\1:***@", str(error)) or type(error).__name__


def _without_compression(client: Mapping[str, Any]) -> dict[str, Any]:
    """Ask for the bytes as they are: a server that compresses on the way gives no ranges of the original."""
    return {**client, "headers": {"Accept-Encoding": "identity", **(client.get("headers") or {})}}
