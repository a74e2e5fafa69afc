"""Space that a guest gives up goes back to the file system, and what is a plain copy of the disk stays one."""

from __future__ import annotations

from pathlib import Path

import cowslice
from cowslice.units import KiB, MiB


def test_a_discard_takes_space_from_a_raw_data_file_which_stays_true(tmp_path: Path) -> None:
    image, data = tmp_path / "image", tmp_path / "data"
    cowslice.create(image, MiB, format="qcow2", data_file=data, data_file_raw=True)
    with cowslice.open(image, "r+") as disk:
        disk.write(0, b"d" * MiB)
        disk.discard(128 * KiB, 512 * KiB)
        assert disk.read(0, MiB) == data.read_bytes() == b"d" * (128 * KiB) + bytes(512 * KiB) + b"d" * (384 * KiB)
    assert data.stat().st_blocks * 512 <= 512 * KiB + 16 * KiB
