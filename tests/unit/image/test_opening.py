"""Opening: the format is what was asked for, every refusal names the file and the field."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cowslice
from cowslice.format.entries import Kind
from cowslice.storage import MemoryStorage
from cowslice.testing.model import Cell, build_image
from tests.unit.image.conftest import GEOMETRY, Maker


def test_a_file_without_the_magic_is_not_an_image_and_the_hint_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"\xeb\x63\x90\x10" + bytes(508))
    with pytest.raises(cowslice.NotAnImage, match="begins with eb639010, expected the qcow2 magic 514649fb") as refusal:
        cowslice.open(tmp_path / "disk")
    assert "raw" in refusal.value.hint


@pytest.mark.parametrize("format_name", [None, "qcow2"])
def test_an_empty_file_is_not_an_image(format_name: str | None) -> None:
    with pytest.raises(cowslice.NotAnImage):
        cowslice.open(MemoryStorage(b""), format=format_name)


def test_an_empty_raw_disk_is_a_disk_of_nothing() -> None:
    with cowslice.open(MemoryStorage(b""), format="raw") as disk:
        assert (disk.size, disk.read(0, 0), list(disk.extents())) == (0, b"", [])


def test_an_image_of_nothing_is_a_disk_of_nothing() -> None:
    with cowslice.open(MemoryStorage(build_image(GEOMETRY, [], size=0).file)) as disk:
        assert (disk.size, disk.read(0, 0), list(disk.extents())) == (0, b"", [])


def test_a_disk_that_looks_like_an_image_is_raw_when_the_caller_says_so(tmp_path: Path, make: Maker) -> None:
    image = make("disk", [Kind.NORMAL])
    with cowslice.open(tmp_path / "disk", format="raw") as disk:
        assert disk.read(0, 4096) == image.file[:4096]


def test_a_missing_file_is_an_error_of_the_world(tmp_path: Path) -> None:
    with pytest.raises(cowslice.StorageError) as failure:
        cowslice.open(tmp_path / "missing")
    assert failure.value.errno == 2
    assert isinstance(failure.value, OSError)


@pytest.mark.parametrize("offset, value, error, words", [
    (4, b"\0\0\0\x09", cowslice.UnsupportedImage, "version is 9"),
    (20, b"\0\0\0\x05", cowslice.MalformedImage, "cluster_bits is 5"),
    (36, b"\0\0\0\0", cowslice.MalformedImage, "l1_size is 0"),
    (72, b"\x80", cowslice.UnsupportedImage, "bit 63"),
    (40, b"\0\0\0\x7f\xff\xff\xf0\0", cowslice.CorruptImage, "ends beyond the end of the file"),
])
def test_a_broken_header_is_refused_with_file_and_field(
        tmp_path: Path, make: Maker, offset: int, value: bytes, error: type[Exception], words: str) -> None:
    image = make("disk", [Kind.NORMAL])
    (tmp_path / "disk").write_bytes(image.file[:offset] + value + image.file[offset + len(value) :])
    with pytest.raises(error, match=words) as refusal:
        cowslice.open(tmp_path / "disk")
    assert str(tmp_path / "disk") in str(refusal.value)


def test_a_name_is_shown_without_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "evil\x1b[2J\nname"
    path.write_bytes(bytes(512))
    with pytest.raises(cowslice.NotAnImage) as refusal:
        cowslice.open(path)
    assert "\x1b" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_name_that_is_no_text_can_be_opened(tmp_path: Path, make: Maker) -> None:
    image = make("disk", [Kind.NORMAL])
    path = os.path.join(os.fsencode(tmp_path), b"n\xff\xfe")
    Path(os.fsdecode(path)).write_bytes(image.file)
    with cowslice.open(os.fsdecode(path)) as disk:
        assert disk.read(0, 4096) == image.over(b"")


def test_a_file_may_end_inside_a_data_cluster() -> None:
    """The builder puts the L2 table last, so the data is moved behind it."""
    image = build_image(GEOMETRY, [Cell(Kind.NORMAL)], size=4096)
    with cowslice.open(MemoryStorage(image.file)) as disk:
        (extent,) = disk.extents()
        place = disk.layers[0].entry_place(0)  # type: ignore[attr-defined]
    assert extent.offset is not None
    moved = image.file[:place] + len(image.file).to_bytes(8, "big") + image.file[place + 8 :]
    moved += image.file[extent.offset : extent.offset + 1000]
    with cowslice.open(MemoryStorage(moved)) as disk:
        assert disk.read(0, 4096) == image.over(b"")[:1000] + bytes(3096)
