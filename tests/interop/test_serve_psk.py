"""Other people's clients with a pre-shared key: who has it reads the disk, nobody else gets anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import cowslice
from cowslice.serve.server import serve
from cowslice.serve.tls import PresharedKeys
from cowslice.testing import peers

pytestmark = peers.needs("qemu-img", "qemu-io", "nbdinfo", "nbdcopy")
MiB = 1 << 20
KEYS = {"ann": "11" * 32, "bob": "5a" * 16}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, 16 * MiB)
    peers.qemu_io(path, "write -P 7 5M 9M")
    return path


def keys(place: Path, **of: str) -> Path:
    """A directory with these keys, as QEMU wants it."""
    place.mkdir()
    (place / "keys.psk").write_text("".join(f"{name}:{key}\n" for name, key in of.items()))
    return place


@pytest.fixture
def port(image: Path, tmp_path: Path) -> Iterator[int]:
    tls = PresharedKeys(keys(tmp_path / "server", **KEYS))
    with (
        cowslice.open(image) as disk,
        serve(disk, host="127.0.0.1", port=0, tls=tls, report=lambda what: None) as server,
    ):
        yield int(server.uri.rpartition(":")[2].rstrip("/"))


@pytest.mark.parametrize("name", KEYS)
def test_libnbd_with_its_key_reads_the_disk(port: int, image: Path, tmp_path: Path, name: str) -> None:
    mine = keys(tmp_path / "mine", **{name: KEYS[name]}) / "keys.psk"
    uri = f"nbds://{name}@127.0.0.1:{port}/?tls-psk-file={mine}"
    assert "using" in peers.run("nbdinfo", uri).stdout.decode()
    peers.nbdcopy("--connections=3", uri, tmp_path / "copy")
    assert "identical" in peers.qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "copy", image)


@pytest.mark.parametrize("name, key", [("ann", "11" * 31 + "12"), ("ann", KEYS["bob"]), ("eve", KEYS["ann"])])
def test_libnbd_with_another_key_does_not(port: int, tmp_path: Path, name: str, key: str) -> None:
    mine = keys(tmp_path / "mine", **{name: key}) / "keys.psk"
    peers.run("nbdinfo", f"nbds://{name}@127.0.0.1:{port}/?tls-psk-file={mine}", expect=1)


@pytest.mark.parametrize("uri", ["nbd://127.0.0.1:{port}", "nbds://127.0.0.1:{port}"])
def test_who_has_no_key_at_all_does_not(port: int, uri: str) -> None:
    peers.run("nbdinfo", uri.format(port=port), expect=1)


@pytest.mark.parametrize("key, status", [(KEYS["ann"], 0), ("12" * 32, 2)])
def test_qemu_img_reads_it_with_its_key_only(port: int, image: Path, tmp_path: Path, key: str, status: int) -> None:
    mine = keys(tmp_path / "mine", ann=key)
    said = peers.qemu_img(
        "compare", "--object", f"tls-creds-psk,id=t,endpoint=client,dir={mine},username=ann", "--image-opts",
        f"driver=raw,file.driver=nbd,file.host=127.0.0.1,file.port={port},file.tls-creds=t",
        f"driver=qcow2,file.filename={image}", expect=status)
    assert ("identical" in said) == (status == 0)
