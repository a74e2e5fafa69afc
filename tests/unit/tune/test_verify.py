"""Forecast hit ratios are those that both engines then have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cowslice.image.image import Image, open_image
from cowslice.ops.layout import write_populated_image
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice
from cowslice.tune import qemuio
from cowslice.tune import verify as verifying
from cowslice.tune.advise import advise
from cowslice.tune.calibrate import parse_device
from cowslice.tune.requests import Requests
from cowslice.tune.study import gather
from cowslice.units import GiB
from tests.unit.tune.evidence import SEED, uniform

WORKLOADS = ["uniform:requests=4000", "zipf:requests=4000,write=0.4", "mixed:requests=4000",
             "sequential:requests=4000,length=64k", "boot:requests=4000"]


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay only as often as the time floor wants."""
    monkeypatch.setattr(verifying, "ROUNDS", 1)


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


@peers.needs("qemu-io", "qemu-img")
@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_an_encrypted_image_is_replayed_by_both_engines(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "PATIENCE", 0.0)
    secret, path = ["--object", "secret,id=key,data=sesame"], tmp_path / "disk.qcow2"
    options = f"cluster_size=4k,encrypt.format={kind},encrypt.key-secret=key"
    peers.qemu_img("create", *secret, "-f", "qcow2", "-o",
                   options + (",encrypt.iter-time=10" if kind == "luks" else ""), path, "32M")
    opened = f"driver=qcow2,file.filename={path},encrypt.format={kind},encrypt.key-secret=key"
    peers.run("qemu-io", *secret, "--image-opts", "-c", "write -P 7 0 32M", opened)
    said = cowslice("tune", *secret, "--device", SEED, "--workload", "zipf:requests=300", "--l2-cache-size", "64k",
                    "--verify", "--json", "--image-opts", opened)
    assert said.status == 0, said.err
    assert_within(said.json["verified"], "qemu", 0.01)
    assert_within(said.json["verified"], "cowslice", 0.005)


def test_a_replay_that_ends_too_soon_to_be_timed_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "disk.qcow2", []
    write_populated_image(path, size=GiB)

    def opener(cache: int, entry: int, direct: bool) -> Image:
        opened.append(cache)
        return open_image(str(path), l2_cache_size=cache, l2_cache_entry_size=entry, warmup="off")

    def openings(floor: float) -> int:
        opened.clear()
        monkeypatch.setattr(verifying, "FLOOR", floor)
        return len(verifying.verify(advice, made, opener)) and len(opened)

    made = uniform(200, GiB)
    monkeypatch.setattr(qemuio, "version", lambda: "")
    monkeypatch.setattr(verifying, "PATIENCE", 0.5)
    with open_image(str(path), warmup="off") as disk:
        advice = advise(gather(disk, made, calibration=parse_device(SEED)))
    assert openings(3600.0) > openings(0.0)


def test_a_trace_that_only_discards_cannot_be_replayed(tmp_path: Path) -> None:
    write_populated_image(tmp_path / "disk.qcow2", size=GiB)
    (tmp_path / "trace").write_text("fio version 2 iolog\na trim 0 1048576\n" + "a trim 65536 1048576\n" * 9)
    said = cowslice("tune", "--device", SEED, "--trace", tmp_path / "trace", "--verify", tmp_path / "disk.qcow2")
    assert (said.status, said.out) == (64, "")
    assert "nothing to replay" in said.err


def test_requests_of_many_lengths_are_timed_each_with_its_own() -> None:
    lengths = np.tile(np.array([512, 4096, 65536], np.uint64), 1000)
    offsets = np.arange(3000, dtype=np.uint64) * np.uint64(65536)
    made = verifying.batches(Requests(np.zeros(3000), np.zeros(3000, np.uint8), offsets, lengths))
    told = sorted((int(offset), length) for places, length in made for offset in places)
    assert told == sorted(zip(offsets.tolist(), lengths.tolist(), strict=True))
    assert len(made) == 9


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
