"""A host with a few disks and the traces of their guests."""

from __future__ import annotations

import random
from pathlib import Path

from cowslice.ops.layout import write_populated_image
from cowslice.testing.traces import READ, Asked, fio_lines
from cowslice.units import GiB, MiB

SIZE = 8 * GiB  # 1 MiB of L2 tables at 64 KiB clusters


def made_host(folder: Path) -> Path:
    """Two starved disks, one of them ten times as busy, one that loops over four places, and a broken image."""
    dice = random.Random(1)
    anywhere = [dice.randrange(SIZE // 4096) * 4096 for _ in range(3000)]
    for name, places, microseconds in (("busy", anywhere, 1000), ("quiet", anywhere, 10_000),
                                       ("loop", [number % 4 * 32 * MiB for number in range(3000)], 1000)):
        write_populated_image(folder / f"{name}.qcow2", size=SIZE, layout="random")
        asked = [Asked(number * microseconds, READ, place, 4096) for number, place in enumerate(places)]
        (folder / f"{name}.log").write_text(fio_lines(asked, 3))
    (folder / "broken.qcow2").write_bytes(b"QFI\xfb" + b"\xff" * 600)
    return folder
