"""Which freed clusters leave the file at once, by the pass-discard options: as with QEMU."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import cowslice
from cowslice.image.punching import Cause, Punching
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice as command

pytestmark = peers.needs("qemu-img", "qemu-io")
KiB, MiB = 1 << 10, 1 << 20
SWITCHES = ("pass-discard-request", "pass-discard-snapshot", "pass-discard-other")
FREED = 640 * KiB  # what each way of freeing frees, at least


@dataclass(frozen=True, slots=True)
class Way:
    """How space becomes free: by our requests, and by QEMU's program and its words."""

    ours: Callable[[cowslice.Image], object]
    theirs: tuple[str, ...]
    switch: str
    default: bool


WAYS = {
    "discard": Way(lambda disk: disk.discard(0, MiB), ("qemu-io", "-c", "discard 0 1M"), SWITCHES[0], True),
    "zero": Way(lambda disk: disk.zero(0, MiB), ("qemu-io", "-c", "write -z -u 0 1M"), SWITCHES[0], True),
    "delete": Way(lambda disk: disk.delete_snapshot("kept"), ("qemu-img", "snapshot", "-d", "kept"), SWITCHES[1], True),
    "apply": Way(lambda disk: disk.apply_snapshot("kept"), ("qemu-img", "snapshot", "-a", "kept"), SWITCHES[1], True),
    "write over": Way(lambda disk: disk.write(2 * MiB, b"\7" * MiB), ("qemu-io", "-c", "write -P 7 2M 1M"),
                      SWITCHES[2], False),
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, a snapshot of other data, and compressed clusters of which nearly each fills one of the file."""
    path, chance = tmp_path / "disk.qcow2", random.Random(7)
    peers.qemu_img("create", "-q", "-f", "qcow2", path, 8 * MiB)
    with cowslice.open(path, "r+") as disk:
        disk.write(4 * MiB, b"\5" * MiB)
        disk.snapshot("kept")
        disk.write(4 * MiB, b"\6" * MiB)
        disk.write(0, b"\4" * MiB)
        for at in range(2 * MiB, 3 * MiB, 64 * KiB):
            disk.write_compressed(at, chance.randbytes(56 * KiB) + bytes(8 * KiB))
    return path


def blocks_after_ours(image: Path, way: Way, **options: bool) -> int:
    copy = copied(image)
    with cowslice.open(copy, "r+", **options) as disk:  # type: ignore[arg-type]
        way.ours(disk)
    return used(copy)


def blocks_after_theirs(image: Path, way: Way, options: str) -> int:
    copy = copied(image)
    tool, *words = way.theirs
    named = f"driver=qcow2,discard=unmap,file.driver=file,file.discard=unmap,file.filename={copy}{options}"
    peers.run(tool, *words, "--image-opts", named)
    return used(copy)


def copied(image: Path) -> Path:
    copy = image.with_name("copy.qcow2")
    copy.write_bytes(image.read_bytes())
    return copy


def used(path: Path) -> int:
    """Bytes that the file takes, once nothing of it waits to be written."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    peers.qemu_img("check", path)
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("name", WAYS)
def test_an_option_says_whether_freed_space_leaves_the_file(image: Path, name: str) -> None:
    way = WAYS[name]
    option = way.switch.replace("-", "_")
    on, off = (blocks_after_ours(image, way, **{option: value}) for value in (True, False))
    assert on + FREED < off
    assert abs(blocks_after_ours(image, way) - (on if way.default else off)) < FREED // 4
    for value, ours in (("on", on), ("off", off)):
        if name == "write over" and value == "on":
            continue  # QEMU keeps what was written over even then
        assert abs(blocks_after_theirs(image, way, f",{way.switch}={value}") - ours) < FREED // 4


def test_space_of_requests_is_given_back_as_discard_says(image: Path) -> None:
    kept = blocks_after_ours(image, WAYS["zero"], discard="ignore")  # type: ignore[arg-type]
    given = blocks_after_ours(image, WAYS["zero"], discard="ignore", pass_discard_request=True)  # type: ignore[arg-type]
    assert given + FREED < kept


def test_a_disk_that_shrinks_gives_space_back_whatever_is_asked() -> None:
    none = Punching(request=False, snapshot=False, other=False)
    assert [one for one in Cause if none.covers(one)] == [Cause.SHRINKING]


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_options_are_words_of_image_opts(image: Path, switch: str) -> None:
    named = f"driver=qcow2,file.filename={image},{switch}="
    assert command("map", "--image-opts", named + "on").status == 0
    assert command("map", "--image-opts", named + "often").status == 64
