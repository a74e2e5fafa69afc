"""Power is lost inside a verb: the disk reads as before, at worst it leaks, and the verb can be done again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import cowslice
from cowslice.image.options import OpenOptions
from cowslice.ops.amend import amend
from cowslice.ops.amendrules import Amendment
from cowslice.ops.check import check
from cowslice.ops.commit import commit
from cowslice.ops.rebase import Backing, rebase
from cowslice.storage import MemoryStorage
from cowslice.testing.crash import CrashRecord, CrashState, crash_states
from cowslice.testing.crashfile import CrashFiles
from cowslice.units import KiB

SIZE = 96 * KiB
QCOW2 = OpenOptions(format="qcow2")

Act = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Case:
    """A verb on the file "image", and what that stands on: `below` is "raw", "qcow2" or "data" (a data file)."""

    act: Act
    below: str = ""
    cluster_size: int = 512
    version: int = 3
    snapshot: bool = False


def committed(place: Path, *, keep: bool = False) -> None:
    commit(str(place / "image"), QCOW2, keep=keep)


def rebased(place: Path, name: str = "", kind: str | None = None) -> None:
    rebase(str(place / "image"), QCOW2, Backing(name, kind))


def amended(place: Path, **wanted: object) -> None:
    amend(str(place / "image"), QCOW2, Amendment(**wanted))  # type: ignore[arg-type]


LONG = "a-name-that-is-not-short/../" * 20 + "twin"

CASES = {
    "commit into raw": Case(committed, "raw"),
    "commit into qcow2": Case(committed, "qcow2"),
    "commit and keep": Case(lambda place: committed(place, keep=True), "qcow2", 4096),
    "rebase onto nothing": Case(rebased, "raw"),
    "rebase onto another": Case(lambda place: rebased(place, "other", "raw"), "qcow2", 4096),
    "amend to version 2": Case(lambda place: amended(place, compat="0.10"), "raw", snapshot=True),
    "amend to version 2, large clusters": Case(lambda place: amended(place, compat="0.10"), "raw", 16 * KiB),
    "amend to version 3": Case(lambda place: amended(place, compat="1.1"), "raw", version=2, snapshot=True),
    "amend to version 3, large clusters": Case(lambda place: amended(place, compat="1.1"), "raw", 16 * KiB, version=2),
    "amend refcounts": Case(lambda place: amended(place, refcount_bits=64), "raw", snapshot=True),
    "amend lazy": Case(lambda place: amended(place, lazy_refcounts=True), "raw", 4096),
    "amend the data file": Case(lambda place: amended(place, data_file="twin"), "data", 16 * KiB),
    "amend the data file to a long name": Case(lambda place: amended(place, data_file=LONG), "data", 16 * KiB),
}


def begin(case: Case, place: Path) -> bytes:
    """Make the files; returns what the disk shows."""
    chooser = random.Random(7)
    (place / "a-name-that-is-not-short").mkdir()
    (place / "other").write_bytes(chooser.randbytes(SIZE // 2))
    named: dict[str, object] = {}
    if case.below == "data":
        named = {"data_file": "data"}
    elif case.below:
        make_below(case.below, place, chooser.randbytes(SIZE * 2 // 3))
        named = {"backing_file": "base", "backing_format": case.below}
    cowslice.create(place / "image", SIZE, format="qcow2", cluster_size=case.cluster_size,
                    compat={2: "0.10", 3: "1.1"}[case.version], **named)  # type: ignore[arg-type]
    with cowslice.open(place / "image", "r+") as disk:
        disk.write(3 * KiB, chooser.randbytes(20 * KiB))
        if case.snapshot:
            disk.snapshot("kept")
        disk.zero(8 * KiB, 8 * KiB)
        disk.write(40 * KiB, chooser.randbytes(5 * KiB))
    if case.below == "data":
        (place / "twin").write_bytes((place / "data").read_bytes())
    return shown(place)


def make_below(kind: str, place: Path, content: bytes) -> None:
    if kind == "raw":
        (place / "base").write_bytes(content)
        return
    cowslice.create(place / "base", len(content), format="qcow2", cluster_size=1024)
    with cowslice.open(place / "base", "r+") as disk:
        disk.write(0, content)


def shown(place: Path) -> bytes:
    """What the disk holds, and its snapshot if there is one."""
    with cowslice.open(place / "image", warmup="off") as disk:
        content = disk.read(0, disk.size)
        names = [one.name.decode() for one in disk.snapshots]
    for name in names:
        with cowslice.open(place / "image", warmup="off", snapshot=name) as disk:
            content += disk.read(0, disk.size)
    return content


def recorded(case: Case, place: Path, lies: tuple[int, ...] = ()) -> CrashRecord:
    paths = [place / name for name in ("image", "base", "data") if (place / name).exists()]
    with CrashFiles(*paths, lies=lies) as crash:
        case.act(place)
    return crash.record


def crashed(place: Path, state: CrashState) -> Path:
    """The files as the crash left them, in the same place."""
    for name, content in state.contents.items():
        (place / name).write_bytes(content)
    return place


def fault_of(place: Path, before: bytes) -> str:
    """What is wrong with the files, '' for nothing."""
    for path in (place / "image", place / "base"):
        if path.exists() and path.read_bytes().startswith(b"QFI\xfb"):
            found = check(MemoryStorage(path.read_bytes()))
            bad = [one.message for one in found.findings if one.kind == "corruption"]
            if bad or found.check_errors:
                return f"{path.name}: {bad}, {found.check_errors} errors"
    try:
        return "" if shown(place) == before else "the disk reads otherwise"
    except cowslice.CowsliceError as error:
        return f"it cannot be read: {error}"


@pytest.mark.parametrize("name", CASES)
def test_a_crash_inside_a_verb_leaves_the_disk_as_it_was(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    before = begin(case, tmp_path)
    faults = {state.name: fault for state in crash_states(recorded(case, tmp_path), limit=10)
              if (fault := fault_of(crashed(tmp_path, state), before))}
    assert not faults


@pytest.mark.parametrize("name", CASES)
def test_after_a_crash_the_verb_can_be_done_again(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    before = begin(case, tmp_path)
    states = list(crash_states(recorded(case, tmp_path), limit=6))
    for state in random.Random(3).sample(states, min(len(states), 6)):
        case.act(crashed(tmp_path, state))
        assert not fault_of(tmp_path, before), state.name


@pytest.mark.parametrize("name", ["commit into raw", "rebase onto nothing", "amend refcounts"])
def test_without_its_barriers_a_crash_inside_a_verb_does_harm(name: str, tmp_path: Path) -> None:
    assert any(does_harm(CASES[name], tmp_path / str(number), number) for number in range(8))


def does_harm(case: Case, place: Path, lie: int) -> bool:
    """Whether a crash can do harm once the sync of this number makes nothing stable."""
    place.mkdir()
    before = begin(case, place)
    return any(fault_of(crashed(place, state), before)
               for state in crash_states(recorded(case, place, lies=(lie,)), limit=16))
