"""Power is lost at any moment of random work: the image opens, at worst leaks, and what was flushed is there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import cowslice
from cowslice.ops.check import check
from cowslice.storage import Storage
from cowslice.testing import peers, steps
from cowslice.testing.crash import CrashRecord, CrashState, crash_states
from cowslice.testing.crashfile import CrashFiles
from cowslice.testing.modeldisk import ModelDisk
from cowslice.testing.twin import Files, Shape, Twin, make_files, shape_by_chance

DIRTY_BYTE, DIRTY = 79, 1  # of the header: incompatible feature bit 0


def opened(files: Files, image: Storage, data: Storage | None, mode: str = "r+", **options: object) -> cowslice.Image:
    """The image over storages in place of its files; what lies below is read from its files."""
    named: dict[str, object] = options if data is None else {"data_file": data, **options}
    if files.shape.backing != "none":
        below = "middle" if files.shape.backing == "qcow2" else "base"
        named |= {"backing": files.directory / below, "backing_format": "qcow2" if below == "middle" else "raw"}
    return cowslice.open(image, mode, format="qcow2", secret=files.shape.secret, warmup="off", **named)


def recorded(files: Files, model: ModelDisk, work: Callable[[Twin], object], record: CrashRecord | None = None,
             wrap: Callable[[Storage], Storage] = lambda storage: storage) -> CrashRecord:
    """Do the work on files that lose power; each return of a flush is marked."""
    record = record or CrashRecord()
    image = wrap(record.storage(files.image.read_bytes()))
    own = files.shape.data_file != "none"
    data = record.storage((files.directory / "data").read_bytes(), file="data") if own else None
    twin = Twin(files.shape, model, lambda: opened(files, image, data))
    twin.flushed = record.mark
    work(twin)
    twin.close()
    record.mark(model.flush())
    return record


def recorded_by_descriptor(files: Files, model: ModelDisk, work: Callable[[Twin], object]) -> CrashRecord:
    """The same on the files themselves, which compiled code writes to."""
    return recorded_beside_lies(files, model, lambda twin, _: work(twin))


def recorded_beside_lies(files: Files, model: ModelDisk, work: Callable[[Twin, CrashFiles], object]) -> CrashRecord:
    """The same, where the work may take barriers away."""
    paths = [files.image] if files.shape.data_file == "none" else [files.image, files.directory / "data"]
    with CrashFiles(*paths) as crash:
        twin = Twin(files.shape, model, lambda: files.open(warmup="off"))
        twin.flushed = crash.mark
        work(twin, crash)
        twin.close()
        crash.mark(model.flush())
    assert crash.past, "compiled code wrote nothing"
    return crash.record


def fault_of(files: Files, model: ModelDisk, state: CrashState) -> str:
    """What is wrong with the image after a crash, '' for nothing. A dirty image may count wrongly: it says so."""
    image = state.storage()
    found = check(image)
    if found.check_errors or (found.corruptions and not is_dirty(image)):
        return f"{found.corruptions} corruptions, {found.check_errors} errors: {[str(one) for one in found.findings]}"
    data = state.storage("data") if files.shape.data_file != "none" else None
    with opened(files, image, data, "r") as disk:
        wrong = model.after_crash(disk.read(0, disk.size), state.marks)
    return "" if wrong is None else f"the sector at byte {wrong} is neither what was flushed nor anything later"


def is_dirty(image: Storage) -> bool:
    return bool(image.read(DIRTY_BYTE, 1)[0] & DIRTY)


def survive(files: Files, seed: int, *, count: int, limit: int, compiled: bool = False) -> list[CrashState]:
    """Play, crash everywhere, judge every state; returns the states."""
    chooser, model = random.Random(seed), ModelDisk(files.content)
    play = recorded_by_descriptor if compiled else recorded
    record = play(files, model, lambda twin: steps.play(twin, chooser, count))
    states = list(crash_states(record, seed=seed, limit=limit))
    faults = {state.name: fault for state in states if (fault := fault_of(files, model, state))}
    assert not faults, f"seed {seed}, {files.shape}: {faults}"
    return states


@pytest.mark.parametrize("seed", range(12))
@peers.needs("qemu-img")
def test_no_crash_loses_what_was_flushed(seed: int, tmp_path: Path) -> None:
    files = make_files(shape_by_chance(random.Random(seed)), tmp_path)
    survive(files, seed, count=25, limit=10)


COMPILED = [
    *(shape_by_chance(random.Random(seed)) for seed in range(12, 20)), Shape(4096, encryption="aes"),
    Shape(16384, encryption="aes", extended_l2=True, backing="qcow2"), Shape(512, encryption="aes", backing="short")]


@pytest.mark.parametrize("seed, shape", list(enumerate(COMPILED, 12)))
@peers.needs("qemu-img")
def test_no_crash_loses_what_was_flushed_when_compiled_code_writes(seed: int, shape: Shape, tmp_path: Path) -> None:
    survive(make_files(shape, tmp_path), seed, count=30, limit=8, compiled=True)


@peers.needs("qemu-img")
def test_qemu_finds_at_worst_leaks_after_a_crash(tmp_path: Path) -> None:
    files = make_files(Shape(512, refcount_bits=1), tmp_path)
    states = survive(files, 7, count=30, limit=12)
    for state in random.Random(7).sample(states, 25):
        files.image.write_bytes(state.contents["image"])
        files.check(leaks=True)


@pytest.mark.parametrize("shape", [Shape(512), Shape(512, lazy=True), Shape(512, backing="raw")], ids=str)
@peers.needs("qemu-img")
def test_a_short_run_survives_every_crash_there_is(shape: Shape, tmp_path: Path) -> None:
    """Not a sample: every subset of the sectors in doubt."""
    files = make_files(shape, tmp_path)
    model = ModelDisk(files.content)

    def work(twin: Twin) -> None:
        twin.write(0, b"a" * 512)
        twin.flush()
        twin.write(512, b"b" * 512)
        twin.discard(0, shape.cluster_size)
        twin.flush()
        twin.write(0, b"c" * 512)

    record = recorded(files, model, work)
    states = list(crash_states(record, limit=1 << 13))
    assert not [state.name for state in states if fault_of(files, model, state)]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 220))
@peers.needs("qemu-img")
def test_no_crash_loses_what_was_flushed_in_longer_runs(seed: int, tmp_path: Path) -> None:
    files = make_files(shape_by_chance(random.Random(seed)), tmp_path)
    survive(files, seed, count=80, limit=40)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(300, 380))
@peers.needs("qemu-img")
def test_no_crash_loses_what_was_flushed_in_longer_runs_of_compiled_code(seed: int, tmp_path: Path) -> None:
    files = make_files(shape_by_chance(random.Random(seed)), tmp_path)
    survive(files, seed, count=80, limit=30, compiled=True)
