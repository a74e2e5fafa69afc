"""A watched file gives back every content that a crash could leave, however it was written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cowslice.storage import FileStorage
from cowslice.testing.crash import SECTOR, crash_states
from cowslice.testing.crashfile import CrashFiles

OLD, NEW, NEWER = b"o" * SECTOR, b"n" * SECTOR, b"w" * SECTOR


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(OLD * 2)
    return path


def leavings(crash: CrashFiles, mark: str = "") -> set[bytes]:
    return {state.contents["image"] for state in crash_states(crash.record) if not mark or mark in state.marks}


def test_what_a_storage_writes_is_there_or_not_until_it_is_synced(path: Path) -> None:
    with CrashFiles(path) as crash, FileStorage(path, "r+") as disk:
        disk.pwrite(0, NEW)
        disk.sync()
        crash.mark("synced")
        disk.pwrite(SECTOR, NEWER)
    assert leavings(crash) == {OLD + OLD, NEW + OLD, NEW + NEWER}
    assert leavings(crash, "synced") == {NEW + OLD, NEW + NEWER}
    assert crash.past == 0


def test_what_is_written_by_the_descriptor_is_found_too_and_before_the_sync_that_follows(path: Path) -> None:
    with CrashFiles(path) as crash, FileStorage(path, "r+") as disk:
        os.pwrite(disk.fileno(), NEW, 0)
        disk.sync()
        crash.mark("synced")
        os.pwrite(disk.fileno(), NEWER, 0)
    assert leavings(crash) == {OLD + OLD, NEW + OLD, NEWER + OLD}
    assert leavings(crash, "synced") == {NEW + OLD, NEWER + OLD}
    assert crash.past == 2


@pytest.mark.parametrize("length", [SECTOR, 3 * SECTOR, 700])
def test_another_length_is_there_or_not(length: int, path: Path) -> None:
    with CrashFiles(path) as crash, FileStorage(path, "r+") as disk:
        disk.truncate(length)
    assert {len(content) for content in leavings(crash)} == {2 * SECTOR, length}


def test_a_lie_is_a_sync_that_makes_nothing_stable(path: Path) -> None:
    with CrashFiles(path, lies=(0,)) as crash, FileStorage(path, "r+") as disk:
        disk.pwrite(0, NEW)
        disk.sync()
        crash.mark("synced")
    assert leavings(crash, "synced") == {OLD + OLD, NEW + OLD}


def test_other_files_are_left_alone(path: Path) -> None:
    other = path.with_name("other")
    with CrashFiles(path) as crash, FileStorage(other, "x") as disk:
        disk.pwrite(0, NEW)
        disk.sync()
    assert not crash.record.events
    assert other.read_bytes() == NEW
