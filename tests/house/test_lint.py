"""The linter and the type checker have nothing to say."""

from __future__ import annotations

import subprocess
import sys

from tests.house.source_tree import ROOT


def _said_by(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    assert not _said_by("ruff", "check", "--output-format=concise")


def test_strict_types_hold() -> None:
    assert not _said_by("mypy", "--no-error-summary")
