"""A fleet on a cluster of several processes: the same result as on this machine, also when a worker is killed."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowslice import tune
from cowslice.errors import BadOption, StorageError
from cowslice.testing.commandline import cowslice
from cowslice.tune.fleetcluster import ClusterCrew
from cowslice.tune.fleetsummary import fleet_json
from tests.unit.tune.evidence import SEED
from tests.unit.tune.host import made_host

WORKERS = 3
TIMES = 3  # each disk of the host in the list


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, processes=True, dashboard_address=":0",
                      worker_dashboard_address=":0", silence_logs=logging.CRITICAL) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of many disks, all named by URLs that fsspec opens."""
    host = made_host(tmp_path_factory.mktemp("host"))
    lines = []
    for number in range(TIMES):
        for name in ("busy", "quiet", "loop", "broken"):
            image = host / f"{name}{number}.qcow2"
            os.link(host / f"{name}.qcow2", image)
            lines.append(f"local://{image},local://{host / name}.log")
    (host / "disks.csv").write_text("\n".join(lines))
    return host / "disks.csv"


def test_a_killed_worker_does_not_change_the_result(cluster: Any, disks: Path) -> None:
    from distributed import Client

    with Client(cluster.scheduler_address, set_as_default=False) as client:
        pids = list(client.run(os.getpid).values())
    killed: list[tuple[int, int]] = []

    def kill_one(done: int, total: int) -> None:
        if done > total // 3 and not killed:
            os.kill(pids[0], signal.SIGKILL)
            killed.append((done, total))

    there = tune.fleet(disks, device=SEED, scheduler=cluster.scheduler_address, on_progress=kill_one)
    assert killed[0][0] < killed[0][1] * 2 // 3
    assert (len(pids), len(there.disks), len(there.broken)) == (WORKERS, 3 * TIMES, TIMES)
    assert there == tune.fleet(disks, device=SEED)


def test_the_command_line_says_the_same_of_a_cluster(cluster: Any, disks: Path) -> None:
    short = disks.with_name("short.csv")
    short.write_text("\n".join(disks.read_text().splitlines()[:3]))
    said = cowslice("tune", "--fleet", short, "--device", SEED, "--scheduler", cluster.scheduler_address, "--json")
    assert (said.status, said.err) == (0, "")
    assert said.json == fleet_json(tune.fleet(short, device=SEED))


def test_a_worker_measures_the_storage_where_the_images_are(cluster: Any, disks: Path) -> None:
    one = disks.with_name("one.csv")
    one.write_text(disks.read_text().splitlines()[0])
    (disk,) = tune.fleet(one, scheduler=cluster.scheduler_address).disks
    assert disk.told["storage"]["given"] is False
    assert disk.told["storage"]["cowslice"]["rate_4k"] > 0


def test_a_scheduler_that_is_not_there_is_a_fault_of_the_world_and_nonsense_one_of_the_caller() -> None:
    with pytest.raises(StorageError, match="cannot reach the scheduler at 'tcp:"):
        ClusterCrew("tcp://127.0.0.1:1", patience=0.5)
    with pytest.raises(BadOption, match="expected an address such as"):
        ClusterCrew("unicorn://x", patience=0.5)


def test_a_cluster_without_workers_is_not_waited_for_for_ever() -> None:
    from distributed import LocalCluster

    with (LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=logging.CRITICAL) as empty,
          pytest.raises(StorageError, match="has no worker")):
        ClusterCrew(empty.scheduler_address, patience=0.2)
