"""The calls that `cowslice.tune` exports: the figures that its parts give, from whatever names an image and a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cowslice
from cowslice import tune
from cowslice.errors import BadOption
from cowslice.units import KiB, MiB
from tests.unit.tune.evidence import SEED
from tests.unit.tune.host import made_host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_host(tmp_path_factory.mktemp("host"))


def test_a_replay_by_qemus_rules_misses_as_often_as_the_curve_says(host: Path) -> None:
    image, trace = host / "busy.qcow2", host / "busy.log"
    curve = tune.curves(image, trace=trace).by_entry_bytes[64 * KiB]
    sizes = [128 * KiB, 512 * KiB, MiB]
    replayed = tune.replay(image, sizes, engine="qemu", entry_size="64k", trace=trace)
    assert [one.misses for one in replayed] == [curve.misses_at(size // (64 * KiB)) for size in sizes]
    assert replayed[0].misses > 2 * replayed[2].misses


def test_a_replay_of_ours_knows_how_small_the_images_map_packs(host: Path) -> None:
    image, trace = host / "busy.qcow2", host / "busy.log"
    (ours,), (qemus,) = (tune.replay(image, ["256k"], engine=engine, trace=trace) for engine in ("cowslice", "qemu"))
    assert ours.accesses == qemus.accesses
    assert ours.misses < qemus.misses / 2


def test_an_image_may_be_open_and_a_trace_be_requests(host: Path) -> None:
    requests = list(tune.open_trace(host / "busy.log"))
    with cowslice.open(host / "busy.qcow2") as disk:
        opened = tune.advice(disk, trace=requests, device=SEED, l2_cache_size="256k")
        assert disk.read(0, 512)
    named = tune.advice(str(host / "busy.qcow2"), trace=str(host / "busy.log"), device=tune.parse_device(SEED),
                        l2_cache_size=256 * KiB)
    assert (opened.qemu, opened.qemu_today, opened.ours) == (named.qemu, named.qemu_today, named.ours)
    assert opened.qemu_today.cache_bytes == 256 * KiB
    assert any("times as fast" in sentence.text for sentence in tune.sentences(opened))


def test_progress_of_an_advice_is_told_to_its_end(host: Path) -> None:
    steps: list[tuple[int, int]] = []
    tune.advice(host / "loop.qcow2", trace=host / "loop.log", device=SEED,
                on_progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 0


@pytest.mark.parametrize("options, told", [
    ({"trace": "t", "workload": "zipf"}, "both given"), ({"workload": "unicorn"}, "expected one of"),
    ({"engine": "vmware"}, "expected qemu or cowslice"), ({"entry_size": "3k"}, "a power of two"),
    ({"entry_size": "4M"}, "a power of two"),
])  # fmt: skip
def test_a_call_that_makes_no_sense_is_refused(host: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadOption, match=told):
        tune.replay(host / "busy.qcow2", ["1M"], **options)


def test_a_raw_disk_has_no_map(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(MiB))
    with cowslice.open(tmp_path / "raw", format="raw") as disk:
        for call in (tune.curves, lambda raw: tune.replay(raw, ["1M"]), lambda raw: tune.advice(raw, device=SEED)):
            with pytest.raises(BadOption, match="raw disk"):
                call(disk)
