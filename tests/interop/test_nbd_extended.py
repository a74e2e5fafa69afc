"""Extended headers between us and programs that nobody here wrote, where they are new enough to speak them.

Debian 12 has older ones. With those of Debian 13 first on PATH nothing here is skipped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowslice
from cowslice.nbd import Wish
from cowslice.nbd.wire import ALLOCATION_DEPTH, BASE_ALLOCATION, Mode
from cowslice.testing import peers
from cowslice.units import KiB, MiB
from tests.interop.test_nbd_protocol import Client

SIZE = 8 * MiB
HUGE = 5 << 40  # one extent of it has a length beyond 32 bits
LIBNBD, QEMU = (1, 18), (8, 2)

pytestmark = peers.needs("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy")


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 2)


@pytest.fixture
def image(tmp_path: Path, content: bytes) -> Path:
    raw, path = tmp_path / "content", tmp_path / "disk.qcow2"
    raw.write_bytes(content)
    peers.qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("s") / "s")


@pytest.fixture
def ours(image: Path, place: str) -> Iterator[str]:
    """The URI of the image, open for writing."""
    with cowslice.open(image, "r+") as disk, cowslice.serve(disk, unix=place, writable=True):
        yield f"nbd+unix:///?socket={place}"


def read_by_qemu(image: Path) -> bytes:
    peers.qemu_img("check", image)
    peers.qemu_img("convert", "-O", "raw", image, image.with_suffix(".raw"))
    return image.with_suffix(".raw").read_bytes()


def test_libnbd_agrees_on_them_with_us(ours: str) -> None:
    peers.require_version("nbdinfo", *LIBNBD)
    assert b"using extended packets" in peers.run("nbdinfo", ours).stdout


def test_libnbd_reads_and_maps_through_them(ours: str, content: bytes, tmp_path: Path) -> None:
    peers.require_version("nbdinfo", *LIBNBD)
    peers.nbdcopy("--connections=2", ours, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    extents = [(extent["offset"], extent["length"], extent["type"]) for extent in peers.nbdinfo_json(ours, "--map")]
    assert extents == [(0, SIZE // 2, 0), (SIZE // 2, SIZE // 2, 3)]


def test_libnbd_writes_through_them(image: Path, place: str, content: bytes, tmp_path: Path) -> None:
    peers.require_version("nbdinfo", *LIBNBD)
    (tmp_path / "new").write_bytes(content[::-1])
    with cowslice.open(image, "r+") as disk, cowslice.serve(disk, unix=place, writable=True):
        peers.nbdcopy("--flush", tmp_path / "new", f"nbd+unix:///?socket={place}")
    assert read_by_qemu(image) == content[::-1]


def test_a_hole_beyond_32_bits_is_one_extent(tmp_path: Path, place: str) -> None:
    peers.require_version("nbdinfo", *LIBNBD)
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", tmp_path / "huge.qcow2", HUGE)
    with cowslice.open(tmp_path / "huge.qcow2") as disk, cowslice.serve(disk, unix=place) as server:
        uri = f"nbd+unix:///?socket={place}"
        (extent,) = peers.nbdinfo_json(uri, "--map")
        assert (extent["length"], extent["type"]) == (HUGE, 3)
        with Client(server.uri, Wish("", contexts=(BASE_ALLOCATION,))) as client:
            assert client.nbd.session.mode is Mode.EXTENDED
            (found,) = client.finish(client.nbd.block_status(0, HUGE)).extents.values()
            assert found == ((HUGE, 3),)


def test_qemu_writes_zeroes_trims_and_flushes_through_them(image: Path, place: str, content: bytes) -> None:
    """Its client sends WRITE without the flag PAYLOAD_LEN."""
    peers.require_version("qemu-io", *QEMU)
    with cowslice.open(image, "r+") as disk, cowslice.serve(disk, unix=place, writable=True):
        peers.qemu_io(f"nbd+unix:///?socket={place}", "write -P 17 0 1M", "write -P 18 -f 70000 4096",
                      "write -z 2M 64k", "discard 3M 128k", "flush", "read -P 18 70000 4096", image_format="raw")
    expected = bytearray(content)
    expected[:MiB] = bytes([17]) * MiB
    expected[70000 : 70000 + 4096] = bytes([18]) * 4096
    expected[2 * MiB : 2 * MiB + 64 * KiB] = bytes(64 * KiB)
    expected[3 * MiB : 3 * MiB + 128 * KiB] = bytes(128 * KiB)
    assert read_by_qemu(image) == expected


def test_qemu_compares_through_them(ours: str, content: bytes, tmp_path: Path) -> None:
    peers.require_version("qemu-img", *QEMU)
    (tmp_path / "same").write_bytes(content)
    assert "identical" in peers.qemu_img("compare", "-f", "raw", "-F", "raw", ours, tmp_path / "same")


def test_we_read_and_choose_contexts_through_them_from_qemu_nbd(image: Path, content: bytes) -> None:
    peers.require_version("qemu-nbd", *QEMU)
    wish = Wish("disk", contexts=(BASE_ALLOCATION, ALLOCATION_DEPTH))
    with peers.qemu_nbd(image, "-r", "-x", "disk", "-A") as uri, Client(uri, wish) as client:
        assert client.nbd.session.mode is Mode.EXTENDED
        assert client.read(0, SIZE) == content
        both = client.finish(client.nbd.block_status(0, SIZE)).extents
        depth = next(one.id for one in client.nbd.session.contexts if one.name == ALLOCATION_DEPTH)
        chosen = client.finish(client.nbd.block_status(0, SIZE, contexts=(depth,))).extents
    assert len(both) == 2
    assert chosen == {depth: ((SIZE // 2, 1), (SIZE // 2, 0))}


def test_we_write_through_them_to_qemu_nbd(image: Path, content: bytes) -> None:
    peers.require_version("qemu-nbd", *QEMU)
    with peers.qemu_nbd(image, "-x", "disk") as uri, Client(uri, Wish("disk")) as client:
        assert client.nbd.session.mode is Mode.EXTENDED
        assert client.finish(client.nbd.write(1000, b"x" * 5000)).error is None
        assert client.finish(client.nbd.write_zeroes(MiB, MiB)).error is None
        assert client.finish(client.nbd.flush()).error is None
        assert client.read(0, SIZE)[999:6001] == content[999:1000] + b"x" * 5000 + content[6000:6001]
    expected = bytearray(content)
    expected[1000:6000] = b"x" * 5000
    expected[MiB : 2 * MiB] = bytes(MiB)
    assert read_by_qemu(image) == expected
