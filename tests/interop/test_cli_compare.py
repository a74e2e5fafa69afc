"""`cowslice compare` ends with the status of `qemu-img compare`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io")

# What is done to two disks of these sizes.
PAIRS = {
    "both empty": ("1M", [], "1M", []),
    "same data": ("1M", ["write -P 1 0 256k"], "1M", ["write -P 1 0 256k"]),
    "zeros written": ("1M", ["write -P 0 0 256k"], "1M", []),
    "zero flag": ("1M", ["write -z 0 256k"], "1M", []),
    "one byte apart": ("1M", ["write -P 1 0 256k"], "1M", ["write -P 1 0 256k", "write -P 2 200k 512"]),
    "data against nothing": ("1M", ["write -P 1 512k 512"], "1M", []),
    "nothing against data": ("1M", [], "1M", ["write -P 1 1023k 1k"]),
    "longer, empty rest": ("1M", ["write -P 1 0 64k"], "2M", ["write -P 1 0 64k"]),
    "longer, zero rest": ("1M", [], "2M", ["write -P 0 1M 64k"]),
    "longer, data behind": ("1M", [], "2M", ["write -P 3 1M 64k"]),
    "shorter, data behind": ("2M", ["write -P 3 1536k 64k"], "1M", []),
    "compressed": ("1M", ["write -c -P 1 0 64k"], "1M", ["write -P 1 0 64k"]),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    paths = folder / "one.qcow2", folder / "other.qcow2"
    first_size, first, second_size, second = PAIRS[request.param]
    for path, size, commands in zip(paths, (first_size, second_size), (first, second), strict=True):
        peers.qemu_img("create", "-f", "qcow2", path, size)
        if commands:
            peers.qemu_io(path, *commands)
    return paths


@pytest.mark.parametrize("options", [[], ["-s"]], ids=["content", "strict"])
def test_the_status_is_that_of_qemu(pair: tuple[Path, Path], options: list[str]) -> None:
    expected = peers.run("qemu-img", "compare", *options, *pair, expect=None).returncode
    assert cowslice("compare", *options, *pair).status == expected


def test_the_place_of_the_difference_is_that_of_qemu(tmp_path: Path) -> None:
    one, other = tmp_path / "one.qcow2", tmp_path / "other.qcow2"
    for path, byte in ((one, 1), (other, 2)):
        peers.qemu_img("create", "-f", "qcow2", path, "8M")
        peers.qemu_io(path, "write -P 9 0 8M", f"write -P {byte} 5M 512", f"write -P {byte} 7M 512")
    expected = peers.qemu_img("compare", one, other, expect=1)
    assert str(5 << 20) in expected
    for workers in (1, 4):
        assert f"offset {5 << 20} " in cowslice("compare", "-m", workers, one, other).out


def test_a_missing_image_is_status_2(tmp_path: Path) -> None:
    peers.qemu_img("create", "-f", "qcow2", tmp_path / "one.qcow2", "1M")
    said = cowslice("compare", tmp_path / "one.qcow2", tmp_path / "none.qcow2")
    assert said.status == 2
    assert "none.qcow2" in said.err


def test_a_map_that_cannot_be_read_is_status_3(tmp_path: Path) -> None:
    one, other = tmp_path / "one.qcow2", tmp_path / "other.qcow2"
    for path in (one, other):
        peers.qemu_img("create", "-f", "qcow2", path, "1M")
        peers.qemu_io(path, "write 0 64k")
    with one.open("r+b") as file:
        file.seek(3 * 65536)
        file.write((1 << 63 | 0x40200).to_bytes(8, "big"))  # an unaligned L2 table
    assert cowslice("compare", one, other).status == 3


def test_content_that_cannot_be_read_is_status_4(tmp_path: Path) -> None:
    one, other = tmp_path / "one.qcow2", tmp_path / "other.qcow2"
    for path in (one, other):
        peers.qemu_img("create", "-f", "qcow2", path, "1M")
        peers.qemu_io(path, "write -c -P 5 0 64k")
    at = 5 * 65536
    data = bytearray(one.read_bytes())
    data[at : at + 32] = b"\xff" * 32
    one.write_bytes(data)
    expected = peers.run("qemu-img", "compare", one, other, expect=None).returncode
    assert cowslice("compare", one, other).status == expected == 4


def test_a_usage_error_never_looks_like_a_difference(tmp_path: Path) -> None:
    assert cowslice("compare", "only-one").status == 64
    assert cowslice("compare", "--no-such-flag", "a", "b").status == 64
