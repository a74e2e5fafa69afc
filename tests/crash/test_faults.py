"""The disk is full, or fails, at each call of every operation that writes: a clear error, no harm, and it goes on.

The matrix: each operation, times what fails (reading, writing, growing, syncing), times the number of the call.
"""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Callable, Iterator

import pytest

import cowslice
from cowslice.errors import StorageError
from cowslice.ops.check import check
from cowslice.storage import MemoryStorage, Storage
from cowslice.testing.faults import Fault, FaultyStorage, Operation
from cowslice.units import KiB

SIZE = 96 * KiB
BELOW = MemoryStorage(b"b" * SIZE)

Act = Callable[[cowslice.Image], object]
Kind = tuple[Operation, int, int]  # what fails, how, and how many times


def write_new(disk: cowslice.Image) -> None:
    disk.write(50 * KiB, b"n" * 3 * KiB)
    disk.flush()


def write_shared(disk: cowslice.Image) -> None:
    disk.write(3 * KiB, b"n" * 3 * KiB)
    disk.flush()


def write_compressed(disk: cowslice.Image) -> None:
    disk.write_compressed(8 * KiB, b"n" * 8 * KiB)
    disk.flush()


def zero(disk: cowslice.Image) -> None:
    disk.zero(3 * KiB + 100, 20 * KiB)
    disk.flush()


def zero_and_keep(disk: cowslice.Image) -> None:
    disk.zero(3 * KiB + 100, 60 * KiB, keep=True)
    disk.flush()


def discard(disk: cowslice.Image) -> None:
    disk.discard(0, 24 * KiB)
    disk.flush()
    disk.flush()


def vacate(disk: cowslice.Image) -> None:
    disk.vacate()
    disk.flush()


def bitmaps(disk: cowslice.Image) -> None:
    disk.add_bitmap("more", granularity=512)
    disk.enable_bitmap("more")
    disk.write(2 * KiB, b"n")
    disk.merge_bitmap("more", "marks")
    disk.clear_bitmap("marks")


