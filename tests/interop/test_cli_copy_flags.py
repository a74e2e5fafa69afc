"""Flags that change how a copy is made, not what it is: qemu-img finds the same bytes and nothing wrong."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from cowslice.ops import pace
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io")

MiB = 1 << 20
SIZE = 5 * MiB + 512


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Data, zeros, compressed clusters, and a backing file that shows through."""
    base, path = tmp_path / "base", tmp_path / "source"
    base.write_bytes(random.Random(1).randbytes(2 * MiB) + bytes(MiB) + random.Random(2).randbytes(MiB))
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", path, SIZE)
    peers.qemu_io(path, "write -P 7 100k 300k", "write -z 1M 256k", "write -c -P 9 3M 64k", "write -P 5 4300k 600k")
    return path


def made(path: Path, *, size: int = SIZE, options: str = "cluster_size=64k") -> Path:
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size)
    return path


def compressed_clusters(path: Path) -> int:
    return int(peers.qemu_img_json("check", path).get("compressed-clusters", 0))


@pytest.mark.parametrize("workers", [1, 4])
def test_copy_offload_leaves_the_same_bytes(source: Path, tmp_path: Path, workers: int) -> None:
    for target, flags in ((tmp_path / "new", ()), (tmp_path / "there", ("-n",))):
        if flags:
            target.write_bytes(b"\xff" * SIZE)
        said = cowslice("convert", "-C", "-m", workers, *flags, source, target)
        assert said.status == 0, said.err
        peers.qemu_img("compare", "-F", "raw", source, target)


def test_copy_offload_lets_the_system_copy(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    inner = os.copy_file_range

    def counted(src: int, dst: int, count: int, *places: int) -> int:
        done = inner(src, dst, count, *places)
        copied.append(done)
        return done

    monkeypatch.setattr(os, "copy_file_range", counted)
    assert cowslice("convert", "-C", source, tmp_path / "copy").status == 0
    assert sum(copied) > 2 * MiB


def test_where_the_system_cannot_copy_the_bytes_are_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*arguments: int) -> int:
        raise OSError(18, "another device")

    monkeypatch.setattr(os, "copy_file_range", cannot)
    assert cowslice("convert", "-C", source, tmp_path / "copy").status == 0
    peers.qemu_img("compare", "-F", "raw", source, tmp_path / "copy")


@pytest.mark.parametrize("flags", ["-C -c -O qcow2", "-C -S 4k", "-C --salvage"])
def test_copy_offload_excludes_what_must_look_at_the_bytes(source: Path, tmp_path: Path, flags: str) -> None:
    ours = cowslice("convert", *flags.split(), source, tmp_path / "copy")
    assert ours.status == 64
    assert "-C" in ours.err
    assert peers.run("qemu-img", "convert", *flags.split(), source, tmp_path / "copy", expect=1)
    assert not (tmp_path / "copy").exists()


def test_copy_offload_into_an_image_is_refused(source: Path, tmp_path: Path) -> None:
    assert cowslice("convert", "-C", "-O", "qcow2", source, tmp_path / "copy").status == 64


