"""Threads and connections that write, discard and take snapshots, delayed wherever one hands over to another.

Every sector of the disk and of every snapshot must hold what some serial order of the requests leaves there, in which
each stands between its call and its return; and nothing is wrong with the image.
"""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import cowslice
from cowslice.image.commit import Commits
from cowslice.image.compressing import Compressing
from cowslice.image.roots import Roots
from cowslice.image.tables import Tables
from cowslice.image.writing import Writer
from cowslice.storage.file import FileStorage
from cowslice.storage.nbd import NbdStorage
from cowslice.testing import peers
from cowslice.testing.twin import Files, Shape, make_files
from cowslice.units import SECTOR

pytestmark = peers.needs("qemu-img")

UNITS = 120  # all requests meet in these sectors
HANDOVERS = [
    (Writer, ("_plan", "_move", "_publish")), (Compressing, ("write",)), (Tables, ("own_table", "drop")),
    (Commits, ("_stage", "_write", "_settle", "release")), (Roots, ("raise_tree", "clear_copied", "switch", "show")),
    (FileStorage, ("pread", "pwrite", "zero", "discard", "sync")),
]
SHAPES = [
    Shape(512), Shape(4096, refcount_bits=8), Shape(4096, backing="raw"), Shape(16384, extended_l2=True),
    Shape(1024, lazy=True), Shape(4096, encryption="aes"),
]


@contextmanager
def delayed(seed: int) -> Iterator[None]:
    """Wait now and then, for moments of different length, before and behind each of the hand-overs."""
    dice = random.Random(seed)

    def slow(act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)
        def call(*arguments: Any, **named: Any) -> Any:
            pause(dice)
            try:
                return act(*arguments, **named)
            finally:
                pause(dice)
        return call

    with ExitStack() as stack:
        for kind, names in HANDOVERS:
            for name in names:
                stack.enter_context(patch.object(kind, name, slow(getattr(kind, name))))
        yield


def pause(dice: random.Random) -> None:
    if dice.random() < 0.2:
        time.sleep(dice.choice((0, 0, 0.0003, 0.002)))


@dataclass(frozen=True, slots=True)
class Request:
    """It began and ended at these moments; `value` is what it leaves in a sector."""

    begin: int
    end: int
    value: bytes


class History:
    """Every request on each sector, by a clock that all threads share."""

    def __init__(self, content: bytes) -> None:
        self.clock = itertools.count(1)
        self.sectors: dict[int, list[Request]] = defaultdict(list)
        self.lock = threading.Lock()
        for unit in range(UNITS):
            self.sectors[unit].append(Request(0, 0, content[unit * SECTOR : (unit + 1) * SECTOR]))

    def note(self, units: range, begin: int, value: bytes) -> None:
        with self.lock:
            end = next(self.clock)
            for unit in units:
                self.sectors[unit].append(Request(begin, end, value))

    def explains(self, seen: bytes, begin: int, end: int) -> int | None:
        """The first sector that what was read between two moments cannot hold, None where all is right."""
        for unit in range(UNITS):
            value = seen[unit * SECTOR : (unit + 1) * SECTOR]
            if not any(one.value == value and self.is_last(unit, one, begin, end) for one in self.sectors[unit]):
                return unit
        return None

    def is_last(self, unit: int, one: Request, begin: int, end: int) -> bool:
        """Whether nothing stands for sure between this request and one from `begin` to `end`."""
        return one.begin < end and not any(one.end < other.begin and other.end < begin for other in self.sectors[unit])


