"""How a command ends: its status, one sentence for a fault, and silence for a reader who left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cowslice.cli import main, verbs
from cowslice.cli.output import printable, say_table
from cowslice.testing.commandline import cowslice


@pytest.mark.parametrize("arguments", [
    [], ["frobnicate"], ["info"], ["check", "--output=xml", "x"], ["map", "-s", "ten", "x"], ["compare", "a"],
    ["convert", "-m", "99", "a", "b"], ["convert", "a"],
])  # fmt: skip
def test_a_usage_error_is_64_and_nothing_on_standard_output(arguments: list[str]) -> None:
    said = cowslice(*arguments)
    assert (said.status, said.out) == (64, "")
    assert said.err


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_help_teaches_with_examples_and_statuses(verb: str) -> None:
    said = cowslice(verb, "--help")
    assert said.status == 0
    assert f"cowslice {verb} " in said.out.replace("Usage:", "", 1)


@pytest.mark.parametrize("verb", ["info", "map", "check", "convert", "compare"])
def test_a_missing_file_is_one_sentence(verb: str, tmp_path: Path) -> None:
    more = {"convert": [tmp_path / "target"], "compare": [tmp_path / "other"]}.get(verb, [])
    said = cowslice(verb, tmp_path / "none.qcow2", *more)
    assert said.status == (2 if verb == "compare" else 1)
    assert said.err.startswith("cowslice: ")
    assert "none.qcow2" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize("verb", ["info", "check", "map"])
def test_an_unknown_image_option_is_a_usage_error(verb: str) -> None:
    said = cowslice(verb, "--image-opts", "driver=qcow2,file.filename=x,no-such-option=1")
    assert said.status == 64
    assert "no-such-option" in said.err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "run_verb", interrupted)
    assert main.run(["info", "x"]) == 130


def test_a_fault_of_ours_is_70_and_asks_for_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> int:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(verbs, "run_verb", broken)
    said = cowslice("info", "x")
    assert said.status == 70
    assert "internal error: ZeroDivisionError: oh" in said.err


def test_a_full_disk_below_standard_output_is_told() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cowslice.cli.main", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"cannot write the result" in done.stderr


def test_the_version_is_told() -> None:
    assert cowslice("--version").out.startswith("cowslice ")


def test_text_from_outside_stays_on_its_line() -> None:
    assert printable("a\x1b[31m\nb\udc80") == "a\\x1b[31m\\nb\\udc80"


def test_a_table_is_as_wide_as_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    say_table(("name", "n"), [("long name", "1"), ("x", "100")], right="lr")
    assert capsys.readouterr().out == "name         n\nlong name    1\nx          100\n"
