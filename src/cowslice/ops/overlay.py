"""An image file with changes that are only planned: reads show them, the file below stays as it is.

It does not know why a byte changes. Changes belong to stages; what a stage leaves is what the next one starts from, and
all changed pages lie in a temporary file, so that memory stays small.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from tempfile import SpooledTemporaryFile

from cowslice.format.limits import MAX_FINDINGS
from cowslice.storage.base import Storage
from cowslice.storage.spans import Span
from cowslice.units import SECTOR, MiB

PAGE = 4096
_IN_MEMORY = 16 * MiB


class Stage(IntEnum):
    """The order of writing; each stage is stable before the next one begins. Cut off between two, nothing is lost."""

    RAISE = 0  # counts too low, and structures that nothing refers to yet
    SWITCH = 1  # the header refers to new structures
    MEND = 2  # flags, and entries that are impossible
    LOWER = 3  # counts too high: the last reference is gone for sure
    CLEAR = 4  # the header calls the image sound


@dataclass(frozen=True, slots=True)
class Edit:
    """`old` becomes `new` at host `offset` (bytes), and why."""

    stage: Stage
    offset: int
    old: bytes = field(repr=False)
    new: bytes = field(repr=False)
    why: str


class Overlay(Storage):
    """A storage over `inner` that keeps what is written by `change`. Closing it leaves `inner` open."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.name = inner.name
        self.edits: list[Edit] = []
        self.untold = 0
        self.reasons: Counter[Stage] = Counter()
        self._length = inner.length()
        self._pages: dict[int, dict[Stage, int]] = {}
        self._spool = SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - closed by close()
        self._slots = 0
        self._lock = threading.Lock()

    def pread(self, offset: int, buffer: memoryview) -> int:
        size = max(min(self._length - offset, len(buffer)), 0)
        view = buffer[:size]
        self.inner.read_into(offset, view)
        if self._pages and size:
            for page in range(offset // PAGE, (offset + size - 1) // PAGE + 1):
                if page in self._pages:
                    _lay(view, offset, self._page(page), page * PAGE)
        return size

    def length(self) -> int:
        return self._length

    def allocated(self) -> int | None:
        return self.inner.allocated()

    def extents(self, offset: int, length: int) -> Iterator[Span]:
        """Data and holes of the file below, or all data once something has changed."""
        return super().extents(offset, length) if self._pages else self.inner.extents(offset, length)

    def close(self) -> None:
        self._spool.close()

    def __len__(self) -> int:
        """Pages that change."""
        return len(self._pages)

    def change(self, stage: Stage, offset: int, new: bytes, why: str) -> None:
        """Plan to write `new` at `offset`. For the same bytes, stages come in ascending order."""
        old = self.read(offset, len(new))
        if old == new:
            return
        low = next(n for n in range(len(new)) if old[n] != new[n])
        high = next(n for n in range(len(new), 0, -1) if old[n - 1] != new[n - 1])
        self._length = max(self._length, offset + len(new))
        self._tell(Edit(stage, offset + low, old[low:high], new[low:high], why))
        offset, new = offset + low, new[low:high]
        for page in range(offset // PAGE, (offset + len(new) - 1) // PAGE + 1):
            self._patch(page, stage, offset, new)

    def writes(self, stage: Stage) -> Iterator[tuple[int, bytes]]:
        """What one stage writes, ascending: whole sectors that differ from what the stages before it left."""
        for page in sorted(self._pages):
            if stage not in self._pages[page]:
                continue
            before, after = self._page(page, Stage(stage - 1) if stage else None), self._page(page, stage)
            for at, end in _runs(before, after):
                yield page * PAGE + at, after[at : min(end, self._length - page * PAGE)]

    def versions(self) -> Iterator[tuple[int, bytes, list[bytes]]]:
        """(offset, bytes now, bytes after each stage that changes them) of every page, ascending."""
        for page in sorted(self._pages):
            yield (page * PAGE, self.inner.read(page * PAGE, PAGE),
                   [self._page(page, stage) for stage in sorted(self._pages[page])])

    def _tell(self, edit: Edit) -> None:
        self.reasons[edit.stage] += 1
        if len(self.edits) < MAX_FINDINGS * 4:
            self.edits.append(Edit(edit.stage, edit.offset, edit.old[:64], edit.new[:64], edit.why))
        else:
            self.untold += 1

    def _patch(self, page: int, stage: Stage, offset: int, new: bytes) -> None:
        if stage not in self._pages.get(page, {}):
            self._store(page, stage, self._page(page, stage))
        for known in self._pages[page]:
            if known >= stage:
                content = bytearray(self._page(page, known))
                _lay(memoryview(content), page * PAGE, new, offset)
                self._store(page, known, bytes(content))

    def _page(self, page: int, upto: Stage | None = Stage.CLEAR) -> bytes:
        """The page as the stages up to this one leave it; None for before them all."""
        slots = self._pages.get(page, {})
        stage = max((known for known in slots if upto is not None and known <= upto), default=None)
        if stage is None:
            return self.inner.read(page * PAGE, PAGE)
        with self._lock:
            self._spool.seek(slots[stage] * PAGE)
            return self._spool.read(PAGE)

    def _store(self, page: int, stage: Stage, content: bytes) -> None:
        with self._lock:
            slots = self._pages.setdefault(page, {})
            if stage not in slots:
                slots[stage] = self._slots
                self._slots += 1
            self._spool.seek(slots[stage] * PAGE)
            self._spool.write(content)


def _lay(target: memoryview, at: int, content: bytes, offset: int) -> None:
    """Put that part of `content`, which belongs at `offset`, into a buffer that begins at `at`."""
    start, end = max(at, offset), min(at + len(target), offset + len(content))
    if start < end:
        target[start - at : end - at] = content[start - offset : end - offset]


def _runs(before: bytes, after: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of sectors that differ, neighbours as one."""
    start = -1
    for at in range(0, PAGE + SECTOR, SECTOR):
        differs = at < PAGE and before[at : at + SECTOR] != after[at : at + SECTOR]
        if differs and start < 0:
            start = at
        elif not differs and start >= 0:
            yield start, at
            start = -1
