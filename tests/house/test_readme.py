"""The quick start in the README works as it is written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cowslice
from cowslice.ops.layout import write_populated_image
from cowslice.testing.traces import READ, Asked, fio_lines
from tests.house.source_tree import ROOT

README = (ROOT / "README.md").read_text()
_CODE = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
COMMANDS = [line for kind, code in _CODE.findall(README) if kind == "sh" for line in code.splitlines()]
# The table is measured tiny, and a server run and asked, elsewhere (test_bench_runs.py, interop/test_serve_cli.py).
SHOWN = [line for line in COMMANDS if line.startswith("cowslice ") and line.split()[1] not in ("bench", "serve")]
VERBS = [line.split("#")[0].split("|")[0].strip() for line in SHOWN]
PYTHON = [code for kind, code in _CODE.findall(README) if kind == "python"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_populated_image(tmp_path / "vm.qcow2", size=1 << 30)
    with (tmp_path / "vm.raw").open("wb") as file:
        file.truncate(1 << 30)
    asked = [Asked(number, READ, number % 100 << 20, 4096) for number in range(2000)]
    (tmp_path / "guest.log").write_text(fio_lines(asked, 3))
    return tmp_path


@pytest.mark.parametrize("command", VERBS)
def test_a_command_of_the_quick_start_succeeds(command: str, folder: Path) -> None:
    words = shlex.split(command)[1:]
    here = {**os.environ, "PYTHONPATH": str(Path(cowslice.__file__).parents[1])}  # a relative one means another folder
    command_line = [sys.executable, "-m", "cowslice.cli.main", *words]
    done = subprocess.run(command_line, cwd=folder, env=here, capture_output=True)
    assert (done.returncode, done.stderr.decode()) == (0, done.stderr.decode())
    assert done.stdout or words[0] == "convert"


@pytest.mark.parametrize("code", PYTHON)
def test_the_python_of_the_quick_start_runs(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {"buffer": bytearray(512), "offsets": [0, 8192], "out": bytearray(8192)})


def test_make_has_the_commands_that_the_readme_names() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test"} <= set(re.findall(r"^make ([\w-]+)", README, re.M)) <= set(targets)
