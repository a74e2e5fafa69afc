"""Images whose header extensions and bitmaps are spoilt are read, written, checked, repaired: guest bytes survive."""

from __future__ import annotations

import os
import random
import re
import tracemalloc
from functools import cache

import pytest

import cowslice
from cowslice.errors import CowsliceError
from cowslice.ops.check import CheckReport, check
from cowslice.ops.references import load_tables
from cowslice.ops.repair import repair
from cowslice.storage import MemoryStorage

KiB, MiB = 1 << 10, 1 << 20
SIZE = 2 * MiB
MOST_MEMORY = 16 * MiB


@cache
def base() -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """An image with bitmaps that have bits, and the (offset, length) of what is spoilt."""
    storage = MemoryStorage()
    cowslice.create(storage, SIZE, format="qcow2", cluster_size=4096)
    with cowslice.open(storage, "r+", format="qcow2", warmup="off") as disk:
        for name, granularity in (("day", 512), ("still", 512), ("coarse", 64 * KiB)):
            disk.add_bitmap(name, granularity=granularity)
        disk.write(0, b"s" * 64 * KiB)
        disk.write(MiB, b"t" * 100)
        disk.disable_bitmap("still")
    content = storage.read(0, storage.length())
    pointer = load_tables(storage).first.bitmaps
    assert pointer is not None
    tables = [(area.offset, min(area.length, 64)) for area in load_tables(storage).areas if "bitmap" in area.owner]
    # Not the counts' width and the like: who writes by wrong counts does harm, here and with QEMU.
    first = ((88, 8), (100, 4), (112, 560), (504, 32))
    return content, (*first, (pointer.directory_offset, pointer.directory_size), *tables)


def spoilt(chance: random.Random) -> bytes:
    content, places = base()
    raw = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        start, length = chance.choice(places)
        at = start + chance.randrange(length)
        raw[at] = chance.choice([raw[at] ^ 1 << chance.randrange(8), chance.randrange(256), 0, 255])
    return bytes(raw)


def guest(storage: MemoryStorage) -> bytes | None:
    """What a guest reads, None where the image does not open."""
    try:
        with cowslice.open(storage, format="qcow2", warmup="off") as disk:
            for bitmap in disk.bitmaps:
                try:
                    marked = list(disk.dirty_extents(os.fsdecode(bitmap.name)))
                except CowsliceError:
                    continue
                assert all(0 <= at < at + length <= disk.size for at, length in marked)
            return disk.read(0, min(disk.size, SIZE))
    except CowsliceError:
        return None


def checked(storage: MemoryStorage) -> CheckReport | None:
    try:
        return check(storage, window=1 << 12)
    except CowsliceError:
        return None


def write(raw: bytes, before: bytes) -> None:
    """Another session: it keeps what there is, and adds no corruption."""
    storage = MemoryStorage(raw)
    found = checked(storage)
    try:
        with cowslice.open(storage, "r+", format="qcow2", warmup="off") as disk:
            disk.write(512 * KiB, b"n" * 5000)
            disk.write(100, b"o")
    except CowsliceError:
        now = guest(storage)
        assert now is None or now[:100] == before[:100]
        return
    expected = bytearray(before)
    expected[512 * KiB : 512 * KiB + 5000], expected[100:101] = b"n" * 5000, b"o"
    assert guest(storage) == expected
    assert found is not None
    # A bitmap that claims a cluster of the guest, which counts one, gives it back: like any owner, it is believed.
    if not any(re.search(r"[2-9] references found, the refcount is 1", told.message) for told in found.findings):
        assert corruptions(checked(storage)) <= corruptions(found)


def corruptions(report: CheckReport | None) -> set[str]:
    """Those that concern more than bitmaps: one that is not to be trusted may point at what others take."""
    assert report is not None
    return {told.message for told in report.findings
            if told.kind == "corruption" and "bitmap" not in f"{told.message} {told.claims}"}


def mend(raw: bytes, before: bytes | None) -> None:
    """A repair keeps what can be read, and is done when it is done."""
    storage = MemoryStorage(raw)
    try:
        done = repair(storage, "all", journal=None, window=1 << 12)
    except CowsliceError:
        assert storage.read(0, storage.length()) == raw
        return
    assert before is None or guest(storage) == before
    again = repair(storage, "all", journal=None, window=1 << 12)
    assert not again.edits
    assert again.after.corruptions == done.after.corruptions


def play(seeds: range) -> None:
    for seed in seeds:
        raw = spoilt(random.Random(seed))
        before = guest(MemoryStorage(raw))
        if before is not None:
            write(raw, before)
        mend(raw, before)


@pytest.mark.parametrize("part", range(2))
def test_spoilt_bitmaps_and_extensions_cost_no_guest_byte(part: int) -> None:
    play(range(part * 50, part * 50 + 50))


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_many_spoilt_bitmaps_and_extensions_cost_no_guest_byte(part: int) -> None:
    play(range(1000 + part * 300, 1300 + part * 300))


def test_what_they_claim_takes_no_memory() -> None:
    base()
    tracemalloc.start()
    try:
        play(range(900, 910))
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
