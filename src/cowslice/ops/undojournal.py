"""The undo journal of a repair: every byte that it changes, as it was before, in a file of its own.

It does not know what the bytes mean. What must hold: the journal is stable before the image changes, and nothing is
taken back into a file that has changed in any other way since.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO
from zlib import crc32

from cowslice.errors import BadOption, CorruptImage, StorageError
from cowslice.ops.overlay import PAGE, Overlay
from cowslice.storage.base import Storage
from cowslice.units import SECTOR

_MAGIC = b"cowundo1"
_HEAD = struct.Struct(">8sQQQ")  # magic, length of the file before, pages, length after
_PAGE = struct.Struct(">QIB")  # offset, bytes before, versions
_SECTORS = PAGE // SECTOR
_MOST_VERSIONS = 8


@dataclass(frozen=True, slots=True)
class OldPage:
    """`content` lay at `offset`; `known` are the checksums of each sector in every state that the repair gives it."""

    offset: int
    content: bytes
    known: tuple[frozenset[int], ...]


def write_journal(path: str, overlay: Overlay) -> None:
    """Write what the planned changes replace, and make it stable. Raises StorageError, also where the file exists."""
    try:
        with open(path, "xb") as file:
            before = overlay.inner.length()
            file.write(_HEAD.pack(_MAGIC, before, len(overlay), overlay.length()))
            check = 0
            for offset, content, versions in overlay.versions():
                kept = content[: max(0, min(PAGE, before - offset))]
                sums = b"".join(struct.pack(f">{_SECTORS}I", *_sums(one)) for one in versions)
                record = _PAGE.pack(offset, len(kept), len(versions)) + kept + sums
                check = crc32(record, check)
                file.write(record)
            file.write(struct.pack(">I", check))
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path)
    except OSError as error:
        raise StorageError.of(error, "write the undo journal", path) from error


def undo(storage: Storage, path: str) -> int:
    """Give the file back the bytes of before a repair: how many pages. May be done again after it was cut off.

    Raises BadOption for a file that is no whole journal, CorruptImage where the image has changed since, StorageError.
    """
    try:
        with open(path, "rb") as file:
            before, after = _verify(file, path)
            if not min(before, after) <= storage.length() <= max(before, after):
                raise _changed(storage, f"it has {storage.length()} bytes, expected {before} to {after}")
            for page in _pages(file):
                _hold(storage, page)
            # Ascending, but the header last: until then the file means what the repair made of it.
            head = None
            pages = 0
            for page in _pages(file):
                pages += 1
                if page.offset == 0:
                    head = page
                elif page.content:
                    storage.pwrite(page.offset, page.content)
            storage.sync()
            if head is not None:
                storage.pwrite(0, head.content)
                storage.sync()
            if storage.length() != before:
                storage.truncate(before)
                storage.sync()
            return pages
    except StorageError:
        raise
    except OSError as error:
        raise StorageError.of(error, "read the undo journal", path) from error


def journal_path(image: str) -> str:
    """Where the next journal of an image goes: IMAGE.undo, or IMAGE.undo.2 and so on where there is one."""
    return next(path for path in _names(image) if not os.path.lexists(path))


def latest_journal(image: str) -> str:
    """The journal that was written last, by its number. Raises BadOption where there is none."""
    latest = ""
    for path in _names(image):
        if not os.path.lexists(path):
            break
        latest = path
    if not latest:
        raise BadOption(f"'{image}.undo' does not exist, expected the undo journal of a repair",
                        hint="Say where it is: --journal PATH.")
    return latest


def _names(image: str) -> Iterator[str]:
    yield f"{image}.undo"
    number = 2
    while True:
        yield f"{image}.undo.{number}"
        number += 1


def _verify(file: BinaryIO, path: str) -> tuple[int, int]:
    """Length of the image before and after, from a journal that is whole."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or head[:8] != _MAGIC:
        raise BadOption(f"'{path}' begins with {head[:8].hex()}, expected an undo journal")
    _, before, pages, after = _HEAD.unpack(head)
    check = 0
    for _ in range(pages):
        record = _record(file)
        check = crc32(record, check)
        if not record:
            break
    if file.read(5) != struct.pack(">I", check):
        raise BadOption(f"'{path}' is cut off or damaged, expected a whole undo journal of {pages} pages",
                        hint="A journal that is not whole was never acted on: the image is as it was.")
    return before, after


def _record(file: BinaryIO) -> bytes:
    """One record, b'' where the file ends before it does."""
    fixed = file.read(_PAGE.size)
    if len(fixed) < _PAGE.size:
        return b""
    offset, length, versions = _PAGE.unpack(fixed)
    rest = length + versions * _SECTORS * 4
    if length > PAGE or versions > _MOST_VERSIONS or offset % PAGE:
        return b""
    body = file.read(rest)
    return fixed + body if len(body) == rest else b""


def _pages(file: BinaryIO) -> Iterator[OldPage]:
    """All pages of a journal that was verified."""
    file.seek(0)
    _, _, pages, _ = _HEAD.unpack(file.read(_HEAD.size))
    for _ in range(pages):
        record = _record(file)
        offset, length, versions = _PAGE.unpack_from(record)
        content = record[_PAGE.size : _PAGE.size + length]
        sums = struct.unpack_from(f">{versions * _SECTORS}I", record, _PAGE.size + length)
        old = _sums(content.ljust(PAGE, b"\0"))
        yield OldPage(offset, content, tuple(frozenset((old[n], *sums[n::_SECTORS])) for n in range(_SECTORS)))


def _hold(storage: Storage, page: OldPage) -> None:
    for n, found in enumerate(_sums(storage.read(page.offset, PAGE))):
        if found not in page.known[n]:
            raise _changed(storage, f"the sector at {page.offset + n * SECTOR:#x} is neither as before the repair nor "
                           "as after it")


def _changed(storage: Storage, what: str) -> CorruptImage:
    return CorruptImage(f"'{storage.name}' has changed since the repair: {what}", structure="undo journal",
                        hint="Nothing was taken back: the journal fits the image no more.")


def _sums(page: bytes) -> list[int]:
    return [crc32(page[at : at + SECTOR]) for at in range(0, PAGE, SECTOR)]


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
