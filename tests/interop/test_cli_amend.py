"""`cowslice amend` leaves images that qemu-img finds as it would have left them, and sound."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io")

MiB = 1 << 20


def made(path: Path, options: str, *more: str) -> Path:
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", options, *more, path, 3 * MiB)
    peers.qemu_io(path, "write -P 5 70k 200k", "write -c -P 6 2M 64k")
    return path


def facts(path: Path) -> Any:
    known = peers.qemu_img_json("info", path)
    return {name: known[name] for name in known if name not in ("filename", "actual-size", "full-backing-filename")}


@pytest.mark.parametrize("options,change", [
    ("compat=0.10", "compat=1.1"), ("compat=0.10,cluster_size=512", "compat=v3"), ("compat=1.1", "compat=0.10"),
    ("compat=0.10", "compat=1.1,lazy_refcounts=on"), ("lazy_refcounts=on", "lazy_refcounts=off"),
    ("lazy_refcounts=on", "compat=0.10"), ("cluster_size=64k", "size=5M"), ("compat=0.10", "compat=1.1,size=900M"),
    ("cluster_size=64k", "lazy_refcounts=on,compat=1.1,refcount_bits=16"), ("cluster_size=4k", "size=3M"),
])  # fmt: skip
def test_the_image_is_what_qemu_makes_of_it(tmp_path: Path, options: str, change: str) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "base").write_bytes(b"\7" * 3 * MiB)
    image = tmp_path / "ours" / "image"
    made(image, options, "-b", "base", "-F", "raw")
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    said = cowslice("amend", "-o", change, image)
    assert (said.status, said.out, said.err) == (0, "", "")
    peers.qemu_img("amend", "-o", change, tmp_path / "theirs" / "image")
    assert facts(image) == facts(tmp_path / "theirs" / "image")
    assert "No errors" in peers.qemu_img("check", image)
    peers.qemu_img("compare", image, tmp_path / "theirs" / "image")
    peers.qemu_io(image, "write -P 9 1M 100k")
    assert "No errors" in peers.qemu_img("check", image)


def test_the_data_file_can_be_named_otherwise_and_be_raw_no_more(tmp_path: Path) -> None:
    image, data = tmp_path / "image", tmp_path / "data"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, MiB)
    peers.qemu_io(image, "write -P 5 70k 200k")
    shutil.copy(data, tmp_path / "moved")
    assert cowslice("amend", "-o", f"data_file={tmp_path / 'moved'},data_file_raw=off", image).status == 0
    data.unlink()
    specific = peers.qemu_img_json("info", image)["format-specific"]["data"]
    assert specific["data-file"] == str(tmp_path / "moved")
    assert specific["data-file-raw"] is False
    peers.qemu_io(image, "read -P 5 70k 200k")
    assert cowslice("amend", "-o", "data_file_raw=on", image).status == 64
    assert cowslice("amend", "-o", "compat=0.10", image).status == 1


@pytest.mark.parametrize("options,change,status", [
    ("cluster_size=64k", "backing_file=x", 64), ("cluster_size=64k", "cluster_size=4k", 64),
    ("cluster_size=64k", "refcount_bits=8", 1), ("cluster_size=64k", "size=1M", 64),
    ("cluster_size=64k", "data_file=x", 64), ("cluster_size=64k", "nonsense=1", 64), ("compat=0.10", "compat=2.0", 64),
    ("compat=0.10", "lazy_refcounts=on", 64), ("refcount_bits=8", "compat=0.10", 1),
    ("extended_l2=on", "compat=0.10", 1), ("compression_type=zstd", "compat=0.10", 1),
])  # fmt: skip
def test_what_is_refused_changes_nothing(tmp_path: Path, options: str, change: str, status: int) -> None:
    image = made(tmp_path / "image", options)
    before = image.read_bytes()
    assert cowslice("amend", "-o", change, image).status == status
    assert image.read_bytes() == before


def test_an_image_that_says_zeros_or_has_snapshots_stays_version_3(tmp_path: Path) -> None:
    zeros, snapshots = made(tmp_path / "zeros", "compat=1.1"), made(tmp_path / "snapshots", "compat=1.1")
    peers.qemu_io(zeros, "write -z 64k 64k")
    peers.qemu_img("snapshot", "-c", "one", snapshots)
    for image in (zeros, snapshots):
        before = image.read_bytes()
        refused = cowslice("amend", "-o", "compat=0.10", image)
        assert refused.status == 1
        assert "stays version 3" in refused.err
        assert image.read_bytes() == before


def test_help_lists_what_can_be_changed(tmp_path: Path) -> None:
    listed = cowslice("amend", "-o", "help")
    assert listed.status == 0
    assert "lazy_refcounts" in listed.out
    assert "cluster_size" not in listed.out
