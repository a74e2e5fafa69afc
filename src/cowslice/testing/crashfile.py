"""Real files that lose power: what happens to them is recorded, whoever writes to them, compiled code too.

It does not know who writes. What came past FileStorage is found by comparing a file with what was recorded, before each
of its calls and whenever the test asks: no write is recorded behind a sync that came after it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from cowslice.storage.file import FileStorage
from cowslice.testing.crash import SECTOR, Change, CrashRecord, Sync

if TYPE_CHECKING:
    from typing import Self

_WRITES = ("pwrite", "truncate", "zero", "allocate", "discard")


class CrashFiles:
    """Records what becomes of `paths`, which exist and lie on the disk as they are, for the length of a `with` block.

    Their names, without folders, are those of the record's files. `lies` are numbers of syncs, counted from zero over
    all of them, that make nothing stable: barriers taken away. `past` counts the changes that came past FileStorage.
    """

    def __init__(self, *paths: Path, lies: Collection[int] = ()) -> None:
        self.record = CrashRecord()
        self.lies = lies
        self.syncs = 0
        self.past = 0
        self._lock = threading.RLock()
        self._names = {os.path.realpath(path): path.name for path in paths}
        self._seen = {path: Path(path).read_bytes() for path in self._names}
        self._stack = ExitStack()
        for path, name in self._names.items():
            self.record.storage(self._seen[path], file=name)

    def __enter__(self) -> Self:
        for name in _WRITES:
            self._stack.enter_context(patch.object(FileStorage, name, self._watched(getattr(FileStorage, name))))
        self._stack.enter_context(patch.object(FileStorage, "sync", self._watched_sync(FileStorage.sync)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self.look()

    def lie(self, *which: int) -> None:
        """Take these of the syncs from now on away; 0 is the next one."""
        self.lies = frozenset(self.syncs + number for number in which)

    def mark(self, label: str) -> None:
        """Note that this happened now, as CrashRecord.mark."""
        self.look()
        self.record.mark(label)

    def look(self) -> None:
        """Record what was written past FileStorage."""
        for path in self._names:
            self._look(path, past=True)

    def _watched(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(storage: FileStorage, *arguments: Any) -> Any:
            path = os.path.realpath(storage.name)
            with self._lock:
                self._look(path, past=True)
                try:
                    return act(storage, *arguments)
                finally:
                    self._look(path, past=False)
        return call

    def _watched_sync(self, act: Callable[[FileStorage], None]) -> Callable[[FileStorage], None]:
        def sync(storage: FileStorage) -> None:
            path = os.path.realpath(storage.name)
            with self._lock:
                self._look(path, past=True)
                act(storage)
                if path not in self._names:
                    return
                if self.syncs not in self.lies:
                    events = self.record.events
                    events.append(Sync(self._names[path], len(events), frozenset()))
                self.syncs += 1
        return sync

    def _look(self, path: str, *, past: bool) -> None:
        if path not in self._names:
            return
        with self._lock:
            now, before = Path(path).read_bytes(), self._seen[path]
            changes = _changes(self._names[path], before, now) if now != before else []
            self.record.events += changes
            self.past += len(changes) if past else 0
            self._seen[path] = now


def _changes(name: str, before: bytes, now: bytes) -> list[Change]:
    """A change of the length, and one for each run of sectors that differ."""
    changes = [Change(name, len(now), b"", True)] if len(now) != len(before) else []
    before = before[: len(now)].ljust(len(now), b"\0")
    runs: list[tuple[int, int]] = []
    for at in range(0, len(now), SECTOR):
        if now[at : at + SECTOR] != before[at : at + SECTOR]:
            begin = runs.pop()[0] if runs and runs[-1][1] == at else at
            runs.append((begin, at + SECTOR))
    return changes + [Change(name, begin, now[begin:end]) for begin, end in runs]
