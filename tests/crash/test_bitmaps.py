"""Power is lost while bitmaps note changes or are stored: each is in use or exactly right (I10), the disk unhurt."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import pytest

import cowslice
from cowslice.format.bitmaps import BitmapFlags
from cowslice.ops.check import check
from cowslice.storage import MemoryStorage, Storage
from cowslice.testing.crash import CrashRecord, CrashState, LyingStorage, crash_states
from cowslice.units import KiB

SIZE, G = 96 * KiB, 4 * KiB
NAMES = ("on", "off")
OLD, NEW = b"o", b"n"

Act = Callable[[cowslice.Image], object]


def write(disk: cowslice.Image) -> None:
    disk.write(8 * G, NEW * G)
    disk.flush()
    disk.write(12 * G, NEW * 10)


def merge(disk: cowslice.Image) -> None:
    write(disk)
    disk.merge_bitmap("off", "on")


def enable(disk: cowslice.Image) -> None:
    disk.enable_bitmap("off")
    write(disk)


def remove(disk: cowslice.Image) -> None:
    write(disk)
    disk.remove_bitmap("on")


def add(disk: cowslice.Image) -> None:
    disk.add_bitmap("new", granularity=512)
    write(disk)


def clear(disk: cowslice.Image) -> None:
    disk.clear_bitmap("on")
    write(disk)


def grow(disk: cowslice.Image) -> None:
    write(disk)
    disk.resize(40 * SIZE)


def shrink(disk: cowslice.Image) -> None:
    write(disk)
    disk.resize(SIZE // 2, shrink=True)


CASES = {one.__name__: one for one in (write, merge, enable, remove, add, clear, grow, shrink)}


@functools.cache
def begun(cluster_size: int) -> bytes:
    storage = MemoryStorage()
    cowslice.create(storage, SIZE, format="qcow2", cluster_size=cluster_size)
    with cowslice.open(storage, "r+", format="qcow2", warmup="off") as disk:
        disk.write(0, OLD * SIZE)
        for name in NAMES:
            disk.add_bitmap(name, granularity=G if cluster_size > 512 else 512)
        disk.write(0, OLD)
        disk.disable_bitmap("off")
    return storage.read(0, storage.length())


def recorded(act: Act, cluster_size: int, wrap: Callable[[Storage], Storage] = lambda one: one) -> CrashRecord:
    record = CrashRecord()
    with cowslice.open(wrap(record.storage(begun(cluster_size))), "r+", format="qcow2", warmup="off") as disk:
        act(disk)
    record.mark("closed")
    return record


def changed(disk: cowslice.Image) -> set[int]:
    """The sectors that do not read as they did."""
    read = disk.read(0, disk.size)
    return {at for at in range(0, min(len(read), SIZE), 512) if read[at : at + 512] != OLD * 512}


def sectors(disk: cowslice.Image, name: str) -> set[int]:
    return {at for start, length in disk.dirty_extents(name) for at in range(start, start + length, 512)}


def fault_of(act: Act, cluster_size: int, state: CrashState, final: dict[str, list[int]]) -> str:
    """What is wrong after a crash, '' for nothing."""
    image = state.storage()
    found = check(image)
    if found.corruptions or found.check_errors:
        return f"{[one.message for one in found.findings]}"
    with cowslice.open(image, format="qcow2", warmup="off") as disk:
        usable = {one.name.decode(): one for one in disk.bitmaps if one.usable and not one.in_use}
        if any(one.fault for one in disk.bitmaps):
            return f"bitmaps are unusable: {[one.fault for one in disk.bitmaps]}"
        new = changed(disk)
        for name, one in usable.items():
            marked = sectors(disk, name)
            if (one.flags & BitmapFlags.AUTO or act is enable) and not new <= marked:
                return f"'{name}' looks right and misses {sorted(new - marked)}"
            before = set(range(0, G if cluster_size > 512 else 512, 512))
            if sorted(marked) != final.get(name) and marked != before:
                return f"'{name}' looks right and marks {sorted(marked)}"
        if "closed" in state.marks and set(usable) != set(final):
            return f"after a whole session only {sorted(usable)} can be used"
    with cowslice.open(image, "r+", format="qcow2", warmup="off") as disk:
        disk.write(0, b"again")
    return "" if not check(image).corruptions else "another session does harm"


def finals(act: Act, cluster_size: int) -> dict[str, list[int]]:
    """What the bitmaps mark in the end."""
    storage = MemoryStorage(begun(cluster_size))
    with cowslice.open(storage, "r+", format="qcow2", warmup="off") as disk:
        act(disk)
    with cowslice.open(storage, format="qcow2", warmup="off") as disk:
        return {one.name.decode(): sorted(sectors(disk, one.name.decode())) for one in disk.bitmaps}


@pytest.mark.parametrize("cluster_size", [512, 4096])
@pytest.mark.parametrize("name", CASES)
def test_after_a_crash_a_bitmap_is_in_use_or_exactly_right(name: str, cluster_size: int) -> None:
    act = CASES[name]
    final = finals(act, cluster_size)
    faults = {state.name: fault for state in crash_states(recorded(act, cluster_size), limit=16)
              if (fault := fault_of(act, cluster_size, state, final))}
    assert not faults, json.dumps(faults, indent=1)[:2000]


@pytest.mark.parametrize("name", ["write", "enable", "grow"])
def test_without_its_barriers_a_bitmap_could_miss_a_write(name: str) -> None:
    """So the states above would show it: invariant I10 needs the sync before the first change."""
    act = CASES[name]
    final = finals(act, 4096)
    harmful = 0
    for number in range(4):
        record = recorded(act, 4096, lambda one, number=number: LyingStorage(one, number))  # type: ignore[misc]
        harmful += any(fault_of(act, 4096, state, final) for state in crash_states(record, limit=24))
    assert harmful