def work(disk: Any, history: History, shape: Shape, seed: int, steps: int) -> None:
    """Requests through an image or a connection, which have the same words for them."""
    dice = random.Random(seed)
    write = getattr(disk, "pwrite", None) or disk.write
    flush = getattr(disk, "sync", None) or disk.flush
    for step in range(steps):
        act, start = dice.choice(("write",) * 5 + ("zero", "discard", "flush")), dice.randrange(UNITS)
        units = range(start, min(start + dice.choice((1, 2, 9, 40)), UNITS))
        offset, length, begin = start * SECTOR, len(units) * SECTOR, next(history.clock)
        if act == "write":
            value = f"{seed}/{step}".encode().ljust(SECTOR, b".")
            write(offset, value * len(units))
            history.note(units, begin, value)
        elif act == "zero":
            disk.zero(offset, length)
            history.note(units, begin, bytes(SECTOR))
        elif act == "discard":
            disk.discard(offset, length)
            per = shape.cluster_size // SECTOR
            whole = range(-(-units.start // per) * per, units.stop // per * per)
            history.note(whole, begin, bytes(SECTOR))
        else:
            flush()


def take_snapshots(disk: cowslice.Image, history: History, taken: dict[str, tuple[int, int]], number: int) -> None:
    """Some are deleted again at once."""
    for step in range(number):
        name, begin = f"shot{step}", next(history.clock)
        disk.snapshot(name)
        taken[name] = begin, next(history.clock)
        if step % 3 == 1:
            disk.delete_snapshot(name)
            del taken[name]


def judge(files: Files, history: History, taken: dict[str, tuple[int, int]]) -> None:
    files.check()
    now = next(history.clock)
    assert history.explains(files.qemu_reads(), now, now) is None
    for name, (begin, end) in taken.items():
        with files.open("r", snapshot=name, warmup="off") as disk:
            wrong = history.explains(disk.read(0, UNITS * SECTOR), begin, end)
            assert wrong is None, f"sector {wrong} of {name} holds what it could not when it was taken"


def race(files: Files, seed: int, *, threads: int = 4, steps: int = 30) -> None:
    history, taken = History(files.content), {}  # type: ignore[var-annotated]
    with delayed(seed), files.open(l2_cache_size=4096, l2_cache_entry_size=512) as disk:
        with ThreadPoolExecutor(threads + 1) as pool:
            tasks = [pool.submit(work, disk, history, files.shape, seed * 100 + one, steps) for one in range(threads)]
            tasks.append(pool.submit(take_snapshots, disk, history, taken, 4))
            for task in tasks:
                task.result()
        now = next(history.clock)
        assert history.explains(disk.read(0, UNITS * SECTOR), now, now) is None
    judge(files, history, taken)


def race_over_nbd(files: Files, seed: int, *, connections: int = 3, steps: int = 30) -> None:
    """Connections, and a thread of the server's own process that takes snapshots."""
    history, taken = History(files.content), {}  # type: ignore[var-annotated]
    socket = files.directory / "race.sock"

    def connected(number: int) -> None:
        with NbdStorage(f"nbd+unix:///?socket={socket}", "r+", connections=1) as disk:
            work(disk, history, files.shape, seed * 100 + number, steps)

    with (delayed(seed), files.open(l2_cache_size=4096, l2_cache_entry_size=512) as disk,
          cowslice.serve(disk, unix=str(socket), writable=True), ThreadPoolExecutor(connections + 1) as pool):
        tasks = [pool.submit(connected, number) for number in range(connections)]
        tasks.append(pool.submit(take_snapshots, disk, history, taken, 4))
        for task in tasks:
            task.result()
    judge(files, history, taken)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_that_meet_leave_what_some_serial_order_does(shape: Shape, tmp_path: Path) -> None:
    race(make_files(shape, tmp_path), 1)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_connections_that_meet_leave_what_some_serial_order_does(shape: Shape, tmp_path: Path) -> None:
    race_over_nbd(make_files(shape, tmp_path), 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 22))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_that_meet_leave_what_some_serial_order_does_in_longer_races(
    shape: Shape, seed: int, tmp_path: Path
) -> None:
    race(make_files(shape, tmp_path), seed, threads=6, steps=120)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_connections_that_meet_leave_what_some_serial_order_does_in_longer_races(
    shape: Shape, seed: int, tmp_path: Path
) -> None:
    race_over_nbd(make_files(shape, tmp_path), seed, steps=120)


def test_a_history_knows_a_value_that_was_overwritten_before() -> None:
    """So the races above would show one that comes back."""
    history = History(bytes(UNITS * SECTOR))
    for value in (b"a", b"b"):
        history.note(range(UNITS), next(history.clock), value * SECTOR)
    now = next(history.clock)
    assert history.explains(b"b" * SECTOR * UNITS, now, now) is None
    assert history.explains(b"a" * SECTOR * UNITS, now, now) == 0