ACTS: dict[str, Act] = {
    "write new": write_new,
    "write shared": write_shared,
    "write compressed": write_compressed,
    "zero": zero,
    "zero and keep": zero_and_keep,
    "discard": discard,
    "vacate": vacate,
    "snapshot": lambda disk: disk.snapshot("made"),
    "apply": lambda disk: disk.apply_snapshot("kept"),
    "delete": lambda disk: disk.delete_snapshot("other"),
    "grow": lambda disk: disk.resize(40 * SIZE, preallocation="metadata"),
    "shrink": lambda disk: disk.resize(SIZE // 3, shrink=True),
    "bitmaps": bitmaps,
}
WHOLE = ("snapshot", "apply", "delete", "grow", "shrink")  # they happen or they do not
ALWAYS = 1 << 62
KINDS: list[Kind] = [
    ("pread", errno.EIO, 2), ("pread", errno.EIO, ALWAYS), ("pwrite", errno.ENOSPC, ALWAYS), ("pwrite", errno.EIO, 1),
    ("zero", errno.ENOSPC, ALWAYS), ("truncate", errno.ENOSPC, ALWAYS), ("discard", errno.EIO, 1),
    ("sync", errno.EIO, 1),
]
EARLY = "the copied flag is clear, but the refcount"  # costs a copy, no byte


@functools.cache
def begun() -> bytes:
    """An overlay of clusters of one sector, with data, two snapshots, newer data, and a bitmap."""
    storage = MemoryStorage()
    cowslice.create(storage, SIZE, format="qcow2", cluster_size=512, backing_file="base", backing_format="raw",
                    check_backing=False)
    with opened(storage) as disk:
        disk.write(0, b"o" * 30 * KiB)
        disk.snapshot("kept")
        disk.snapshot("other")
        disk.write(0, b"p" * 10 * KiB)
        disk.add_bitmap("marks", granularity=512)
    return storage.read(0, storage.length())


def opened(storage: object, mode: str = "r+", **options: object) -> cowslice.Image:
    return cowslice.open(storage, mode, format="qcow2", warmup="off", backing=BELOW,  # type: ignore[arg-type]
                         backing_format="raw", **options)


def content(disk: cowslice.Image) -> bytes:
    return disk.read(0, disk.size)


@functools.cache
def outcome(name: str) -> bytes:
    """What the disk holds once nothing failed."""
    with opened(MemoryStorage(begun())) as disk:
        ACTS[name](disk)
        return content(disk)


@functools.cache
def before() -> bytes:
    with opened(MemoryStorage(begun()), "r") as disk:
        return content(disk)


def run(name: str, fault: Fault) -> bool:
    """Do the operation while something fails, and judge; whether it failed at all."""
    storage = FaultyStorage(MemoryStorage(begun(), name="image"))
    error = None
    disk = opened(storage)
    storage.add(fault)
    try:
        ACTS[name](disk)
    except StorageError as failure:
        error = failure
        assert failure.errno == fault.code or "opened again" in str(failure), repr(failure)
    fired = storage.met > fault.skip
    storage.heal()
    if fault.operation == "sync" and error is not None:
        with pytest.raises(StorageError, match="opened again"):
            disk.write(0, b"after" * 100)
        with contextlib.suppress(StorageError):
            disk.close()
    else:
        judge_content(name, content(disk), done=error is None)
        go_on(disk)
        disk.close()
    judge_file(name, storage.inner, done=error is None)
    return fired


def judge_content(name: str, seen: bytes, *, done: bool) -> None:
    """Each sector is old or new; all of them are alike where the operation is one step; all are new when it said so."""
    old, new = before(), outcome(name)
    if done:
        assert seen == new
    elif name in WHOLE:
        assert seen in (old, new)
    else:
        for at in range(0, SIZE, 512):
            assert seen[at : at + 512] in (old[at : at + 512], new[at : at + 512]), f"the sector at {at}"


def go_on(disk: cowslice.Image) -> None:
    """Once the fault is over the disk takes new work, that needs room, and keeps it."""
    data = bytes(range(200)) * 10
    disk.write(disk.size - len(data), data)
    disk.flush()
    assert disk.read(disk.size - len(data), len(data)) == data


def judge_file(name: str, image: Storage, *, done: bool) -> None:
    """Nothing is corrupt, snapshots are what they were, and another session goes on."""
    for _ in range(2):
        found = check(image)
        bad = [one.message for one in found.findings if one.kind == "corruption" and EARLY not in one.message]
        assert not bad
        assert not found.check_errors
        with opened(image, "r", snapshot="kept") as disk:
            assert content(disk) == b"o" * 30 * KiB + b"b" * (SIZE - 30 * KiB)
        with opened(image) as disk:
            assert not [one.fault for one in disk.bitmaps if one.fault]
            go_on(disk)
    if name == "snapshot" and done:
        with opened(image, "r", snapshot="made") as disk:
            assert content(disk) == before()


def skips(most: int | None) -> Iterator[int]:
    """Numbers of calls: all of them, or `most` that lie ever further apart."""
    return iter(range(10_000)) if most is None else iter([n * n for n in range(most)])


def walk(name: str, kind: Kind, most: int | None = None) -> None:
    operation, code, times = kind
    for skip in skips(most):
        if not run(name, Fault(operation, skip=skip, times=times, code=code)):
            return


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{errno.errorcode[kind[1]]}-{kind[2]}")
@pytest.mark.parametrize("name", ACTS)
def test_a_fault_costs_its_operation_only(name: str, kind: Kind) -> None:
    walk(name, kind, 4)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{errno.errorcode[kind[1]]}-{kind[2]}")
@pytest.mark.parametrize("name", ACTS)
def test_a_fault_at_any_call_costs_its_operation_only(name: str, kind: Kind) -> None:
    walk(name, kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{errno.errorcode[kind[1]]}-{kind[2]}")
def test_an_image_that_cannot_be_opened_for_a_fault_is_as_it_was(kind: Kind) -> None:
    operation, code, times = kind
    for skip in range(20):
        fault = Fault(operation, skip=skip, times=times, code=code)
        storage = FaultyStorage(MemoryStorage(begun(), name="image"), fault)
        with contextlib.suppress(StorageError), opened(storage) as disk:
            storage.heal()
            disk.write(0, b"q" * 512)
        storage.heal()
        judge_file("open", storage.inner, done=False)


def has_happened(name: str, disk: cowslice.Image) -> bool:
    """Whether the disk is that of "kept", which an apply makes it, or "other" is gone."""
    if name == "apply":
        return content(disk) == outcome("apply")
    return b"other" not in [one.name for one in disk.snapshots]


@pytest.mark.parametrize("operation,code", [("pwrite", errno.ENOSPC), ("zero", errno.ENOSPC), ("pread", errno.EIO)])
@pytest.mark.parametrize("name", ["delete", "apply"])
def test_a_snapshot_operation_fails_exactly_when_nothing_has_changed(
    name: str, operation: Operation, code: int
) -> None:
    """Whatever cannot be freed once the header says so: it is no error then, and closing gives it back."""
    for skip in range(10_000):
        storage = FaultyStorage(MemoryStorage(begun(), name="image"))
        with opened(storage) as disk:
            storage.add(Fault(operation, skip=skip, code=code))
            try:
                ACTS[name](disk)
                failed = False
            except StorageError:
                failed = True
            fired = storage.met > skip
            storage.heal()
            assert has_happened(name, disk) is not failed
        found = check(storage.inner)
        assert not [one.message for one in found.findings if one.kind == "corruption"]
        assert operation == "pread" or not found.leaks
        if not fired:
            return
