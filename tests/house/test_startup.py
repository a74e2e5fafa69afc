"""Start-up stays light: a short command pays only for what it uses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cowslice.ops.layout import write_populated_image

HEAVY = {"aiohttp", "asyncio", "concurrent", "cryptography", "fsspec", "matplotlib", "numpy", "rich", "s3fs"}

_RUN = """
import contextlib, io, json, sys
from cowslice.cli.main import run
with contextlib.redirect_stdout(io.StringIO()):
    status = run(sys.argv[1:])
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def _heavy_libraries_of(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, check=True)
    status, loaded = json.loads(done.stdout)
    assert status == 0, done.stderr
    return HEAVY & set(loaded)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("startup") / "disk.qcow2"
    write_populated_image(path, size=4 << 20)
    return str(path)


@pytest.mark.parametrize("output", ["human", "json"])
def test_info_loads_no_heavy_library(disk: str, output: str) -> None:
    assert _heavy_libraries_of("info", f"--output={output}", disk) == set()


def test_help_loads_no_heavy_library() -> None:
    assert _heavy_libraries_of("--help") == set()


def test_the_package_itself_loads_no_heavy_library() -> None:
    code = "import cowslice, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()
