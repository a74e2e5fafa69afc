"""Power is lost inside a snapshot operation or a resize: at worst leaks, and COPIED that was cleared too early."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

import cowslice
from cowslice.ops.check import check
from cowslice.storage import MemoryStorage, Storage
from cowslice.testing.crash import CrashRecord, CrashState, LyingStorage, crash_states
from cowslice.units import KiB

SIZE, SMALL, LARGE = 96 * KiB, 40 * KiB, 200 * KiB
OLD, NEW = b"o", b"n"
EARLY = "the copied flag is clear, but the refcount"  # costs a copy, no byte

Act = Callable[[cowslice.Image], object]


@dataclass(frozen=True, slots=True)
class Case:
    """An operation, and the disks (length, first byte of what was overwritten) that a crash in it may show."""

    act: Act
    shows: tuple[tuple[int, bytes], ...]
    snapshots: tuple[tuple[bytes, ...], ...] = ((b"kept", b"other"),)


CASES = {
    "create": Case(lambda disk: disk.snapshot("made"), ((SIZE, NEW),),
                   ((b"kept", b"other"), (b"kept", b"other", b"made"))),
    "apply": Case(lambda disk: disk.apply_snapshot("kept"), ((SIZE, NEW), (SIZE, OLD))),
    "delete": Case(lambda disk: disk.delete_snapshot("other"), ((SIZE, NEW),), ((b"kept", b"other"), (b"kept",))),
    "grow": Case(lambda disk: disk.resize(LARGE, preallocation="metadata"), ((SIZE, NEW), (LARGE, NEW))),
    "shrink": Case(lambda disk: disk.resize(SMALL, shrink=True), ((SIZE, NEW), (SMALL, NEW))),
}


@functools.cache
def begun(cluster_size: int) -> bytes:
    """An image with data, two snapshots, and newer data over a part of it."""
    storage = MemoryStorage()
    cowslice.create(storage, SIZE, format="qcow2", cluster_size=cluster_size)
    with cowslice.open(storage, "r+", format="qcow2", warmup="off") as disk:
        disk.write(0, OLD * SIZE)
        disk.snapshot("kept")
        disk.snapshot("other")
        disk.write(0, NEW * (30 * KiB))
    return storage.read(0, storage.length())


def recorded(case: Case, cluster_size: int, wrap: Callable[[Storage], Storage] = lambda one: one) -> CrashRecord:
    record = CrashRecord()
    image = wrap(record.storage(begun(cluster_size)))
    with cowslice.open(image, "r+", format="qcow2", warmup="off") as disk:
        case.act(disk)
        record.mark("done")
    return record


def fault_of(case: Case, state: CrashState) -> str:
    """What is wrong after a crash, '' for nothing."""
    image = state.storage()
    found = check(image)
    bad = [one.message for one in found.findings if one.kind == "corruption" and EARLY not in one.message]
    if bad or found.check_errors:
        return f"{bad}, {found.check_errors} errors"
    with cowslice.open(image, format="qcow2", warmup="off") as disk:
        fault = wrong_disk(case, disk, done="done" in state.marks)
        names = tuple(one.name for one in disk.snapshots)
    if fault:
        return fault
    if names not in case.snapshots or ("done" in state.marks and names != case.snapshots[-1]):
        return f"snapshots are {names!r}"
    for name in names:
        with cowslice.open(image, format="qcow2", warmup="off", snapshot=name.decode()) as shot:
            first = NEW if name == b"made" else OLD
            if shot.read(0, SIZE) != first * (30 * KiB) + OLD * (SIZE - 30 * KiB):
                return f"snapshot {name!r} holds other bytes"
    return ""


def wrong_disk(case: Case, disk: cowslice.Image, *, done: bool) -> str:
    shows = case.shows[-1:] if done else case.shows
    read = disk.read(0, disk.size)
    if (disk.size, read[:1]) not in shows:
        return f"the disk has {disk.size} bytes and begins with {read[:1]!r}"
    whole = read[:1] * (30 * KiB) + OLD * (SIZE - 30 * KiB) + bytes(LARGE)
    kept = min(size for size, _ in case.shows)
    if read[:kept] != whole[:kept]:
        return "the disk holds other bytes"
    rest = read[kept : disk.size]
    return "" if all(byte in (0, OLD[0]) for byte in rest) and not any(read[SIZE:]) else "the end holds other bytes"


@pytest.mark.parametrize("cluster_size", [512, 4096])
@pytest.mark.parametrize("name", CASES)
def test_a_crash_inside_leaves_at_worst_leaks(name: str, cluster_size: int) -> None:
    case = CASES[name]
    faults = {state.name: fault for state in crash_states(recorded(case, cluster_size), limit=24)
              if (fault := fault_of(case, state))}
    assert not faults


@pytest.mark.parametrize("name", CASES)
def test_without_its_barriers_a_crash_inside_does_harm(name: str) -> None:
    """So the states above would show it. Which barriers are needed differs; some only repeat what a commit did."""
    case = CASES[name]
    harmful = 0
    for number in range(8):
        record = recorded(case, 512, lambda storage, number=number: LyingStorage(storage, number))  # type: ignore[misc]
        harmful += any(fault_of(case, state) for state in crash_states(record, limit=24))
    assert harmful


@pytest.mark.parametrize("name", ["create", "apply", "delete"])
def test_what_a_crash_left_is_mended_by_the_next_delete(name: str) -> None:
    case = CASES[name]
    for state in list(crash_states(recorded(case, 4096), limit=8)):
        image = state.storage()
        with cowslice.open(image, "r+", format="qcow2", warmup="off") as disk:
            disk.snapshot("more")
            disk.delete_snapshot("more")
        assert check(image).corruptions == 0, state.name
