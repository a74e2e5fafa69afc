"""`cowslice convert -n -O qcow2` writes over images that qemu-img then finds sound and the same as the source."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice
from cowslice.testing.damage import make_worn_image

pytestmark = peers.needs("qemu-img", "qemu-io")

MiB = 1 << 20


def worn(path: Path, seed: int) -> Path:
    make_worn_image(path, random.Random(seed))
    return path


@pytest.mark.parametrize("options", ["cluster_size=64k", "compat=0.10,cluster_size=4k", "extended_l2=on",
                                     "cluster_size=2M", "cluster_size=512,refcount_bits=1"])
@pytest.mark.parametrize("workers", [1, 4])
def test_an_image_full_of_other_bytes_then_has_those_of_the_source(tmp_path: Path, options: str, workers: int) -> None:
    source, target, theirs = worn(tmp_path / "source", workers + len(options)), tmp_path / "target", tmp_path / "theirs"
    size = peers.qemu_img_json("info", source)["virtual-size"]
    for path in (target, theirs):
        peers.qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size + MiB)
        peers.qemu_io(path, f"write -P 7 0 {size + MiB}")
    said = cowslice("convert", "-n", "-p", "-m", workers, "-O", "qcow2", source, target)
    assert said.status == 0, said.err
    peers.qemu_img("convert", "-n", "-O", "qcow2", source, theirs)
    assert "No errors" in peers.qemu_img("check", target)
    peers.qemu_img("compare", target, theirs)


def test_over_a_backing_file_the_zeros_of_the_source_hide_it(tmp_path: Path) -> None:
    base, target, source = tmp_path / "base", tmp_path / "target", tmp_path / "source"
    base.write_bytes(b"\7" * MiB)
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", target)
    peers.qemu_img("create", "-q", "-f", "qcow2", source, MiB)
    peers.qemu_io(source, "write -P 3 100k 64k")
    assert cowslice("convert", "-n", "-O", "qcow2", source, target).status == 0
    assert "No errors" in peers.qemu_img("check", target)
    peers.qemu_img("compare", source, target)
    assert base.read_bytes() == b"\7" * MiB
    assert cowslice("convert", "-n", "--target-is-zero", "-O", "qcow2", source, target).status == 64


def test_a_target_that_is_known_to_be_zeros_gets_no_zeros(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(MiB) + b"\5" * MiB)
    peers.qemu_img("create", "-q", "-f", "qcow2", target, 2 * MiB)
    assert cowslice("convert", "-n", "--target-is-zero", "-f", "raw", "-O", "qcow2", source, target).status == 0
    peers.qemu_img("compare", "-f", "raw", source, target)


def test_targets_that_cannot_take_the_copy_are_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"\5" * MiB)
    peers.qemu_img("create", "-q", "-f", "qcow2", target, MiB - 512)
    before = target.read_bytes()
    small = cowslice("convert", "-n", "-f", "raw", "-O", "qcow2", source, target)
    assert small.status == 1
    assert f"has {MiB - 512} bytes" in small.err
    assert cowslice("convert", "-n", "-f", "raw", "-O", "qcow2", source, tmp_path / "missing").status == 1
    assert cowslice("convert", "-n", "-o", "compat=1.1", "-f", "raw", "-O", "qcow2", source, target).status == 64
    assert cowslice("convert", "-n", "-f", "qcow2", "-O", "qcow2", target, target).status == 64
    assert target.read_bytes() == before