@pytest.mark.parametrize("flags", [(), ("-O", "qcow2"), ("-c", "-O", "qcow2")])
def test_a_limited_copy_is_the_same_copy_and_waits(
    source: Path, tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    real = pace.Pace

    def limited(rate: int) -> pace.Pace:
        now = [0.0]

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            now[0] += seconds

        return real(rate, clock=lambda: now[0], sleep=sleep)

    for module in ("convert", "qcow2convert"):
        monkeypatch.setattr(f"cowslice.ops.{module}.Pace", limited)
    target = tmp_path / "copy"
    assert cowslice("convert", "-r", "1M", *flags, source, target).status == 0
    peers.qemu_img("compare", source, target)
    assert 2 < sum(waited) < 6  # seconds, of some five megabytes of data


def test_a_limited_commit_leaves_what_an_unlimited_one_does(source: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected"
    peers.qemu_img("convert", "-O", "raw", source, expected)
    said = cowslice("commit", "-r", "1G", source)
    assert said.status == 0, said.err
    assert (tmp_path / "base").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("verb", [("convert", "{source}", "{copy}"), ("commit", "{source}")])
def test_a_rate_that_is_no_number_is_refused(source: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    words = [word.format(source=source, copy=tmp_path / "copy") for word in verb[1:]]
    for program, status in ((cowslice(verb[0], "-r", "fast", *words).status, 64),
                            (peers.run("qemu-img", verb[0], "-r", "fast", *words, expect=None).returncode, 1)):
        assert program == status


def test_a_target_is_named_by_its_options(source: Path, tmp_path: Path) -> None:
    target = made(tmp_path / "target")
    said = cowslice("convert", "-n", "--target-image-opts", source, f"driver=qcow2,file.filename={target}")
    assert said.status == 0, said.err
    peers.qemu_img("check", target)
    peers.qemu_img("compare", source, target)


def test_an_encrypted_target_is_written_with_its_secret(source: Path, tmp_path: Path) -> None:
    key = ("--object", "secret,id=key,data=words")
    target = tmp_path / "target"
    peers.qemu_img("create", "-q", *key, "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=key", target, SIZE)
    named = f"driver=qcow2,encrypt.key-secret=key,file.filename={target}"
    said = cowslice("convert", "-n", *key, "--target-image-opts", source, named)
    assert said.status == 0, said.err
    peers.qemu_img("compare", *key, "--image-opts", f"driver=qcow2,file.filename={source}", named)


@pytest.mark.parametrize("flags", [("--target-image-opts",), ("-n", "-O", "qcow2", "--target-image-opts")])
def test_options_of_a_target_that_would_be_made_are_refused(
    source: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    target = made(tmp_path / "target")
    before = target.read_bytes()
    words = (*flags, source, f"driver=qcow2,file.filename={target}")
    assert cowslice("convert", *words).status == 64
    assert peers.run("qemu-img", "convert", *words, expect=1)
    assert target.read_bytes() == before


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "cluster_size=2M",
                                     "extended_l2=on,cluster_size=16k", "compat=0.10", "compression_type=zstd"])
@pytest.mark.parametrize("extra", [0, 700 * 1024])
def test_an_image_that_is_there_is_filled_with_compressed_clusters(
    source: Path, tmp_path: Path, options: str, extra: int
) -> None:
    target = made(tmp_path / "target", size=SIZE + extra, options=options)
    peers.qemu_io(target, f"write -P 3 1M {SIZE - MiB}")
    said = cowslice("convert", "-n", "-c", "-O", "qcow2", source, target)
    assert said.status == 0, said.err
    peers.qemu_img("check", target)
    peers.qemu_img("compare", source, target)
    assert options == "cluster_size=2M" or compressed_clusters(target) > 0


@pytest.mark.parametrize("cluster", ["512", "4k", "64k", "2M"])
@pytest.mark.parametrize("extended", ["off", "on"])
def test_a_rebase_compresses_what_it_copies(tmp_path: Path, cluster: str, extended: str) -> None:
    if extended == "on" and cluster in ("512", "4k"):
        cluster = "16k"
    base, image, expected = tmp_path / "base", tmp_path / "image", tmp_path / "expected"
    text = b"".join(b"%7d " % number for number in range(SIZE // 8 + 1))
    base.write_bytes(text[: 3 * MiB + 4096] + bytes(MiB))
    options = f"cluster_size={cluster},extended_l2={extended}"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "-o", options, image, SIZE)
    peers.qemu_io(image, "write -P 7 101k 3k", "write -z 1M 100k", "write -P 5 4500k 2k", "write -P 6 5M 512")
    peers.qemu_img("convert", "-O", "raw", image, expected)
    said = cowslice("rebase", "-c", "-b", "", image)
    assert said.status == 0, said.err
    peers.qemu_img("check", image)
    peers.qemu_img("compare", "-f", "raw", expected, image)
    assert compressed_clusters(image) > 0


def test_a_rebase_that_cannot_compress_changes_nothing(tmp_path: Path) -> None:
    base, image = tmp_path / "base", tmp_path / "image"
    base.write_bytes(b"x" * MiB)
    options = f"data_file={tmp_path / 'data'}"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "-o", options, image)
    before = image.read_bytes()
    assert cowslice("rebase", "-c", "-b", "", image).status == 1
    assert cowslice("rebase", "-c", "-u", "-b", "", image).status == 64
    assert image.read_bytes() == before
