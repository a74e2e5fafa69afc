"""The benchmarks run, tiny, so that they cannot rot. What they measure here means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cowslice.testing.peers import needs

TINY = ("--short", "--size=1G", "--requests=100", "--rounds=1", "--output=json")


def _table(*options: str) -> Any:
    command = [sys.executable, "-m", "cowslice.cli.main", "bench", "table", *TINY, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("layout", ["sequential", "random"])
def test_the_table_is_measured_without_qemu(layout: str) -> None:
    cells = _table("--no-peer", f"--layout={layout}")["cells"]
    assert {cell["cluster_bits"] for cell in cells} == {16, 18}
    assert all(cell["ours_cold"] > 0 and cell["ours_warm"] > 0 and cell["peer_warm"] is None for cell in cells)


@needs("qemu-img")
def test_the_table_is_measured_beside_qemu() -> None:
    cells = _table("--cluster-size=64k")["cells"]
    assert all(cell["peer_cold"] > 0 and cell["ratio_cold"] > 0 for cell in cells)


@pytest.mark.parametrize("ending, opening", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_table_is_drawn(ending: str, opening: bytes, tmp_path: Path) -> None:
    picture = tmp_path / f"table.{ending}"
    _table("--no-peer", "--cluster-size=256k", f"--plot={picture}")
    assert picture.read_bytes().startswith(opening)
