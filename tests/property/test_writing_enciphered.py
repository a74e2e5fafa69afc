"""Writers of whole sectors and of parts of sectors meet in an encrypted image, and nobody's bytes are lost."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

import cowslice
from cowslice.units import SECTOR, KiB

SECRET = "sesame"
LUKS = {"encryption": "luks", "iter_time": 1, "secret": SECRET}
KINDS = {
    "aes": {"encryption": "aes", "secret": SECRET, "cluster_size": 4 * KiB},
    "xts": {**LUKS, "cluster_size": 4 * KiB},
    "extended": {**LUKS, "cluster_size": 16 * KiB, "extended_l2": True},
}
PLACE = slice(100, 130)  # of a sector: the part that has a writer of its own


@pytest.fixture(params=list(KINDS))
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    cowslice.create(tmp_path / "disk", 64 * KiB, **KINDS[request.param])  # type: ignore[arg-type]
    return tmp_path / "disk"


def test_whole_sectors_and_parts_of_them_are_written_at_once_and_both_are_there(path: Path) -> None:
    """Who writes a part of a sector writes back the rest of it: a whole one that came meanwhile must not be undone."""
    with cowslice.open(path, "r+", secret=SECRET) as disk:
        ended = threading.Event()

        def write_parts() -> None:
            dice = random.Random(1)
            while not ended.is_set():
                disk.write(dice.randrange(4) * SECTOR + PLACE.start, b"part" * 7 + b"ed")

        writer = threading.Thread(target=write_parts)
        writer.start()
        dice = random.Random(2)
        try:
            for _ in range(3000):
                start, data = dice.randrange(4) * SECTOR, bytearray(dice.randbytes(16) * 32)
                disk.write(start, data)
                seen = bytearray(disk.read(start, SECTOR))
                seen[PLACE] = data[PLACE] = bytes(30)
                assert seen == data
        finally:
            ended.set()
            writer.join()


def test_the_bytes_of_a_caller_stay_as_they_are(path: Path) -> None:
    data = random.Random(3).randbytes(40 * KiB)
    buffer = bytearray(data)
    with cowslice.open(path, "r+", secret=SECRET) as disk:
        for _ in range(2):
            disk.write(0, buffer)
            assert buffer == data
        assert disk.read(0, len(data)) == data
    assert data[:SECTOR] not in path.read_bytes()


def test_a_cipher_that_libcrypto_lacks_is_left_to_the_plain_path(tmp_path: Path) -> None:
    cowslice.create(tmp_path / "disk", 64 * KiB, **LUKS, cipher_alg="cast5-128", cipher_mode="cbc")  # type: ignore[arg-type]
    with cowslice.open(tmp_path / "disk", "r+", secret=SECRET) as disk:
        assert disk.fast_path is not None
        assert disk.fast_path.write_from(0, b"w" * SECTOR) == 0
        disk.write(0, b"w" * SECTOR)
        assert disk.fast_path.write_from(0, b"x" * SECTOR) == 0
        assert disk.read(0, SECTOR) == b"w" * SECTOR


def test_an_image_whose_clusters_others_share_is_written_to_new_ones(path: Path) -> None:
    with cowslice.open(path, "r+", secret=SECRET) as disk:
        disk.write(0, b"1" * 8 * KiB)
        disk.snapshot("before")
        disk.write(SECTOR, b"2" * SECTOR)
    with cowslice.open(path, secret=SECRET, snapshot="before") as disk:
        assert disk.read(0, 8 * KiB) == b"1" * 8 * KiB
    with cowslice.open(path, secret=SECRET) as disk:
        assert disk.read(0, 8 * KiB) == b"1" * SECTOR + b"2" * SECTOR + b"1" * (8 * KiB - 2 * SECTOR)
