"""Persistent bitmaps: listed as qemu-img lists them, dirty where the guest wrote, never in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowslice
from cowslice.errors import CorruptImage
from cowslice.image.bitmaps import dirty_extents
from cowslice.storage import MemoryStorage
from cowslice.testing import peers

pytestmark = peers.needs("qemu-img", "qemu-io")
KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, 64 * MiB)
    peers.qemu_img("bitmap", "--add", "-g", 64 * KiB, path, "day")
    peers.qemu_img("bitmap", "--add", "-g", 1 * MiB, path, "week")
    peers.qemu_io(path, "write 0 1", "write 1M 200k", "write 63M 1M")
    peers.qemu_img("bitmap", "--add", "--disable", path, "idle")
    return path


def test_bitmaps_are_listed_as_qemu_lists_them(image: Path) -> None:
    listed = peers.qemu_img_json("info", image)["format-specific"]["data"]["bitmaps"]
    with cowslice.open(image) as disk:
        assert sorted((one.name.decode(), one.granularity) for one in disk.bitmaps) == \
            sorted((one["name"], one["granularity"]) for one in listed)
        assert all(one.usable and not one.in_use for one in disk.bitmaps)


@pytest.mark.parametrize("name, expected", [
    ("day", [(0, 64 * KiB), (MiB, 256 * KiB), (63 * MiB, MiB)]),
    ("week", [(0, 2 * MiB), (63 * MiB, MiB)]),
    ("idle", []),
])
def test_a_bitmap_is_dirty_where_the_guest_wrote(image: Path, name: str, expected: list[tuple[int, int]]) -> None:
    with cowslice.open(image) as disk:
        (bitmap,) = [one for one in disk.bitmaps if one.name == name.encode()]
        assert disk.first_cluster is not None
        assert list(dirty_extents(disk.layers[0].storage, disk.first_cluster, bitmap)) == expected


@pytest.mark.parametrize("offset, length, expected", [
    (0, 1, [(0, 1)]),
    (KiB, MiB, [(KiB, 63 * KiB), (MiB, KiB)]),
    (64 * KiB, MiB - 64 * KiB, []),
    (63 * MiB + 7, None, [(63 * MiB + 7, MiB - 7)]),
    (64 * MiB, None, []),
])
def test_a_bitmap_is_read_only_where_it_is_asked(
    image: Path, offset: int, length: int | None, expected: list[tuple[int, int]]
) -> None:
    with cowslice.open(image) as disk:
        (bitmap,) = [one for one in disk.bitmaps if one.name == b"day"]
        assert disk.first_cluster is not None
        found = dirty_extents(disk.layers[0].storage, disk.first_cluster, bitmap, offset=offset, length=length)
        assert list(found) == expected


def test_a_damaged_directory_does_not_keep_the_disk_from_being_read(image: Path) -> None:
    file = bytearray(image.read_bytes())
    with cowslice.open(image) as disk:
        assert disk.first_cluster is not None
        assert disk.first_cluster.bitmaps is not None
        at = disk.first_cluster.bitmaps.directory_offset
        content = disk.read(0, MiB)
    file[at + 16] = 77  # the type of the first bitmap
    with cowslice.open(MemoryStorage(bytes(file))) as disk:
        assert disk.read(0, MiB) == content
        bad = [one for one in disk.bitmaps if one.fault]
        assert [one.fault for one in bad] == ["type is 77, expected 1"]
        assert len(disk.bitmaps) == 3
        with pytest.raises(CorruptImage, match="type is 77"):
            list(dirty_extents(disk.layers[0].storage, disk.first_cluster, bad[0]))  # type: ignore[arg-type]


def test_a_directory_beyond_the_end_of_the_file_lists_nothing(image: Path) -> None:
    with cowslice.open(image) as disk:
        assert disk.first_cluster is not None
        assert disk.first_cluster.bitmaps is not None
        at = disk.first_cluster.bitmaps.directory_offset
    with cowslice.open(MemoryStorage(image.read_bytes()[:at])) as disk:
        assert disk.bitmaps == ()
