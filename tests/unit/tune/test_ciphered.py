"""What deciphering costs is measured where there is something to decipher, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowslice
from cowslice.image.image import Image
from cowslice.ops.layout import write_populated_image
from cowslice.testing.peers import needs, qemu_img
from cowslice.tune import qemuio
from cowslice.tune.calibrate import Calibration, parse_device
from cowslice.tune.ciphered import deciphering, key_of
from cowslice.tune.model import Device
from cowslice.units import KiB, MiB
from tests.unit.tune.evidence import SEED

FAST = Device(read_4k=1e-6, read_64k=1e-5, rate_4k=1e6, rate_64k=1e5, cpu=1e-7)
MEASURED = Calibration(FAST, FAST, direct=False, measured_qemu=True)


@pytest.fixture
def disk(tmp_path: Path) -> Image:
    """An encrypted one, empty, open for writing."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "--object", "secret,id=key,data=sesame", "-f", "qcow2", "-o",
             "encrypt.format=aes,encrypt.key-secret=key", path, "64M")
    with cowslice.open(path, mode="r+", secret=b"sesame") as disk:
        yield disk


def measured(disk: Image, known: Calibration = MEASURED) -> Calibration:
    return deciphering(known, disk, key_of(disk, b"sesame"), seconds=0.01)


@needs("qemu-img", "qemu-io")
def test_both_engines_pay_for_each_byte(disk: Image) -> None:
    disk.write(MiB, b"x" * (256 * KiB))
    disk.flush()
    found = measured(disk)
    assert found.ours.cpu > FAST.cpu
    assert found.qemu.cpu > FAST.cpu
    assert found.ours.cipher > 0


@needs("qemu-img")
def test_without_qemu_it_is_measured_for_ours_alone(disk: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write(0, b"x" * (256 * KiB))
    monkeypatch.setattr(qemuio, "version", lambda: "")
    found = measured(disk)
    assert found.ours.cpu > FAST.cpu
    assert found.qemu == FAST


@needs("qemu-img")
def test_where_nothing_is_stored_nothing_is_measured(disk: Image) -> None:
    assert measured(disk) is MEASURED


@needs("qemu-img")
def test_constants_that_were_given_stay(disk: Image) -> None:
    disk.write(0, b"x" * (256 * KiB))
    given = parse_device(SEED)
    assert measured(disk, given) is given


def test_an_image_in_clear_needs_no_key(tmp_path: Path) -> None:
    write_populated_image(tmp_path / "disk.qcow2", size=MiB)
    with cowslice.open(tmp_path / "disk.qcow2") as disk:
        assert key_of(disk, b"sesame") is None
        assert measured(disk) is MEASURED
