"""Power is lost while an image is amended: it has the old form or the new, its bytes are there, at worst it leaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

import cowslice
from cowslice.image.expanding import expand_zeros
from cowslice.image.options import OpenOptions
from cowslice.image.recounting import change_width, forget_structures
from cowslice.image.writable import opened_writer
from cowslice.ops.check import check
from cowslice.storage import MemoryStorage, Storage
from cowslice.testing.crash import CrashRecord, CrashState, LyingStorage, crash_states
from cowslice.units import KiB

SIZE = 64 * KiB
BASE = MemoryStorage(b"b" * SIZE)
OPTIONS = OpenOptions(format="qcow2", warmup="off", writable=True, backing=BASE, backing_format="raw")

Act = Callable[[Storage], None]


@dataclass(frozen=True, slots=True)
class Disk:
    """An image, and the bytes that its disk and its snapshots hold."""

    content: bytes
    reads: tuple[bytes, ...]


def begun() -> Disk:
    storage = MemoryStorage()
    cowslice.create(storage, SIZE, format="qcow2", cluster_size=512, backing_file="base", backing_format="raw",
                    check_backing=False)
    with cowslice.open(storage, "r+", format="qcow2", warmup="off", backing=BASE, backing_format="raw") as disk:
        disk.write(0, b"o" * 20 * KiB)
        disk.zero(30 * KiB, 8 * KiB)
        disk.snapshot("kept")
        disk.zero(4 * KiB, 3 * KiB)
        disk.write(33 * KiB, b"n" * KiB)
    content = storage.read(0, storage.length())
    return Disk(content, shown(storage))


def shown(storage: Storage) -> tuple[bytes, ...]:
    found = []
    for snapshot in (None, "kept"):
        with cowslice.open(storage, format="qcow2", warmup="off", backing=BASE, backing_format="raw",
                           snapshot=snapshot) as disk:
            found.append(disk.read(0, SIZE))
    return tuple(found)


def widened(bits: int) -> Act:
    def act(storage: Storage) -> None:
        with opened_writer(storage, OPTIONS) as writer:
            former = change_width(writer, bits)
        with opened_writer(storage, OPTIONS) as writer:
            forget_structures(writer, former)
    return act


def expanded(storage: Storage) -> None:
    with opened_writer(storage, OPTIONS) as writer:
        expand_zeros(writer)


ACTS = {"wider": widened(64), "narrower": widened(2), "expanded": expanded}


def recorded(disk: Disk, act: Act, wrap: Callable[[Storage], Storage] = lambda one: one) -> CrashRecord:
    record = CrashRecord()
    act(wrap(record.storage(disk.content)))
    return record


def fault_of(disk: Disk, state: CrashState) -> str:
    """What is wrong after a crash, '' for nothing."""
    image = state.storage()
    found = check(image)
    if found.corruptions or found.check_errors:
        return f"{[one.message for one in found.findings if one.kind == 'corruption']}, {found.check_errors} errors"
    return "" if shown(image) == disk.reads else "a disk reads otherwise"


@pytest.mark.parametrize("name", ACTS)
def test_a_crash_leaves_at_worst_leaks(name: str) -> None:
    disk = begun()
    record = recorded(disk, ACTS[name])
    faults = {state.name: fault for state in crash_states(record, limit=24) if (fault := fault_of(disk, state))}
    assert not faults


@pytest.mark.parametrize("name", ACTS)
def test_without_its_barriers_a_crash_does_harm(name: str) -> None:
    disk, harmful = begun(), 0
    for number in range(6):
        record = recorded(disk, ACTS[name], lambda storage, number=number: LyingStorage(storage, number))  # type: ignore[misc]
        harmful += any(fault_of(disk, state) for state in crash_states(record, limit=24))
    assert harmful


@pytest.mark.parametrize("name", ACTS)
def test_nothing_leaks_when_no_power_is_lost(name: str) -> None:
    disk = begun()
    image = MemoryStorage(disk.content)
    ACTS[name](image)
    found = check(image)
    assert (found.leaks, found.corruptions, found.check_errors) == (0, 0, 0)
    assert shown(image) == disk.reads
