"""Files that lose power: every write and sync is recorded, and every content that a crash could leave is given back.

It knows bytes, sectors and syncs, nothing of images. A write is on disk for sure once a sync is over that began after
the write had ended; until then each of its sectors may be there or not, whatever became of the others.
"""

from __future__ import annotations

import errno
import itertools
import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cowslice.errors import StorageError
from cowslice.storage.base import Storage, check_span
from cowslice.storage.memory import MemoryStorage
from cowslice.storage.wrappers import WrappedStorage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SECTOR = 512  # what a disk writes whole or not at all
DISCARDED = 0xDB  # a discarded span reads as anything; zeros would hide that somebody relies on them
_LENGTH = -1  # the cell of a file that is not a sector but its length


@dataclass(frozen=True, slots=True)
class Change:
    """`data` written at `offset`, or with `resized` the file cut or grown to `offset` bytes."""

    file: str
    offset: int
    data: bytes = field(repr=False)
    resized: bool = False


@dataclass(frozen=True, slots=True)
class Sync:
    """A sync that is over: every change of the file before event number `began` is stable, but for the `open` ones."""

    file: str
    began: int
    open: frozenset[int]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that the test did between two events, for instance the return of a flush."""

    label: str


Event = Change | Sync | Mark


class CrashRecord:
    """What happened, in order, to all the files that lose power together."""

    def __init__(self) -> None:
        self.begins: dict[str, bytes] = {}
        self.events: list[Event] = []
        self.lock = threading.Lock()
        self.under_way: set[int] = set()

    def storage(self, content: ReadableBuffer = b"", *, file: str = "image") -> CrashStorage:
        """Return a new file of this record that holds `content`, all of it stable."""
        assert file not in self.begins, f"the record has a file '{file}' already"
        self.begins[file] = bytes(content)
        return CrashStorage(self, file)

    def mark(self, label: str) -> None:
        """Note that this happened now. A state that a crash can leave after it lists it in `marks`."""
        with self.lock:
            self.events.append(Mark(label))


class CrashStorage(MemoryStorage):
    """A file of a CrashRecord. `handover` runs after each change has begun and before it counts as ended."""

    def __init__(self, record: CrashRecord, file: str, *, handover: Callable[[], None] | None = None) -> None:
        super().__init__(record.begins[file], name=file)
        self.record = record
        self.handover = handover

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        content = bytes(memoryview(data).cast("B"))
        self._change(Change(self.name, offset, content), lambda: super(CrashStorage, self).pwrite(offset, content))

    def truncate(self, length: int) -> None:
        self._change(Change(self.name, length, b"", True), lambda: super(CrashStorage, self).truncate(length))

    def discard(self, offset: int, length: int) -> None:
        check_span(offset, length)
        length = min(length, self.length() - offset)
        if length > 0:
            self.pwrite(offset, bytes([DISCARDED]) * length)

    def sync(self) -> None:
        with self.record.lock:
            began, open_ = len(self.record.events), frozenset(self.record.under_way)
        super().sync()
        if self.handover is not None:
            self.handover()
        with self.record.lock:
            self.record.events.append(Sync(self.name, began, open_))

    def _change(self, change: Change, apply: Callable[[], None]) -> None:
        record = self.record
        with record.lock:
            apply()
            number = len(record.events)
            record.events.append(change)
            if self.handover is None:
                return
            record.under_way.add(number)
        self.handover()
        with record.lock:
            record.under_way.remove(number)


class LyingStorage(WrappedStorage):
    """Claim that the syncs with these numbers, counted from zero, were done, and do nothing: a barrier taken away."""

    def __init__(self, inner: Storage, *lies: int) -> None:
        super().__init__(inner)
        self.lies = frozenset(lies)
        self.syncs = 0

    def lie(self, *which: int) -> None:
        """Take these of the syncs from now on away; 0 is the next one."""
        self.lies = frozenset(self.syncs + number for number in which)

    def sync(self) -> None:
        number, self.syncs = self.syncs, self.syncs + 1
        if number not in self.lies:
            self.inner.sync()


class FailingSync(WrappedStorage):
    """Fail the next sync after `fail()`, and forget what it should have covered: no later sync makes that stable."""

    def __init__(self, inner: CrashStorage) -> None:
        super().__init__(inner)
        self.record = inner.record
        self.fails = False

    def fail(self) -> None:
        self.fails = True

    def sync(self) -> None:
        if not self.fails:
            return self.inner.sync()
        self.fails = False
        with self.record.lock:
            settled = max((at for at, event in enumerate(self.record.events) if isinstance(event, Sync)), default=0)
            self.record.under_way.update(range(settled, len(self.record.events)))
        raise StorageError.of(OSError(errno.EIO, ""), "sync", self.name)


@dataclass(frozen=True, slots=True)
class CrashState:
    """What a crash can leave. `crash_state` finds it again by `name`; `marks` are the labels of what came before."""

    name: str
    marks: tuple[str, ...]
    contents: Mapping[str, bytes] = field(repr=False)

    def storage(self, file: str = "image") -> MemoryStorage:
        """Return the file as the next boot finds it, as a writable copy."""
        return MemoryStorage(self.contents[file], name=f"{file} after crash {self.name}")


def crash_states(record: CrashRecord, *, seed: int = 0, limit: int = 64) -> Iterator[CrashState]:
    """Yield what crashes can leave, each state once, oldest first: at most `limit` of each epoch, all if there are few.

    An epoch ends with a sync. Just before its end every write is in doubt that was in doubt at any moment of it, so
    the states there include those of all its moments.
    """
    for epoch in _epochs(record):
        seen = set()
        for kind, choice in epoch.choices(seed, limit):
            if choice not in seen:
                seen.add(choice)
                yield epoch.state(kind, choice)


def crash_state(record: CrashRecord, name: str) -> CrashState:
    """Return the one state of that name. Raises LookupError where the record has none such."""
    number, _, kind = name.partition("/")
    for epoch in _epochs(record):
        if epoch.number == int(number):
            return epoch.state(kind, epoch.choice(kind))
    raise LookupError(f"the record has no epoch {number}")


@dataclass(frozen=True, slots=True)
class _Version:
    """What a cell holds after the epoch's change number `by`; `reach` is the length that the file has then at least."""

    by: int
    content: bytes
    reach: int


