"""`cowslice rebase` keeps what a guest sees, and leaves images that qemu-img understands."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io")

MiB = 1 << 20
SIZE = 5 * MiB + 512
OPTIONS = ["cluster_size=64k", "compat=0.10,cluster_size=4k", "extended_l2=on,cluster_size=16k", "cluster_size=2M",
           "cluster_size=512", "extended_l2=on,cluster_size=2M"]


def scribble(path: Path, seed: int, size: int, *, image_format: str = "qcow2") -> None:
    chosen = random.Random(seed)
    commands = []
    for number in range(8):
        offset = chosen.randrange(size // 512) * 512
        length = min(chosen.choice([512, 4096, 70 * 1024, 300 * 1024]), size - offset)
        commands.append(f"{'write -z' if number % 4 == 3 else f'write -P {seed * 16 + number}'} {offset} {length}")
    peers.qemu_io(path, *commands, image_format=image_format)


def disk(path: Path, seed: int, size: int, image_format: str = "qcow2") -> Path:
    peers.qemu_img("create", "-q", "-f", image_format, path, size)
    scribble(path, seed, size, image_format=image_format)
    return path


def overlay(path: Path, base: Path | None, options: str, seed: int, base_format: str = "qcow2") -> Path:
    backing = ["-b", base.name, "-F", base_format] if base else []
    peers.qemu_img("create", "-q", "-f", "qcow2", *backing, "-o", options, path, SIZE)
    scribble(path, seed, SIZE)
    return path


def content(path: Path) -> bytes:
    raw = path.with_name("content")
    peers.qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


def info(path: Path) -> Any:
    return peers.qemu_img_json("info", path)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [(SIZE, SIZE), (2 * MiB, SIZE), (SIZE, 2 * MiB + 512), (70_144, 3 * MiB)], ids=str)
def test_the_disk_reads_as_before_over_any_backing_file(tmp_path: Path, options: str, sizes: tuple[int, int]) -> None:
    old, new = disk(tmp_path / "old", 1, sizes[0]), disk(tmp_path / "new", 2, sizes[1], "raw")
    image = overlay(tmp_path / "image", old, options, 3)
    before = content(image)
    said = cowslice("rebase", "-b", "new", "-F", "raw", image)
    assert (said.status, said.out, said.err) == (0, "", "")
    assert "No errors" in peers.qemu_img("check", image)
    assert info(image)["backing-filename"] == "new"
    assert info(image)["backing-filename-format"] == "raw"
    assert content(image) == before
    old.unlink()
    assert cowslice("rebase", "-q", "-b", "", image).status == 0
    new.unlink()
    assert "backing-filename" not in info(image)
    assert "No errors" in peers.qemu_img("check", image)
    assert content(image) == before


def test_an_image_without_a_backing_file_gets_one_that_it_hides(tmp_path: Path) -> None:
    disk(tmp_path / "new", 2, SIZE)
    image = overlay(tmp_path / "image", None, "cluster_size=64k", 3)
    before, length = content(image), image.stat().st_size
    assert cowslice("rebase", "-p", "-b", "new", "-F", "qcow2", image).status == 0
    assert content(image) == before
    assert image.stat().st_size <= length + 3 * 65536  # zeros are said, not written


def test_what_both_backing_files_show_alike_stays_below(tmp_path: Path) -> None:
    base = disk(tmp_path / "base", 1, SIZE)
    middle = overlay(tmp_path / "middle", base, "cluster_size=64k", 2)
    image = overlay(tmp_path / "image", middle, "cluster_size=64k", 3)
    peers.qemu_img("convert", "-O", "qcow2", middle, tmp_path / "copy")
    before, own = content(image), peers.qemu_img_json("map", image)
    assert cowslice("rebase", "-b", "copy", "-F", "qcow2", image).status == 0
    assert content(image) == before
    kept = [(e["start"], e["length"]) for e in own if e["depth"] == 0 and e["present"] and e["data"]]
    now = peers.qemu_img_json("map", image)
    assert [(e["start"], e["length"]) for e in now if e["depth"] == 0 and e["present"] and e["data"]] == kept
    assert cowslice("rebase", "-b", "base", "-F", "qcow2", image).status == 0
    assert content(image) == before


def test_an_unsafe_rebase_changes_nothing_but_the_header(tmp_path: Path) -> None:
    disk(tmp_path / "old", 1, SIZE)
    image, twin = overlay(tmp_path / "image", tmp_path / "old", "cluster_size=64k", 3), tmp_path / "twin"
    twin.write_bytes(image.read_bytes())
    assert cowslice("rebase", "-u", "-b", "gone/else where", "-F", "raw", image).status == 0
    peers.qemu_img("rebase", "-u", "-b", "gone/else where", "-F", "raw", twin)
    assert info(image)["backing-filename"] == info(twin)["backing-filename"] == "gone/else where"
    assert image.read_bytes()[65536:] == twin.read_bytes()[65536:]
    assert cowslice("rebase", "-u", "-b", "", image).status == 0
    assert "backing-filename" not in info(image)
    assert "No errors" in peers.qemu_img("check", image)


def test_loops_are_refused_and_leave_the_image_as_it_is(tmp_path: Path) -> None:
    image = overlay(tmp_path / "image", None, "cluster_size=64k", 3)
    overlay(tmp_path / "above", image, "cluster_size=64k", 4)
    os.link(image, tmp_path / "link")
    before = image.read_bytes()
    for arguments in (["-b", "above"], ["-b", "image"], ["-b", "link"], ["-u", "-b", image]):
        refused = cowslice("rebase", *arguments, "-F", "qcow2", image)
        assert refused.status == 1
        assert "its own" in refused.err
    assert image.read_bytes() == before


def test_a_wrong_command_line_is_a_usage_error(tmp_path: Path) -> None:
    image = overlay(tmp_path / "image", None, "cluster_size=64k", 3)
    raw = disk(tmp_path / "raw", 1, MiB, "raw")
    assert cowslice("rebase", image).status == 64
    assert cowslice("rebase", "-b", "raw", image).status == 64
    assert cowslice("rebase", "-b", "", "-F", "raw", image).status == 64
    assert cowslice("rebase", "-b", "missing", "-F", "raw", image).status == 1
    assert cowslice("rebase", "-b", "image", "-F", "qcow2", raw).status == 1
    assert cowslice("rebase", "-u", "-b", "x" * 1024, "-F", "raw", image).status == 64
    small = tmp_path / "small"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", small, MiB)
    before = small.read_bytes()
    assert cowslice("rebase", "-u", "-b", "x" * 500, "-F", "raw", small).status == 64
    assert small.read_bytes() == before
