"""`cowslice tune`: what it says, in which form, and how it ends."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cowslice as library
from cowslice.cli.tuneout import bars
from cowslice.ops.layout import write_populated_image
from cowslice.testing.commandline import Said, cowslice
from cowslice.units import GiB, KiB, MiB
from tests.unit.tune.evidence import SEED

QUICK = ("--device", SEED)
UNIFORM = ("--workload", "uniform:requests=20000")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "vm.qcow2"
    write_populated_image(path, size=8 * GiB, layout="random")
    return path


def tune(*arguments: str | Path) -> Said:
    return cowslice("tune", *QUICK, *arguments)


def fio_log(path: Path, offsets: list[int]) -> Path:
    lines = ["fio version 3 iolog", "0 /dev/vda add", "0 /dev/vda open"]
    lines += [f"{number} /dev/vda read {offset} 4096" for number, offset in enumerate(offsets, 1)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_advice_says_the_setting_and_lines_to_paste(image: Path) -> None:
    said = tune(image, *UNIFORM, "--l2-cache-size", "512k")
    assert (said.status, said.err) == (0, "")
    for words in ("QEMU needs 1 MiB (64 KiB entries) for the whole map", "Today's 512 KiB", "misses by cache size",
                  f"-drive file={image},format=qcow2,if=virtio,l2-cache-size=1M,l2-cache-entry-size=64k",
                  "<max_size unit='bytes'>", "cowslice.open("):
        assert words in " ".join(said.out.split()), words


def test_without_a_trace_the_assumption_is_said(image: Path) -> None:
    said, told = tune(image), tune(image, "--json")
    assert "No trace was given, so this assumes" in " ".join(said.out.split())
    assert told.json["trace"] == "uniform"
    assert "No trace was given" in told.json["assumption"]


def test_a_trace_is_no_assumption(image: Path, tmp_path: Path) -> None:
    trace = fio_log(tmp_path / "guest.log", [number % 100 * 32 * MiB for number in range(3000)])
    told = tune(image, "--trace", trace, "--output=json").json
    assert (told["assumption"], told["trace"]) == (None, str(trace))
    assert told["requests"]["count"] == 3000
    assert told["advised"]["cache-size"] < 1 * MiB


def test_malformed_lines_are_refused_or_counted(image: Path, tmp_path: Path) -> None:
    trace = fio_log(tmp_path / "guest.log", [0, MiB, 2 * MiB])
    trace.write_text(trace.read_text() + "9 /dev/vda read x 4096\n")
    refused = tune(image, "--trace", trace)
    assert (refused.status, refused.out) == (1, "")
    assert "line 7" in refused.err
    passed = tune(image, "--trace", trace, "--skip-bad", "--json")
    assert (passed.status, passed.json["trace-lines-skipped"]) == (0, 1)
    assert "1 malformed line" in passed.err


def test_todays_setting_is_taken_from_options_and_from_image_opts(image: Path) -> None:
    given = tune(image, *UNIFORM, "--l2-cache-size=256k", "--l2-cache-entry-size=16k", "--json").json
    named = tune("--image-opts", f"driver=qcow2,file.filename={image},l2-cache-size=256k,l2-cache-entry-size=16k",
                 *UNIFORM, "--json").json
    assert given["today"] == named["today"]
    assert (given["today"]["cache-size"], given["today"]["entry-size"]) == (256 * KiB, 16 * KiB)


@pytest.mark.parametrize("arguments, told", [
    (["--trace", "t", "--workload", "zipf"], "exclude each other"), (["--workload", "unicorn"], "expected one of"),
    (["--device", "read4k=1"], "--device has no"), (["--budget", "1M"], "there is one"),
    (["--disk", "3"], "need a --trace"), (["--depth", "0"], "--depth"), (["--l2-cache-size", "much"], "much"),
    (["--trace", "a", "--trace", "b"], "2 times for 1 images"),
])  # fmt: skip
def test_a_wrong_command_line_is_64_and_says_why(image: Path, arguments: list[str], told: str) -> None:
    said = tune(image, *arguments)
    assert (said.status, said.out) == (64, "")
    assert told in said.err


def test_a_raw_disk_has_no_map_to_cache(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(MiB))
    said = tune(tmp_path / "raw")
    assert said.status == 64
    assert "is a raw disk" in said.err


def test_a_trace_of_a_larger_disk_is_refused(image: Path, tmp_path: Path) -> None:
    said = tune(image, "--trace", fio_log(tmp_path / "log", [8 * GiB]))
    assert (said.status, said.out) == (1, "")
    assert "inside the disk" in said.err


def test_a_budget_goes_where_it_helps_and_is_not_exceeded(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    write_populated_image(other, size=8 * GiB)
    loop = fio_log(tmp_path / "loop", [number % 4 * 32 * MiB for number in range(4000)])
    wide = fio_log(tmp_path / "wide", [number * 37 % 256 * 32 * MiB for number in range(4000)])
    told = tune(image, other, "--trace", loop, "--trace", wide, "--budget=1M", "--json").json
    narrow, needy = (part["qemu"]["cache-size"] for part in told["budget"]["disks"])
    assert narrow + needy <= MiB
    assert narrow < 16 * KiB
    assert needy >= 128 * KiB  # 256 places, in the smallest entries there are
    shown = tune(image, other, "--trace", loop, "--trace", wide, "--budget=1M")
    assert "1 MiB shared among 2 disks" in shown.out


def test_a_budget_that_nobody_can_live_on_is_refused(image: Path) -> None:
    said = tune(image, image, *UNIFORM, "--budget=512")
    assert (said.status, said.out) == (64, "")
    assert "expected at least" in said.err


def test_progress_goes_to_standard_error_alone(image: Path) -> None:
    said = tune(image, *UNIFORM, "-p", "--json")
    assert said.json["verdict"]
    assert "reading the map" in said.err


def test_quiet_says_nothing(image: Path) -> None:
    assert tune(image, *UNIFORM, "-q") == Said(0, "", "")


def test_bars_become_digits_where_they_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = [0, 0.01, 0.5, 1]
    assert bars(ratios) == "·▁▅█"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert bars(ratios) == "0159"


def in_a_process(*arguments: str | Path, **more: str) -> subprocess.Popen[str]:
    here = {**os.environ, "PYTHONPATH": str(Path(library.__file__).parents[1]), **more}
    return subprocess.Popen([sys.executable, "-m", "cowslice.cli.main", "tune", *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=here)


def test_a_terminal_without_unicode_gets_the_same_advice(image: Path) -> None:
    with in_a_process(*QUICK, image, *UNIFORM, PYTHONIOENCODING="ascii") as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert " us" in out


def test_ctrl_c_ends_it_with_130_and_without_a_word(image: Path) -> None:
    with in_a_process(image, "--workload", "uniform:requests=1000000000", "-p", PATH="") as process:
        assert process.stderr
        assert process.stderr.readline() == "measuring the storage: 100.0%\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