@dataclass(slots=True)
class _File:
    """The stable bytes of one file, and what may have replaced them: `cells` are its sectors and its length."""

    stable: bytearray
    length: int = 0
    cells: dict[int, list[_Version]] = field(default_factory=dict)

    def begin(self) -> None:
        self.length = len(self.stable)
        self.cells = {}

    def add(self, number: int, change: Change) -> None:
        """Give every sector that the change touches one more version."""
        if change.resized:
            self._cut(number, change.offset)
            self._set_length(number, change.offset)
            return
        end = change.offset + len(change.data)
        for sector in range(change.offset // SECTOR, -(-end // SECTOR)):
            start = max(change.offset, sector * SECTOR)
            piece = change.data[start - change.offset : (sector + 1) * SECTOR - change.offset]
            self._store(number, sector, start, piece, reach=start + len(piece))
        if change.data and end > self.length:
            self._set_length(number, end)

    def _cut(self, number: int, length: int) -> None:
        for sector in range(length // SECTOR, -(-self.length // SECTOR)):
            start = max(length, sector * SECTOR)
            self._store(number, sector, start, bytes((sector + 1) * SECTOR - start), reach=0)

    def _store(self, number: int, sector: int, start: int, piece: bytes, *, reach: int) -> None:
        versions = self.cells.setdefault(sector, [_Version(-1, self._first(sector), 0)])
        at = start - sector * SECTOR
        last = versions[-1].content
        versions.append(_Version(number, last[:at] + piece + last[at + len(piece) :], reach))

    def _first(self, sector: int) -> bytes:
        return bytes(self.stable[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0")

    def _set_length(self, number: int, length: int) -> None:
        self.length = length
        self.cells.setdefault(_LENGTH, [_Version(-1, b"", len(self.stable))]).append(_Version(number, b"", length))


@dataclass(frozen=True, slots=True)
class _Epoch:
    """All that is in doubt at one moment. A choice is the number of a version for each of `cells`."""

    number: int
    marks: tuple[str, ...]
    stable: Mapping[str, bytes]
    changes: int
    cells: Sequence[tuple[str, int, Sequence[_Version]]]

    def choices(self, seed: int, limit: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and choices: all of them, or nothing, everything and a mixture that is likely to hurt."""
        total = math.prod(len(versions) for *_, versions in self.cells)
        if total <= limit:
            everything = itertools.product(*(range(len(versions)) for *_, versions in self.cells))
            yield from ((f"all/{n}", choice) for n, choice in enumerate(everything))
            return
        sampled = self._sampled(random.Random(f"{seed}/{self.number}"), seed, limit)
        kinds = ["first/0", f"first/{self.changes}", *sampled]
        yield from ((kind, self.choice(kind)) for kind in kinds[:limit])

    def _sampled(self, chooser: random.Random, seed: int, limit: int) -> list[str]:
        """A third of it sectors at random, the rest about single changes: lost, alone, the last, the last one torn."""
        chosen = [f"random/{seed}.{n}" for n in range(max(limit // 3, 1))]
        numbers = range(self.changes)
        for number in chooser.sample(numbers, min(limit, self.changes)):
            chosen += [f"without/{number}", f"only/{number}", f"first/{number}", f"torn/{number}"]
        chooser.shuffle(chosen)
        return chosen

    def choice(self, kind: str) -> tuple[int, ...]:
        """The choice that a name stands for."""
        word, _, text = kind.partition("/")
        if word == "all":
            return self._counted(int(text))
        if word == "random":
            return self._random(random.Random(f"{text}/{self.number}"))
        rule = self._rule(word, int(text))
        return tuple(_latest(versions, rule, cell) for cell, (*_, versions) in enumerate(self.cells))

    def _rule(self, word: str, chosen: int) -> Callable[[int, int], bool]:
        """Whether the change with this number came through to this cell."""
        rules: dict[str, Callable[[int, int], bool]] = {
            "first": lambda number, cell: number < chosen,
            "only": lambda number, cell: number == chosen,
            "without": lambda number, cell: number != chosen,
            "torn": lambda number, cell: number < chosen or (number == chosen and cell % 2 == 0),
        }
        return rules[word]

    def _counted(self, number: int) -> tuple[int, ...]:
        choice = []
        for *_, versions in reversed(self.cells):
            number, digit = divmod(number, len(versions))
            choice.append(digit)
        return tuple(reversed(choice))

    def _random(self, chooser: random.Random) -> tuple[int, ...]:
        loss = chooser.choice((0.05, 0.5, 0.95))
        return tuple(
            0 if chooser.random() < loss else chooser.randrange(1, len(versions)) for *_, versions in self.cells
        )

    def state(self, kind: str, choice: Iterable[int]) -> CrashState:
        contents = {file: bytearray(content) for file, content in self.stable.items()}
        lengths = {file: len(content) for file, content in contents.items()}
        reaches = dict.fromkeys(contents, 0)
        for (file, sector, versions), number in zip(self.cells, choice, strict=True):
            version = versions[number]
            if sector == _LENGTH:
                lengths[file] = version.reach
            elif number:
                _put(contents[file], sector * SECTOR, version.content)
                reaches[file] = max(reaches[file], version.reach)
        for file, content in contents.items():
            length = max(lengths[file], reaches[file])
            content[length:] = bytes(max(length - len(content), 0))
        return CrashState(f"{self.number}/{kind}", self.marks, {name: bytes(held) for name, held in contents.items()})


def _latest(versions: Sequence[_Version], came: Callable[[int, int], bool], cell: int) -> int:
    return max((n for n, version in enumerate(versions) if n and came(version.by, cell)), default=0)


def _epochs(record: CrashRecord) -> Iterator[_Epoch]:
    """Yield the moments before each sync that has something to make stable, and the end of the record."""
    files = {name: _File(bytearray(content)) for name, content in record.begins.items()}
    marks: list[str] = []
    pending: list[tuple[int, Change]] = []
    number = 0
    for at, event in enumerate(record.events):
        if isinstance(event, Mark):
            marks.append(event.label)
        elif isinstance(event, Change):
            pending.append((at, event))
        elif any(_is_settled(event, *known) for known in pending):
            yield _epoch(number, marks, files, pending)
            number += 1
            for _, change in (known for known in pending if _is_settled(event, *known)):
                _apply(files[change.file].stable, change)
            pending = [known for known in pending if not _is_settled(event, *known)]
    yield _epoch(number, marks, files, pending)


def _is_settled(sync: Sync, at: int, change: Change) -> bool:
    return change.file == sync.file and at < sync.began and at not in sync.open


def _epoch(number: int, marks: list[str], files: dict[str, _File], pending: list[tuple[int, Change]]) -> _Epoch:
    for file in files.values():
        file.begin()
    for n, (_, change) in enumerate(pending):
        files[change.file].add(n, change)
    cells = [(name, sector, versions) for name, file in files.items() for sector, versions in file.cells.items()]
    stable = {name: bytes(file.stable) for name, file in files.items()}
    return _Epoch(number, tuple(marks), stable, len(pending), cells)


def _apply(content: bytearray, change: Change) -> None:
    if change.resized:
        content[change.offset :] = bytes(max(change.offset - len(content), 0))
    else:
        _put(content, change.offset, change.data)


def _put(content: bytearray, offset: int, data: bytes) -> None:
    content.extend(bytes(max(offset - len(content), 0)))
    content[offset : offset + len(data)] = data
