"""What is refused when an image is made, and that a failure leaves everything as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import cowslice
from cowslice.errors import BadOption, CowsliceError, Locked, NoSpace, NotAnImage, ReferenceRefused, StorageError
from cowslice.image.createoptions import CreateOptions
from cowslice.image.creation import new_image
from cowslice.image.gate import FolderGate
from cowslice.storage import FileStorage, LimitedStorage, MemoryStorage
from cowslice.testing.faults import Fault, FaultyStorage

IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "an unknown format": {"format": "vmdk"},
    "an unknown version": {"compat": "2"},
    "clusters that are no power of two": {"cluster_size": 1000},
    "clusters that are too large": {"cluster_size": "4M"},
    "clusters that are too small": {"cluster_size": 256},
    "subclusters smaller than a sector": {"cluster_size": "8k", "extended_l2": True},
    "an odd refcount width": {"refcount_bits": 7},
    "a refcount width that is too large": {"refcount_bits": 128},
    "an unknown compression": {"compression_type": "lz4"},
    "an unknown preallocation": {"preallocation": "most"},
    "narrow refcounts in version 2": {"compat": "0.10", "refcount_bits": 8},
    "lazy refcounts in version 2": {"compat": "0.10", "lazy_refcounts": True},
    "subclusters in version 2": {"compat": "0.10", "extended_l2": True},
    "zstd in version 2": {"compat": "0.10", "compression_type": "zstd"},
    "a data file in version 2": {"compat": "0.10", "data_file": "data.raw"},
    "a format without a backing file": {"backing_format": "raw"},
    "a backing file without its format": {"backing_file": "base.raw"},
    "a backing format nobody has": {"backing_file": "base.raw", "backing_format": "blah"},
    "a backing name that is too long": {"backing_file": "b" * 1024, "backing_format": "raw", "check_backing": False},
    "preallocation that hides a backing file":
        {"backing_file": "base.raw", "backing_format": "raw", "preallocation": "metadata"},
    "a raw data file without a data file": {"data_file_raw": True},
    "a raw data file over a backing file":
        {"data_file": "data.raw", "data_file_raw": True, "backing_file": "base.raw", "backing_format": "raw"},
    "the image as its own backing file": {"backing_file": "disk.qcow2", "backing_format": "qcow2"},
    "the image as its own data file": {"data_file": "disk.qcow2"},
    "a data file elsewhere in a network": {"data_file": "nbd://host/data"},
    "an unknown encryption": {"encryption": "rot13", "secret": "x"},
    "encryption without a secret": {"encryption": "luks"},
    "a secret without encryption": {"secret": "x"},
    "a cipher for legacy encryption": {"encryption": "aes", "secret": "x", "cipher_alg": "aes-256"},
    "a cipher that nobody has": {"encryption": "luks", "secret": "x", "cipher_alg": "serpent-256"},
    "a cipher without its key length": {"encryption": "luks", "secret": "x", "cipher_alg": "aes"},
    "a key derivation that takes no time": {"encryption": "luks", "secret": "x", "iter_time": 0},
    "preallocated metadata of a raw file": {"format": "raw", "preallocation": "metadata"},
    "clusters in a raw file": {"format": "raw", "cluster_size": 4096},
    "an extent size that is no number of sectors": {"extent_size_hint": 1000},
    "an option that is not known": {"cluster_bits": 16},
}


@pytest.mark.parametrize("options", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_is_refused_and_nothing_is_touched(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "disk.qcow2").write_bytes(b"old")
    (tmp_path / "base.raw").write_bytes(bytes(512))
    with pytest.raises(BadOption, match=r"expected|needs|without"):
        cowslice.create(tmp_path / "disk.qcow2", "1M", **options)
    assert (tmp_path / "disk.qcow2").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["base.raw", "disk.qcow2"]


@pytest.mark.parametrize("size, options", [
    (None, {}), ("128P", {}), (-1, {}), ("1x", {}), ("129G", {"cluster_size": 512}), ((1 << 63) - 1, {"format": "raw"}),
    (None, {"backing_file": "gone", "backing_format": "raw", "check_backing": False}),
])
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, size: int | str | None, options: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="size"):
        cowslice.create(tmp_path / "disk", size, **options)
    assert os.listdir(tmp_path) == []


def test_a_size_is_rounded_up_to_sectors(tmp_path: Path) -> None:
    for kind in ("qcow2", "raw"):
        cowslice.create(tmp_path / kind, 1000, format=kind)
        with cowslice.open(tmp_path / kind, format=kind) as disk:
            assert disk.size == 1024


def test_a_backing_file_gives_its_size_and_shows_through(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"x" * 5120)
    cowslice.create(tmp_path / "disk.qcow2", backing_file="base.raw", backing_format="raw")
    with cowslice.open(tmp_path / "disk.qcow2") as disk:
        assert disk.read(0, disk.size) == b"x" * 5120


def test_a_backing_file_that_is_not_there_is_missed_only_when_it_is_checked(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone"):
        cowslice.create(tmp_path / "disk", "1M", backing_file="gone", backing_format="raw")
    cowslice.create(tmp_path / "disk", "1M", backing_file="gone", backing_format="raw", check_backing=False)
    assert os.listdir(tmp_path) == ["disk"]


def test_a_backing_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(512))
    with pytest.raises(NotAnImage):
        cowslice.create(tmp_path / "disk", "1M", backing_file="base.raw", backing_format="qcow2")


def test_what_a_backing_file_names_must_pass_the_gate(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "base.raw").write_bytes(bytes(512))
    cowslice.create(folder / "middle", 512, backing_file=elsewhere / "base.raw", backing_format="raw")
    with pytest.raises(ReferenceRefused):
        cowslice.create(folder / "disk", backing_file="middle", backing_format="qcow2")
    cowslice.create(folder / "disk", backing_file="middle", backing_format="qcow2", gate=FolderGate([elsewhere]))


def test_a_backing_file_that_opening_will_refuse_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(512))
    (tmp_path / "folder").mkdir()
    said: list[str] = []
    cowslice.create(tmp_path / "folder/disk", backing_file=tmp_path / "base.raw", backing_format="raw",
                    on_warning=said.append)
    assert len(said) == 1


def test_an_encrypted_backing_file_needs_no_key(tmp_path: Path) -> None:
    cowslice.create(tmp_path / "base", "1M", encryption="aes", secret="x")
    cowslice.create(tmp_path / "disk", backing_file="base", backing_format="qcow2")
    with cowslice.open(tmp_path / "disk", metadata_only=True) as disk:
        assert disk.size == 1 << 20


def test_a_data_file_with_content_is_not_emptied_unless_told(tmp_path: Path) -> None:
    (tmp_path / "data.raw").write_bytes(b"precious")
    with pytest.raises(BadOption, match="not empty"):
        cowslice.create(tmp_path / "disk", "1M", data_file="data.raw")
    assert (tmp_path / "data.raw").read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["data.raw"]
    cowslice.create(tmp_path / "disk", "1M", data_file="data.raw", replace_data_file=True)
    assert (tmp_path / "data.raw").read_bytes() == bytes(1 << 20)


@pytest.mark.parametrize("extended", [False, True])
def test_a_raw_data_file_keeps_its_content_and_shows_it(tmp_path: Path, extended: bool) -> None:
    (tmp_path / "data.raw").write_bytes(b"p" * 70_000)
    cowslice.create(tmp_path / "disk", "1M", data_file="data.raw", data_file_raw=True, extended_l2=extended,
                    preallocation="full")
    with cowslice.open(tmp_path / "disk") as disk:
        assert disk.read(0, 1 << 20) == (b"p" * 70_000).ljust(1 << 20, b"\0")


def test_a_raw_data_file_longer_than_the_disk_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / "data.raw").write_bytes(b"p" * 1024)
    with pytest.raises(BadOption, match="cut"):
        cowslice.create(tmp_path / "disk", 512, data_file="data.raw", data_file_raw=True)
    assert (tmp_path / "data.raw").read_bytes() == b"p" * 1024


@pytest.mark.parametrize("name", ["disk", "data.raw"])
def test_a_file_that_somebody_uses_is_not_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with FileStorage(tmp_path / name, "r+"), pytest.raises(Locked):
        cowslice.create(tmp_path / "disk", "1M", data_file="data.raw")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_abandoned_image_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "disk").write_bytes(b"old")
    options = CreateOptions(data_file="data.raw")
    with pytest.raises(error), new_image(str(tmp_path / "disk"), 1 << 20, options):
        raise error
    assert os.listdir(tmp_path) == ["disk"]
    assert (tmp_path / "disk").read_bytes() == b"old"


def test_a_full_storage_is_said_so() -> None:
    with pytest.raises(NoSpace):
        cowslice.create(LimitedStorage(MemoryStorage(), 300_000), "1M", preallocation="full")


@pytest.mark.parametrize("blank", [True, False])
def test_before_the_last_write_the_storage_holds_no_image(blank: bool) -> None:
    """Whatever fails, a reader finds no header: neither a new one nor the old one."""
    for skip in range(40):
        memory = MemoryStorage()
        cowslice.create(memory, "1M")
        storage = FaultyStorage(memory, Fault("pwrite", skip=skip), Fault("sync", skip=skip))
        if not blank:
            storage.add(Fault("truncate"))
        try:
            cowslice.create(storage, "1M", encryption="luks", secret="x", iter_time=1, cluster_size=4096)
        except CowsliceError:
            with pytest.raises(NotAnImage):
                cowslice.open(memory)
            continue
        assert skip > 2
        return
    pytest.fail("it never ended")


def test_a_storage_that_keeps_its_length_is_written_in_place() -> None:
    memory = MemoryStorage(b"\xff" * (8 << 20))
    storage = FaultyStorage(memory, Fault("truncate"))
    cowslice.create(storage, "2M", preallocation="metadata")
    with cowslice.open(memory) as disk:
        assert disk.read(0, disk.size) == bytes(2 << 20)


def test_a_relative_data_file_needs_a_folder() -> None:
    with pytest.raises(BadOption, match="folder"):
        cowslice.create(MemoryStorage(), "1M", data_file="data.raw")


@pytest.mark.parametrize("encryption", ["aes", "luks"])
def test_only_the_secret_opens_what_was_made(encryption: str) -> None:
    memory = MemoryStorage()
    cowslice.create(memory, "1M", encryption=encryption, secret="right", **(
        {"iter_time": 1} if encryption == "luks" else {}))  # type: ignore[arg-type]
    with cowslice.open(memory, secret="right") as disk:
        assert disk.read(0, disk.size) == bytes(1 << 20)
    if encryption == "luks":
        with pytest.raises(cowslice.CryptoError):
            cowslice.open(memory, secret="wrong")
