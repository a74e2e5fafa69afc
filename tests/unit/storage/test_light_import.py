"""Whoever only opens a local file does not pay for remote stores or for writing."""

from __future__ import annotations

import subprocess
import sys

HEAVY = [
    *("fsspec", "s3fs", "aiohttp", "asyncio", "numpy", "ctypes"),
    *("ssl", "socket", "cowslice.nbd", "hypothesis", "pytest"),
]


def test_importing_storages_imports_nothing_heavy() -> None:
    asked = f"import sys, cowslice.storage; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_reading_a_local_file_imports_nothing_heavy() -> None:
    asked = (
        "import sys; from cowslice.storage import locate\n"
        "with locate(sys.executable) as storage: storage.read(0, 4096), list(storage.extents(0, 4096))\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
