"""What stands outside the package agrees with it."""

from __future__ import annotations

import re
import subprocess

import pytest

from cowslice.testing import peers
from tests.house.source_tree import ROOT

SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "scripts").iterdir())]


def test_the_peers_that_are_installed_are_those_that_tests_know() -> None:
    written = (ROOT / "scripts" / "peers").read_text()
    assert dict(re.findall(r"\[([\w-]+)\]=([\w-]+)", written)) == peers.PACKAGES


@pytest.mark.parametrize("verb", ["demo", "test", "test-long", "lint", "bench", "clean"])
def test_make_knows_the_verb(verb: str) -> None:
    assert subprocess.run(["make", "-n", verb], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_sound_shell_and_can_be_run(script) -> None:
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
