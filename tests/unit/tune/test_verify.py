"""Forecast hit ratios are those that both engines then have."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowslice.ops.layout import write_populated_image
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice
from cowslice.tune import qemuio
from cowslice.tune import verify as verifying
from cowslice.units import GiB
from tests.unit.tune.evidence import SEED

WORKLOADS = ["uniform:requests=4000", "zipf:requests=4000,write=0.4", "mixed:requests=4000",
             "sequential:requests=4000,length=64k", "boot:requests=4000"]


def proofs(image: Path, *arguments: str) -> list[dict[str, object]]:
    said = cowslice("tune", "--device", SEED, "--verify", "--json", *arguments, image)
    assert said.status == 0, said.err
    told: list[dict[str, object]] = said.json["verified"]
    return told


def assert_within(told: list[dict[str, object]], engine: str, most: float) -> None:
    of_engine = [proof for proof in told if proof["engine"] == engine]
    assert len(of_engine) >= 2
    for proof in of_engine:
        assert proof["measured-hits"] == pytest.approx(proof["forecast-hits"], abs=most), proof
        assert isinstance(proof["measured-rate"], float)
        assert proof["measured-rate"] > 0


@pytest.mark.parametrize("workload", WORKLOADS)
def test_ours_hits_within_half_a_point(tmp_path: Path, workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemuio, "version", lambda: "")
    write_populated_image(tmp_path / "disk.qcow2", size=8 * GiB, layout="random")
    told = proofs(tmp_path / "disk.qcow2", "--workload", workload, "--l2-cache-size", "256k")
    assert_within(told, "cowslice", 0.005)
    assert {proof["engine"] for proof in told} == {"cowslice"}


@peers.needs("qemu-io")
@pytest.mark.parametrize("workload", WORKLOADS)
def test_qemu_hits_within_one_point(tmp_path: Path, workload: str) -> None:
    write_populated_image(tmp_path / "disk.qcow2", size=8 * GiB, layout="random")
    told = proofs(tmp_path / "disk.qcow2", "--workload", workload, "--l2-cache-size", "256k")
    assert_within(told, "qemu", 0.01)


@peers.needs("qemu-io", "qemu-img")
def test_parts_without_a_map_cost_nothing_and_the_image_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "4G")
    peers.qemu_io(path, "write 0 64k", "write 1G 64k", "write 3G 64k")
    before = path.read_bytes()
    told = proofs(path, "--workload", "uniform:requests=2000,write=0.5", "--l2-cache-size", "64k")
    assert_within(told, "qemu", 0.01)
    assert path.read_bytes() == before


def test_no_more_than_a_bounded_number_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemuio, "version", lambda: "")
    monkeypatch.setattr(verifying, "MOST_REQUESTS", 300)
    write_populated_image(tmp_path / "disk.qcow2", size=GiB)
    told = proofs(tmp_path / "disk.qcow2", "--workload", "uniform:requests=9000")
    assert {proof["requests"] for proof in told} == {300}


def test_the_terminal_shows_forecast_beside_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemuio, "version", lambda: "")
    write_populated_image(tmp_path / "disk.qcow2", size=GiB)
    said = cowslice("tune", "--device", SEED, "--workload", "uniform:requests=500", "--verify", tmp_path / "disk.qcow2")
    assert "Verified with 500 reads" in said.out
    assert "QEMU was not asked" in said.out
