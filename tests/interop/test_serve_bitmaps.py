"""`cowslice serve -B` of a disk that is written: clients see their changes marked, and a kill leaves no false mark."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")

KiB, MiB = 1 << 10, 1 << 20
SIZE = 8 * MiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    peers.qemu_img("bitmap", "--add", "-g", "4k", path, "day")
    peers.qemu_img("bitmap", "--add", "-g", "64k", path, "still")
    peers.qemu_io(path, "write 7M 4k")
    peers.qemu_img("bitmap", "--disable", path, "still")
    return path


@contextmanager
def served(image: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URI and the process of `cowslice serve`, which is told to end after the block if it still runs."""
    socket = image.with_suffix(".sock")
    command = [sys.executable, "-m", "cowslice.cli.main", "serve", "--writable", "-t", "-k", str(socket), *options,
               str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline()  # it says where it listens
            yield f"nbd+unix:///?socket={socket}", server
        finally:
            server.terminate()


def marked(uri: str, name: str) -> list[tuple[int, int]]:
    found = peers.nbdinfo_json(uri, f"--map=qemu:dirty-bitmap:{name}")
    return [(one["offset"], one["length"]) for one in found if one["type"] == 1]


def flags(image: Path) -> dict[str, list[str]]:
    listed = peers.qemu_img_json("info", image)["format-specific"]["data"]["bitmaps"]
    return {one["name"]: sorted(one["flags"]) for one in listed}


def test_writes_zeroes_and_trims_are_marked_at_once_and_for_whoever_comes_later(image: Path) -> None:
    with served(image, "-B", "day", "-B", "still") as (uri, server):
        assert marked(uri, "day") == [(7 * MiB, 4 * KiB)]
        for command, expected in (("write 1M 512", (MiB, 4 * KiB)), ("write -z 2M 64k", (2 * MiB, 64 * KiB)),
                                  ("discard 3M 128k", (3 * MiB, 128 * KiB)), ("write -f 4M 4k", (4 * MiB, 4 * KiB))):
            peers.qemu_io(uri, command, image_format="raw")
            assert expected in marked(uri, "day")
        before = marked(uri, "day")
        assert marked(uri, "still") == [(7 * MiB, 64 * KiB)]
    assert server.returncode == 0
    assert flags(image) == {"day": ["auto"], "still": []}
    with peers.qemu_nbd(image, "-r", "-B", "day", "-B", "still") as uri:
        assert marked(uri, "day") == before
        assert marked(uri, "still") == [(7 * MiB, 64 * KiB)]
    assert "No errors" in peers.qemu_img("check", image)


def test_a_server_killed_while_it_writes_leaves_what_it_kept_in_use_and_nothing_corrupt(image: Path) -> None:
    with served(image, "-B", "day") as (uri, server):
        peers.qemu_io(uri, "write -P 5 1M 64k", "flush", image_format="raw")
        writer = subprocess.Popen(
            ["qemu-io", "-f", "raw", "-c", "write -P 6 2M 1M", "-c", "flush", "-c", "write -P 7 3M 4M", uri],
            stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        server.kill()
        writer.stdout.close()
        writer.wait()
    assert flags(image) == {"day": ["auto", "in-use"], "still": []}
    assert peers.run("qemu-img", "check", image, expect=(0, 3)).returncode in (0, 3)
    peers.qemu_io(image, "read -P 5 1M 64k", "read -P 6 2M 1M", image_format="qcow2")
    for words in (["serve", "-B", "day"], ["serve", "--writable", "-B", "day"]):
        said = cowslice(*words, "-k", image.with_suffix(".2"), image)
        assert said.status == 64
        assert "bitmap 'day'" in said.err
        assert "cannot be served: a writer did not finish it" in said.err
    with served(image, "-B", "still") as (uri, _):
        peers.qemu_io(uri, "write 6M 4k", image_format="raw")  # it is written all the same
        assert marked(uri, "still") == [(7 * MiB, 64 * KiB)]
    assert flags(image) == {"day": ["auto", "in-use"], "still": []}
    assert cowslice("check", "-r", "leaks", image).status == 0
    assert cowslice("bitmap", "--remove", image, "day").status == 0
    assert flags(image) == {"still": []}
    assert "No errors" in peers.qemu_img("check", image)
