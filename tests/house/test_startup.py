"""Start-up stays light: a short command pays only for what it uses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cowslice
from cowslice.ops.layout import write_populated_image

HEAVY = {"aiohttp", "asyncio", "concurrent", "cryptography", "ctypes", "fsspec", "http", "matplotlib",
         "multiprocessing", "numpy", "rich", "s3fs", "ssl", "tempfile"}

# What each verb does with a plain image, and the heavy libraries that it may load for that.
PLAIN = {
    "amend -o lazy_refcounts=on {disk}": set(),
    "bitmap --add {disk} monday": set(),
    "check {disk}": set(),
    "commit {overlay}": set(),
    "compare {disk} {other}": set(),
    "convert {disk} {new}": {"ctypes"},
    "convert -O qcow2 {disk} {new}": {"ctypes"},
    "create -f qcow2 {new} 4M": set(),
    "dd if={disk} of={new}": set(),
    "info {disk}": set(),
    "info --output=json {disk}": set(),
    "map {disk}": set(),
    "measure {disk}": set(),
    "rebase -u -b {other} -F qcow2 {overlay}": set(),
    "resize {disk} 8M": set(),
    "snapshot -c one {disk}": set(),
    "snapshot -l {disk}": set(),
}
WRITES_ONLY = {"cowslice.image.writing", "cowslice.image.tracking", "cowslice.image.refcounts"}
READING = ("check {disk}", "compare {disk} {other}", "convert {disk} {new}", "info {disk}", "map {disk}",
           "snapshot -l {disk}")

_RUN = """
import contextlib, io, json, sys
from cowslice.cli.main import run
with contextlib.redirect_stdout(io.StringIO()):
    status = run(sys.argv[1:])
print(json.dumps([status, sorted(sys.modules)]))
"""


def _loaded_by(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, check=True)
    status, loaded = json.loads(done.stdout)
    assert status == 0, done.stderr
    return set(loaded)


def _heavy_libraries_of(*arguments: str) -> set[str]:
    return HEAVY & {name.partition(".")[0] for name in _loaded_by(*arguments)}


@pytest.fixture
def words(tmp_path: Path) -> Callable[[str], list[str]]:
    """The words of a command, with paths of images in them."""
    paths = {name: tmp_path / f"{name}.qcow2" for name in ("disk", "other", "overlay", "new")}
    for name in ("disk", "other"):
        write_populated_image(paths[name], size=4 << 20)
    cowslice.create(paths["overlay"], backing_file="other.qcow2", backing_format="qcow2")
    return lambda text: [word.format(**paths) for word in text.split()]


@pytest.mark.parametrize("text", PLAIN)
def test_a_verb_loads_only_what_it_needs(text: str, words: Callable[[str], list[str]]) -> None:
    assert _heavy_libraries_of(*words(text)) <= PLAIN[text]


@pytest.mark.parametrize("text", READING)
def test_who_only_reads_loads_nothing_that_writes(text: str, words: Callable[[str], list[str]]) -> None:
    assert not WRITES_ONLY & _loaded_by(*words(text))


def test_help_loads_no_heavy_library() -> None:
    assert _heavy_libraries_of("--help") == set()


def test_the_installed_command_loads_no_regular_expressions_before_it_knows_the_verb() -> None:
    command = Path(sys.executable).with_name("cowslice")
    assert not {"re", "inspect"} & set(command.read_text().replace(".", " ").split())


def test_the_package_itself_loads_no_heavy_library() -> None:
    code = "import cowslice, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()
