"""Images behind NBD servers: opened by their URI, they are what they are as files."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import ReferenceRefused
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice as run

pytestmark = peers.needs("qemu-img", "qemu-io", "qemu-nbd")
MiB = 1 << 20


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    path, packed = folder / "plain.qcow2", folder / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, 16 * MiB)
    peers.qemu_io(path, "write -P 7 1M 3M", "write -P 9 9M 100k")
    peers.qemu_img("convert", "-c", "-O", "qcow2", path, packed)
    peers.qemu_io(packed, "write -P 3 2M 1M")
    return packed


def test_an_image_behind_a_server_reads_as_the_file(image: Path) -> None:
    served = peers.qemu_nbd(image, "--read-only", image_format="raw")
    with served as uri, cowslice.open(uri) as far, cowslice.open(image) as near:
        assert far.size == near.size
        assert far.read(0, far.size) == near.read(0, near.size)
        assert [one.length for one in far.extents()] == [one.length for one in near.extents()]


def test_a_raw_export_is_a_raw_disk(image: Path) -> None:
    served = peers.qemu_nbd(image, "--read-only")
    with served as uri, cowslice.open(uri, format="raw") as far, cowslice.open(image) as near:
        assert far.read(0, far.size) == near.read(0, near.size)
        assert run("compare", uri, image).status == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_we_serve_over_tcp_we_can_open(image: Path, host: str) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with contextlib.ExitStack() as stack:
        near = stack.enter_context(cowslice.open(image))
        server = stack.enter_context(cowslice.serve({"the disk": near}, host=host, port=0))
        far = stack.enter_context(cowslice.open(server.uri, format="raw"))
        assert far.read(0, far.size) == near.read(0, near.size)


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def test_the_command_line_takes_uris(image: Path, tmp_path: Path) -> None:
    with peers.qemu_nbd(image, image_format="raw") as uri:
        told = run("info", "--output=json", uri).json
        assert (told["format"], told["virtual-size"], told["filename"]) == ("qcow2", 16 * MiB, uri)
        assert run("check", uri).status == 0
        assert run("convert", uri, tmp_path / "copy.raw").status == 0
    assert "identical" in peers.qemu_img("compare", "-F", "raw", image, tmp_path / "copy.raw")


def test_a_missing_server_is_one_line_and_a_status() -> None:
    said = run("info", "nbd+unix:///disk?socket=/nowhere/at/all")
    assert said.status == 1
    assert "cannot open 'nbd+unix:///disk?socket=/nowhere/at/all': No such file or directory" in said.err


def test_an_image_may_not_send_us_to_a_server(image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    with peers.qemu_nbd(image) as uri:
        peers.qemu_img("create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", overlay)
        with pytest.raises(ReferenceRefused, match="network"):
            cowslice.open(overlay)
        with cowslice.open(overlay, gate=cowslice.PermitGate(network=True)) as disk:
            assert disk.read(9 * MiB, 3) == b"\x09\x09\x09"


def test_an_image_behind_a_server_names_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MiB))
    overlay = tmp_path / "overlay.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", overlay)
    with peers.qemu_nbd(overlay, image_format="raw") as uri:
        with pytest.raises(ReferenceRefused, match="NBD exports have no folder"):
            cowslice.open(uri)
        with cowslice.open(uri, backing=tmp_path / "base.raw", backing_format="raw") as disk:
            assert disk.read(0, 9) == bytes(9)
