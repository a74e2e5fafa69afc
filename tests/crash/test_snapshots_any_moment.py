"""Power is lost at any moment of random work between snapshots: they hold their bytes, the disk what was flushed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cowslice.image.refcounts import RefcountOverflow
from cowslice.ops.check import check
from cowslice.testing import peers, steps
from cowslice.testing.crash import CrashState, crash_states
from cowslice.testing.modeldisk import ModelDisk
from cowslice.testing.twin import Files, Shape, Twin, make_files
from tests.crash.test_any_moment import is_dirty, opened, recorded, recorded_by_descriptor

EARLY = "the copied flag is clear, but the refcount"  # costs a copy, no byte
SHAPES = [Shape(512), Shape(4096, refcount_bits=8), Shape(4096, backing="raw"), Shape(16384, extended_l2=True),
          Shape(1024, lazy=True), Shape(1024, 2, backing="short"), Shape(4096, encryption="aes")]


class Album:
    """Takes, applies and deletes snapshots as steps of a play; `shots` is what each must hold."""

    def __init__(self) -> None:
        self.shots: dict[str, bytes] = {}
        self.present: list[str] = []

    def take(self, twin: Twin, chooser: random.Random) -> None:
        name = f"shot{len(self.shots)}"
        self.shots[name] = bytes(twin.model.content)
        with contextlib.suppress(RefcountOverflow):
            twin.disk.snapshot(name)
            self.present.append(name)
            twin.flushed(twin.model.flush())

    def apply(self, twin: Twin, chooser: random.Random) -> None:
        if self.present:
            name = chooser.choice(self.present)
            with contextlib.suppress(RefcountOverflow):
                twin.disk.apply_snapshot(name)
                twin.model.write(0, self.shots[name])
                twin.flushed(twin.model.flush())

    def delete(self, twin: Twin, chooser: random.Random) -> None:
        if self.present:
            twin.disk.delete_snapshot(self.present.pop(chooser.randrange(len(self.present))))

    @property
    def steps(self) -> dict[steps.Step, int]:
        return {**steps.STEPS, write_twice: 6, self.take: 3, self.apply: 1, self.delete: 2}


def write_twice(twin: Twin, chooser: random.Random) -> None:
    """The second time in place, which compiled code does."""
    offset, length = steps.span(twin, chooser)
    for _ in range(2):
        twin.write(offset, chooser.randbytes(length))


def fault_of(files: Files, model: ModelDisk, album: Album, state: CrashState) -> str:
    """What is wrong after a crash, '' for nothing."""
    image = state.storage()
    found = check(image)
    bad = [one.message for one in found.findings if one.kind == "corruption" and EARLY not in one.message]
    if found.check_errors or (bad and not is_dirty(image)):
        return f"{bad}, {found.check_errors} errors"
    with opened(files, image, None, "r") as disk:
        if model.after_crash(disk.read(0, disk.size), state.marks) is not None:
            return "the disk holds neither what was flushed nor anything later"
        names = [one.name.decode() for one in disk.snapshots]
    for name in names:
        with opened(files, image, None, "r", snapshot=name) as disk:
            if disk.read(0, disk.size) != album.shots[name]:
                return f"{name} holds other bytes"
    return ""


def survive(files: Files, seed: int, record: Callable[..., object], *, count: int, limit: int) -> None:
    model, album = ModelDisk(files.content), Album()
    chooser = random.Random(seed)
    found = record(files, model, lambda twin: steps.play(twin, chooser, count, album.steps))
    faults = {state.name: fault for state in crash_states(found, seed=seed, limit=limit)  # type: ignore[arg-type]
              if (fault := fault_of(files, model, album, state))}
    assert not faults, f"seed {seed}, {files.shape}: {faults}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@peers.needs("qemu-img")
def test_no_crash_between_snapshots_loses_a_byte(shape: Shape, tmp_path: Path) -> None:
    survive(make_files(shape, tmp_path), 1, recorded_by_descriptor, count=20, limit=3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 20))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@peers.needs("qemu-img")
def test_no_crash_between_snapshots_loses_a_byte_in_longer_runs(shape: Shape, seed: int, tmp_path: Path) -> None:
    survive(make_files(shape, tmp_path), seed, recorded, count=70, limit=12)
