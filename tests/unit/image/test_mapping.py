"""Extents: the words and numbers of qemu-img map, holes of the file below included."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cowslice
from cowslice.image.preallocation import looks_preallocated
from cowslice.storage import FileStorage, MemoryStorage
from cowslice.testing import peers

pytestmark = peers.needs("qemu-img", "qemu-io")
KiB, MiB = 1 << 10, 1 << 20
Recipe = Callable[[Path], None]


def ours(path: Path, **options: Any) -> list[dict[str, Any]]:
    with cowslice.open(path, **options) as disk:
        found = [{name: getattr(extent, name) for name in (*_FIELDS, "offset")} for extent in disk.extents()]
    return [{name: value for name, value in extent.items() if value is not None} for extent in found]


def theirs(path: Path, image_format: str = "qcow2") -> list[dict[str, Any]]:
    found = peers.qemu_img_json("map", "-f", image_format, path)
    return [{name: extent[name] for name in (*_FIELDS, "offset") if name in extent} for extent in found]


_FIELDS = ("start", "length", "depth", "present", "zero", "data")


def punch(path: Path, offset: int, length: int) -> None:
    """Make a hole in the file, so that far less is stored than is counted."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), offset, length)
    with FileStorage(path, "r+", locking=False) as storage:
        storage.discard(offset, length)


def create(path: Path, *options: str, size: int = 4 * MiB) -> None:
    peers.qemu_img("create", "-q", "-f", "qcow2", *options, path, size)


def preallocated(path: Path) -> None:
    create(path, "-o", "preallocation=metadata")
    peers.qemu_io(path, "write 0 64k", "write 1M 100k", "write -z 2M 128k")


def barely_sparse(path: Path) -> None:
    """One hole of one cluster: not enough to look for holes."""
    create(path)
    peers.qemu_io(path, "write 0 2M")
    punch(path, 0x60000, 64 * KiB)


def clearly_sparse(path: Path) -> None:
    create(path)
    peers.qemu_io(path, "write 0 2M", "write -z 1M 64k")
    punch(path, 0x61000, 700 * KiB)


def small_clusters(path: Path) -> None:
    create(path, "-o", "cluster_size=512,preallocation=metadata", size=300 * KiB)
    peers.qemu_io(path, "write 10k 20k")


def subclusters(path: Path) -> None:
    base = path.with_name("base.raw")
    with base.open("wb") as file:
        file.truncate(3 * MiB + 4096)
        file.seek(MiB)
        file.write(b"x" * 9000)
    create(path, "-o", "extended_l2=on", "-b", "base.raw", "-F", "raw")
    peers.qemu_io(path, "write 2k 4k", "write 2M 4k", "write -z 128k 6k", "write 3M 128k", "discard 3M 64k",
                  "write 3200k 10k")


def deep_chain(path: Path) -> None:
    for name, below in (("c", None), ("b", "c"), (path.name, "b")):
        create(path.with_name(name), *(("-b", below, "-F", "qcow2") if below else ()),
               size={"c": MiB, "b": 3 * MiB}.get(name, 4 * MiB))
    peers.qemu_io(path.with_name("c"), "write 100k 300k")
    peers.qemu_io(path.with_name("b"), "write 0 128k", "write 2M 10k", "write -z 300k 64k")
    peers.qemu_io(path, "write 64k 64k", "write -z 3M 64k")


def external_data(path: Path) -> None:
    create(path, "-o", f"data_file={path.with_name('data.raw')}")
    peers.qemu_io(path, "write 0 64k", "write -z 128k 64k", "write 256k 64k", "discard 256k 64k", "write 1M 1M")


RECIPES: list[Recipe] = [preallocated, barely_sparse, clearly_sparse, small_clusters, subclusters, deep_chain,
                         external_data]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_extents_are_those_of_qemu_img_map(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "disk.qcow2"
    recipe(path)
    assert ours(path) == theirs(path)


@pytest.mark.parametrize("length", [1, 511, 512, 1000, 100_000])
def test_extents_of_a_raw_file_show_its_holes(tmp_path: Path, length: int) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(length)
        if length > 50_000:
            file.seek(40_960)
            file.write(b"x" * 5000)
    assert ours(path, format="raw") == theirs(path, "raw")


def test_a_hole_is_looked_for_only_where_far_less_is_stored_than_counted(tmp_path: Path) -> None:
    for recipe, expected in ((barely_sparse, False), (clearly_sparse, True), (preallocated, True)):
        path = tmp_path / recipe.__name__
        recipe(path)
        with cowslice.open(path) as disk:
            assert disk.header is not None
            assert looks_preallocated(disk.layers[0].storage, disk.header) is expected


def test_a_storage_that_cannot_say_what_it_stores_is_not_looked_into(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    clearly_sparse(path)
    with cowslice.open(MemoryStorage(path.read_bytes())) as disk:
        assert disk.header is not None
        assert not looks_preallocated(disk.layers[0].storage, disk.header)


def test_compressed_clusters_are_data_without_a_place(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"abcd" * 50_000)
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", tmp_path / "plain", path)
    assert ours(path) == theirs(path)
    with cowslice.open(path) as disk:
        assert all(extent.compressed and extent.offset is None and extent.filename is None for extent in disk.extents())
