"""A raw target is there whole or not at all, and what was there before survives a failure."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cowslice.errors import BadOption, Locked, OutOfRange, StorageError
from cowslice.ops.rawtarget import ExistingFile, NewFile, Stream, raw_target, refuse_sources
from cowslice.storage.file import FileStorage


def test_a_new_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with NewFile(str(path), 4096) as target:
        target.write(512, memoryview(b"x" * 512))
        assert not path.exists()
    assert path.read_bytes() == bytes(512) + b"x" * 512 + bytes(3072)
    assert os.listdir(tmp_path) == ["disk.raw"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_abandoned_file_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), NewFile(str(tmp_path / "disk.raw"), 4096):
        raise error
    assert os.listdir(tmp_path) == []


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"old")
    with pytest.raises(ValueError), NewFile(str(path), 512):
        raise ValueError
    assert path.read_bytes() == b"old"
    with NewFile(str(path), 512):
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == bytes(512)


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with NewFile(str(path), 512):
        pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk.raw")
    with NewFile(str(link), 512):
        pass
    assert link.is_symlink()
    assert (tmp_path / "disk.raw").stat().st_size == 512


def test_a_file_that_someone_uses_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"old")
    with FileStorage(path, "r+"), pytest.raises(Locked):
        NewFile(str(path), 512)
    assert os.listdir(tmp_path) == ["disk.raw"]


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        NewFile(str(tmp_path / "none" / "disk.raw"), 512)


def test_an_existing_file_is_zeroed_where_asked_unless_it_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 1024)
    with ExistingFile(str(path), 1024, is_zero=True) as target:
        target.zero(0, 512)
    assert path.read_bytes() == b"x" * 1024
    with ExistingFile(str(path), 1024) as target:
        target.zero(0, 512)
    assert path.read_bytes() == bytes(512) + b"x" * 512


def test_an_existing_file_must_be_large_enough(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"x" * 10)
    with pytest.raises(OutOfRange):
        ExistingFile(str(tmp_path / "disk.raw"), 512)


def test_a_target_is_made_unless_it_is_to_exist(tmp_path: Path) -> None:
    with raw_target(str(tmp_path / "disk.raw"), 512) as target:
        assert isinstance(target, NewFile)
    with raw_target(str(tmp_path / "disk.raw"), 512, existing=True) as target:
        assert isinstance(target, ExistingFile)


def test_a_stream_takes_everything_through_a_narrow_pipe(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file, Stream(file.fileno()) as stream:
        stream.write(0, memoryview(b"ab" * 100))
        stream.zero(200, (1 << 20) + 7)
    assert (tmp_path / "out").read_bytes() == b"ab" * 100 + bytes((1 << 20) + 7)


def test_a_source_is_refused_as_target_under_any_name(tmp_path: Path) -> None:
    source = tmp_path / "disk"
    source.write_bytes(b"x")
    (tmp_path / "link").symlink_to(source)
    with FileStorage(source) as storage:
        with pytest.raises(BadOption):
            refuse_sources(str(tmp_path / "link"), [-1, storage.fileno()])
        refuse_sources(str(tmp_path / "other"), [storage.fileno()])
