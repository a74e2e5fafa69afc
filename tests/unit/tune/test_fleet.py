"""A fleet on this machine: each disk studied as if alone, in processes that may die, and summed up by what it gains."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cowslice
from cowslice import tune
from cowslice.errors import BadOption, StorageError
from cowslice.ops.layout import write_populated_image
from cowslice.tune import fleetstudy
from cowslice.tune.calibrate import parse_device
from cowslice.tune.digest import digest
from cowslice.tune.fleetlist import Broken, Member
from cowslice.tune.fleetlocal import ATTEMPTS, LocalCrew
from cowslice.tune.fleetstudy import Job, Studied, Terms, study
from cowslice.tune.fleetsummary import Fleet, fleet_json, summarise
from cowslice.tune.guest import Guest
from cowslice.tune.study import Setting
from cowslice.units import GiB, KiB
from tests.unit.tune.evidence import SEED
from tests.unit.tune.host import made_host

CALIBRATION = parse_device(SEED)
FEW = Terms(guest=Guest(workload="uniform:requests=5000"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def found(host: Path) -> Fleet:
    return tune.fleet(host, device=SEED, l2_cache_size="512k", l2_cache_entry_size="4k")


def job(image: Path | str, terms: Terms = FEW, **more: Any) -> Job:
    return Job(Member(str(image), **more), terms, CALIBRATION)


def names(disks: tuple[Studied, ...] | tuple[Broken, ...]) -> list[str]:
    return [Path(disk.image).name for disk in disks]


def test_starved_and_wasteful_disks_are_told_apart_and_broken_ones_named(found: Fleet) -> None:
    assert names(found.starved) == ["busy.qcow2", "quiet.qcow2"]  # the one with ten times the requests first
    assert names(found.wasteful) == ["loop.qcow2"]
    assert names(found.right) == []
    assert names(found.broken) == ["broken.qcow2"]
    assert "version is" in found.broken[0].error


def test_each_disk_is_advised_what_it_is_advised_alone(host: Path, found: Fleet) -> None:
    for disk in found.disks:
        path = Path(disk.image)
        alone = tune.advice(path, trace=path.with_suffix(".log"), device=SEED, l2_cache_size="512k",
                            l2_cache_entry_size="4k")
        assert disk.digest == replace(digest(alone), name=disk.digest.name)


def test_without_a_budget_what_there_is_today_is_shared(found: Fleet) -> None:
    assert found.division is not None
    assert found.division.budget == 3 * 512 * KiB
    assert found.division.weighted
    today = found.division.mean_seconds(lambda part: part.disk.qemu_today)
    assert found.division.mean_seconds(lambda part: part.qemu) < today / 2
    assert sum(part.qemu.cache_bytes for part in found.division.parts) <= 3 * 512 * KiB


def test_a_budget_is_shared_and_one_that_nobody_can_live_on_refused(found: Fleet) -> None:
    outcomes = (*found.disks, *found.broken)
    shared = summarise(outcomes, 256 * KiB).division
    assert shared is not None
    assert sum(part.qemu.cache_bytes for part in shared.parts) <= 256 * KiB
    with pytest.raises(BadOption, match="expected at least"):
        summarise(outcomes, 512)


def test_it_is_all_told_as_json_without_curves(found: Fleet) -> None:
    told = fleet_json(found)
    assert [Path(path).name for path in told["summary"]["starved"]] == names(found.starved)
    assert told["summary"]["bytes"]["today"] == 3 * 512 * KiB
    assert told["broken"][0]["kind"] == "UnsupportedImage"
    assert len(told["disks"]) == 3
    assert "curves" not in told["disks"][0]
    assert told["disks"][0]["paste"]["drive"].startswith("-drive file=")


def test_jobs_and_outcomes_travel(host: Path, found: Fleet) -> None:
    sent = job(host / "busy.qcow2", trace=str(host / "busy.log"))
    assert pickle.loads(pickle.dumps(sent)) == sent
    assert pickle.loads(pickle.dumps(found)) == found
    assert len(pickle.dumps(found)) < 200 * KiB * 3


def test_what_a_disk_has_of_its_own_today_stands_above_what_all_have(host: Path) -> None:
    terms = replace(FEW, today=Setting(l2_cache_size=512 * KiB))
    own = study(job(host / "busy.qcow2", terms, today=Setting(l2_cache_size=256 * KiB)))
    of_all = study(job(host / "busy.qcow2", terms))
    assert isinstance(own, Studied)
    assert isinstance(of_all, Studied)
    assert (own.digest.qemu_today.cache_bytes, of_all.digest.qemu_today.cache_bytes) == (256 * KiB, 512 * KiB)


def test_nothing_that_an_image_names_is_opened(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    write_populated_image(base, size=GiB)
    cowslice.create(top, backing_file=str(base), backing_format="qcow2")
    base.unlink()
    assert isinstance(study(job(top)), Studied)


def test_a_fault_of_ours_at_one_disk_is_told_and_not_raised(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(evidence: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(fleetstudy, "advise", fails)
    outcome = study(job(host / "busy.qcow2"))
    assert isinstance(outcome, Broken)
    assert (outcome.kind, "ZeroDivisionError" in outcome.error) == ("InternalError", True)


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (9,)


def test_a_disk_that_ends_its_process_is_named_and_the_others_are_studied(host: Path) -> None:
    good, bad = job(host / "busy.qcow2"), Job(Member("bad.qcow2"), Deadly(), CALIBRATION)  # type: ignore[arg-type]
    outcomes = LocalCrew().run([bad, good], lambda done: None)
    assert isinstance(outcomes[0], Broken)
    assert f"{ATTEMPTS} processes ended at it, the last one ended with status 9" in outcomes[0].error
    assert outcomes[1] == study(good)
    assert not multiprocessing.active_children()


def test_processes_that_are_killed_cost_nothing_but_time(host: Path) -> None:
    jobs = [job(host / name) for name in ("busy.qcow2", "quiet.qcow2", "loop.qcow2", "busy.qcow2")]
    killed: list[int] = []

    def kill_all(done: int) -> None:
        if done == 1:
            killed.extend(child.pid for child in multiprocessing.active_children() if child.pid)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    assert LocalCrew().run(jobs, kill_all) == [study(each) for each in jobs]
    assert killed


def test_a_script_that_starts_itself_over_and_over_is_stopped_with_a_hint(host: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"from cowslice import tune\ntune.fleet({str(host)!r}, device={SEED!r})\n")
    here = {**os.environ, "PYTHONPATH": str(Path(cowslice.__file__).parents[1])}
    ended = subprocess.run([sys.executable, script], env=here, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "cannot start a process to study disks in: it ended with status 1" in ended.stderr


def test_no_process_outlives_an_interruption(host: Path) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LocalCrew().run([job(host / "busy.qcow2")] * 4, interrupt)
    assert not multiprocessing.active_children()


def test_wrong_terms_are_refused_before_a_disk_is_touched(tmp_path: Path) -> None:
    for wrong in ({"workload": "unicorn"}, {"trace_format": "unicorn"}, {"device": "fast"}, {"budget": "much"},
                  {"l3_cache_size": "1M"}):  # fmt: skip
        with pytest.raises(BadOption):
            tune.fleet(tmp_path / "nowhere", **wrong)  # type: ignore[arg-type]


def test_a_storage_that_cannot_be_measured_breaks_its_own_disks_only(tmp_path: Path) -> None:
    (tmp_path / "torn.qcow2").write_bytes(b"QFI\xfb")
    steps: list[tuple[int, int]] = []
    found = tune.fleet(tmp_path, on_progress=lambda done, total: steps.append((done, total)))
    assert (found.disks, names(found.broken), found.division) == ((), ["torn.qcow2"], None)
    assert "to measure its storage" in found.broken[0].error
    assert steps[-1] == (2, 2)
    with pytest.raises(StorageError):
        tune.fleet(tmp_path / "nowhere")
