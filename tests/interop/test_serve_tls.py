"""Other people's clients over TLS: those with a good certificate read the disk, nobody else gets anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowslice
from cowslice.serve.listing import list_exports
from cowslice.serve.server import serve
from cowslice.serve.tls import Certificates
from cowslice.testing import peers
from tests.unit.serve.certificates import Authority, trusting

pytestmark = peers.needs("qemu-img", "qemu-io", "qemu-nbd")
MiB = 1 << 20


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pki")
    ours, theirs = Authority.new("ours"), Authority.new("theirs")
    ours.put(place / "server", side="server")
    ours.put(place / "client", side="client")
    theirs.put(place / "stranger", side="client")
    shutil.copy(place / "server" / "ca-cert.pem", place / "stranger")
    theirs.put(place / "mistrusting", side="")
    return place


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, 64 * MiB)
    peers.qemu_io(path, "write -P 7 5M 9M")
    return path


@pytest.fixture
def port(image: Path, pki: Path) -> Iterator[int]:
    with cowslice.open(image) as disk:
        tls = Certificates(pki / "server")
        with serve(disk, host="127.0.0.1", port=0, tls=tls, report=lambda what: None) as server:
            yield int(server.uri.rpartition(":")[2].rstrip("/"))


def compare(port: int, credentials: Path, image: Path, *, expect: int = 0) -> str:
    """What `qemu-img compare` says of the served disk and the file."""
    return peers.qemu_img(
        "compare", "--object", f"tls-creds-x509,id=t,endpoint=client,dir={credentials}", "--image-opts",
        f"driver=raw,file.driver=nbd,file.host=127.0.0.1,file.port={port},file.tls-creds=t",
        f"driver=qcow2,file.filename={image}", expect=expect)


def test_qemu_img_with_a_certificate_reads_the_disk(port: int, pki: Path, image: Path) -> None:
    assert "identical" in compare(port, pki / "client", image)


@pytest.mark.parametrize("who", ["stranger", "mistrusting"])
def test_qemu_img_without_a_good_one_does_not(port: int, pki: Path, image: Path, who: str) -> None:
    compare(port, pki / who, image, expect=2)


def test_qemu_img_in_clear_does_not(port: int) -> None:
    said = peers.run("qemu-img", "info", f"nbd://127.0.0.1:{port}", expect=1).stderr.decode()
    assert "TLS" in said


@peers.needs("nbdinfo", "nbdcopy")
def test_libnbd_with_a_certificate_reads_the_disk(port: int, pki: Path, image: Path, tmp_path: Path) -> None:
    uri = f"nbds://localhost:{port}/?tls-certificates={pki / 'client'}"
    assert "using" in peers.run("nbdinfo", uri).stdout.decode()
    peers.nbdcopy("--connections=3", uri, tmp_path / "copy")
    assert "identical" in peers.qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "copy", image)


@peers.needs("nbdinfo")
@pytest.mark.parametrize("uri", ["nbds://localhost:{port}/?tls-certificates={pki}/stranger", "nbd://localhost:{port}"])
def test_libnbd_without_a_good_one_does_not(port: int, pki: Path, uri: str) -> None:
    peers.run("nbdinfo", uri.format(port=port, pki=pki), expect=1)


def test_our_listing_sees_what_qemu_nbd_serves_over_tls(image: Path, pki: Path) -> None:
    arguments = ["--object", f"tls-creds-x509,id=t,endpoint=server,dir={pki / 'server'},verify-peer=on", "--tls-creds",
                 "t", "-x", "disk", "-D", "a disk", "-r"]
    with peers.qemu_nbd(image, *arguments) as uri:
        place = uri.partition("socket=")[2]
        tls = trusting(pki / "client")
        (found,) = list_exports(place, tls=tls, hostname="localhost")
    assert (found.name, found.description, found.contexts) == ("disk", "a disk", ("base:allocation",))
    assert found.session is not None
    assert found.session.size == 64 * MiB
