"""docs/cache.md says of the cache what is true of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import cowslice
from cowslice.cache.forms import FORMS
from cowslice.ops.layout import Layout, write_populated_image
from cowslice.tune.curvepacked import packed_map
from cowslice.tune.simulatereplay import weigh
from cowslice.units import GiB, KiB, MiB
from tests.house.source_tree import ROOT

PAGE = (ROOT / "docs" / "cache.md").read_text()
TOLD = {int(runs): int(size) for runs, size in re.findall(r"^\| (\d+) runs? \| (\d+) \|$", PAGE, re.M)}
CLUSTERS = 40 * GiB >> 16


def packed_bytes(clusters: np.ndarray) -> int:
    """What the cache charges for these clusters, 8 where a word holds them."""
    raw = (clusters.astype(np.uint64) << np.uint64(16) | np.uint64(1 << 63)).astype(">u8")
    sizes = np.zeros(1, np.uint16)
    weigh(raw.tobytes(), 4 * KiB, 16, False, sizes)
    return int(sizes[0]) or 8


@pytest.mark.parametrize("runs", TOLD)
def test_a_slice_of_runs_takes_what_the_page_says(runs: int) -> None:
    places = np.random.default_rng(runs).integers(1, CLUSTERS - 512, runs)
    run = np.arange(512) * runs // 512
    assert packed_bytes(places[run] + np.arange(512)) == TOLD[runs]


def test_a_slice_in_no_order_takes_what_the_page_says() -> None:
    told = re.search(r"^\| in no order, in a file of 40 GiB \| (\d+) \|$", PAGE, re.M)
    assert told is not None
    assert packed_bytes(np.random.default_rng(1).permutation(CLUSTERS)[:512] + 1) == int(told[1])


@pytest.mark.parametrize("layout, told", [("sequential", 12 * KiB), ("random", 1.6 * MiB)])
def test_the_map_of_a_disk_takes_about_what_the_page_says(layout: Layout, told: float, tmp_path: Path) -> None:
    write_populated_image(tmp_path / "disk.qcow2", size=40 * GiB, layout=layout)
    with cowslice.open(tmp_path / "disk.qcow2", warmup="off") as disk:
        assert packed_map(disk).packed_bytes == pytest.approx(told, rel=0.04)


def test_every_form_and_every_file_that_the_page_names_is_there() -> None:
    assert all(f"**{form}**" in PAGE for form in FORMS)
    assert set(re.findall(r"`(\w+\.(?:pyx|pxd|py))`", PAGE)) <= {
        path.name for path in (ROOT / "src" / "cowslice" / "cache").iterdir()}
