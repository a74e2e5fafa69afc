"""Ctrl-C at any moment of a verb: its exit status says so, source and target are sound, and it can be done again.

The signal comes at a call of a storage, whose number is chosen, so that every run meets the same moment. An impatient
user presses it again at every later call, as long as the verb brings in order what it wrote.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import cowslice
from cowslice.cli import exitcodes
from cowslice.cli.main import run
from cowslice.cli.termination import SIGNALS
from cowslice.image.growth import Growth
from cowslice.ops.check import check
from cowslice.storage import MemoryStorage
from cowslice.storage.file import FileStorage
from cowslice.units import KiB

SIZE = 300 * KiB
CALLS = ("pread", "pwrite", "zero", "discard", "truncate", "sync", "length")
EARLY = "the copied flag is clear, but the refcount"  # costs a copy, no byte
MOMENTS = (0, 11, 48, 97)


@contextmanager
def interrupted_at(number: int, *, impatient: bool) -> Iterator[None]:
    """Let Ctrl-C come with the call of this number, before it or behind it; if `impatient`, with later ones too."""
    count = itertools.count()
    handlers = {one: signal.getsignal(one) for one in SIGNALS}

    def watched(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(storage: FileStorage, *arguments: Any) -> Any:
            called = next(count)
            due = called == number or (impatient and called > number)
            if due and number % 2:
                signal.raise_signal(signal.SIGINT)
            try:
                return act(storage, *arguments)
            finally:
                if due and number % 2 == 0:
                    signal.raise_signal(signal.SIGINT)
        return call

    with ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(patch.object(FileStorage, name, watched(getattr(FileStorage, name))))
        for one, handler in handlers.items():  # a command that was told to end leaves them ignored
            stack.callback(signal.signal, one, handler)
        yield


@dataclass(frozen=True, slots=True)
class Case:
    """A command in the folder of the files; what it makes, and what it may change of the disk "image"."""

    command: str
    makes: str = ""
    resizes: bool = False
    applies: bool = False
    damaged: bool = False
    changes_below: bool = False  # what snapshots show of it changes too, as under QEMU
    again: bool = True


CASES = {
    "convert to qcow2": Case("convert -O qcow2 image made", "made"),
    "convert and compress": Case("convert -c -O qcow2 -o cluster_size=4k image made", "made"),
    "convert to raw": Case("convert -O raw image made", "made"),
    "convert into": Case("convert -n -O qcow2 image target"),
    "dd": Case("dd -f qcow2 -O qcow2 bs=64k if=image of=made", "made"),
    "commit": Case("commit image", changes_below=True),
    "rebase": Case("rebase -b other -F raw image", changes_below=True),
    "rebase onto nothing": Case("rebase -b  image", changes_below=True),
    "grow": Case("resize image 2M", resizes=True),
    "grow with clusters": Case("resize --preallocation=metadata image 2M", resizes=True),
    "shrink": Case("resize --shrink image 100k", resizes=True),
    "repair": Case("check -r all image", damaged=True),
    "amend refcounts": Case("amend -o refcount_bits=64 image"),
    "amend to version 2": Case("amend -o compat=0.10 image"),
    "take a snapshot": Case("snapshot -c made image", again=False),
    "apply a snapshot": Case("snapshot -a kept image", applies=True),
    "delete a snapshot": Case("snapshot -d other image", again=False),
}


def begun(place: Path, *, damaged: bool) -> tuple[bytes, bytes]:
    """Make the files; returns what the disk "image" and its snapshot "kept" hold."""
    chooser = random.Random(5)
    (place / "base").write_bytes(chooser.randbytes(SIZE // 2))
    (place / "other").write_bytes(chooser.randbytes(SIZE // 3))
    cowslice.create(place / "target", SIZE, format="qcow2", cluster_size=4096)
    cowslice.create(place / "image", SIZE, format="qcow2", cluster_size=4096, backing_file="base",
                    backing_format="raw")
    with cowslice.open(place / "image", "r+") as disk:
        disk.write(10 * KiB, chooser.randbytes(60 * KiB))
        kept = disk.read(0, SIZE)
        disk.snapshot("kept")
        disk.snapshot("other")
        disk.zero(20 * KiB, 30 * KiB)
        disk.write(200 * KiB, chooser.randbytes(50 * KiB))
        content = disk.read(0, SIZE)
    if damaged:
        with FileStorage(place / "image", "r+") as storage:
            storage.pwrite(3 * 4096 + 2 * 20, bytes(24))  # counts of clusters that are in use
    return content, kept


def soundness(path: Path) -> str:
    """What is wrong with an image, '' for nothing."""
    found = check(MemoryStorage(path.read_bytes()))
    bad = [one.message for one in found.findings if one.kind == "corruption" and EARLY not in one.message]
    return str(bad) if bad or found.check_errors else ""


def shown(path: Path, **options: object) -> bytes:
    with cowslice.open(path, format=None if path.read_bytes()[:4] == b"QFI\xfb" else "raw",
                       **options) as disk:  # type: ignore[arg-type]
        return disk.read(0, disk.size)


def judge(case: Case, place: Path, content: bytes, kept: bytes) -> None:
    """All that may be there after the command was cut off."""
    if not case.damaged:
        assert not soundness(place / "image")
        assert not soundness(place / "target")
    seen = shown(place / "image")
    if case.resizes:
        alike = min(len(seen), 100 * KiB)
        assert seen[:alike] == content[:alike]
        assert len(seen) in (SIZE, 2048 * KiB, 100 * KiB)
    else:
        assert seen in ((content, kept) if case.applies else (content,))
    if not case.resizes and not case.changes_below:
        assert shown(place / "image", snapshot="kept") == kept
    if case.makes and (place / case.makes).exists():
        assert shown(place / case.makes)[:SIZE] == content
    known = {"base", "other", "target", "image", case.makes}
    assert {path.name for path in place.iterdir() if "undo" not in path.name} <= known


@pytest.mark.parametrize("impatient", [False, True], ids=["once", "again and again"])
@pytest.mark.parametrize("name", CASES)
def test_after_ctrl_c_all_is_sound_and_the_verb_can_be_done_again(
    name: str, impatient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, cut_off = CASES[name], 0
    for moment in MOMENTS:
        place = tmp_path / str(moment)
        place.mkdir()
        monkeypatch.chdir(place)
        content, kept = begun(place, damaged=case.damaged)
        with interrupted_at(moment, impatient=impatient):
            status = run(case.command.split(" "))
        assert status in (exitcodes.INTERRUPTED, exitcodes.OK), moment
        cut_off += status == exitcodes.INTERRUPTED
        judge(case, place, content, kept)
        if status == exitcodes.INTERRUPTED and case.again:
            assert run(case.command.split(" ")) == exitcodes.OK
            assert not soundness(place / "image")
            judge(case, place, content, kept)
    assert cut_off


def test_ctrl_c_while_entries_are_made_leaks_none_of_their_clusters(tmp_path: Path) -> None:
    cowslice.create(tmp_path / "image", SIZE, format="qcow2", cluster_size=4096)

    def interrupted(growth: Growth, host: int) -> tuple[int, int]:
        raise KeyboardInterrupt

    with (cowslice.open(tmp_path / "image", "r+") as disk, patch.object(Growth, "_blank", interrupted),
          pytest.raises(KeyboardInterrupt)):
        disk.resize(2048 * KiB, preallocation="metadata")
    assert not check(MemoryStorage((tmp_path / "image").read_bytes())).findings
