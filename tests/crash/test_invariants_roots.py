"""The invariants where the header and whole trees of tables change, each shown to fail without what keeps it."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest

from cowslice.image.roots import Roots
from cowslice.storage import Storage
from cowslice.storage.wrappers import WrappedStorage
from cowslice.testing import peers
from cowslice.testing.crash import LyingStorage, crash_states
from cowslice.testing.modeldisk import ModelDisk
from cowslice.testing.twin import Files, Shape, Twin, make_files
from tests.crash.test_any_moment import fault_of, recorded
from tests.crash.test_invariants import faults

pytestmark = peers.needs("qemu-img")


def serious(found: list[str]) -> list[str]:
    """Without COPIED flags that were cleared too early, which cost a copy and no byte."""
    return [fault for fault in found if "kind='corruption'" not in fault
            or [one for one in re.findall("kind='corruption', message='([^']*)'", fault) if "flag is clear" not in one]]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_files(Shape(512), tmp_path)


@pytest.mark.parametrize("broken", [False, True])
def test_i3_counts_fall_after_the_entries_that_dropped_them_are_stable(files: Files, broken: bool) -> None:
    """Barrier 2 of one commit is what the falling counts of the next rely on."""
    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(0, b"a" * 2048)
        twin.flush()
        twin.discard(512, 1024)
        if broken:
            liar.lie(1)
        twin.disk.flush()
        twin.flush()

    assert bool([one for one in faults(files, work) if "corruptions" in one]) is broken


@pytest.mark.parametrize("broken", [False, True])
def test_i3_a_deleted_snapshot_lets_counts_fall_after_the_header_forgot_it(
    files: Files, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(0, b"a" * 2048)
        twin.disk.snapshot("gone")
        twin.write(0, b"b" * 1024)
        twin.flush()
        def without_sync(roots: Roots, undo: ExitStack | None = None, **fields: object) -> None:
            liar.lie(0)
            switch(roots, undo, **fields)

        if broken:
            monkeypatch.setattr(Roots, "switch", without_sync)
        twin.disk.delete_snapshot("gone")

    switch = Roots.switch
    assert bool(serious(faults(files, work, limit=60))) is broken


@pytest.mark.parametrize("broken", [False, True])
def test_i5_the_header_names_a_snapshot_table_that_is_stable(files: Files, broken: bool) -> None:
    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(0, b"a" * 2048)
        twin.flush()
        if broken:
            liar.lie(*range(syncs_of_a_snapshot(files) - 1))
        twin.disk.snapshot("kept")

    assert bool(serious(faults(files, work, limit=60))) is broken


def syncs_of_a_snapshot(files: Files) -> int:
    """How many barriers one takes; the last is that of the header."""
    counted: list[int] = []

    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(0, b"a" * 2048)
        twin.flush()
        before = liar.syncs
        twin.disk.snapshot("kept")
        counted.append(liar.syncs - before)

    faults(files, work, limit=1)
    return counted[0]


class SplitHeader(WrappedStorage):
    """Write the header in two requests, so that power may fail between its fields."""

    def pwrite(self, offset: int, data: object) -> None:
        content = bytes(data)  # type: ignore[call-overload]
        if offset == 0:
            self.inner.pwrite(0, content[:56])
            self.inner.sync()
            self.inner.pwrite(56, content[56:])
        else:
            self.inner.pwrite(offset, content)


@pytest.mark.parametrize("broken", [False, True])
def test_i5_the_header_changes_in_one_sector(tmp_path: Path, broken: bool) -> None:
    """A larger refcount table: its place and its length are two fields."""
    files = make_files(Shape(512, refcount_bits=64, guest_bytes=3 << 20), tmp_path)
    model = ModelDisk(files.content)

    def wrap(storage: Storage) -> Storage:
        return SplitHeader(storage) if broken else storage

    record = recorded(files, model, lambda twin: twin.write(0, b"a" * (35 << 16)), wrap=wrap)
    found = [fault for state in crash_states(record, limit=4) if (fault := fault_of(files, model, state))]
    assert bool(found) is broken


@pytest.mark.parametrize("broken", [False, True])
def test_i6_copied_is_off_on_disk_before_a_count_rises(
    files: Files, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = Roots.clear_copied

    def work(twin: Twin, liar: LyingStorage) -> None:
        def without_sync(roots: Roots, tree: object) -> None:
            liar.lie(0)
            clear(roots, tree)  # type: ignore[arg-type]

        twin.write(0, b"a" * 2048)
        twin.flush()
        if broken:
            monkeypatch.setattr(Roots, "clear_copied", without_sync)
        twin.disk.snapshot("kept")

    assert bool([one for one in faults(files, work, limit=40) if "flag is set" in one]) is broken


@pytest.mark.parametrize("broken", [False, True])
def test_i6_copied_is_set_again_after_the_count_has_fallen(
    files: Files, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting a snapshot gives clusters back to the disk alone: their flags come last."""
    lower = Roots.lower_tree

    def work(twin: Twin, liar: LyingStorage) -> None:
        def with_lie(roots: Roots, tree: object) -> None:
            lower(roots, tree)  # type: ignore[arg-type]
            liar.lie(0)

        twin.write(0, b"a" * 2048)
        twin.disk.snapshot("gone")
        if broken:
            monkeypatch.setattr(Roots, "lower_tree", with_lie)
        twin.disk.delete_snapshot("gone")

    assert bool([one for one in faults(files, work, limit=40) if "flag is set" in one]) is broken
