"""Constants of a storage: measured here, or as people write them. Times themselves are not judged."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from cowslice.errors import BadOption, StorageError
from cowslice.testing.peers import needs
from cowslice.tune import qemuio
from cowslice.tune.calibrate import Calibration, as_json, calibrate, parse_device
from cowslice.tune.model import QEMU_CPU
from cowslice.units import MiB

SEED = "read4k=177us,read64k=0.423ms,rate4k=56700,rate64k=8090"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some, bytes"
    path.write_bytes(b"x" * MiB)
    return path


def quick(path: Path | str) -> Calibration:
    return calibrate(str(path), seconds=0.002)


def test_constants_are_taken_as_they_are_written() -> None:
    found = parse_device(SEED)
    assert (found.qemu.read_4k, found.qemu.read_64k) == (pytest.approx(177e-6), pytest.approx(423e-6))
    assert (found.ours.rate_4k, found.qemu.rate_64k, found.qemu.cpu) == (56700, 8090, QEMU_CPU)
    assert found.given


def test_qemus_own_work_may_be_given_too() -> None:
    assert parse_device(SEED + ",cpu=20us").qemu.cpu == pytest.approx(20e-6)


@pytest.mark.parametrize("text, wrong", [
    ("", "unknown ''"), ("read4k=1ms", "no rate4k"), (SEED + ",speed=3", "unknown 'speed'"),
    (SEED.replace("177us", "fast"), "read4k of --device is 'fast'"), (SEED.replace("56700", "0"), "rate4k"),
    (SEED.replace("56700", "9us"), "rate4k"), (SEED.replace("8090", "nan"), "rate64k"), (SEED + ",cpu=", "cpu"),
])  # fmt: skip
def test_other_words_are_refused_by_name(text: str, wrong: str) -> None:
    with pytest.raises(BadOption, match=wrong):
        parse_device(text)


def test_everything_is_measured_without_qemu(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemuio, "version", lambda: "")
    found = quick(file)
    assert all(getattr(found.ours, field.name) > 0 for field in fields(found.ours) if field.name != "cipher")
    assert not found.measured_qemu
    assert found.qemu.read_4k == found.ours.read_4k


@needs("qemu-io")
def test_qemu_measures_its_own_way_to_the_storage(file: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = calibrate(str(file), seconds=0.002, on_progress=lambda done, total: steps.append((done, total)))
    assert found.measured_qemu
    assert all(getattr(found.qemu, field.name) > 0 for field in fields(found.qemu)
               if field.name not in ("cipher", "miss_cpu"))
    assert steps == [(n, 9) for n in range(1, 10)]
    assert as_json(found)["measured-by-qemu"] is True


def test_a_file_smaller_than_one_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_bytes(b"x" * 100)
    with pytest.raises(StorageError, match="has 100 bytes, expected at least 4096"):
        quick(tmp_path / "tiny")


def test_a_file_smaller_than_the_large_read_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemuio, "version", lambda: "")
    (tmp_path / "small").write_bytes(b"x" * 9000)
    assert quick(tmp_path / "small").ours.rate_64k > 0


def test_a_file_that_is_a_hole_is_measured_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemuio, "version", lambda: "")
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(MiB)
    assert quick(tmp_path / "hole").ours.rate_4k > 0
