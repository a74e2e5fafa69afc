"""A new file that has its name only when it is complete, and leaves nothing where it never is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from cowslice.errors import StorageError
from cowslice.storage.appearing import AppearingFile


def test_it_appears_when_its_block_has_ended_well(tmp_path: Path) -> None:
    with AppearingFile(str(tmp_path / "made")) as file:
        file.storage.pwrite(0, b"content")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["made"]


def test_a_block_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"old")
    with contextlib.suppress(KeyboardInterrupt), AppearingFile(str(tmp_path / "made")) as file:
        file.storage.pwrite(0, b"content")
        raise KeyboardInterrupt
    assert (tmp_path / "made").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["made"]


def test_one_whose_block_was_never_entered_leaves_nothing(tmp_path: Path) -> None:
    file = AppearingFile(str(tmp_path / "made"))
    file.storage.close()
    del file
    assert os.listdir(tmp_path) == []


def test_a_file_of_somebody_else_stays(tmp_path: Path) -> None:
    taken = tmp_path / f".made.{os.getpid()}.part"
    taken.write_bytes(b"not ours")
    with pytest.raises(StorageError):
        AppearingFile(str(tmp_path / "made"))
    assert taken.read_bytes() == b"not ours"
