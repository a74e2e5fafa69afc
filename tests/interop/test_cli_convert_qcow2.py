"""`cowslice convert -O qcow2` makes sound images with the bytes that `qemu-img convert` writes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice
from cowslice.testing.damage import make_worn_image

pytestmark = peers.needs("qemu-img", "qemu-io")

OPTIONS = [
    [], ["-c"], ["-c", "-o", "compression_type=zstd"], ["-S", "0"], ["-S", "0", "-c"], ["-S", "64k", "-m", "4"],
    ["-o", "cluster_size=512"], ["-c", "-o", "cluster_size=512"], ["-c", "-o", "cluster_size=4k,refcount_bits=1"],
    ["-c", "-o", "cluster_size=64k,refcount_bits=2"], ["-o", "cluster_size=2M"], ["-c", "-o", "cluster_size=2M"],
    ["-o", "extended_l2=on"], ["-c", "-o", "extended_l2=on,cluster_size=16k"], ["-o", "compat=0.10"],
    ["-o", "preallocation=metadata"], ["-o", "preallocation=falloc,cluster_size=4k"], ["-o", "preallocation=full"],
    ["-o", "preallocation=metadata,extended_l2=on"],
]  # fmt: skip


def _disk(path: Path, size: int, seed: int) -> None:
    """A raw disk with holes, zeros that are stored, words and noise."""
    chosen = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(12 if size else 0):
            offset, length = chosen.randrange(size), chosen.choice([100, 4096, 30_000, 300_000])
            file.seek(offset)
            kind = chosen.choice([bytes(length), chosen.randbytes(length), b"some words " * (length // 11 + 1)])
            file.write(kind[: min(length, size - offset)])


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_the_bytes_are_those_of_the_source_and_the_file_is_no_larger_than_qemus(
    tmp_path: Path, options: list[str]
) -> None:
    source, ours, theirs = tmp_path / "source", tmp_path / "ours", tmp_path / "theirs"
    for size in (512, 1_000_448, (5 << 20) + 512):
        _disk(source, size, seed=size)
        made = cowslice("convert", "-f", "raw", "-O", "qcow2", *options, source, ours)
        assert made.status == 0, made.err
        assert "No errors" in peers.qemu_img("check", ours)
        peers.qemu_img("compare", "-f", "raw", "-F", "qcow2", source, ours)
        peers.qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, source, theirs)
        cluster = peers.qemu_img_json("info", ours)["cluster-size"]
        # The deflate used here trades a twentieth of the space for ten times the speed.
        assert ours.stat().st_size <= theirs.stat().st_size * (1.1 if "-c" in options else 1) + cluster


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("workers", [1, 4])
def test_worn_images_are_copied_whole(tmp_path: Path, seed: int, workers: int) -> None:
    source, ours = tmp_path / "source.qcow2", tmp_path / "ours"
    make_worn_image(source, random.Random(seed))
    options = OPTIONS[(seed * 2 + workers) % len(OPTIONS)]
    assert cowslice("convert", "-m", workers, "-O", "qcow2", *options, source, ours).status == 0
    assert "No errors" in peers.qemu_img("check", ours)
    peers.qemu_img("compare", source, ours)


@pytest.mark.parametrize("options", [[], ["-c"], ["-o", "cluster_size=2M"]], ids=" ".join)
def test_sources_that_end_inside_a_cluster_follow_each_other(tmp_path: Path, options: list[str]) -> None:
    sources = [tmp_path / f"source{number}" for number in range(4)]
    for number, size in enumerate((512, 700_928, 0, 3 << 20)):
        _disk(sources[number], size, seed=number)
    assert cowslice("convert", "-f", "raw", "-O", "qcow2", *options, *sources, tmp_path / "ours").status == 0
    (tmp_path / "whole").write_bytes(b"".join(source.read_bytes() for source in sources))
    peers.qemu_img("compare", "-f", "raw", tmp_path / "whole", tmp_path / "ours")
    assert "No errors" in peers.qemu_img("check", tmp_path / "ours")


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    base, path = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", base, "3M")
    peers.qemu_io(base, "write -P 5 0 3M")
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", "cluster_size=4k", path,
                   "4M")
    peers.qemu_io(path, "write -P 6 12k 4k", "write -z 512k 100k", "write -P 0 1M 64k", "write -P 7 3M 4k")
    return path


@pytest.mark.parametrize("options", [
    [], ["-c"], ["-o", "compat=0.10"], ["-o", "extended_l2=on"], ["-o", "cluster_size=2M"], ["-S", "0"],
], ids=" ".join)  # fmt: skip
def test_over_a_backing_file_only_what_the_overlay_has_is_copied(
    tmp_path: Path, overlay: Path, options: list[str]
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    arguments = ["-O", "qcow2", *options, "-B", "base.qcow2", "-F", "qcow2", str(overlay)]
    assert cowslice("convert", *arguments, ours).status == 0
    assert "No errors" in peers.qemu_img("check", ours)
    peers.qemu_img("compare", overlay, ours)
    peers.qemu_img("convert", *arguments[:-1], overlay, theirs)
    assert ours.stat().st_size <= theirs.stat().st_size + (3 << 20 if "cluster_size=2M" in options else 1 << 17)


@pytest.mark.parametrize("kind", ["aes", "luks", "luks,preallocation=metadata", "aes,preallocation=metadata"])
def test_an_encrypted_copy_is_read_by_qemu(tmp_path: Path, kind: str) -> None:
    source, ours = tmp_path / "source", tmp_path / "ours"
    _disk(source, 3 << 20, seed=5)
    secret = "secret,id=key,data=correct horse"
    options = f"encrypt.key-secret=key,encrypt.format={kind}" + (",encrypt.iter-time=10" if "luks" in kind else "")
    made = cowslice("convert", "--object", secret, "-f", "raw", "-O", "qcow2", "-o", options, source, ours)
    assert made.status == 0, made.err
    described = ["--object", secret, "--image-opts", f"driver=qcow2,encrypt.key-secret=key,file.filename={ours}"]
    assert "No errors" in peers.qemu_img("check", *described)
    peers.qemu_img("convert", *described, "-O", "raw", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("raw", ["", ",data_file_raw=on", ",preallocation=full", ",data_file_raw=on,extended_l2=on"])
def test_a_copy_with_a_data_file_keeps_its_data_there(tmp_path: Path, raw: str) -> None:
    source, ours = tmp_path / "source", tmp_path / "ours"
    _disk(source, (3 << 20) + 512, seed=6)
    arguments = ["-f", "raw", "-O", "qcow2", "-o", f"data_file={tmp_path}/kept{raw}", source, ours]
    assert cowslice("convert", *arguments).status == 0
    assert "No errors" in peers.qemu_img("check", ours)
    peers.qemu_img("compare", "-f", "raw", source, ours)
    if "raw" in raw:
        assert (tmp_path / "kept").read_bytes() == source.read_bytes()
    before = (tmp_path / "kept").read_bytes()
    assert cowslice("convert", *arguments).status == 64
    assert (tmp_path / "kept").read_bytes() == before
    assert cowslice("convert", "--replace-data-file", *arguments).status == 0
    peers.qemu_img("compare", "-f", "raw", source, ours)


def test_a_snapshot_is_copied_as_it_was(tmp_path: Path, overlay: Path) -> None:
    peers.qemu_img("convert", "-O", "raw", overlay, tmp_path / "before")
    peers.qemu_img("snapshot", "-c", "before", overlay)
    peers.qemu_io(overlay, "write -P 77 0 4M")
    assert cowslice("convert", "-O", "qcow2", "-l", "before", overlay, tmp_path / "ours").status == 0
    peers.qemu_img("compare", "-f", "raw", tmp_path / "before", tmp_path / "ours")


@pytest.mark.parametrize("arguments", [
    ["-O", "vmdk"], ["-O", "raw", "-c"], ["-O", "qcow2", "-o", "nonsense=1"], ["-O", "qcow2", "-o", "size=1M"],
    ["-O", "qcow2", "-B", "base.qcow2"], ["-O", "qcow2", "-c", "-o", "preallocation=full"],
    ["-O", "qcow2", "-c", "-o", "data_file=kept"],
])
def test_a_wrong_wish_makes_nothing(tmp_path: Path, overlay: Path, arguments: list[str]) -> None:
    before = sorted(os.listdir(tmp_path))
    assert cowslice("convert", *arguments, overlay, tmp_path / "ours").status == 64
    assert sorted(os.listdir(tmp_path)) == before


def test_a_source_is_not_its_own_target(overlay: Path) -> None:
    before = overlay.read_bytes()
    assert cowslice("convert", "-O", "qcow2", overlay, overlay).status == 64
    assert overlay.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_copy_leaves_what_was_there(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "ours").write_bytes(b"old")
    with (tmp_path / "source").open("wb") as file:
        file.truncate(16 << 30)
    command = [sys.executable, "-m", "cowslice.cli.main", "convert", "-f", "raw", "-O", "qcow2", "-S", "0",
               str(tmp_path / "source"), str(tmp_path / "ours")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while len(os.listdir(tmp_path)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert sorted(os.listdir(tmp_path)) == ["ours", "source"]
    assert (tmp_path / "ours").read_bytes() == b"old"
