"""Encrypted images: both methods read as QEMU wrote them, and a missing or wrong secret is said clearly."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowslice
from cowslice.storage import MemoryStorage
from cowslice.testing import peers

pytestmark = peers.needs("qemu-img", "qemu-io")
SECRET = "horse"
KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture(scope="module", params=["luks", "aes"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("keys") / f"{request.param}.qcow2"
    options = f"encrypt.format={request.param},encrypt.key-secret=s,cluster_size=4096"
    if request.param == "luks":
        options += ",encrypt.iter-time=10"
    create(path, options)
    write(path, "write -P 7 1000 100000", "write -P 9 800k 70000", "write -z 900k 8k")
    return path


def create(path: Path, options: str) -> None:
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", options, "--object", f"secret,id=s,data={SECRET}", path, MiB)


def write(path: Path, *commands: str) -> None:
    peers.qemu_io(f"driver=qcow2,encrypt.key-secret=s,file.filename={path}", *commands, image_format=None,
                  options=["--object", f"secret,id=s,data={SECRET}", "--image-opts"])


def expected() -> bytes:
    content = bytearray(MiB)
    content[1000:101000] = b"\7" * 100000
    content[800 * KiB : 800 * KiB + 70000] = b"\x09" * 70000
    content[900 * KiB : 908 * KiB] = bytes(8 * KiB)
    return bytes(content)


def test_an_encrypted_image_reads_with_its_secret(image: Path) -> None:
    with cowslice.open(image, secret=SECRET) as disk:
        assert disk.encrypted
        assert disk.read(0, disk.size) == expected()


def test_any_span_of_an_encrypted_image_reads(image: Path) -> None:
    with cowslice.open(image, secret=SECRET.encode()) as disk:
        for offset, length in ((0, 1), (999, 2), (1000, 511), (511, 3), (101_000 - 1, 700), (MiB - 1, 1)):
            assert disk.read(offset, length) == expected()[offset : offset + length]


def test_a_secret_may_be_asked_for_by_the_name_of_the_file(image: Path) -> None:
    asked: list[str] = []

    def give(name: str) -> str:
        asked.append(name)
        return SECRET

    with cowslice.open(image, secret=give) as disk:
        assert disk.read(1000, 1) == b"\7"
    assert asked == [str(image)]


@pytest.mark.parametrize("secret", [None, lambda name: None])
def test_without_a_secret_the_image_is_not_opened(image: Path, secret: object) -> None:
    with pytest.raises(cowslice.CryptoError, match="no secret was given") as refusal:
        cowslice.open(image, secret=secret)
    assert str(image) in str(refusal.value)


def test_a_wrong_secret_is_noticed_by_luks_and_gives_noise_with_the_old_method(image: Path) -> None:
    if "luks" in image.name:
        with pytest.raises(cowslice.CryptoError, match=r"luks\.qcow2.*passphrase"):
            cowslice.open(image, secret="wrong")
        return
    with cowslice.open(image, secret="wrong") as disk:
        assert disk.read(1000, 512) != expected()[1000:1512]


def test_key_derivation_has_a_budget(image: Path) -> None:
    if "luks" in image.name:
        with pytest.raises(cowslice.CryptoError, match="hash rounds"):
            cowslice.open(image, secret=SECRET, max_key_rounds=10)


def test_metadata_needs_no_secret_and_extents_show_no_offsets(image: Path) -> None:
    with cowslice.open(image, metadata_only=True) as disk:
        assert all(extent.offset is None for extent in disk.extents())
        assert sum(extent.length for extent in disk.extents() if extent.data) >= 168 * KiB


def test_compressed_clusters_of_an_encrypted_image_are_read_as_they_are_stored(image: Path, tmp_path: Path) -> None:
    """QEMU stores them in clear; what is stored can be read by anyone, so refusing it would protect nothing."""
    if "luks" not in image.name:
        return
    copy = tmp_path / image.name
    copy.write_bytes(image.read_bytes())
    write(copy, "write -c -P 5 500k 4k")
    with cowslice.open(copy, secret=SECRET) as disk:
        assert disk.read(500 * KiB, 4 * KiB) == b"\5" * 4096


def test_a_luks_header_that_is_cut_off_is_a_clear_error(image: Path) -> None:
    file = image.read_bytes()
    with pytest.raises(cowslice.CowsliceError) as refusal:
        cowslice.open(MemoryStorage(file[: 5 * 4096]), secret="x" if "luks" in image.name else None)
    assert str(refusal.value)
