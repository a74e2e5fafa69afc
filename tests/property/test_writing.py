"""Random operations on the real thing and on a model that is obviously right; QEMU judges what is left."""

from __future__ import annotations

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import NoSpace
from cowslice.storage import MemoryStorage
from cowslice.testing import peers, steps
from cowslice.testing.faults import Fault, FaultyStorage, Operation
from cowslice.testing.modeldisk import ModelDisk
from cowslice.testing.twin import Files, Shape, Twin, judge, make_files, shape_by_chance

pytestmark = peers.needs("qemu-img", "qemu-io")

UNIT = 512


def live(files: Files, seed: int, count: int) -> None:
    model = ModelDisk(files.content)
    twin = Twin(files.shape, model, files.open)
    try:
        steps.play(twin, random.Random(seed), count)
        twin.read_all()
    finally:
        twin.close()
    judge(files, model)


@pytest.mark.parametrize("seed", range(24))
def test_a_disk_is_what_was_written_to_it(seed: int, tmp_path: Path) -> None:
    live(make_files(shape_by_chance(random.Random(seed)), tmp_path), seed, 40)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1300))
def test_a_disk_is_what_was_written_to_it_in_longer_lives(seed: int, tmp_path: Path) -> None:
    live(make_files(shape_by_chance(random.Random(seed)), tmp_path), seed, 200)


@pytest.mark.parametrize("seed", range(4))
def test_qemu_and_we_take_turns_on_one_image(seed: int, tmp_path: Path) -> None:
    chooser = random.Random(seed)
    files = make_files(Shape(4096, backing="raw"), tmp_path)
    model = ModelDisk(files.content)
    for turn in range(3):
        offset = chooser.randrange(files.shape.size // UNIT - 40) * UNIT
        peers.qemu_io(files.image, f"write -P {turn + 1} {offset} 20k", f"write -z {offset + 4096} 4k")
        model.write(offset, bytes([turn + 1]) * 20480)
        model.zero(offset + 4096, 4096)
        twin = Twin(files.shape, model, files.open)
        steps.play(twin, chooser, 15)
        twin.close()
        judge(files, model)


@pytest.mark.parametrize("operation", ["pread", "pwrite", "zero"])
@pytest.mark.parametrize("skip", range(0, 24, 3))
def test_a_failed_call_costs_its_request_only(operation: Operation, skip: int, tmp_path: Path) -> None:
    """Whatever fails for want of room or by chance: a clear error, at worst leaks, and all goes on once it is over."""
    files = make_files(Shape(512), tmp_path)
    model, chooser = ModelDisk(files.content), random.Random(skip)
    storage = FaultyStorage(MemoryStorage(files.image.read_bytes(), name="image"))
    disk = cowslice.open(storage, "r+", format="qcow2", warmup="off")
    storage.add(Fault(operation, skip=skip, times=2, code=28))
    for _ in range(25):
        offset, data = chooser.randrange(300) * UNIT, chooser.randbytes(chooser.choice((1, 3, 8)) * UNIT)
        try:
            disk.write(offset, data)
            model.write(offset, data)
        except NoSpace:
            model.fail(offset, data)
        with contextlib.suppress(NoSpace):
            disk.flush()
    storage.heal()
    disk.write(0, b"w" * UNIT)
    model.write(0, b"w" * UNIT)
    assert model.differs(0, disk.read(0, disk.size)) is None
    disk.close()
    files.image.write_bytes(storage.inner.read(0, storage.inner.length()))
    judge(files, model, leaks=True)


@pytest.mark.parametrize("shape", [Shape(512), Shape(16384, extended_l2=True), Shape(4096, backing="raw")], ids=str)
def test_threads_that_write_the_same_units_leave_one_of_their_values(shape: Shape, tmp_path: Path) -> None:
    files = make_files(shape, tmp_path)
    last: list[dict[int, bytes]] = [{} for _ in range(6)]
    begin = threading.Barrier(6)

    def work(number: int) -> None:
        chooser = random.Random(number)
        begin.wait()
        for _ in range(60):
            start, count = chooser.randrange(60), chooser.randrange(1, 12)
            act = chooser.choice(("write",) * 5 + ("zero", "flush"))
            if act == "flush":
                disk.flush()
                continue
            value = bytes(UNIT) if act == "zero" else chooser.randbytes(UNIT)
            if act == "zero":
                disk.zero(start * UNIT, count * UNIT)
            else:
                disk.write(start * UNIT, value * count)
            last[number] |= dict.fromkeys(range(start, start + count), value)

    with files.open() as disk:
        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(work, number) for number in range(6)]:
                done.result()
        seen = disk.read(0, disk.size)
    files.check()
    assert files.qemu_reads() == seen
    for unit in range(72):
        possible = [values[unit] for values in last if unit in values]
        place = slice(unit * UNIT, (unit + 1) * UNIT)
        assert seen[place] in (possible or [files.content[place]]), f"unit {unit} holds what no thread wrote last"
