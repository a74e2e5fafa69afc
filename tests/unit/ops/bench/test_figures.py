"""Every published figure still runs, on a small disk."""

import subprocess
import sys
from pathlib import Path

from cowslice.testing.peers import needs

FIGURES = Path(__file__).parents[4] / "bench" / "figures.py"


@needs("qemu-img")
def test_every_figure_runs() -> None:
    ran = subprocess.run([sys.executable, FIGURES, "--tiny"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    names = (
        "resident map", "hit rate", "metadata read", "Python loop", "process memory", "check", "convert", "snapshot",
        "info", "curves", "random 4 KiB", "sequential 1 MiB", "check -r all", "LUKS",
    )  # fmt: skip
    assert all(any(line.startswith(name) for line in ran.stdout.splitlines()) for name in names)
