"""What a discard and zeros become by the options of an open: as with QEMU, from Python and in --image-opts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowslice
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice as command

pytestmark = peers.needs("qemu-img", "qemu-io", "nbdinfo")

KiB, MiB = 1 << 10, 1 << 20
CHANGES = ["write -P 0 0 64k", "write -P 0 130k 100k", "write -P 7 512k 64k", "write -P 0 768k 64k", "discard 1M 128k"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, 2 * MiB)
    peers.qemu_io(path, "write -P 5 0 256k", "write -P 6 1M 256k")
    return path


@contextmanager
def served(image: Path, options: str) -> Iterator[str]:
    """The URI of the image, served for writing with these --image-opts."""
    socket = image.with_suffix(".sock")
    words = ["serve", "--writable", "-t", "-k", str(socket), "--image-opts"]
    with subprocess.Popen([sys.executable, "-m", "cowslice.cli.main", *words,
                           f"driver=qcow2,file.filename={image},{options}"], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline()
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.terminate()


def mapped(path: Path) -> list[tuple[int, bool, bool]]:
    """Where something else begins: whether it is known to be zeros, and whether it is data."""
    peers.qemu_img("check", path)
    found = [(one["start"], one["zero"], one["data"]) for one in peers.qemu_img_json("map", path)]
    return [one for n, one in enumerate(found) if not n or one[1:] != found[n - 1][1:]]


@pytest.mark.parametrize("detect,discard", [
    ("off", "unmap"), ("on", "unmap"), ("unmap", "unmap"), ("off", "ignore"), ("on", "ignore"),
])  # fmt: skip
def test_zeros_and_discards_become_what_qemu_makes_of_them(
    image: Path, detect: str, discard: str, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs.qcow2"
    theirs.write_bytes(image.read_bytes())
    options = f"driver=qcow2,detect-zeroes={detect},discard={discard},file.filename="
    peers.run("qemu-io", *(word for change in CHANGES for word in ("-c", change)), "--image-opts", f"{options}{theirs}")
    with cowslice.open(image, "r+", detect_zeroes=detect, discard=discard) as disk:
        disk.write(0, bytes(64 * KiB))
        disk.write(130 * KiB, bytes(100 * KiB))
        disk.write(512 * KiB, b"\7" * 64 * KiB)
        disk.write(768 * KiB, bytes(64 * KiB))
        disk.discard(MiB, 128 * KiB)
    assert mapped(image) == mapped(theirs)
    peers.qemu_img("compare", image, theirs)


def test_the_options_of_a_served_image_are_heeded(image: Path) -> None:
    with served(image, "detect-zeroes=unmap,discard=unmap") as uri:
        peers.qemu_io(uri, "write -P 0 0 64k", "discard 1M 64k", image_format="raw")
    assert mapped(image)[:2] == [(0, True, False), (64 * KiB, False, True)]
    with served(image, "discard=off") as uri:
        peers.qemu_io(uri, "discard 1088k 64k", image_format="raw")
    peers.qemu_io(image, "read -P 0 0 64k", "read -P 0 1M 64k", "read -P 6 1088k 64k")


@pytest.mark.parametrize("option", ["discard=maybe", "detect-zeroes=1", "discard-no-unref=2"])
def test_a_value_that_no_option_has_is_refused(image: Path, option: str) -> None:
    assert command("map", "--image-opts", f"driver=qcow2,{option},file.filename={image}").status == 64


def test_a_cluster_that_is_discarded_may_stay_with_its_place(image: Path) -> None:
    def places() -> list[int]:
        return [one["offset"] for one in peers.qemu_img_json("map", image) if "offset" in one]

    before, length = places(), image.stat().st_size
    with cowslice.open(image, "r+", discard_no_unref=True) as disk:
        disk.discard(0, 256 * KiB)
    assert "No errors" in peers.qemu_img("check", image)
    peers.qemu_io(image, "read -P 0 0 256k", "write -P 8 0 256k")
    assert places() == before
    assert image.stat().st_size == length
