"""`cowslice tune --fleet`: what it says, in which form, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowslice as library
from cowslice.testing.commandline import Said, cowslice
from tests.unit.tune.evidence import SEED
from tests.unit.tune.host import made_host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_host(tmp_path_factory.mktemp("host"))


def fleet(source: Path | str, *arguments: str | Path) -> Said:
    return cowslice("tune", "--fleet", source, "--device", SEED, *arguments)


def test_the_summary_says_who_is_starved_and_names_what_is_broken(host: Path) -> None:
    said = fleet(host, "--l2-cache-size=512k", "--l2-cache-entry-size=4k", "--budget=1M", "-p")
    assert said.status == 2
    told = " ".join(said.out.split())
    for words in ("4 disks", "2 starved, 1 wasteful, 0 about right; 1 could not be studied", "Starved:", "Wasteful:",
                  "1 MiB shared among 3 disks"):
        assert words in told, words
    assert "broken.qcow2': version is" in said.err
    assert "studying disks: 100.0%" in said.err


def test_a_list_of_sound_disks_ends_well_and_is_told_as_json(host: Path, tmp_path: Path) -> None:
    (tmp_path / "disks.csv").write_text(f"image,trace,l2-cache-size\n{host}/busy.qcow2,{host}/busy.log,256k\n"
                                        f"{host}/loop.qcow2,,\n")
    said = fleet(tmp_path / "disks.csv", "--workload=zipf:requests=5000", "--json")
    assert (said.status, said.err) == (0, "")
    busy, loop = said.json["disks"]
    assert (busy["today"]["cache-size"], loop["today"]["cache-size"]) == (256 << 10, 1 << 20)
    assert (busy["trace"], loop["trace"]) == (f"{host}/busy.log", "zipf:requests=5000")
    assert said.json["summary"]["starved"] == [busy["image"]]


def test_nothing_but_broken_disks_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "torn.qcow2").touch()
    said = fleet(tmp_path)
    assert said.status == 1
    assert "0 starved, 0 wasteful, 0 about right; 1 could not be studied." in said.out


@pytest.mark.parametrize("arguments, told", [
    (["--fleet", "x", "y.qcow2"], "IMAGE is about one disk"), (["--fleet", "x", "--trace", "t"], "--trace is about"),
    (["--fleet", "x", "--verify"], "--verify is about"), (["--fleet", "x", "--html", "p"], "--html is about"),
    (["--fleet", "x", "--png", "p"], "--png is about"), (["--fleet", "x", "--allow-any"], "--allow-any is about"),
    (["y.qcow2", "--scheduler", "tcp://h:1"], "--scheduler is for a --fleet"), ([], "Missing argument"),
    (["--fleet", "x", "--workload", "unicorn"], "expected one of"), (["--fleet", "x", "--depth", "0"], "--depth"),
])  # fmt: skip
def test_a_wrong_command_line_is_64_and_says_why(arguments: list[str], told: str) -> None:
    said = cowslice("tune", *arguments)
    assert (said.status, said.out) == (64, "")
    assert told in said.err


def test_a_wrong_line_of_a_list_is_64_and_named(tmp_path: Path) -> None:
    (tmp_path / "disks").write_text("a.qcow2\n\x1b[2J\n")
    said = fleet(tmp_path / "disks")
    assert (said.status, said.out) == (64, "")
    assert "line 2: '\\x1b[2J', expected printable text" in said.err


def test_without_dask_it_says_what_to_install(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    said = fleet(host, "--scheduler", "tcp://127.0.0.1:1")
    assert (said.status, said.out) == (64, "")
    assert "pip install 'cowslice[fleet]'" in said.err


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.fixture
def endless(host: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command at work on disks that it would study for hours."""
    (tmp_path / "disks").write_text("".join(f"{host}/{name}.qcow2\n" for name in ("busy", "quiet", "loop")))
    command = [sys.executable, "-m", "cowslice.cli.main", "tune", "--fleet", tmp_path / "disks", "--device", SEED]
    here = {**os.environ, "PYTHONPATH": str(Path(library.__file__).parents[1])}
    with subprocess.Popen([*command, "--workload", "uniform:requests=1000000000"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=here, text=True) as process:
        yield process


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that study, as soon as there is one."""
    while not (found := [pid for pid in children(process.pid) if b"spawn_main" in _command(pid)]):
        assert process.poll() is None
        time.sleep(0.01)
    return found


def test_ctrl_c_ends_it_with_130_and_leaves_no_process(endless: subprocess.Popen[str]) -> None:
    working = workers(endless)
    endless.send_signal(signal.SIGINT)
    out, err = endless.communicate(timeout=60)
    assert (endless.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not [pid for pid in working if Path(f"/proc/{pid}").exists()]


def test_processes_end_when_the_one_that_asked_is_killed(endless: subprocess.Popen[str]) -> None:
    working = workers(endless)
    endless.kill()
    deadline = time.monotonic() + 60
    while any(b"spawn_main" in _command(pid) for pid in working):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
